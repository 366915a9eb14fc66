//! A provider's response head, read with httparse.
//!
//! Not with async-h1, whose client takes a 100 for the answer, panics on Latin-1 values and knows no status like 529. What
//! is wrong with a response is said in words: whoever asked knows the provider's name and makes the 502. Body bytes stay in
//! the reader.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;

use futures_lite::io::AsyncRead;
use memchr::memchr_iter;

use super::headers::list_items;
use super::write::standard_reason;
use super::{Framing, HEADER_LIMIT, Headers, Reader};

/// The most bytes of one response head.
pub const RESPONSE_HEAD_LIMIT_BYTES: usize = 64 * 1024;
/// Interim responses (1xx) that are skipped before the final one; a provider may send one every few seconds as it works.
const INTERIM_LIMIT: usize = 64;

/// A response head that can be acted on.
#[derive(Debug, Clone, PartialEq)]
pub struct ResponseHead {
    /// 100..=999, known or not.
    pub status: u16,
    /// The reason phrase as sent; empty where there is none, or where it is the standard one.
    pub reason: Vec<u8>,
    /// Whether it is an HTTP/1.0 response.
    pub http_10: bool,
    /// All fields as received, framing and hop-by-hop ones included: names with their case, values as bytes.
    pub headers: Headers,
    /// How the body comes.
    pub framing: Framing,
    /// Whether the connection can be used again after this body; never after `UntilClose`.
    pub keep_alive: bool,
}

/// The first byte of a record with an alert (RFC 8446 section 5.1). A server that expects a
/// handshake sends one.
const TLS_ALERT: u8 = 21;

/// Why there is no response head. `received` counts all bytes of the response until then: with 0 on a reused connection,
/// the provider had closed it before our request came.
#[derive(Debug)]
pub enum ReadFault {
    /// The connection ended.
    Eof {
        /// Bytes until then.
        received: usize,
    },
    /// The connection broke.
    Io {
        /// How.
        error: io::Error,
        /// Bytes until then.
        received: usize,
    },
    /// It is no HTTP/1.x response, or one that cannot be relayed faithfully.
    Invalid(String),
}

impl fmt::Display for ReadFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Eof { received: 0 } => f.write_str("the connection was closed before a response"),
            Self::Eof { received } => {
                write!(f, "the connection was closed after {received} bytes of a response head")
            }
            Self::Io { error, received: 0 } => error.fmt(f),
            Self::Io { error, received } => {
                write!(f, "{error}, after {received} bytes of a response head")
            }
            Self::Invalid(detail) => f.write_str(detail),
        }
    }
}

impl std::error::Error for ReadFault {}

/// Reads the final response's head, skipping interim ones, and leaves the body's bytes in the reader. Dropping the future
/// loses nothing.
pub async fn read_response_head<R: AsyncRead + Unpin>(
    reader: &mut Reader<R>,
    to_head_request: bool,
) -> Result<ResponseHead, ReadFault> {
    let mut skipped = 0;
    for _ in 0..=INTERIM_LIMIT {
        let (head, len) = read_one_head(reader, to_head_request, skipped).await?;
        reader.consume(len);
        match head.status {
            101 => {
                return Err(ReadFault::Invalid(
                    "status 101 although no upgrade was asked for".to_owned(),
                ));
            }
            100..=199 => skipped += len,
            _ => return Ok(head),
        }
    }
    Err(ReadFault::Invalid(format!("more than {INTERIM_LIMIT} interim responses")))
}

/// Reads until a head is complete; `skipped` bytes of interim responses came before it.
async fn read_one_head<R: AsyncRead + Unpin>(
    reader: &mut Reader<R>,
    to_head_request: bool,
    skipped: usize,
) -> Result<(ResponseHead, usize), ReadFault> {
    let mut searched = 0;
    loop {
        let buffered = reader.buffered();
        let end = find_end(buffered, searched).map_err(ReadFault::Invalid)?;
        if let Some(end) = end {
            let head =
                parse_whole(&buffered[..end], to_head_request).map_err(ReadFault::Invalid)?;
            return Ok((head, end));
        }
        searched = buffered.len();
        let received = skipped + searched;
        match reader.fill().await {
            Ok(0) => return Err(ReadFault::Eof { received }),
            Ok(_) => {}
            Err(error) => return Err(ReadFault::Io { error, received }),
        }
    }
}

