//! Watching a server-sent event stream go by (WHATWG HTML, section 9.2). Looks, and never changes a byte.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde::de::IgnoredAny;
use serde_json::Value;

use super::usage::Usage;
use crate::error::{Dialect, responses_events};

/// A longer line is not searched for `usage`; nothing more of a line is ever kept.
const LINE_LIMIT_BYTES: usize = 64 * 1024;

/// The events after which nothing more comes that a client waits for, by name: Anthropic's Messages and OpenAI's
/// Responses. A stream of chat completions ends with [`DONE`].
const LAST_EVENTS: [&[u8]; 4] =
    [b"message_stop", b"response.completed", b"response.failed", b"response.incomplete"];

/// The data of the last event of a stream of chat completions. openai-python looks at its start only.
const DONE: &[u8] = b"[DONE]";

/// Fed with a stream piece by piece, tells what the relay has to know about it. How the stream is cut into pieces makes no
/// difference. Holds at most one line of at most 64 KiB.
#[derive(Debug)]
pub struct EventScanner {
    /// The line so far; one byte past the limit marks it as too long.
    line: Vec<u8>,
    /// The last piece ended in CR: an LF that starts the next one belongs to it.
    after_cr: bool,
    /// The `event` field of the event under way names a last event.
    is_named_last: bool,
    has_last_event: bool,
    usage: Usage,
    /// No event with content has come since the usage.
    usage_is_current: bool,
}

impl EventScanner {
    /// At the start of a stream.
    pub fn new() -> Self {
        EventScanner {
            line: Vec::new(),
            after_cr: false,
            is_named_last: false,
            has_last_event: false,
            usage: Usage::default(),
            usage_is_current: false,
        }
    }

    /// Takes the next bytes of the stream. Lines end in LF, CRLF or CR.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        if self.after_cr && !bytes.is_empty() {
            self.after_cr = false;
            bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
        }
        while let Some(end) = memchr::memchr2(b'\n', b'\r', bytes) {
            self.end_line(&bytes[..end]);
            self.after_cr = bytes[end..] == *b"\r";
            let ending = if bytes[end..].starts_with(b"\r\n") { 2 } else { 1 };
            bytes = &bytes[end + ending..];
        }
        self.keep(bytes);
    }

    /// The `usage` so far: each object brings the ones before it up to date.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Whether [`EventScanner::usage`] counts everything that has passed: no further content came after it.
    pub fn usage_is_current(&self) -> bool {
        self.usage_is_current
    }

    /// Whether the data of the last event has passed: `[DONE]`, `message_stop`, `response.completed`,
    /// `response.failed` or `response.incomplete`. A client may close from here on.
    pub fn has_last_event(&self) -> bool {
        self.has_last_event
    }

    fn end_line(&mut self, rest: &[u8]) {
        if self.line.is_empty() {
            self.read_line(rest);
            return;
        }
        self.keep(rest);
        let mut line = std::mem::take(&mut self.line);
        self.read_line(&line);
        line.clear();
        self.line = line;
    }

    fn read_line(&mut self, line: &[u8]) {
        let Some(data) = field(line, b"data:") else {
            if let Some(name) = field(line, b"event:") {
                self.is_named_last = LAST_EVENTS.contains(&name);
            } else if line.is_empty() {
                self.is_named_last = false;
            }
            return;
        };
        let kind = kind(data);
        if line.len() <= LINE_LIMIT_BYTES
            && has_usage_object(data)
            && let Some(usage) = Usage::of(data)
        {
            self.usage = self.usage.updated(usage);
            self.usage_is_current = true;
        } else if kind == Kind::Content {
            self.usage_is_current = false;
        }
        self.has_last_event |= self.is_named_last || kind == Kind::Last;
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = LINE_LIMIT_BYTES + 1 - self.line.len();
        self.line.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}

impl Default for EventScanner {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether a body is one whole JSON value.
pub fn is_json(body: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(body).is_ok()
}

/// A JSON body as one event; `None` where it is no JSON.
pub fn event(body: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(body).ok()?;
    // Written anew, since a line break in it would end the line.
    Some(format!("data: {value}\n\n"))
}

/// A provider's error object as the event that makes an SDK raise it; `None` where the body is none.
pub fn error_event(dialect: Dialect, body: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(body).ok()?;
    let error = value.get("error").filter(|error| error.is_object())?;
    Some(match dialect {
        Dialect::OpenAi => format!("data: {value}\n\n"),
        Dialect::Anthropic => format!("event: error\ndata: {value}\n\n"),
        Dialect::Responses => {
            let field = |name: &str| error[name].as_str();
            let message = field("message").unwrap_or_default();
            responses_events(message, field("type"), field("code"), field("param"))
        }
    })
}

/// The value of a field, whose `name` includes the colon; one space after it is not part of the value.
fn field<'l>(line: &'l [u8], name: &[u8]) -> Option<&'l [u8]> {
    let value = line.strip_prefix(name)?;
    Some(value.strip_prefix(b" ").unwrap_or(value))
}

