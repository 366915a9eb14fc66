//! The command line of the built binary: what it prints where, and its exit codes.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use support::{Process, UNSHAPED, get, post, provider_at, sse};

/// What a start warns of: 120 a minute and a bucket of 10.
const WARNING: &str = "bursty: capacity 10 on top of rpm 120 lets 129 requests through in the first 60 s; \
                       add strict_window: true if your provider counts a rolling minute";

fn providers() -> String {
    provider_at("the-provider", "http://127.0.0.1:1/v1", &["m"], UNSHAPED, "api_key: sk-secret")
}

/// Exit code, standard output, standard error.
fn outcome(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A configuration with a provider of each mode.
fn every_mode() -> String {
    let at = |name, models: &[&str], limit| {
        provider_at(name, "http://127.0.0.1:1/v1", models, limit, "")
    };
    let text = [
        at(
            "even",
            &["m", "{id: fast, upstream: meta/m}"],
            "{mode: spaced, rpm: 40, max_wait_seconds: 90}",
        ),
        at("bursty", &["m", "n"], "{mode: burst, rpm: 120, capacity: 10}"),
        at(
            "counted",
            &["{id: o, rate_limit: {rpd: 5}}"],
            "{mode: window, rpm: 30, rpd: 900, day_resets_at: rolling}",
        ),
    ]
    .concat();
    Process::config("", &text).to_str().expect("the build directory is UTF-8").to_owned()
}

/// The program, from the first line that it prints on. Dropping it kills it.
struct Serving {
    child: Child,
    stdout: BufReader<ChildStdout>,
    printed: String,
}

impl Serving {
    fn start(arguments: &[&str]) -> Serving {
        let mut program = Command::new(env!("CARGO_BIN_EXE_limitrate"));
        program.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = program.spawn().expect("the binary runs");
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut serving = Serving { child, stdout, printed: String::new() };
        serving.stdout.read_line(&mut serving.printed).expect("stdout is UTF-8");
        serving
    }

    /// The address in the first line.
    fn addr(&self) -> SocketAddr {
        let addr = self.printed.split("http://").nth(1).and_then(|rest| rest.split("/v1").next());
        addr.and_then(|addr| addr.parse().ok())
            .unwrap_or_else(|| panic!("no address in {:?}", self.printed))
    }

    /// Ends it in order: exit code, standard output, standard error.
    fn end(mut self) -> (Option<i32>, String, String) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("signal the program");
        let (mut printed, mut logged) = (std::mem::take(&mut self.printed), String::new());
        self.stdout.read_to_string(&mut printed).expect("stdout is UTF-8");
        let mut stderr = self.child.stderr.take().expect("stderr is piped");
        stderr.read_to_string(&mut logged).expect("stderr is UTF-8");
        (self.child.wait().expect("wait for the program").code(), printed, logged)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Fails where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn version_and_help_go_to_standard_output() {
    for option in ["--version", "-V"] {
        let version = format!("limitrate {}\n", env!("CARGO_PKG_VERSION"));
        assert_eq!(outcome(&Process::run(&[option])), (Some(0), version, String::new()));
    }
    for arguments in
        [&["--help"][..], &["check", "--help"], &["demo", "--help"], &["health", "--help"]]
    {
        let (code, out, err) = outcome(&Process::run(arguments));
        assert_eq!((code, err.as_str()), (Some(0), ""), "{arguments:?}");
        assert!(out.contains("Usage: limitrate"), "{out}");
    }
    let (_, out, _) = outcome(&Process::run(&["--help"]));
    for word in ["--config", "--version", "check", "demo", "health"] {
        assert!(out.contains(word), "no {word} in {out}");
    }
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    for arguments in [&["--nonsense"][..], &["nonsense"], &["--config"], &["demo", "--port", "x"]] {
        let (code, out, err) = outcome(&Process::run(arguments));
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(!err.is_empty());
    }
}

#[test]
fn a_missing_configuration_exits_with_2_and_says_what_to_do() {
    let folder = Process::file("unrelated", "").parent().expect("a file is in a folder").to_owned();
    for arguments in [&[][..], &["check"]] {
        let (code, out, err) = outcome(&Process::run_in(&folder, arguments));
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        for word in ["config.yaml", "config.example.yaml", "--config", "demo"] {
            assert!(err.contains(word), "no {word} in {err}");
        }
    }
    for arguments in [&["--config", "nowhere.yaml"][..], &["check", "--config", "nowhere.yaml"]] {
        let (code, out, err) = outcome(&Process::run_in(&folder, arguments));
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(err.contains("nowhere.yaml"), "{err}");
    }
}

#[test]
fn a_faulty_configuration_exits_with_2_and_names_file_line_and_key() {
    let file = Process::config("prot: 1\n", &providers());
    let file = file.to_str().expect("the build directory is UTF-8");
    for arguments in [&["--config", file][..], &["check", "--config", file], &["-c", file, "check"]]
    {
        let (code, out, err) = outcome(&Process::run(arguments));
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        for word in ["config.yaml", "4", "prot", "port"] {
            assert!(err.contains(word), "no {word} in {err}");
        }
    }
}

#[test]
fn check_explains_a_good_configuration_and_shows_no_key() {
    let file = Process::config("", &providers());
    let folder = file.parent().expect("a file is in a folder");
    let named = ["check", "--config", file.to_str().expect("the build directory is UTF-8")];
    for arguments in [&named[..], &["check"]] {
        let (code, out, err) = outcome(&Process::run_in(folder, arguments));
        assert_eq!((code, err.as_str()), (Some(0), ""), "{arguments:?}");
        for word in ["the-provider", "http://127.0.0.1:1/v1", "burst", "worst case"] {
            assert!(out.contains(word), "no {word} in {out}");
        }
        assert!(!out.contains("sk-secret"), "{out}");
    }
}

#[test]
fn check_tells_mode_models_queue_and_limits_of_each_provider_and_warns() {
    let (code, out, err) = outcome(&Process::run(&["check", "--config", &every_mode()]));
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let (first, rest) = out.split_once('\n').expect("more than one line");
    assert!(first.ends_with("config.yaml: fine, 3 providers"), "{first}");
    let wanted = format!(
        "
even: spaced, one send every 1.5 s (40 a minute)
  base_url   http://127.0.0.1:1/v1
  models     m, fast (as meta/m)
  queue      up to 1000 requests; one that would wait over 90 s gets 503 with Retry-After
  worst case 40 sends in any 60 s

bursty: burst, up to 10 at once, then one send every 0.5 s (120 a minute)
  base_url   http://127.0.0.1:1/v1
  models     m, n
  queue      up to 1000 requests, each waits for as long as it takes
  worst case 129 sends in any 60 s

counted: window, up to 30 at once (30 a minute)
  base_url   http://127.0.0.1:1/v1
  models     o
  queue      up to 1000 requests, each waits for as long as it takes
  limit      at most 30 sends in any 60.5 s
  limit      at most 900 sends in any 24 h
  worst case 30 sends in any 60 s
  model      o: at most 5 sends a day, which begins at 00:00 UTC

warning: {WARNING}
"
    );
    assert_eq!(rest, wanted);
}

#[test]
fn check_tells_what_callers_and_keys_share_and_shows_no_token() {
    let server = "routing: earliest\nfallback: true\nheartbeat_after_seconds: 5\n\
                  clients: [{name: chat, token: t-secret, priority: high, max_queue: 20}]\n";
    let keys = "api_keys: [sk-secret-1, sk-secret-2, sk-secret-3]";
    let providers =
        provider_at("shared", "http://127.0.0.1:1/v1", &["m"], "{mode: window, rpm: 30}", keys);
    let file = Process::config(server, &providers);
    let (code, out, err) =
        outcome(&Process::run(&["check", "--config", file.to_str().expect("the path is UTF-8")]));
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let (_, rest) = out.split_once('\n').expect("more than one line");
    let wanted = "
server
  routing    earliest, to the provider that can send a request soonest
  fallback   to the next provider of the same model when one can't do it
  client     chat, goes first, at most 20 waiting at a provider
  heartbeats after 5 s in streams

shared: window, up to 30 at once (30 a minute)
  base_url   http://127.0.0.1:1/v1
  models     m
  api_keys   3, each with these limits
  queue      up to 1000 requests, each waits for as long as it takes
  limit      at most 30 sends in any 60.5 s
  worst case 90 sends in any 60 s

warning: clients are told by their tokens, but everybody else who can reach the port is served too; \
add server.auth_token to keep them out
";
    assert_eq!(rest, wanted);
}

#[test]
fn serving_prints_a_line_for_each_provider_and_logs_the_warning() {
    let serving = Serving::start(&["--config", &every_mode()]);
    let addr = serving.addr();
    let (code, out, err) = serving.end();
    assert_eq!(code, Some(0), "{err}");
    let wanted = format!(
        "limitrate {} at http://{addr}/v1
  even: spaced, one send every 1.5 s (40 a minute), at most 40 in any 60 s, models: m, fast (as meta/m)
  bursty: burst, up to 10 at once, then one send every 0.5 s (120 a minute), at most 129 in any 60 s, models: m, n
  counted: window, up to 30 at once (30 a minute), at most 30 in any 60 s, models: o
",
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(out, wanted);
    let warned: Vec<&str> = err.lines().filter(|line| line.contains("on top of rpm")).collect();
    assert!(matches!(warned[..], [line] if line.ends_with(&format!("{WARNING}\""))), "{err}");
}

#[test]
fn the_demo_serves_what_it_prints_and_says_back_what_it_is_told() {
    let serving = Serving::start(&["demo", "--port", "0"]);
    let addr = serving.addr();
    let list = get(addr, "/v1/models").json();
    let models: Vec<_> =
        list["data"].as_array().expect("a list").iter().map(|model| model["id"].as_str()).collect();
    for model in ["demo", "demo-fast", "demo-embedding"] {
        assert!(models.contains(&Some(model)), "no {model} in {models:?}");
    }

    let chat = "/v1/chat/completions";
    let plain = post(
        addr,
        chat,
        r#"{"model":"demo","messages":[{"role":"user","content":"Hello there!"}]}"#,
    );
    assert_eq!(plain.status, 200, "{plain:?}");
    let said = plain.json()["choices"][0]["message"]["content"].as_str().map(str::to_owned);
    assert!(said.is_some_and(|said| said.contains("Hello there!")), "{plain:?}");

    let streamed = post(
        addr,
        chat,
        r#"{"model":"demo-fast","stream":true,"messages":[{"content":"One two"}]}"#,
    );
    assert_eq!(streamed.status, 200, "{streamed:?}");
    assert_eq!(streamed.header("content-type").as_deref(), Some("text/event-stream"));
    assert!(streamed.body.ends_with(&sse::done()), "{streamed:?}");
    let words: String = streamed.text().split("\n\n").filter_map(word).collect();
    assert!(words.contains("One two"), "{words}");

    // What an agent sends: instructions around what the user said, and too much to be said back.
    let said = format!("Begin {}end", "again ".repeat(100));
    let agent = serde_json::json!({"model": "demo-fast", "stream": true, "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "rules"}, {"type": "input_text", "text": said}]},
        {"role": "developer", "content": "more rules"}]});
    let streamed = post(addr, "/v1/responses", agent.to_string());
    let events: Vec<serde_json::Value> =
        streamed.text().split("\n\n").filter_map(named_event).collect();
    let deltas: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    let response = &events.last().expect("the stream has an end")["response"];
    assert_eq!(response["output"][0]["content"][0]["text"], deltas.as_str());
    assert!(
        deltas.contains("Begin again") && deltas.contains("again ...") && !deltas.contains("end"),
        "{deltas}"
    );
    assert!(response["usage"]["input_tokens"] == 102 && !deltas.contains("rules"), "{response}");
    assert!(
        events.iter().zip(0..).all(|(event, number)| event["sequence_number"] == number),
        "{events:?}"
    );

    let (code, out, err) = serving.end();
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(out.matches("curl ").count(), 4, "{out}");
    for path in ["/v1/chat/completions", "/admin/stats", "/v1/messages"] {
        assert!(out.contains(&format!("http://{addr}{path}")), "no {path} at {addr} in {out}");
    }
}

/// The data of an event whose name is the one its data tells.
fn named_event(event: &str) -> Option<serde_json::Value> {
    let (name, data) = event.strip_prefix("event: ")?.split_once("\ndata: ")?;
    let data: serde_json::Value = serde_json::from_str(data).ok()?;
    (data["type"] == name).then_some(data)
}

/// The text that one event of a chat brings.
fn word(event: &str) -> Option<String> {
    let chunk: serde_json::Value = serde_json::from_str(event.strip_prefix("data: ")?).ok()?;
    chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned)
}

#[test]
fn a_port_that_is_taken_exits_with_1_and_says_whose_turn_it_is() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
    let port = taken.local_addr().expect("the address of a bound listener").port();
    let text = format!("server: {{host: 127.0.0.1, port: {port}}}\nproviders:\n{}", providers());
    let file = Process::file("config.yaml", &text);
    let (code, out, err) =
        outcome(&Process::run(&["-c", file.to_str().expect("the build directory is UTF-8")]));
    assert_eq!((code, out.as_str()), (Some(1), ""));
    for word in [&port.to_string(), "127.0.0.1", "taken", "server.port"] {
        assert!(err.contains(word), "no {word} in {err}");
    }
    fs::remove_file(file).expect("nobody holds the file");
}