/// Parses the head at the beginning of `buf`, interim or final, and tells its length. None if it is not complete yet. The
/// error is a detail for a 502.
pub fn parse_response_head(
    buf: &[u8],
    to_head_request: bool,
) -> Result<Option<(ResponseHead, usize)>, String> {
    let Some(end) = find_end(buf, 0)? else {
        return Ok(None);
    };
    Ok(Some((parse_whole(&buf[..end], to_head_request)?, end)))
}

/// The length of the head at the beginning of `buf`, of which the first `searched` bytes were looked at before. Lines may end
/// in LF alone, as RFC 9112 section 2.2 lets a recipient allow and old servers need. Other protocols are told apart at once.
fn find_end(buf: &[u8], searched: usize) -> Result<Option<usize>, String> {
    let start = b"HTTP/1.";
    let common = buf.len().min(start.len());
    if buf[..common] != start[..common] {
        return Err(match buf[0] {
            TLS_ALERT => "not an HTTP/1.x response but a TLS alert: that port speaks TLS",
            _ => "not an HTTP/1.x response",
        }
        .to_owned());
    }
    let window = &buf[..buf.len().min(RESPONSE_HEAD_LIMIT_BYTES)];
    let is_end = |at: &usize| window[..*at].ends_with(b"\n") || window[..*at].ends_with(b"\n\r");
    match memchr_iter(b'\n', &window[searched.min(window.len())..])
        .map(|at| searched + at)
        .find(is_end)
    {
        Some(at) => Ok(Some(at + 1)),
        None if window.len() == RESPONSE_HEAD_LIMIT_BYTES => {
            Err(format!("a response head of more than {RESPONSE_HEAD_LIMIT_BYTES} bytes"))
        }
        None => Ok(None),
    }
}

/// Parses a head that ends where [`find_end`] says.
fn parse_whole(head: &[u8], to_head_request: bool) -> Result<ResponseHead, String> {
    let mut slots = [const { MaybeUninit::uninit() }; HEADER_LIMIT];
    let mut response = httparse::Response::new(&mut []);
    let mut config = httparse::ParserConfig::default();
    // RFC 9112 section 5.1: a proxy removes the white space before a response's colon. Nothing else is forgiven.
    config.allow_spaces_after_header_name_in_responses(true);
    match config.parse_response_with_uninit_headers(&mut response, head, &mut slots) {
        Ok(httparse::Status::Complete(len)) if len == head.len() => {}
        Ok(_) => return Err("a response head that ends in the wrong place".to_owned()),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(format!("more than {HEADER_LIMIT} response headers"));
        }
        Err(error) => return Err(format!("a malformed response head: {error}")),
    }
    let status = response.code.filter(|status| *status >= 100).ok_or("a status below 100")?;
    let http_10 = response.version == Some(0);
    let headers = super::collect(response.headers);
    let framing = match (framing(&headers, http_10)?, status) {
        (_, 100..=199 | 204 | 304) => Framing::Empty,
        _ if to_head_request => Framing::Empty,
        (framing, _) => framing,
    };
    let keep_alive = framing != Framing::UntilClose && super::keep_alive(&headers, http_10);
    Ok(ResponseHead { status, reason: reason(head, status), http_10, headers, framing, keep_alive })
}

/// What follows the status; httparse gives none that is not ASCII.
fn reason(head: &[u8], status: u16) -> Vec<u8> {
    let line = head.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let reason = line.get("HTTP/1.1 200 ".len()..).unwrap_or_default().trim_ascii();
    if reason == standard_reason(status) { Vec::new() } else { reason.to_vec() }
}

