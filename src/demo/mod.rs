//! `limitrate demo`: a small provider on a loopback port that speaks OpenAI's API and Anthropic's, and the configuration
//! that puts it behind the real gateway as two providers.
//!
//! It answers what a provider would (chat, completions, responses, embeddings, models, messages; plain and streamed, word by
//! word), so that queues, streams and statistics can be seen without a key. It is no model: it says back what it was told.
//! What the answers look like is known by `openai`, `responses` and `anthropic`, one room for each API.

mod anthropic;
mod openai;
mod responses;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use async_io::Timer;
use async_net::{TcpListener, TcpStream};
use futures_lite::AsyncWriteExt;
use serde_json::{Value, json};
use smol::LocalExecutor;

use crate::config::{self, Config};
use crate::http1::{self, BodyDecoder, BodyLength, FINAL_CHUNK, Reader};

/// Between two events of a stream.
const EVENT_PAUSE: Duration = Duration::from_millis(60);

/// How long a plain answer "thinks".
const THINKING: Duration = Duration::from_millis(300);

/// How much of a prompt is said back: agents send pages of instructions with each.
const ECHOED_WORDS: usize = 40;

const MAX_HEAD_BYTES: usize = 64 * 1024;

/// Starts the provider on a thread of its own, for as long as the process lives.
pub fn start() -> io::Result<SocketAddr> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let listener = TcpListener::try_from(listener)?;
    std::thread::Builder::new().name("demo-provider".into()).spawn(move || {
        let executor = Rc::new(LocalExecutor::new());
        smol::block_on(executor.run(accept(executor.clone(), listener)));
    })?;
    Ok(address)
}

/// Two providers, one of each mode, on the built-in one.
pub fn config(port: u16, upstream: SocketAddr) -> Config {
    let text = format!(
        "
server: {{host: 127.0.0.1, port: {port}}}
providers:
  - name: demo-spaced
    base_url: http://{upstream}/v1
    models: [demo, demo-embedding]
    rate_limit: {{mode: spaced, rpm: 40}}
  - name: demo-burst
    base_url: http://{upstream}/v1
    models: [demo-fast, demo]
    rate_limit: {{mode: burst, rpm: 120, capacity: 10, max_wait_seconds: 30}}
"
    );
    config::parse(&text, Path::new("the demo"), &|_| None)
        .expect("the demo's own configuration is valid")
}

/// What the start of the demo prints.
pub fn instructions(gateway: SocketAddr) -> String {
    let chat = |model: &str, text: &str, flags: &str| {
        format!(
            "curl {flags}http://{gateway}/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
             -d '{{\"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \"{text}\"}}]}}'"
        )
    };
    let one = chat("demo", "Hello!", "");
    let three =
        chat("demo", "Hello number $i!", "-s -w '\\n' ").replace("'{", "\"{").replace("}'", "}\"");
    let three = escape_inner_quotes(&three);
    format!(
        "limitrate {} demo at http://{gateway}/v1 (any API key will do; Ctrl-C ends it)\n\n\
         1. One chat:\n  {one}\n\n\
         2. Three at once; they leave 1.5 s apart, and nobody sees a 429:\n  for i in 1 2 3; do {three} & done; wait\n\n\
         3. The queues, meanwhile from another terminal:\n  curl http://{gateway}/admin/stats\n\n\
         4. Anthropic's API, streamed:\n  curl -N http://{gateway}/v1/messages -H 'Content-Type: application/json' \\\n    \
             -d '{{\"model\": \"demo-fast\", \"max_tokens\": 99, \"stream\": true, \"messages\": \
             [{{\"role\": \"user\", \"content\": \"Hello!\"}}]}}'\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// Inside a double-quoted shell word the JSON's own quotes need a backslash; `$i` must stay open to the shell.
fn escape_inner_quotes(command: &str) -> String {
    let (Some(start), Some(end)) = (command.find("\"{"), command.rfind("}\"")) else {
        return command.into();
    };
    let inner = command[start + 1..=end].replace('"', "\\\"");
    format!("{}\"{inner}\"", &command[..start])
}

async fn accept(executor: Rc<LocalExecutor<'static>>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => executor.spawn(connection(stream)).detach(),
            Err(_) => drop(Timer::after(Duration::from_millis(100)).await),
        }
    }
}

/// Answers until the gateway closes; a broken connection is the gateway's business.
async fn connection(stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut reader = Reader::new(stream.clone());
    while let Ok(Some(head)) = http1::read_request_head(&mut reader, MAX_HEAD_BYTES).await {
        let Some(body) = read_body(&mut reader, head.framing).await else { return };
        let path = head.target.split('?').next().unwrap_or_default();
        if answer(stream.clone(), path, &body).await.is_err() {
            return;
        }
    }
}