/// What an event is by its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Content,
    Ping,
    Last,
}

/// Reads `type` where it is the first field, as OpenAI and Anthropic write it: parsing each event would cost too much.
fn kind(data: &[u8]) -> Kind {
    if data.starts_with(DONE) {
        return Kind::Last;
    }
    let first_field = || {
        let object = data.strip_prefix(b"{")?.trim_ascii_start().strip_prefix(b"\"type\"")?;
        let value = object.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
        value.strip_prefix(b"\"")?.split(|byte| *byte == b'"').next()
    };
    match first_field() {
        Some(b"ping") => Kind::Ping,
        Some(name) if LAST_EVENTS.contains(&name) => Kind::Last,
        _ => Kind::Content,
    }
}

/// Whether parsing is worth it: `"usage":null` stands in every event of some streams, and in most there is none. Inside a
/// JSON string the quotes would be escaped, so text cannot look like this.
fn has_usage_object(data: &[u8]) -> bool {
    const KEY: &[u8] = b"\"usage\"";
    // Made once: every event of every stream is searched.
    static FINDER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(KEY));
    FINDER.find_iter(data).any(|at| {
        let after = data[at + KEY.len()..].trim_ascii_start();
        after.strip_prefix(b":").is_some_and(|value| value.trim_ascii_start().starts_with(b"{"))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const USAGE: &str = r#"data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#;

    fn scan<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Option<u64> {
        let mut scanner = EventScanner::new();
        pieces.into_iter().for_each(|piece| scanner.feed(piece));
        scanner.usage().total()
    }

    /// A stream as Anthropic documents it, but for the usage in its `message_delta`.
    const MESSAGE: &str = r#"event: message_start
data: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","content":[],"model":"m",\
"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":25,"cache_creation_input_tokens":0,\
"cache_read_input_tokens":900,"output_tokens":1}}}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

event: ping
data: {"type": "ping"}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":USAGE}

event: message_stop
data: {"type":"message_stop"}

"#;

    fn message(usage: &str) -> String {
        MESSAGE.replace("\\\n", "").replace("USAGE", usage)
    }

    #[test]
    fn a_message_counts_its_input_from_the_start_and_its_output_from_the_end() {
        for (delta, total) in [
            (r#"{"output_tokens":15}"#, 40),
            (
                r#"{"input_tokens":30,"cache_creation_input_tokens":0,"cache_read_input_tokens":900,"output_tokens":15}"#,
                45,
            ),
        ] {
            let stream = message(delta);
            assert_eq!(scan([stream.as_bytes()]), Some(total), "{delta}");
            let cut_short = &stream[..stream.find("event: message_delta").unwrap()];
            assert_eq!(scan([cut_short.as_bytes()]), Some(26));
        }
    }

    #[test]
    fn the_last_usage_object_counts() {
        for (stream, total) in [
            (format!("{USAGE}\n\ndata: [DONE]\n\n"), Some(7)),
            (format!("{USAGE}\n\ndata: {{\"usage\" :\t{{\"total_tokens\":9}}}}\r\r"), Some(9)),
            (format!("{USAGE}\n\ndata: {{\"usage\":null}}\n\n"), Some(7)),
            (format!("{USAGE}\n\ndata: {{\"usage\":{{}}}}\n\n"), Some(7)),
            (format!("{USAGE}\n\ndata: {{\"usage\":{{broken\n\n"), Some(7)),
            (
                r#"data: {"type":"response.completed","response":{"usage":{"total_tokens":5}}}"#
                    .to_owned()
                    + "\n",
                Some(5),
            ),
            (USAGE.to_owned(), None),
            (format!(": {USAGE}\n"), None),
            (r#"data: {"text":"\"usage\":{\"total_tokens\":5}"}"#.to_owned() + "\n", None),
        ] {
            assert_eq!(scan([stream.as_bytes()]), total, "{stream:?}");
        }
    }

    fn scanned(stream: &str) -> EventScanner {
        let mut scanner = EventScanner::new();
        scanner.feed(stream.as_bytes());
        scanner
    }

    #[test]
    fn the_data_of_the_last_event_ends_a_stream_in_each_api() {
        for (stream, ends) in [
            ("data: [DONE]\n", true),
            ("data:[DONE]\r\n", true),
            ("data: [DONE] \n", true),
            ("data: [DONE]", false),
            (": [DONE]\n", false),
            ("data: {\"choices\":[{\"delta\":{\"content\":\"[DONE]\"}}]}\n\n", false),
            ("event: message_stop\ndata: {\"type\":\"message_stop\"}\n", true),
            ("data: {\"type\": \"message_stop\"}\n", true),
            ("event: message_stop\n", false),
            ("event: message_stop\n\ndata: {}\n", false),
            ("event: response.completed\ndata: {\"response\":{}}\n", true),
            ("data: { \"type\" : \"response.completed\",\"response\":{}}\n", true),
            ("data: {\"type\":\"response.failed\"}\n", true),
            ("data: {\"type\":\"response.incomplete\"}\n", true),
            ("event: response.created\ndata: {\"type\":\"response.created\"}\n\n", false),
            ("data: {\"type\":\"response.completed.not\"}\n", false),
        ] {
            assert_eq!(scanned(stream).has_last_event(), ends, "{stream:?}");
        }
        assert!(scanned(&message("{\"output_tokens\":15}")).has_last_event());
    }

    #[test]
    fn a_usage_is_current_until_further_content_comes() {
        for (stream, is_current) in [
            ("data: {\"choices\":[]}\n\n".to_owned(), false),
            (format!("{USAGE}\n\n"), true),
            (
                format!("{USAGE}\n\n: comment\n\ndata: {{\"type\": \"ping\"}}\n\ndata: [DONE]\n\n"),
                true,
            ),
            (format!("{USAGE}\n\ndata: {{\"choices\":[]}}\n\n"), false),
            (format!("{USAGE}\n\ndata: {{\"choices\":[]}}\n\n{USAGE}\n"), true),
            (message("{\"output_tokens\":15}"), true),
            (
                message("{\"output_tokens\":15}")
                    .split("event: message_delta")
                    .next()
                    .unwrap()
                    .into(),
                false,
            ),
        ] {
            assert_eq!(scanned(&stream).usage_is_current(), is_current, "{stream:?}");
        }
    }

    #[test]
    fn only_usage_objects_are_worth_parsing() {
        assert!(has_usage_object(br#"{"usage":null,"response":{"usage" : {}}}"#));
        assert!(!has_usage_object(
            br#"{"usage":null,"choices":[{"delta":{"content":"usage: {"}}]}"#
        ));
        assert!(!has_usage_object(br#"{"text":"\"usage\":{"}"#));
        assert!(!has_usage_object(b"\"usage\""));
        assert!(!has_usage_object(b""));
    }

    #[test]
    fn a_line_past_the_limit_is_passed_over_and_not_kept() {
        for (length, total) in [(LINE_LIMIT_BYTES, Some(7)), (LINE_LIMIT_BYTES + 1, None)] {
            let mut line =
                USAGE.replace("[]", &format!("\"{}\"", "x".repeat(length - USAGE.len())));
            assert_eq!(line.len(), length);
            line.push('\n');
            assert_eq!(scan([line.as_bytes()]), total, "whole, {length}");
            assert_eq!(scan(line.as_bytes().chunks(1000)), total, "in pieces, {length}");
        }

        let mut scanner = EventScanner::new();
        (0..1000).for_each(|_| scanner.feed(&[b'x'; 1000]));
        assert_eq!(scanner.line.len(), LINE_LIMIT_BYTES + 1);
        scanner.feed(format!("\n\n{USAGE}\n\n").as_bytes());
        assert_eq!(scanner.usage().total(), Some(7), "the next line is read again");
    }

    fn stream() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            3 => Just(b"\n".to_vec()),
            3 => Just(b"\r".to_vec()),
            3 => Just(b"\r\n".to_vec()),
            2 => Just(USAGE.as_bytes().to_vec()),
            2 => (0..99_u64).prop_map(|total| format!("data:{{\"usage\":{{\"total_tokens\":{total}}}}}").into_bytes()),
            1 => (0..99_u64).prop_map(|tokens| message(&format!("{{\"output_tokens\":{tokens}}}")).into_bytes()),
            1 => Just(b"data: [DONE]".to_vec()),
            1 => Just(b": ping".to_vec()),
            1 => prop::collection::vec(any::<u8>(), 0..9),
        ];
        prop::collection::vec(part, 0..30).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn cuts_make_no_difference(stream in stream(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..9)) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).chain([0, stream.len()]).collect();
            cuts.sort_unstable();
            let whole = scan([&stream[..]]);
            prop_assert_eq!(scan(cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]])), whole);
            prop_assert_eq!(scan(stream.chunks(1)), whole);
        }

        #[test]
        fn line_ends_make_no_difference(totals in prop::collection::vec(any::<Option<u16>>(), 0..9)) {
            let line = |total: &Option<u16>| {
                total.map_or("data: x".to_owned(), |total| format!("data: {{\"usage\":{{\"total_tokens\":{total}}}}}"))
            };
            let joined = |end: &str| totals.iter().flat_map(|total| [line(total), end.repeat(2)]).collect::<String>();
            let last = totals.iter().rev().flatten().next().map(|total| u64::from(*total));
            for end in ["\n", "\r\n", "\r"] {
                prop_assert_eq!(scan([joined(end).as_bytes()]), last, "{:?}", end);
            }
        }
    }
}