/// RFC 9112 section 6.3, before status and method have their say. `gzip, chunked` is refused although it could be read:
/// we never asked for it, and its payload could not be relayed as what it is.
fn framing(headers: &Headers, http_10: bool) -> Result<Framing, String> {
    let mut codings = headers.get_all("transfer-encoding").flat_map(list_items);
    let mut lengths = headers.get_all("content-length").flat_map(list_items);
    match (codings.next(), lengths.next()) {
        (None, None) => Ok(Framing::UntilClose),
        (Some(_), Some(_)) => Err("both Content-Length and Transfer-Encoding".to_owned()),
        (Some(_), None) if http_10 => Err("a Transfer-Encoding in HTTP/1.0".to_owned()),
        (Some(coding), None)
            if coding.eq_ignore_ascii_case(b"chunked") && codings.next().is_none() =>
        {
            Ok(Framing::Chunked)
        }
        (Some(_), None) => Err("a Transfer-Encoding other than chunked".to_owned()),
        (None, Some(first)) => {
            let first = super::parse_length(first)
                .ok_or("a Content-Length that is not a number of bytes")?;
            match lengths.all(|other| super::parse_length(other) == Some(first)) {
                true => Ok(Framing::Length(first)),
                false => Err("Content-Lengths that differ".to_owned()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reader::tests::Pieces;
    use super::*;
    use futures_lite::future::block_on;
    use proptest::prelude::*;

    fn parse(head: &str) -> Result<ResponseHead, String> {
        parse_response_head(head.as_bytes(), false).map(|found| {
            let (parsed, len) = found.expect("the head is complete");
            assert_eq!(len, head.len());
            parsed
        })
    }

    /// Reads one response head in pieces of the given sizes: what it is or why it is not, and what is left to read.
    fn read(bytes: &[u8], sizes: &[usize]) -> (Result<ResponseHead, String>, Vec<u8>) {
        let mut reader = Reader::new(Pieces::new(bytes, sizes));
        let head =
            block_on(read_response_head(&mut reader, false)).map_err(|fault| format!("{fault:?}"));
        if head.is_ok() {
            while block_on(reader.fill()).unwrap() > 0 {}
            return (head, reader.buffered().to_vec());
        }
        (head, Vec::new())
    }

    #[test]
    fn heads_as_providers_send_them() {
        let head = parse("HTTP/1.1 529 Site is  overloaded\r\nSet-Cookie: a\r\nX-Y :\tz \r\nset-cookie: b\r\nContent-Length: 7\r\n\r\n").unwrap();
        assert_eq!(
            (head.status, head.reason.as_slice(), head.framing),
            (529, &b"Site is  overloaded"[..], Framing::Length(7))
        );
        let fields: Vec<_> = head.headers.iter().collect();
        let expected =
            [("Set-Cookie", "a"), ("X-Y", "z"), ("set-cookie", "b"), ("Content-Length", "7")];
        assert_eq!(fields, expected.map(|(name, value)| (name, value.as_bytes())));

        let latin = b"HTTP/1.1 200 d\xe9j\xe0\r\nX: caf\xe9\r\n\r\n";
        let (head, _) = parse_response_head(latin, false).unwrap().unwrap();
        assert_eq!(
            (head.reason.as_slice(), head.headers.get("x")),
            (&b"d\xe9j\xe0"[..], Some(&b"caf\xe9"[..]))
        );

        for (line, status) in
            [("HTTP/1.1 100 ", 100), ("HTTP/1.1 999", 999), ("HTTP/1.0 499 \t", 499)]
        {
            let head = parse(&format!("{line}\r\n\r\n")).unwrap();
            assert_eq!((head.status, head.reason), (status, Vec::new()), "{line:?}");
        }
        assert_eq!(parse("HTTP/1.1 200 OK\nA: b\n\n").unwrap().headers.get("a"), Some(&b"b"[..]));
        assert_eq!(
            parse_response_head(b"HTTP/1.1 200 OK\r\n\r\nbody", false).unwrap().unwrap().1,
            19
        );
    }

    #[test]
    fn heads_that_are_refused() {
        let many: String = (0..129).map(|i| format!("N{i}: x\r\n")).collect();
        for (head, detail) in [
            ("HTTP/1.1 099 No\r\n\r\n", "a status below 100"),
            ("HTTP/1.1 20 OK\r\n\r\n", "malformed"),
            ("HTTP/1.1 2000 OK\r\n\r\n", "malformed"),
            ("HTTP/1.1  200 OK\r\n\r\n", "malformed"),
            ("HTTP/1.2 200 OK\r\n\r\n", "malformed"),
            ("HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", "malformed"),
            ("HTTP/1.1 200 OK\r\n A: b\r\n\r\n", "malformed"),
            ("HTTP/1.1 200 OK\r\nA b\r\n\r\n", "malformed"),
            ("HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n", "malformed"),
            ("HTTP/1.1 200 OK\r\nA: \0\r\n\r\n", "malformed"),
            ("HTTP/2 200\r\n\r\n", "not an HTTP/1.x response"),
            ("\r\nHTTP/1.1 200 OK\r\n\r\n", "not an HTTP/1.x response"),
            ("ICY 200 OK\r\n\r\n", "not an HTTP/1.x response"),
            ("<html>", "not an HTTP/1.x response"),
            ("\x15\x03\x03\0\x02\x02\x32", "not an HTTP/1.x response but a TLS alert"),
            (&format!("HTTP/1.1 200 OK\r\n{many}\r\n"), "more than 128 response headers"),
        ] {
            let error = parse(head).unwrap_err();
            assert!(error.contains(detail), "{head:?}: {error}");
        }
    }

    #[test]
    fn framings() {
        for (status, lines, framing) in [
            (200, "", Some(Framing::UntilClose)),
            (200, "Content-Length: 5\r\n", Some(Framing::Length(5))),
            (200, "Content-Length: 5\r\ncontent-length: 5\r\n", Some(Framing::Length(5))),
            (200, "Content-Length: 5, 5\r\n", Some(Framing::Length(5))),
            (200, "Content-Length: 5, 6\r\n", None),
            (200, "Content-Length: 5\r\nContent-Length: 6\r\n", None),
            (200, "Content-Length: -5\r\n", None),
            (200, "Content-Length: +5\r\n", None),
            (200, "Content-Length:\r\n", None),
            (200, "Content-Length: 18446744073709551616\r\n", None),
            (200, "Transfer-Encoding: CHUNKED\r\n", Some(Framing::Chunked)),
            (200, "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", None),
            (200, "Transfer-Encoding: gzip, chunked\r\n", None),
            (200, "Transfer-Encoding: chunked, gzip\r\n", None),
            (200, "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", None),
            (200, "Transfer-Encoding: identity\r\n", None),
            (200, "Transfer-Encoding:\r\n", None),
            (204, "", Some(Framing::Empty)),
            (304, "Content-Length: 5\r\n", Some(Framing::Empty)),
            (103, "", Some(Framing::Empty)),
        ] {
            let head = parse(&format!("HTTP/1.1 {status} X\r\n{lines}\r\n"));
            assert_eq!(head.ok().map(|head| head.framing), framing, "{status} {lines:?}");
        }
        assert!(parse("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").is_err());
        let to_head = parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", true)
            .unwrap()
            .unwrap()
            .0;
        assert_eq!((to_head.framing, to_head.keep_alive), (Framing::Empty, true));
    }

    #[test]
    fn who_keeps_the_connection() {
        for (head, expected) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: x, Close\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\n", false),
            ("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", false),
            ("HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: Keep-Alive\r\n\r\n", true),
            ("HTTP/1.1 204 OK\r\n\r\n", true),
        ] {
            assert_eq!(parse(head).unwrap().keep_alive, expected, "{head:?}");
        }
    }

    #[test]
    fn interim_responses_are_skipped_and_bounded() {
        let interim = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n";
        let last = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n";
        for sizes in [&[1][..], &[7, 40], &[9999]] {
            let (head, rest) = read(format!("{interim}{last}body").as_bytes(), sizes);
            assert_eq!((head.unwrap().status, rest.as_slice()), (200, &b"body"[..]));
        }
        let flood = "HTTP/1.1 102 Processing\r\n\r\n";
        assert!(read((flood.repeat(64) + last).as_bytes(), &[99]).0.is_ok());
        assert!(
            read((flood.repeat(65) + last).as_bytes(), &[99])
                .0
                .unwrap_err()
                .contains("more than 64 interim")
        );
        assert!(
            read(b"HTTP/1.1 101 Switching\r\n\r\n", &[99]).0.unwrap_err().contains("status 101")
        );
    }

    #[test]
    fn ends_of_the_stream_are_told_apart() {
        assert_eq!(read(b"", &[1]).0, Err("Eof { received: 0 }".to_owned()));
        assert_eq!(read(b"HTTP/1.1 20", &[4]).0, Err("Eof { received: 11 }".to_owned()));
        assert_eq!(read(b"HTTP/1.1 100 C\r\n\r\n", &[4]).0, Err("Eof { received: 18 }".to_owned()));
    }

    #[test]
    fn the_limit_of_a_head_is_exact() {
        let head_of = |len: usize| {
            let frame = "HTTP/1.1 200 OK\r\nA: \r\n\r\n";
            frame.replace("A: ", &format!("A: {}", "a".repeat(len - frame.len())))
        };
        for sizes in [&[1_000_000][..], &[1000, 1]] {
            assert!(read(head_of(RESPONSE_HEAD_LIMIT_BYTES).as_bytes(), sizes).0.is_ok());
            let error =
                read(head_of(RESPONSE_HEAD_LIMIT_BYTES + 1).as_bytes(), sizes).0.unwrap_err();
            assert!(error.contains("more than 65536 bytes"), "{error}");
        }
    }

    /// Text that looks enough like a response to get far into the parser.
    fn almost_response() -> impl Strategy<Value = Vec<u8>> {
        let atoms = [
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 100\r\n\r\n",
            "HTTP/1.0 404 No\n",
            "Content-Length: 3\r\n",
            "\r\n",
            "\n",
            "\r",
            "A: b\r\n",
            "Transfer-Encoding: chunked\r\n",
            " fold\r\n",
            "X:\u{e9}\r\n",
            ":",
            "\r\n\r\nbody",
            "\0",
        ];
        proptest::collection::vec(proptest::sample::select(atoms.to_vec()), 0..9)
            .prop_map(|parts| ("HTTP/1.1 200 OK\r\n".to_owned() + &parts.concat()).into_bytes())
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>, start in 0usize..20, to_head: bool) {
            let head = [&b"HTTP/1.1 200 OK\r\nA: "[..start], &bytes, b"\r\n\r\n"].concat();
            let _ = parse_response_head(&head, to_head);
        }

        #[test]
        fn splits_change_nothing(bytes in almost_response(), sizes in proptest::collection::vec(1usize..30, 1..9)) {
            let whole = read(&bytes, &[usize::MAX]);
            prop_assert_eq!(&read(&bytes, &sizes), &whole);
            prop_assert_eq!(&read(&bytes, &[1]), &whole);
        }

        #[test]
        fn a_prefix_is_incomplete_or_wrong(bytes in almost_response()) {
            if let Ok(Some((_, len))) = parse_response_head(&bytes, false) {
                for end in 0..len {
                    prop_assert_eq!(parse_response_head(&bytes[..end], false), Ok(None));
                }
            }
        }
    }
}
