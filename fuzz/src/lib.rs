//! What is fuzzed: the pure rooms that read what strangers wrote, one function a target.
//!
//! `fuzz/run` feeds them with libFuzzer's inventions; `tests/fuzz_replay.rs` compiles this file as well and feeds them
//! with the committed seeds and regressions. So nothing here knows the fuzzer.
//!
//! Where a target is about cuts, the lengths of the pieces are the bytes of the input itself, from its end: a seed stays
//! readable, and the fuzzer decides.

use std::collections::HashSet;
use std::future::Future;
use std::io::{self, Read};
use std::path::Path;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use futures_lite::io::AsyncRead;
use limitrate::aside::Buffer;
use limitrate::config::{self, Config};
use limitrate::error::Error;
use limitrate::http1::{
    BodyDecoder, BodyFault, BodyLength, FINAL_CHUNK, Framing, HEADER_LIMIT, Headers, ReadError,
    Reader, RequestHead, ResponseHead, parse_request_head, parse_response_head, read_request_head,
    read_response_head, write_chunk, write_request_head, write_response_head,
};
use limitrate::openai::{EventScanner, RequestBody, Usage, peek};
use limitrate::shaping::books::{Ask, Books, BooksMemory};
use limitrate::shaping::limiter::{Cadence, Day, Limits, Now, Reset};
use limitrate::state::State;
use limitrate::upstream::verdict::{MAX_WAIT, Verdict, judge, may_be_refusal};
use serde_json::Value;

/// Takes any bytes and returns, or panics where a promise is broken.
pub type Target = fn(&[u8]);

/// Every target under the name of its binary and of the folders with its inputs.
pub const TARGETS: [(&str, Target); 8] = [
    ("body", body),
    ("config", config),
    ("refusal", refusal),
    ("request_head", request_head),
    ("response_head", response_head),
    ("splice", splice),
    ("sse", sse),
    ("state", state),
];

/// The default of `server.max_head_bytes`.
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// A body has the same payload, end and fault however it is cut, and chunks that we write are read back.
pub fn body(input: &[u8]) {
    for framing in [Framing::Chunked, Framing::Length(16), Framing::UntilClose] {
        let whole = decode(framing, [input]);
        assert_eq!(decode(framing, pieces(input)), whole, "{framing:?} in pieces");
        assert_eq!(decode(framing, input.chunks(1)), whole, "{framing:?} byte by byte");
    }

    let mut wire = Vec::new();
    pieces(input).for_each(|piece| write_chunk(&mut wire, piece));
    wire.extend_from_slice(FINAL_CHUNK);
    assert_eq!(
        decode(Framing::Chunked, [&wire[..]]),
        (input.to_vec(), Ok(Vec::new())),
        "written and read back"
    );
}

/// Payload, and what follows the body or its fault.
fn decode<'a>(
    framing: Framing,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<u8>, Result<Vec<u8>, BodyFault>) {
    let mut decoder = BodyDecoder::new(framing);
    let (mut payload, mut unread) = (Vec::new(), Vec::new());
    for piece in pieces {
        unread.extend_from_slice(piece);
        while !decoder.is_done() && !unread.is_empty() {
            match decoder.decode(&unread) {
                Err(fault) => return (payload, Err(fault)),
                Ok(decoded) => {
                    assert!(
                        decoded.consumed > 0 && decoded.data.end <= decoded.consumed,
                        "{decoded:?}"
                    );
                    payload.extend_from_slice(&unread[decoded.data]);
                    unread.drain(..decoded.consumed);
                }
            }
        }
        assert_eq!(decoder.payload_so_far(), payload.len() as u64);
    }
    (payload, decoder.at_eof().map(|()| unread))
}

/// A configuration is taken or refused with words, what is taken is sound, and no fault shows a variable's value.
pub fn config(input: &[u8]) {
    const SECRET: &str = "sk-3b9f-secret";
    let Ok(text) = std::str::from_utf8(input) else { return };
    let env = |name: &str| (name == "KEY").then(|| SECRET.to_owned());
    match config::parse(text, Path::new("no-such-folder/config.yaml"), &env) {
        Ok(config) => assert_sound(&config),
        Err(faults) => {
            assert!(
                faults.in_brief().all(|fault| fault.starts_with("no-such-folder/config.yaml:")),
                "{faults}"
            );
            assert!(!faults.to_string().contains(SECRET), "{faults}");
        }
    }
}

