//! Heads and chunks on their way out, appended to a buffer of the caller's, so that head and first bytes of a body can
//! leave in one write. Frames a message; does not decide how it is framed.

use std::io::Write;

use http_types::StatusCode;
use itoa::Buffer as Decimal;
use memchr::memchr3;

/// The interim response that lets a caller send its body (RFC 9110 section 15.2.1).
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Why writing to a buffer can't fail.
pub(super) const MEMORY: &str = "memory takes all that is written";

/// The end of a chunked body.
pub const FINAL_CHUNK: &[u8] = b"0\r\n\r\n";

/// How a response says where its body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyLength {
    /// Content-Length.
    Length(u64),
    /// Transfer-Encoding: chunked.
    Chunked,
    /// By closing the connection, whatever `keep_alive` says.
    UntilClose,
    /// No body and no framing: 204, 304, HEAD. A Content-Length among the headers is passed, since it describes the body
    /// that a GET would have had.
    None,
}

/// Appends a request head: request line, Host, the given headers, Content-Length if one is given. Host, framing and Connection
/// among the headers are left out: they are written here or not at all.
pub fn write_request_head<'a>(
    out: &mut Vec<u8>,
    method: &str,
    target: &str,
    host: &str,
    headers: impl Iterator<Item = (&'a str, &'a [u8])>,
    content_length: Option<u64>,
) {
    debug_assert!(
        ![method, target].iter().any(|word| word.contains(['\r', '\n', '\0', ' '])),
        "an unclean request line"
    );
    for part in [method, " ", target, " HTTP/1.1\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    write_field(out, "Host", host.as_bytes());
    for (name, value) in headers {
        if !is_one_of(name, &["host", "content-length", "transfer-encoding", "connection"]) {
            write_field(out, name, value);
        }
    }
    if let Some(length) = content_length {
        write_field(out, "Content-Length", Decimal::new().format(length).as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

/// Appends a response head: status line, the given headers, framing, Connection. An empty reason becomes the standard
/// phrase of a known status. Framing and Connection among the headers are left out, as for requests. `keep-alive` is said
/// aloud for HTTP/1.0 callers. Connection names an Upgrade among the headers (RFC 9110 section 7.8).
pub fn write_response_head<'a>(
    out: &mut Vec<u8>,
    status: u16,
    reason: &[u8],
    headers: impl Iterator<Item = (&'a str, &'a [u8])>,
    body: BodyLength,
    keep_alive: bool,
) {
    debug_assert!((100..=999).contains(&status) && is_clean(reason), "an unclean status line");
    let reason = if reason.is_empty() { standard_reason(status) } else { reason };
    for part in [b"HTTP/1.1 ", Decimal::new().format(status).as_bytes(), b" ", reason, b"\r\n"] {
        out.extend_from_slice(part);
    }
    let mut offers_upgrade = false;
    for (name, value) in headers {
        offers_upgrade |= name.eq_ignore_ascii_case("upgrade");
        let describes = body == BodyLength::None && name.eq_ignore_ascii_case("content-length");
        if describes || !is_one_of(name, &["content-length", "transfer-encoding", "connection"]) {
            write_field(out, name, value);
        }
    }
    match body {
        BodyLength::Length(length) => {
            write_field(out, "Content-Length", Decimal::new().format(length).as_bytes())
        }
        BodyLength::Chunked => write_field(out, "Transfer-Encoding", b"chunked"),
        BodyLength::UntilClose | BodyLength::None => {}
    }
    let lives_on = keep_alive && body != BodyLength::UntilClose;
    let connection: &[u8] = match (lives_on, offers_upgrade) {
        (true, false) => b"keep-alive",
        (false, false) => b"close",
        (true, true) => b"keep-alive, upgrade",
        (false, true) => b"close, upgrade",
    };
    write_field(out, "Connection", connection);
    out.extend_from_slice(b"\r\n");
}

/// The standard phrase of a status; empty for one that has none.
pub(super) fn standard_reason(status: u16) -> &'static [u8] {
    StatusCode::try_from(status).map_or("", |known| known.canonical_reason()).as_bytes()
}

/// Appends one chunk; nothing for an empty payload, which would end the body.
pub fn write_chunk(out: &mut Vec<u8>, payload: &[u8]) {
    if payload.is_empty() {
        return;
    }
    write!(out, "{:x}\r\n", payload.len()).expect(MEMORY);
    out.extend_from_slice(payload);
    out.extend_from_slice(b"\r\n");
}

fn is_one_of(name: &str, names: &[&str]) -> bool {
    names.iter().any(|known| name.eq_ignore_ascii_case(known))
}

/// Appends `name: value`. A field that would break out of its line is a bug further up, and is left out.
fn write_field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    let start = out.len();
    out.reserve(name.len() + value.len() + 4);
    for part in [name.as_bytes(), b": ", value] {
        out.extend_from_slice(part);
    }
    let clean = !name.is_empty() && is_clean(&out[start..]);
    debug_assert!(clean, "an unclean header field: {name:?}");
    if clean {
        out.extend_from_slice(b"\r\n");
    } else {
        out.truncate(start);
    }
}

/// Whether the bytes stay on their line.
fn is_clean(bytes: &[u8]) -> bool {
    memchr3(b'\r', b'\n', b'\0', bytes).is_none()
}

#[cfg(test)]
mod tests {
    use super::super::{BodyDecoder, Framing, Headers, parse_request_head, parse_response_head};
    use super::*;
    use proptest::prelude::*;

    fn headers(fields: &[(&str, &str)]) -> Headers {
        let mut headers = Headers::default();
        fields.iter().for_each(|(name, value)| headers.push(name, value.as_bytes()));
        headers
    }

    fn response(
        status: u16,
        reason: &str,
        fields: &[(&str, &str)],
        body: BodyLength,
        keep_alive: bool,
    ) -> String {
        let mut out = Vec::new();
        write_response_head(
            &mut out,
            status,
            reason.as_bytes(),
            headers(fields).iter(),
            body,
            keep_alive,
        );
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn request_heads() {
        let fields = headers(&[
            ("X-A", "1"),
            ("host", "evil"),
            ("content-length", "9"),
            ("Transfer-Encoding", "x"),
        ]);
        let mut out = b"before".to_vec();
        write_request_head(&mut out, "POST", "/v1/x?y", "h:1", fields.iter(), Some(3));
        let expected =
            "beforePOST /v1/x?y HTTP/1.1\r\nHost: h:1\r\nX-A: 1\r\nContent-Length: 3\r\n\r\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        let mut out = Vec::new();
        write_request_head(&mut out, "GET", "/", "h", std::iter::empty(), None);
        assert_eq!(out, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n");
    }

    #[test]
    fn response_heads() {
        let copied = [
            ("Content-Length", "9"),
            ("transfer-encoding", "chunked"),
            ("connection", "x"),
            ("A", "b"),
        ];
        for (body, keep_alive, framing) in [
            (BodyLength::Length(5), true, "A: b\r\nContent-Length: 5\r\nConnection: keep-alive"),
            (BodyLength::Chunked, false, "A: b\r\nTransfer-Encoding: chunked\r\nConnection: close"),
            (BodyLength::UntilClose, true, "A: b\r\nConnection: close"),
            (BodyLength::None, true, "Content-Length: 9\r\nA: b\r\nConnection: keep-alive"),
        ] {
            let expected = format!("HTTP/1.1 200 Fine\r\n{framing}\r\n\r\n");
            assert_eq!(response(200, "Fine", &copied, body, keep_alive), expected);
        }
    }

    #[test]
    fn an_upgrade_is_named_in_connection() {
        for (keep_alive, connection) in [(true, "keep-alive, upgrade"), (false, "close, upgrade")] {
            let head =
                response(426, "", &[("Upgrade", "HTTP/1.1")], BodyLength::Length(0), keep_alive);
            let expected = format!(
                "HTTP/1.1 426 Upgrade Required\r\nUpgrade: HTTP/1.1\r\nContent-Length: 0\r\n\
                 Connection: {connection}\r\n\r\n"
            );
            assert_eq!(head, expected);
        }
    }

    #[test]
    fn reasons() {
        for (status, line) in [
            (200, "200 OK"),
            (431, "431 Request Header Fields Too Large"),
            (529, "529 "),
            (999, "999 "),
        ] {
            assert!(
                response(status, "", &[], BodyLength::None, true)
                    .starts_with(&format!("HTTP/1.1 {line}\r\n"))
            );
        }
    }

    #[test]
    #[cfg_attr(debug_assertions, should_panic(expected = "an unclean header field"))]
    fn a_field_that_breaks_its_line_is_a_bug_and_is_left_out() {
        let head = response(200, "", &[("A", "b\r\nC: d"), ("E", "f")], BodyLength::None, true);
        assert_eq!(head, "HTTP/1.1 200 OK\r\nE: f\r\nConnection: keep-alive\r\n\r\n");
    }

    proptest! {
        #[test]
        fn requests_are_read_back(
            target in "/[!\"$-~]{0,40}",
            fields in proptest::collection::vec(("x-[a-z]{1,8}", "([!-~]([ -~]{0,20}[!-~])?)?"), 0..20),
            length: Option<u64>,
        ) {
            let mut sent: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            let mut out = Vec::new();
            write_request_head(&mut out, "PUT", &target, "h", headers(&sent).iter(), length);
            let head = parse_request_head(&out).unwrap();
            prop_assert_eq!((&*head.method, &head.target), ("PUT", &target));
            prop_assert_eq!(head.framing, length.map_or(Framing::Empty, Framing::Length));
            sent.insert(0, ("host", "h"));
            prop_assert_eq!(head.headers, headers(&sent));
        }

        #[test]
        fn responses_are_read_back(
            status in 200u16..=999,
            reason in "[A-Za-z]([ -~\u{e9}]{0,20}[A-Za-z])?",
            fields in proptest::collection::vec(("X-[A-Za-z]{1,8}", "([!-~\u{e9}]([ -~]{0,20}[!-~])?)?"), 0..20),
            chunked: bool, keep_alive: bool,
        ) {
            prop_assume!(![204, 304].contains(&status));
            let mut sent: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            let body = if chunked { BodyLength::Chunked } else { BodyLength::Length(7) };
            let out = response(status, &reason, &sent, body, keep_alive);
            let (head, len) = parse_response_head(out.as_bytes(), false).unwrap().unwrap();
            prop_assert_eq!((head.status, head.reason.as_slice(), head.keep_alive), (status, reason.as_bytes(), keep_alive));
            prop_assert_eq!(head.framing, if chunked { Framing::Chunked } else { Framing::Length(7) });
            sent.push(if chunked { ("Transfer-Encoding", "chunked") } else { ("Content-Length", "7") });
            sent.push(("Connection", if keep_alive { "keep-alive" } else { "close" }));
            prop_assert_eq!((head.headers, len), (headers(&sent), out.len()));
        }

        #[test]
        fn chunks_are_read_back(payloads: Vec<Vec<u8>>) {
            let mut wire = Vec::new();
            payloads.iter().for_each(|payload| write_chunk(&mut wire, payload));
            wire.extend_from_slice(FINAL_CHUNK);
            let (mut decoder, mut at, mut read) = (BodyDecoder::new(Framing::Chunked), 0, Vec::new());
            while !decoder.is_done() {
                let decoded = decoder.decode(&wire[at..]).unwrap();
                read.extend_from_slice(&wire[at..][decoded.data]);
                at += decoded.consumed;
            }
            prop_assert_eq!((read, at), (payloads.concat(), wire.len()));
        }
    }
}