async fn read_body(reader: &mut Reader<TcpStream>, framing: http1::Framing) -> Option<Vec<u8>> {
    let (mut decoder, mut body) = (BodyDecoder::new(framing), Vec::new());
    while !decoder.drain(reader, &mut body).ok()? {
        if !matches!(reader.fill().await, Ok(1..)) {
            return None;
        }
    }
    Some(body)
}

async fn answer(mut stream: TcpStream, path: &str, body: &[u8]) -> io::Result<()> {
    let request: Value = serde_json::from_slice(body).unwrap_or_default();
    let reply = Reply::to(&request);
    let (whole, events) = match path {
        "/v1/chat/completions" => {
            (openai::completion(true, &reply), openai::events(true, &reply, &request))
        }
        "/v1/completions" => {
            (openai::completion(false, &reply), openai::events(false, &reply, &request))
        }
        "/v1/responses" => (responses::response(&reply), responses::events(&reply)),
        "/v1/messages" => (anthropic::message(&reply), anthropic::events(&reply)),
        "/v1/messages/count_tokens" => {
            return plain(&mut stream, 200, &anthropic::count(&reply)).await;
        }
        "/v1/embeddings" => {
            return plain(&mut stream, 200, &openai::embeddings(&request, &reply)).await;
        }
        "/v1/models" => {
            return plain(&mut stream, 200, &json!({"object": "list", "data": []})).await;
        }
        _ => {
            let error = json!({"message": format!("the demo provider has no {path}"), "type": "invalid_request_error",
                "param": null, "code": "unknown_path"});
            return plain(&mut stream, 404, &json!({ "error": error })).await;
        }
    };
    if request["stream"] == true {
        return streamed(&mut stream, events).await;
    }
    Timer::after(THINKING).await;
    plain(&mut stream, 200, &whole).await
}

/// What is answered, whatever the API.
struct Reply {
    model: String,
    text: String,
    /// A word is a token here.
    prompt_tokens: usize,
    reply_tokens: usize,
}

impl Reply {
    fn to(request: &Value) -> Reply {
        let prompt = prompt(request);
        let said = opening(&prompt);
        let text = format!(
            "You said: {said}. This is limitrate's built-in demo provider; it only says things back."
        );
        Reply {
            model: request["model"].as_str().unwrap_or("demo").to_owned(),
            prompt_tokens: prompt.split_whitespace().count(),
            reply_tokens: text.split_whitespace().count(),
            text,
        }
    }

    /// Each with the blank behind it.
    fn words(&self) -> impl Iterator<Item = &str> {
        self.text.split_inclusive(' ')
    }
}

/// What the user said last, or the prompt of a legacy completion. Agents put instructions of their own before and behind it.
fn prompt(request: &Value) -> String {
    let is_said = |message: &&Value| message["role"] != "system" && message["role"] != "developer";
    let last =
        |name: &str| request[name].as_array().and_then(|messages| messages.iter().rfind(is_said));
    let content = match last("messages").or(last("input")) {
        Some(message) => &message["content"],
        None if request["input"].is_string() => &request["input"],
        None => &request["prompt"],
    };
    match content {
        Value::String(text) => text.clone(),
        Value::Null => "nothing".into(),
        Value::Array(parts) => {
            parts.iter().rev().find_map(|part| part["text"].as_str()).unwrap_or_default().into()
        }
        other => other.to_string(),
    }
}

/// The first words, as they stand.
fn opening(prompt: &str) -> String {
    let mut words = prompt.split_inclusive(char::is_whitespace);
    let mut said: String = words.by_ref().take(ECHOED_WORDS).collect();
    if words.next().is_some() {
        said.truncate(said.trim_end().len());
        said.push_str(" ...");
    }
    said
}

async fn plain(stream: &mut TcpStream, status: u16, body: &Value) -> io::Result<()> {
    let body = body.to_string();
    let mut out = Vec::new();
    let fields = [("Content-Type", b"application/json".as_slice())];
    http1::write_response_head(
        &mut out,
        status,
        b"",
        fields.into_iter(),
        BodyLength::Length(body.len() as u64),
        true,
    );
    out.extend_from_slice(body.as_bytes());
    stream.write_all(&out).await
}

/// A stream of these events, whole ones each, with a pause after each.
async fn streamed(stream: &mut TcpStream, events: Vec<String>) -> io::Result<()> {
    let mut out = Vec::new();
    let fields = [("Content-Type", b"text/event-stream".as_slice())];
    http1::write_response_head(&mut out, 200, b"", fields.into_iter(), BodyLength::Chunked, true);
    for event in events {
        http1::write_chunk(&mut out, event.as_bytes());
        stream.write_all(&out).await?;
        out.clear();
        Timer::after(EVENT_PAUSE).await;
    }
    stream.write_all(FINAL_CHUNK).await
}