fn assert_sound(config: &Config) {
    let names: HashSet<&str> =
        config.providers.iter().map(|provider| provider.name.as_str()).collect();
    assert!(!names.is_empty() && names.len() == config.providers.len(), "{names:?}");
    for provider in &config.providers {
        let pace = provider.rate_limit.pace;
        assert!(!provider.name.is_empty() && !provider.name.contains('/'), "{:?}", provider.name);
        assert!(!provider.models.is_empty() && provider.max_queue > 0);
        assert!(!pace.interval.is_zero() && pace.capacity > 0, "{pace:?}");
        assert!(
            provider.base_url.path.is_empty() || provider.base_url.path.starts_with('/'),
            "{}",
            provider.base_url
        );
        for (name, value) in &provider.headers {
            assert!(
                !name.contains(['\r', '\n', '\0', ':'])
                    && !value.reveal().contains(['\r', '\n', '\0'])
            );
        }
    }
}

/// A provider's answer, head and body, is judged whatever the clock says, and a pause is bounded.
pub fn refusal(input: &[u8]) {
    let Ok(Some((head, length))) = parse_response_head(input, false) else { return };
    let day = Duration::from_secs(24 * 3600);
    for now in [
        SystemTime::UNIX_EPOCH - day,
        SystemTime::UNIX_EPOCH + 20_000 * day,
        SystemTime::UNIX_EPOCH + u32::MAX * day,
    ] {
        let verdict = judge(head.status, &head.headers, &input[length..], now);
        match verdict {
            Verdict::CoolDown { wait, .. } => {
                assert!(may_be_refusal(head.status), "{}", head.status);
                assert!(wait.is_none_or(|wait| wait <= MAX_WAIT), "{wait:?}");
            }
            Verdict::Exhausted => assert_eq!(head.status, 429),
            Verdict::Repeat => assert!(head.status >= 500, "{}", head.status),
            Verdict::PassOn => assert!(!may_be_refusal(head.status), "{}", head.status),
        }
    }
}

/// The heads of one connection are the same however they are cut, and async-h1 takes all that the guard lets through.
pub fn request_head(input: &[u8]) {
    let whole = read_requests([input]);
    assert_eq!(read_requests(pieces(input)), whole, "in pieces");
    assert_eq!(read_requests(input.chunks(1)), whole, "byte by byte");
    whole.0.iter().for_each(assert_forwardable);
    // The reader bounds a head, the parser does not.
    match parse_request_head(input) {
        Ok(head) => {
            assert_faithful(&head, input);
        }
        Err(error) => assert_honest(&error),
    }
}

/// What was taken is what the bytes say, line for line; only values have bytes over 0x7F.
fn assert_faithful(head: &RequestHead, bytes: &[u8]) {
    let mut lines = bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
    let line = std::str::from_utf8(lines.next().unwrap_or_default()).expect("a line in ASCII");
    let words: Vec<&str> = line.split(' ').collect();
    assert_eq!(words[0], &*head.method);
    assert!(!words[1].starts_with('/') || words[1] == head.target, "{:?}", head.target);
    let field = |line: &[u8]| {
        let (name, value) = line.split_at(line.iter().position(|byte| *byte == b':')?);
        let name = std::str::from_utf8(name).expect("a name in ASCII").to_ascii_lowercase();
        Some((name, value[1..].trim_ascii().to_vec()))
    };
    let mut fields: Vec<_> = lines.filter_map(field).collect();
    let apart = ["host", "content-length", "transfer-encoding", "expect"];
    fields.retain(|(name, _)| !apart.contains(&name.as_str()));
    assert_eq!(without(&head.headers, &["host"]), fields);
}

/// The heads up to the first that is refused, and how it ended.
fn read_requests<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<RequestHead>, String) {
    let mut reader = Reader::new(Pieces::new(pieces));
    let mut heads = Vec::new();
    loop {
        match ready(read_request_head(&mut reader, MAX_HEAD_BYTES)) {
            Ok(Some(head)) => heads.push(head),
            Ok(None) => return (heads, "the end".to_owned()),
            Err(ReadError::Refused(error)) => {
                assert_honest(&error);
                return (heads, error.to_string());
            }
            Err(ReadError::Eof) => return (heads, "an end in mid head".to_owned()),
            Err(ReadError::Io(error)) => panic!("memory does not break: {error}"),
        }
    }
}

/// A refusal has one of the statuses of a bad head, and is the guard's own, not that of the parser behind it.
fn assert_honest(error: &Error) {
    assert!([400, 431, 501, 505].contains(&error.status()), "{error:?}");
    assert!(!error.to_string().contains("The parser"), "{error}");
}

/// What was taken can be written to a provider, and reads there as what it was here.
fn assert_forwardable(head: &RequestHead) {
    assert!(head.target.starts_with('/') || head.target == "*", "{:?}", head.target);
    assert!(head.headers.len() <= HEADER_LIMIT && head.framing != Framing::UntilClose);
    let Some(host) = head.headers.get("host").and_then(|host| std::str::from_utf8(host).ok())
    else {
        assert!(head.http_10, "no Host");
        return;
    };
    if head.http_10 {
        return; // it is written as HTTP/1.1
    }
    let length = match head.framing {
        Framing::Length(length) => Some(length),
        _ => None,
    };
    let mut wire = Vec::new();
    write_request_head(&mut wire, &head.method, &head.target, host, head.headers.iter(), length);
    let again = parse_request_head(&wire)
        .unwrap_or_else(|error| panic!("{error}: {}", wire.escape_ascii()));
    assert_eq!((&again.method, &again.target), (&head.method, &head.target));
    assert_eq!(again.framing, length.map_or(Framing::Empty, Framing::Length));
    assert_eq!(without(&again.headers, &["connection"]), without(&head.headers, &["connection"]));
}

/// A response's head is the same however it is cut, and can be relayed: written out, it reads as what it was.
pub fn response_head(input: &[u8]) {
    for to_head in [false, true] {
        let whole = read_response([input], to_head);
        assert_eq!(read_response(pieces(input), to_head), whole, "in pieces");
        assert_eq!(read_response(input.chunks(1), to_head), whole, "byte by byte");
        if let Ok((head, _)) = &whole {
            assert!((200..=999).contains(&head.status) && head.headers.len() <= HEADER_LIMIT);
            assert!(
                !(head.keep_alive && head.framing == Framing::UntilClose),
                "kept alive past its close"
            );
            assert!(
                head.framing == Framing::Empty || !(to_head || [204, 304].contains(&head.status)),
                "{head:?}"
            );
            assert_relayable(head);
        }
    }
    let _ = parse_response_head(input, false);
}

/// The head, and the bytes behind it.
fn read_response<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
    to_head: bool,
) -> Result<(ResponseHead, Vec<u8>), String> {
    let mut reader = Reader::new(Pieces::new(pieces));
    let head =
        ready(read_response_head(&mut reader, to_head)).map_err(|fault| fault.to_string())?;
    while ready(reader.fill()).expect("memory does not break") > 0 {}
    Ok((head, reader.buffered().to_vec()))
}

fn assert_relayable(head: &ResponseHead) {
    const OURS: [&str; 3] = ["connection", "content-length", "transfer-encoding"];
    let fields = without(&head.headers, &OURS);
    // Framing and Connection of our own take two lines.
    if fields.len() + 2 > HEADER_LIMIT {
        return;
    }
    let (mut wire, body) = (Vec::new(), BodyLength::Length(7));
    write_response_head(&mut wire, head.status, &head.reason, head.headers.iter(), body, true);
    let (again, length) = parse_response_head(&wire, false)
        .unwrap_or_else(|error| panic!("{error}: {}", wire.escape_ascii()))
        .unwrap_or_else(|| panic!("cut short: {}", wire.escape_ascii()));
    assert_eq!((again.status, length), (head.status, wire.len()));
    assert!(again.reason == head.reason || head.reason.is_empty(), "{:?}", again.reason);
    assert_eq!(without(&again.headers, &OURS), fields);
}

/// Another model's name in the body of a request changes that value and nothing else.
pub fn splice(input: &[u8]) {
    let tree: Option<Value> = serde_json::from_slice(input).ok();
    let Ok(found) = peek(input) else {
        let named = tree.as_ref().and_then(|tree| tree.get("model")).is_some_and(Value::is_string);
        assert!(!named, "a body with a model is refused");
        return;
    };
    if let Some(tree) = &tree {
        assert_eq!(tree["model"].as_str(), Some(found.model.as_str()));
    }
    for new in ["z-ai/glm-5.1", "", "\"\\\u{0}\u{e9}\u{1f600}"] {
        let spliced =
            RequestBody::new(Buffer(input.to_vec())).with_model(found.model_span.clone(), new);
        let spliced = spliced.pieces().concat();
        let again = peek(&spliced).expect("still a request");
        assert_eq!((again.model.as_str(), again.max_tokens), (new, found.max_tokens));
        assert_eq!(
            splice_back(spliced.clone(), again.model_span, &input[found.model_span.clone()]),
            input
        );
        if let Some(mut tree) = tree.clone() {
            tree["model"] = Value::from(new);
            assert_eq!(serde_json::from_slice::<Value>(&spliced).ok(), Some(tree));
        }
    }
}

fn splice_back(mut body: Vec<u8>, span: std::ops::Range<usize>, old: &[u8]) -> Vec<u8> {
    body.splice(span, old.iter().copied());
    body
}

/// A stream's usage is made of those on its finished lines, and the same however the stream is cut.
pub fn sse(input: &[u8]) {
    let (mut scanner, mut lines) = (EventScanner::new(), Lines::default());
    let mut seen = vec![scanner.usage().total()];
    for &byte in input {
        scanner.feed(&[byte]);
        lines.push(byte);
        seen.push(scanner.usage().total());
    }
    for cut in [pieces(input).collect(), vec![input]] {
        let (mut scanner, mut at) = (EventScanner::new(), 0);
        for piece in cut {
            scanner.feed(piece);
            at += piece.len();
            assert_eq!(scanner.usage().total(), seen[at], "after {at} bytes");
        }
    }
    let data = lines.finished.iter().filter_map(|line| line.strip_prefix(b"data:"));
    let totals: Vec<_> = data.filter_map(|data| Usage::of(data)?.total()).collect();
    let sum = totals.iter().fold(0, |sum: u64, total| sum.saturating_add(*total));
    let total = scanner.usage().total();
    assert!(
        total.is_none_or(|total| !totals.is_empty() && total <= sum),
        "{total:?} was never sent"
    );
}

/// A stream cut into lines, which end in LF, CRLF or CR.
#[derive(Default)]
struct Lines {
    finished: Vec<Vec<u8>>,
    unfinished: Vec<u8>,
    last: u8,
}

impl Lines {
    fn push(&mut self, byte: u8) {
        match (self.last, byte) {
            (b'\r', b'\n') => {}
            (_, b'\r' | b'\n') => self.finished.push(std::mem::take(&mut self.unfinished)),
            _ => self.unfinished.push(byte),
        }
        self.last = byte;
    }
}

/// A state file is refused or is what it reads as when it is written again; and whatever it says, a provider that goes on from it
/// sends within the span of its limits or the longest pause.
pub fn state(input: &[u8]) {
    let Ok(mut state) = State::parse(input) else { return };
    let again = serde_json::to_vec(&state).expect("a state is JSON");
    assert_eq!(State::parse(&again), Ok(state.clone()));
    let tree: Value = serde_json::from_slice(&again).expect("what was written is JSON");
    for (provider, lanes) in tree["providers"].as_object().expect("providers have names") {
        for lane in lanes.as_array().expect("a provider has a list of keys") {
            let key = lane["key"].as_str().expect("a key has a fingerprint");
            let models = lane["models"].as_object().expect("models have names").keys();
            let memory =
                state.take(provider, key, models.map(String::as_str)).expect("a key is found");
            recall(&memory);
        }
    }
}

/// Goes on from a memory with every kind of limit, at once and after a while.
fn recall(memory: &BooksMemory) {
    const MINUTE: Duration = Duration::from_secs(60);
    let day = |reset| Limits {
        cadence: Some(Cadence { interval: MINUTE / 7, capacity: 3 }),
        window: Some(5),
        day: Some(Day { max: 9, reset }),
        tokens: Some(100),
        ..Limits::default()
    };
    let limits = [day(Reset::Rolling), day(Reset::At(Duration::from_secs(3600)))];
    let now = Now { mono: Instant::now(), wall: SystemTime::UNIX_EPOCH + 20_000 * 1440 * MINUTE };
    for elapsed in [Duration::ZERO, MINUTE / 2, 1500 * MINUTE, Duration::MAX] {
        for shared in &limits {
            let mut books = Books::new(shared, &limits, true, now);
            books.recall(memory, elapsed, now);
            books.spend_day(u32::MAX, now);
            for model in 0..limits.len() {
                let next = books
                    .next(now, Ask { model, tokens: u64::MAX })
                    .at
                    .expect("nothing is in flight");
                assert!(next - now.mono <= MAX_WAIT, "{:?}", next - now.mono);
                assert!(books.nth(now, model, 7, 7).at >= books.nth(now, model, 0, 0).at);
            }
            let mut successor = Books::new(shared, &limits, true, now);
            successor.recall(&books.memory(now), elapsed, now);
        }
    }
}

/// The fields but for those of the given names, names in lower case.
fn without(headers: &Headers, names: &[&str]) -> Vec<(String, Vec<u8>)> {
    let fields = headers.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.to_vec()));
    fields.filter(|(name, _)| !names.contains(&name.as_str())).collect()
}

/// Cuts the input into pieces of 1 to 32 bytes.
fn pieces(input: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = input;
    input.iter().rev().map_while(move |byte| {
        let (piece, later) = rest.split_at(rest.len().min(1 + usize::from(byte % 32)));
        rest = later;
        (!piece.is_empty()).then_some(piece)
    })
}

/// A connection on which each read finds one piece.
struct Pieces<'a> {
    coming: std::vec::IntoIter<&'a [u8]>,
    here: &'a [u8],
}

impl<'a> Pieces<'a> {
    fn new(pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        Self { coming: Vec::from_iter(pieces).into_iter(), here: &[] }
    }
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if self.here.is_empty() {
            self.here = self.coming.next().unwrap_or_default();
        }
        Poll::Ready(self.here.read(buf))
    }
}

/// What a future gives that has nothing to wait for.
fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("waits for bytes that are there"),
    }
}
