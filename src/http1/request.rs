//! A caller's request head: what is refused, with which error, and what is made of the rest.
//!
//! async-h1 is the parser, and this file is the guard in front of it: it decides every refusal, since async-h1 drops the
//! connection, panics or misreads where a caller is owed an answer. What passes is handed over as a head that async-h1
//! reads faithfully: HTTP/1.1, a Host and a target that cannot bend its URL, no framing and no Expect (both are ours), and a stand-in
//! for each value, so that it is under 8 KiB.
//! Reading is done here, deadlines and answers are not.

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::{self, Write};
use std::net::Ipv6Addr;
use std::pin::pin;
use std::rc::Rc;
use std::str::FromStr;
use std::task::{Context, Poll, Waker};

use futures_lite::io::{AsyncRead, Cursor};
use http_types::Method;
use memchr::{memchr, memchr2};

use super::write::MEMORY;
use super::{Framing, HEADER_LIMIT, Headers, Reader};
use crate::error::Error;

/// async-h1 reads heads that are shorter than this.
const PARSER_HEAD_LIMIT_BYTES: usize = 8 * 1024;
/// Empty lines before a request line that are skipped (RFC 9112 section 2.2), in bytes.
const EMPTY_LINES_LIMIT_BYTES: usize = 16;

/// A request head that can be acted on.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestHead {
    /// A method that http-types knows, but for CONNECT and PRI.
    pub method: Rc<str>,
    /// The request target byte for byte as it was sent, in origin-form (`/path?query`), or `*` for OPTIONS. From an
    /// absolute-form it is the part behind the authority (RFC 9112 section 3.2.2).
    pub target: String,
    /// HTTP/1.0: no chunked answer.
    pub http_10: bool,
    /// Host first (that of an absolute-form target goes before the field), then the others in their
    /// order, names in lower case. Without Content-Length, Transfer-Encoding and Expect, which are the
    /// three fields below. Values may hold bytes over 0x7F (RFC 9110 section 5.5); that of Host is ASCII.
    pub headers: Headers,
    /// How the body comes; never `UntilClose`.
    pub framing: Framing,
    /// Whether the caller wants the connection to live on (RFC 9112 section 9.3).
    pub keep_alive: bool,
    /// Whether the caller waits for a 100 before it sends its body.
    pub expects_continue: bool,
}

/// Why there is no request head.
#[derive(Debug)]
pub enum ReadError {
    /// The head is refused; the caller is owed this answer, and the connection cannot be used further.
    Refused(Error),
    /// The connection broke.
    Io(io::Error),
    /// The connection ended inside a head.
    Eof,
}

/// Reads one head and leaves what follows it in the reader; None if the connection ends before a head begins. Empty
/// lines before it are skipped. Dropping the future loses nothing.
pub async fn read_request_head<R: AsyncRead + Unpin>(
    reader: &mut Reader<R>,
    max_head_bytes: usize,
) -> Result<Option<RequestHead>, ReadError> {
    let mut screen = Screen::default();
    let mut skipped = 0;
    reader.release();
    loop {
        while reader.buffered().starts_with(b"\r\n") {
            reader.consume(2);
            skipped += 2;
            screen = Screen::default();
        }
        if skipped > EMPTY_LINES_LIMIT_BYTES {
            return Err(ReadError::Refused(malformed(
                "There are empty lines instead of a request",
            )));
        }
        let buffered = reader.buffered();
        let window = &buffered[..buffered.len().min(max_head_bytes)];
        if let Some(end) = screen.advance(window).map_err(ReadError::Refused)? {
            let head = parse_screened(&buffered[..end]).map_err(ReadError::Refused)?;
            reader.consume(end);
            return Ok(Some(head));
        }
        if window.len() == max_head_bytes {
            return Err(ReadError::Refused(Error::HeadTooLarge { limit_bytes: max_head_bytes }));
        }
        if reader.fill_little().await.map_err(ReadError::Io)? == 0 {
            return if reader.buffered().is_empty() { Ok(None) } else { Err(ReadError::Eof) };
        }
    }
}

/// Parses a complete head: from the first byte of the request line through the empty line, and nothing behind it.
pub fn parse_request_head(head: &[u8]) -> Result<RequestHead, Error> {
    if Screen::default().advance(head)? != Some(head.len()) {
        return Err(malformed("The request head is not complete"));
    }
    parse_screened(head)
}

/// Looks at each byte of a head once: finds its end, and refuses what no head may contain. Its lines
/// end in CRLF, a CR or LF stands nowhere else, the rest is printable ASCII or a tab. Fields may hold
/// bytes over 0x7F, too; httparse refuses those in names.
#[derive(Default)]
struct Screen {
    /// Bytes looked at.
    at: usize,
    /// Whether the request line is over.
    in_fields: bool,
}

impl Screen {
    /// Goes on through `buf`, which has grown since the last call. Some is the head's length.
    fn advance(&mut self, buf: &[u8]) -> Result<Option<usize>, Error> {
        let after_cr = |at: usize| at > 0 && buf[at - 1] == b'\r';
        loop {
            let text = text_length(&buf[self.at..], self.in_fields);
            if text > 0 && after_cr(self.at) {
                return Err(malformed("The head has a CR without LF"));
            }
            self.at += text;
            match buf.get(self.at) {
                None => return Ok(None),
                Some(b'\n') if buf[..=self.at].ends_with(b"\r\n\r\n") => {
                    return Ok(Some(self.at + 1));
                }
                Some(b'\n') if after_cr(self.at) => self.in_fields = true,
                Some(b'\n') => return Err(malformed("A line of the head ends in LF without CR")),
                Some(_) if after_cr(self.at) => {
                    return Err(malformed("The head has a CR without LF"));
                }
                Some(b'\r') => {}
                Some(0x80..) => {
                    return Err(malformed("The request line has a byte that is not ASCII"));
                }
                Some(_) => return Err(malformed("The head has a control character")),
            }
            self.at += 1;
        }
    }
}

/// How many printable characters and tabs `bytes` begins with. Bytes over 0x7F are such in fields only.
fn text_length(bytes: &[u8], in_fields: bool) -> usize {
    let last = if in_fields { 0xff } else { b'~' };
    let is_text = |byte: &u8| (*byte >= b' ' && *byte <= last && *byte != 0x7f) || *byte == b'\t';
    let line = memchr2(b'\r', b'\n', bytes).unwrap_or(bytes.len());
    // Without a branch for each byte the compiler does many at a time.
    if bytes[..line].iter().fold(true, |all, byte| all & is_text(byte)) {
        return line;
    }
    bytes.iter().take_while(|byte| is_text(byte)).count()
}

/// Parses a head that went through [`Screen`].
fn parse_screened(head: &[u8]) -> Result<RequestHead, Error> {
    let line_end = memchr(b'\r', head).expect("a screened head has lines");
    let (line, fields) = (&head[..line_end], &head[line_end + 2..]);
    let line = std::str::from_utf8(line).expect("a screened request line is ASCII");
    let line = RequestLine::parse(line)?;
    // To have the slots ready costs something for each, and few heads have many fields.
    let mut few = [httparse::EMPTY_HEADER; HEADER_LIMIT / 4];
    let mut many;
    let slots = match parse_fields(fields, &mut few)? {
        Some(count) => &mut few[..count],
        None => {
            many = [httparse::EMPTY_HEADER; HEADER_LIMIT];
            let count = parse_fields(fields, &mut many)?
                .ok_or(Error::TooManyHeaders { limit: HEADER_LIMIT })?;
            &mut many[..count]
        }
    };
    let fields = Fields::sort(slots);
    let host = host(&line, &fields)?;
    let framing = framing(&fields, line.http_10)?;
    if fields.expects_more {
        return Err(malformed("The only Expect that can be met is 100-continue"));
    }
    let (method, headers) = decode(&line, host, fields.others)?;
    Ok(RequestHead {
        method,
        target: line.target.into_owned(),
        http_10: line.http_10,
        keep_alive: super::keep_alive(&headers, line.http_10),
        headers,
        framing,
        // RFC 9110 section 10.1.1: not for HTTP/1.0, and there is nothing to wait for without a body.
        expects_continue: fields.expects_continue
            && !line.http_10
            && !matches!(framing, Framing::Empty | Framing::Length(0)),
    })
}

struct RequestLine<'a> {
    method: &'a str,
    target: Cow<'a, str>,
    /// Of a target in absolute-form.
    authority: Option<&'a str>,
    http_10: bool,
}

impl<'a> RequestLine<'a> {
    /// The version goes first: a head of another protocol is told so, whatever its method (HTTP/2's preface is
    /// `PRI * HTTP/2.0`).
    fn parse(line: &'a str) -> Result<Self, Error> {
        let mut words = line.split(' ');
        let (Some(method), Some(target), Some(version), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(malformed("The request line is not `METHOD TARGET HTTP/1.1`"));
        };
        let http_10 = is_http_10(version)?;
        check_method(method)?;
        let (target, authority) = origin_form(method, target)?;
        Ok(Self { method, target, authority, http_10 })
    }
}

fn is_http_10(version: &str) -> Result<bool, Error> {
    match version.strip_prefix("HTTP/") {
        Some("1.1") => Ok(false),
        Some("1.0") => Ok(true),
        Some(number) if number.starts_with(|c: char| c.is_ascii_digit()) => {
            Err(Error::UnsupportedVersion)
        }
        _ => Err(malformed("The request line does not end in an HTTP version")),
    }
}

/// Methods are case-sensitive (RFC 9110 section 9.1), which http-types forgets. CONNECT is known and not implemented: we
/// are no tunnel. PRI is no method at all but the first word of HTTP/2.
fn check_method(method: &str) -> Result<(), Error> {
    if !is_token(method.as_bytes()) {
        return Err(malformed("The method is not a token"));
    }
    // Nearly all are one of these.
    if matches!(method, "POST" | "GET") {
        return Ok(());
    }
    match Method::from_str(method) {
        Ok(Method::Connect | Method::Pri) | Err(_) => {
            Err(Error::UnknownMethod { method: method.to_owned() })
        }
        Ok(known) if known.as_ref() != method => {
            Err(Error::UnknownMethod { method: method.to_owned() })
        }
        Ok(_) => Ok(()),
    }
}

/// Whether it could be a method or the name of a field (RFC 9110 section 5.6.2).
pub fn is_token(word: &[u8]) -> bool {
    !word.is_empty() && word.iter().all(|byte| super::is_token_byte(*byte))
}

/// The target without scheme and authority, and the authority if there was one (RFC 9112 section 3.2).
fn origin_form<'a>(
    method: &str,
    target: &'a str,
) -> Result<(Cow<'a, str>, Option<&'a str>), Error> {
    if target.contains(['\t', '#']) {
        return Err(malformed("The request target has a tab or a fragment"));
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok((Cow::Borrowed(target), None));
    }
    let rest = match target.split_once("://") {
        Some((scheme, rest))
            if ["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) =>
        {
            rest
        }
        _ => {
            return Err(malformed("The request target is neither a path nor an http URL"));
        }
    };
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let path = match path {
        "" if method == "OPTIONS" => Cow::Borrowed("*"),
        "" => Cow::Borrowed("/"),
        path if path.starts_with('/') => Cow::Borrowed(path),
        query => Cow::Owned(format!("/{query}")),
    };
    Ok((path, Some(authority)))
}

/// Finds the fields in the field lines and the empty line behind them, and says how many there are; None if there are more
/// than `slots`.
fn parse_fields<'a>(
    lines: &'a [u8],
    slots: &mut [httparse::Header<'a>],
) -> Result<Option<usize>, Error> {
    match httparse::parse_headers(lines, slots) {
        Ok(httparse::Status::Complete((_, fields))) => Ok(Some(fields.len())),
        Ok(httparse::Status::Partial) => Err(malformed("The request head is not complete")),
        Err(httparse::Error::TooManyHeaders) => Ok(None),
        Err(httparse::Error::HeaderName) => Err(malformed(
            "A header line does not begin with a name and a colon, without white space around the name",
        )),
        Err(_) => Err(malformed("A header has an invalid value")),
    }
}

/// The fields of a head. Those that async-h1 must not see are taken out: it gets a Host of ours, misreads framing, and starts
/// an executor for Expect.
#[derive(Default)]
struct Fields<'f, 'a> {
    host: Times<&'a [u8]>,
    content_length: Times<&'a [u8]>,
    /// The values of Transfer-Encoding.
    codings: Vec<&'a [u8]>,
    expects_continue: bool,
    /// There is an Expect that cannot be met.
    expects_more: bool,
    /// In their order.
    others: &'f [httparse::Header<'a>],
}

/// How often a field is there that should be there once.
#[derive(Default)]
enum Times<T> {
    #[default]
    Never,
    Once(T),
    More,
}

impl<T> Times<T> {
    fn add(&mut self, value: T) {
        *self = if let Times::Never = self { Times::Once(value) } else { Times::More };
    }
}

impl<'f, 'a> Fields<'f, 'a> {
    fn sort(all: &'f mut [httparse::Header<'a>]) -> Self {
        let mut fields = Fields::default();
        let mut others = 0;
        for at in 0..all.len() {
            let httparse::Header { name, value } = all[at];
            if name.eq_ignore_ascii_case("host") {
                fields.host.add(value);
            } else if name.eq_ignore_ascii_case("content-length") {
                fields.content_length.add(value);
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                fields.codings.push(value);
            } else if name.eq_ignore_ascii_case("expect") {
                let is_continue = value.eq_ignore_ascii_case(b"100-continue");
                fields.expects_continue |= is_continue;
                fields.expects_more |= !is_continue;
            } else {
                all.swap(others, at);
                others += 1;
            }
        }
        fields.others = &all[..others];
        fields
    }
}

/// The host the request is for; None if HTTP/1.0 names none.
fn host<'a>(line: &RequestLine<'a>, fields: &Fields<'_, 'a>) -> Result<Option<&'a str>, Error> {
    let field = match fields.host {
        Times::More => return Err(malformed("There is more than one Host header")),
        Times::Never if !line.http_10 => return Err(malformed("The Host header is missing")),
        Times::Never => None,
        // What is not UTF-8 is no host either.
        Times::Once(host) => Some(std::str::from_utf8(host).unwrap_or_default()),
    };
    if !field.into_iter().chain(line.authority).all(is_authority) {
        return Err(malformed("The host is not a name or an address with or without a port"));
    }
    Ok(line.authority.or(field))
}

/// `host[:port]` with a DNS name or an address: narrower than RFC 3986's reg-name, which lets in percent signs and
/// punctuation, and no user info.
fn is_authority(authority: &str) -> bool {
    let (host_is_good, port) = match authority
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
    {
        Some((address, rest)) => (address.parse::<Ipv6Addr>().is_ok(), rest),
        None => {
            let (name, port) = authority.split_at(authority.find(':').unwrap_or(authority.len()));
            let is_name_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            (!name.is_empty() && name.bytes().all(is_name_byte), port)
        }
    };
    let port_is_good = match port.strip_prefix(':') {
        None => port.is_empty(),
        Some(digits) => {
            digits.is_empty()
                || (super::is_digits(digits.as_bytes()) && digits.parse::<u16>().is_ok())
        }
    };
    host_is_good && port_is_good
}

/// RFC 9112 section 6.3, with every doubt refused: what two parsers can read in two ways smuggles requests.
fn framing(fields: &Fields, http_10: bool) -> Result<Framing, Error> {
    match (fields.codings.as_slice(), &fields.content_length) {
        ([], Times::Never) => Ok(Framing::Empty),
        ([], Times::Once(length)) => super::parse_length(length)
            .map(Framing::Length)
            .ok_or_else(|| malformed("The Content-Length is not a number of bytes")),
        ([], Times::More) => Err(malformed("There is more than one Content-Length")),
        (_, Times::Once(_) | Times::More) => {
            Err(malformed("There are both Content-Length and Transfer-Encoding"))
        }
        _ if http_10 => Err(malformed("HTTP/1.0 has no Transfer-Encoding")),
        ([coding], Times::Never) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
        (codings, Times::Never) if codings.iter().any(|coding| !coding.is_ascii()) => {
            Err(malformed("The Transfer-Encoding has a byte that is not ASCII"))
        }
        (codings, Times::Never) => {
            let value = String::from_utf8_lossy(&codings.join(&b", "[..])).into_owned();
            Err(Error::UnsupportedTransferEncoding { value })
        }
    }
}

/// Lets async-h1 parse the request and returns what it understood. What it need not understand goes round it: the host,
/// of which it would build a URL whatever it says; the target, which a URL would rewrite; and the values, each of which has its
/// place among the fields as a stand-in. So heads of any length come to be short ones.
fn decode(
    line: &RequestLine,
    host: Option<&str>,
    fields: &[httparse::Header<'_>],
) -> Result<(Rc<str>, Headers), Error> {
    let understood = Understood::of(line.method, fields)?;
    let host = host.map(|host| ("host", host.as_bytes()));
    let others = understood.names.iter().map(|(place, name)| (name.as_str(), fields[*place].value));
    Ok((understood.method.clone(), Headers::of(host.into_iter().chain(others))))
}

/// What async-h1 made of a head, whatever the values of its fields.
#[derive(Debug)]
struct Understood {
    /// As it was sent.
    sent_method: String,
    /// The names of its fields as they were sent, each with a line end behind it.
    sent_names: String,
    method: Rc<str>,
    /// In lower case, each with the place that stood as its value; in the order of the places.
    names: Vec<(usize, String)>,
}

/// Kinds of clients that are known at once, as far as the names of their fields go.
const KNOWN_HEADS: usize = 16;

thread_local! {
    /// The latest heads, the latest one first. Without values they are few: a client sends the same names with each
    /// request, and to read them anew each time was a quarter of all that a request cost.
    static KNOWN: RefCell<Vec<Rc<Understood>>> = const { RefCell::new(Vec::new()) };
}

impl Understood {
    fn of(method: &str, fields: &[httparse::Header<'_>]) -> Result<Rc<Understood>, Error> {
        KNOWN.with_borrow_mut(|known| {
            let read = match known.iter().position(|read| read.is_of(method, fields)) {
                Some(0) => return Ok(known[0].clone()),
                Some(at) => known.remove(at),
                None => Rc::new(Understood::by_async_h1(method, fields)?),
            };
            known.truncate(KNOWN_HEADS - 1);
            known.insert(0, read.clone());
            Ok(read)
        })
    }

    fn is_of(&self, method: &str, fields: &[httparse::Header<'_>]) -> bool {
        // No name has a line end in it.
        let mut rest = self.sent_names.as_str();
        let mut next = |name: &str| {
            let left = rest.strip_prefix(name).and_then(|left| left.strip_prefix('\n'));
            rest = left.unwrap_or_default();
            left.is_some()
        };
        self.sent_method == method && fields.iter().all(|field| next(field.name)) && rest.is_empty()
    }

    fn by_async_h1(method: &str, fields: &[httparse::Header<'_>]) -> Result<Understood, Error> {
        // A slot is taken by the Host that async-h1 wants even when HTTP/1.0 sent none.
        if fields.len() >= HEADER_LIMIT {
            return Err(Error::TooManyHeaders { limit: HEADER_LIMIT });
        }
        let head = short_head(method, fields);
        if head.len() >= PARSER_HEAD_LIMIT_BYTES {
            return Err(Error::HeadTooLarge { limit_bytes: PARSER_HEAD_LIMIT_BYTES });
        }
        let sent_names = fields.iter().flat_map(|field| [field.name, "\n"]).collect();
        let request = run_async_h1(head)?;
        let fields =
            request.iter().flat_map(|(name, values)| values.iter().map(move |value| (name, value)));
        let fields = fields.filter(|(name, _)| *name != "host");
        let mut names: Vec<_> = fields
            .map(|(name, stand_in)| (place(stand_in.as_str()), name.as_str().to_owned()))
            .collect();
        names.sort_unstable();
        let (sent_method, method) = (method.to_owned(), request.method().as_ref().into());
        Ok(Understood { sent_method, sent_names, method, names })
    }
}

/// A head that async-h1 takes, with each value's place in `fields` in the place of the value.
fn short_head(method: &str, fields: &[httparse::Header<'_>]) -> Vec<u8> {
    let mut head = Vec::with_capacity(512);
    for part in [method, " / HTTP/1.1\r\nHost: h\r\n"] {
        head.extend_from_slice(part.as_bytes());
    }
    for (place, field) in fields.iter().enumerate() {
        write!(head, "{}: {place}\r\n", field.name).expect(MEMORY);
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// Reads what [`short_head`] put in place of a value.
fn place(stand_in: &str) -> usize {
    stand_in.parse().expect("short_head wrote a number")
}

/// One poll of async-h1's decoder over memory. It finds nothing to refuse that the guard let through; if it ever did, that
/// would be the caller's 400 too.
fn run_async_h1(head: Vec<u8>) -> Result<http_types::Request, Error> {
    let decoding = pin!(async_h1::server::decode(Cursor::new(head)));
    match decoding.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(Some((request, _)))) => Ok(request),
        Poll::Ready(Ok(None)) => Err(malformed("The parser found no end of the head")),
        Poll::Ready(Err(error)) => Err(malformed(&format!("The parser refused the head: {error}"))),
        Poll::Pending => unreachable!("reading memory never waits"),
    }
}

fn malformed(detail: &str) -> Error {
    Error::MalformedRequest { detail: detail.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::super::reader::tests::Pieces;
    use super::*;
    use futures_lite::future::block_on;
    use proptest::prelude::*;

    const LIMIT: usize = 32 * 1024;

    fn parse(head: &str) -> Result<RequestHead, Error> {
        parse_request_head(head.as_bytes())
    }

    /// Reads all heads of a connection, cut into reads of the given sizes; how it ended comes last.
    fn read(bytes: &[u8], sizes: &[usize]) -> (Vec<RequestHead>, String, Vec<u8>) {
        let mut reader = Reader::new(Pieces::new(bytes, sizes));
        let mut heads = Vec::new();
        loop {
            match block_on(read_request_head(&mut reader, LIMIT)) {
                Ok(Some(head)) => heads.push(head),
                Ok(None) => return (heads, "end".to_owned(), Vec::new()),
                Err(ReadError::Eof) => {
                    return (heads, "eof".to_owned(), reader.buffered().to_vec());
                }
                Err(error) => return (heads, format!("{error:?}"), Vec::new()),
            }
        }
    }

    fn text(value: &[u8]) -> &str {
        std::str::from_utf8(value).unwrap()
    }

    fn fields(head: &RequestHead) -> Vec<(&str, &str)> {
        head.headers.iter().map(|(name, value)| (name, text(value))).collect()
    }

    /// The status that each variant's documentation promises.
    fn status(error: &Error) -> u16 {
        match error {
            Error::MalformedRequest { .. } => 400,
            Error::HeadTooLarge { .. } | Error::TooManyHeaders { .. } => 431,
            Error::UnknownMethod { .. } | Error::UnsupportedTransferEncoding { .. } => 501,
            Error::UnsupportedVersion => 505,
            other => panic!("not a refusal of a head: {other:?}"),
        }
    }

    #[test]
    fn a_plain_request() {
        let head = parse(
            "POST /v1/chat%2Fx?a=|b HTTP/1.1\r\nX-B: 2\r\nHOST: Box.lan:8080\r\nContent-Length:  012\t\r\nx-a:\r\n\
             X-b: 1\r\nExpect: 100-Continue\r\nConnection: foo\r\n\r\n",
        )
        .unwrap();
        assert_eq!((&*head.method, head.target.as_str()), ("POST", "/v1/chat%2Fx?a=|b"));
        assert_eq!(
            fields(&head),
            [
                ("host", "Box.lan:8080"),
                ("x-b", "2"),
                ("x-a", ""),
                ("x-b", "1"),
                ("connection", "foo")
            ]
        );
        assert_eq!(head.framing, Framing::Length(12));
        assert_eq!((head.http_10, head.keep_alive, head.expects_continue), (false, true, true));
    }

    #[test]
    fn refusals_of_the_request_line() {
        for (line, expected) in [
            ("", 400),
            ("GET /", 400),
            ("GET  / HTTP/1.1", 400),
            ("GET / HTTP/1.1 ", 400),
            (" GET / HTTP/1.1", 400),
            ("GET\t/ HTTP/1.1", 400),
            ("GET / x HTTP/1.1", 400),
            ("GET / http/1.1", 400),
            ("GET / HTTP/", 400),
            ("GET / HTTP/one", 400),
            ("GET / FTP/1.1", 400),
            ("G@T / HTTP/1.1", 400),
            (" / HTTP/1.1", 400),
            ("GET  HTTP/1.1", 400),
            ("GET v1/models HTTP/1.1", 400),
            ("GET * HTTP/1.1", 400),
            ("GET /a#b HTTP/1.1", 400),
            ("GET /a\tb HTTP/1.1", 400),
            ("GET ftp://h/ HTTP/1.1", 400),
            ("GET http:///x HTTP/1.1", 400),
            ("GET http://u:p@h/ HTTP/1.1", 400),
            ("GET h:443 HTTP/1.1", 400),
            ("BREW / HTTP/1.1", 501),
            ("get / HTTP/1.1", 501),
            ("CONNECT h:443 HTTP/1.1", 501),
            ("PRI / HTTP/1.1", 501),
            ("PRI * HTTP/2.0", 505),
            ("GET / HTTP/1.2", 505),
            ("GET / HTTP/0.9", 505),
            ("GET / HTTP/2", 505),
        ] {
            let error = parse(&format!("{line}\r\nHost: h\r\n\r\n")).unwrap_err();
            assert_eq!(status(&error), expected, "{line:?}: {error:?}");
        }
    }

    #[test]
    fn refusals_of_header_lines() {
        for line in [
            "A : b\r\n",
            "A\tx: b\r\n",
            " A: b\r\n",
            "A: b\r\n c\r\n",
            "A: b\r\n\tc\r\n",
            ": b\r\n",
            "A\r\n",
            "A=b\r\n",
            "A(b): c\r\n",
            "A: b\n",
            "A: b\n\r\n",
            "A: b\rC: d\r\n",
            "A: b\r\r\n",
            "A: \0\r\n",
            "A: \u{1b}[0m\r\n",
            "A: \u{7f}\r\n",
            "A: \u{e9}\u{7f}\r\n",
            "A\u{e9}: b\r\n",
            "\u{e9}\r\n",
        ] {
            let error = parse(&format!("GET / HTTP/1.1\r\nHost: h\r\n{line}\r\n")).unwrap_err();
            assert_eq!(status(&error), 400, "{line:?}: {error:?}");
        }
        assert_eq!(status(&parse("GET / HTTP/1.1\nHost: h\n\n").unwrap_err()), 400);
        assert_eq!(
            status(&parse("GET / HTTP/1.1\r\nHost: h\r\n").unwrap_err()),
            400,
            "not complete"
        );
        assert_eq!(
            status(&parse("GET / HTTP/1.1\r\nHost: h\r\n\r\nx").unwrap_err()),
            400,
            "bytes behind it"
        );
    }

    #[test]
    fn bytes_over_0x7f_stand_in_values_and_nowhere_else() {
        let all: Vec<u8> = (0x80..=0xff).collect();
        for value in [&b"caf\xe9"[..], "S\u{e3}o Paulo".as_bytes(), b"\xff", b"\xa0x\xa0", &all] {
            let head = [b"GET / HTTP/1.1\r\nHost: h\r\nA: ", value, b" \r\nB: \t\r\n\r\n"].concat();
            let parsed = parse_request_head(&head).unwrap();
            assert_eq!(parsed.headers.get("a"), Some(value));
            assert_eq!(parsed.headers.get("b"), Some(&b""[..]));
        }
        for head in [
            &b"GET /caf\xe9 HTTP/1.1\r\nHost: h\r\n\r\n"[..],
            b"G\xe9T / HTTP/1.1\r\nHost: h\r\n\r\n",
            b"GET / HTTP/1.1\xe9\r\nHost: h\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: caf\xe9\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: b\xc3\xbccher.example\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\xe9\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\xa0\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: \xff\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\xa0\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nN\xe9: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nA: x\r\n\xa0: x\r\n\r\n",
        ] {
            let error = parse_request_head(head).unwrap_err();
            assert_eq!(status(&error), 400, "{}: {error:?}", head.escape_ascii());
        }
    }

    #[test]
    fn hosts() {
        for host in [
            "h",
            "h:",
            "h:80",
            "box_1.lan",
            "[::1]:8080",
            "[fe80::1]",
            "10.0.0.1:65535",
            "256.1.1.1",
            "xn--zz",
        ] {
            let head = parse(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).unwrap();
            assert_eq!(fields(&head), [("host", host)]);
        }
        for host in [
            "", "a/admin?", "a b", "a,b", "u@h", "h:x", "h:+8", "h:65536", "h:1:2", "[::1", "[h]",
            "[::1]x", "::1", "a%2fb",
        ] {
            let error = parse(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).unwrap_err();
            assert_eq!(status(&error), 400, "{host:?}");
        }
        for head in ["GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nHost: h\r\nhost: h\r\n\r\n"] {
            assert_eq!(status(&parse(head).unwrap_err()), 400, "{head:?}");
        }
    }

    #[test]
    fn targets_are_reduced_to_origin_form() {
        for (line, target, host) in [
            ("GET /a/../b?c=%zz\\ HTTP/1.1", "/a/../b?c=%zz\\", "field"),
            ("GET //a HTTP/1.1", "//a", "field"),
            ("OPTIONS * HTTP/1.1", "*", "field"),
            ("GET http://box:1/a?b HTTP/1.1", "/a?b", "box:1"),
            ("GET HTTPS://box HTTP/1.1", "/", "box"),
            ("GET http://box?q HTTP/1.1", "/?q", "box"),
            ("OPTIONS http://box HTTP/1.1", "*", "box"),
        ] {
            let head = parse(&format!("{line}\r\nHost: field\r\n\r\n")).unwrap();
            assert_eq!((head.target.as_str(), fields(&head)[0].1), (target, host), "{line}");
        }
    }

    #[test]
    fn framings() {
        for (lines, framing) in [
            ("", Ok(Framing::Empty)),
            ("Content-Length: 0\r\n", Ok(Framing::Length(0))),
            ("Content-Length: 18446744073709551615\r\n", Ok(Framing::Length(u64::MAX))),
            ("Content-Length: 18446744073709551616\r\n", Err(400)),
            ("Content-Length: +3\r\n", Err(400)),
            ("Content-Length: -3\r\n", Err(400)),
            ("Content-Length: 0x3\r\n", Err(400)),
            ("Content-Length: 3 3\r\n", Err(400)),
            ("Content-Length: 3, 3\r\n", Err(400)),
            ("Content-Length:\r\n", Err(400)),
            ("Content-Length: 3\r\ncontent-length: 3\r\n", Err(400)),
            ("Transfer-Encoding: Chunked\r\n", Ok(Framing::Chunked)),
            ("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", Err(400)),
            ("Transfer-Encoding: identity\r\nContent-Length: 3\r\n", Err(400)),
            ("Transfer-Encoding: gzip, chunked\r\n", Err(501)),
            ("Transfer-Encoding: identity\r\n", Err(501)),
            ("Transfer-Encoding: xchunked\r\n", Err(501)),
            ("Transfer-Encoding: chunked, chunked\r\n", Err(501)),
            ("Transfer-Encoding: chunked;q=1\r\n", Err(501)),
            ("Transfer-Encoding:\r\n", Err(501)),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", Err(501)),
        ] {
            let head = parse(&format!("POST / HTTP/1.1\r\nHost: h\r\n{lines}\r\n"));
            assert_eq!(
                head.map(|head| head.framing).map_err(|error| status(&error)),
                framing,
                "{lines:?}"
            );
        }
        let error = parse("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap_err();
        assert_eq!(status(&error), 400);
    }

    #[test]
    fn who_keeps_the_connection() {
        for (version, connection, expected) in [
            ("1.1", "x", true),
            ("1.1", "x, CLOSE", false),
            ("1.1", "keep-alive\r\nConnection: close", false),
            ("1.0", "x", false),
            ("1.0", "Keep-Alive", true),
            ("1.0", "keep-alive, close", false),
        ] {
            let head = parse(&format!(
                "GET / HTTP/{version}\r\nHost: h\r\nConnection: {connection}\r\n\r\n"
            ))
            .unwrap();
            assert_eq!(head.keep_alive, expected, "{version} {connection}");
            assert_eq!(head.http_10, version == "1.0");
        }
        assert_eq!(parse("GET / HTTP/1.0\r\n\r\n").unwrap().headers, Headers::default());
    }

    #[test]
    fn expectations() {
        let expects = |version: &str, lines: &str| {
            parse(&format!("POST / HTTP/{version}\r\nHost: h\r\n{lines}\r\n"))
                .map(|head| head.expects_continue)
        };
        assert_eq!(expects("1.1", "Expect: 100-CONTINUE\r\nContent-Length: 1\r\n"), Ok(true));
        assert_eq!(
            expects("1.1", "Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n"),
            Ok(true)
        );
        assert_eq!(expects("1.1", "Expect: 100-continue\r\n"), Ok(false));
        assert_eq!(expects("1.0", "Expect: 100-continue\r\nContent-Length: 1\r\n"), Ok(false));
        assert_eq!(expects("1.1", "Content-Length: 1\r\n"), Ok(false));
        for other in ["Expect: 200-ok\r\n", "Expect:\r\n", "Expect: 100-continue\r\nExpect: x\r\n"]
        {
            assert_eq!(status(&expects("1.1", other).unwrap_err()), 400, "{other:?}");
        }
    }

    /// async-h1 would start a global executor for an Expect that it saw; its threads carry that name.
    #[cfg(target_os = "linux")]
    #[test]
    fn an_expectation_starts_no_executor() {
        parse("POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
            .unwrap();
        for thread in std::fs::read_dir("/proc/self/task").unwrap() {
            let name =
                std::fs::read_to_string(thread.unwrap().path().join("comm")).unwrap_or_default();
            assert!(!name.starts_with("async-global"), "{name}");
        }
    }

    #[test]
    fn what_was_read_of_other_heads_changes_nothing() {
        let head = |n: usize, value: &str| {
            format!("GET /{n} HTTP/1.1\r\nHost: h\r\nN{n}: {value}\r\nB:\r\n\r\n")
        };
        for round in 0..3 {
            for n in (0..KNOWN_HEADS + 3).chain([5, 5, 0]) {
                let value = format!("{round}");
                let parsed = parse(&head(n, &value)).unwrap();
                let name = format!("n{n}");
                assert_eq!(fields(&parsed), [("host", "h"), (&name, &value), ("b", "")]);
            }
        }
        assert_eq!(KNOWN.with_borrow(Vec::len), KNOWN_HEADS);
        let post = parse("POST / HTTP/1.1\r\nHost: h\r\nN0: 1\r\nB:\r\n\r\n").unwrap();
        assert_eq!(&*post.method, "POST", "the method is part of what is known");
    }

    #[test]
    fn heads_beyond_the_parsers_limit_pass_whole() {
        for size in 7_900..8_300 {
            let token = "t".repeat(size);
            let head = parse(&format!(
                "GET / HTTP/1.1\r\nHost: h\r\nB: 1\r\nA: 0\r\nB: {token}\r\nb:\r\n\r\n"
            ))
            .unwrap();
            assert_eq!(
                fields(&head),
                [("host", "h"), ("b", "1"), ("a", "0"), ("b", &token), ("b", "")]
            );
        }
        let (target, host) = (format!("/{}", "p".repeat(20_000)), "h".repeat(9_000));
        let head =
            parse(&format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nA: 1\r\n\r\n")).unwrap();
        assert_eq!((head.target, head.headers.get("host")), (target, Some(host.as_bytes())));
    }

    #[test]
    fn limits() {
        let many = |version: &str, count: usize| {
            let lines: String = (0..count).map(|i| format!("N{i}: {i}\r\n")).collect();
            parse(&format!("GET / HTTP/{version}\r\n{lines}\r\n"))
        };
        let with_host = |count: usize| {
            let lines: String =
                (1..count).map(|i| format!("N{i}: {}\r\n", "v".repeat(200))).collect();
            parse(&format!("GET / HTTP/1.1\r\nHost: h\r\n{lines}\r\n"))
        };
        assert_eq!(with_host(128).unwrap().headers.len(), 128);
        assert_eq!(with_host(129), Err(Error::TooManyHeaders { limit: 128 }));
        assert_eq!(many("1.0", 127).unwrap().headers.len(), 127);
        assert_eq!(many("1.0", 128), Err(Error::TooManyHeaders { limit: 128 }));
        assert_eq!(many("1.0", 500), Err(Error::TooManyHeaders { limit: 128 }));
        // Heads with up to 32 fields are read by another way than those with more.
        for count in [31, 32, 33, 34] {
            let others: String = (0..count - 2).map(|i| format!("N{i}: {i}\r\n")).collect();
            let head = |last: &str| {
                parse(&format!("POST / HTTP/1.1\r\nContent-Length: 3\r\n{others}{last}\r\n"))
            };
            let taken = head("Host: h\r\n").unwrap();
            assert_eq!((taken.headers.len(), taken.framing), (count - 1, Framing::Length(3)));
            assert_eq!(taken.headers.iter().last().unwrap().1, format!("{}", count - 3).as_bytes());
            for (last, says) in [
                ("Content-Length: 3\r\nHost: h\r\n", "more than one Content-Length"),
                ("Host: h\r\nHost: h\r\n", "more than one Host"),
                ("Host: h\r\nBad name: x\r\n", "name and a colon"),
                ("", "Host header is missing"),
            ] {
                let Err(Error::MalformedRequest { detail }) = head(last) else {
                    panic!("{count} {last} was taken")
                };
                assert!(detail.contains(says), "{count} {last}: {detail}");
            }
        }
        let name = "n".repeat(8_200);
        let error = parse(&format!("GET / HTTP/1.1\r\nHost: h\r\n{name}: 1\r\n\r\n"));
        assert_eq!(error, Err(Error::HeadTooLarge { limit_bytes: 8192 }));
    }

    #[test]
    fn the_limit_of_a_head_is_exact() {
        let head_of = |len: usize| {
            let frame = "GET / HTTP/1.1\r\nHost: h\r\nA: \r\n\r\n";
            frame.replace("A: ", &format!("A: {}", "a".repeat(len - frame.len())))
        };
        for sizes in [&[1_000_000][..], &[1], &[4096, 1]] {
            assert_eq!(read(head_of(LIMIT).as_bytes(), sizes).1, "end");
            assert_eq!(
                read(head_of(LIMIT + 1).as_bytes(), sizes).1,
                "Refused(HeadTooLarge { limit_bytes: 32768 })"
            );
            let endless = vec![b'a'; 10 * LIMIT];
            assert_eq!(read(&endless, sizes).1, "Refused(HeadTooLarge { limit_bytes: 32768 })");
        }
    }

    #[test]
    fn pipelined_heads_and_ends_of_streams() {
        let one = "GET /1 HTTP/1.1\r\nHost: h\r\n\r\n";
        let (heads, end, _) = read(format!("\r\n\r\n{one}\r\n{one}{one}\r\n").as_bytes(), &[5]);
        assert_eq!((heads.len(), end.as_str()), (3, "end"));
        assert_eq!(read(b"", &[1]).1, "end");
        assert_eq!(read(b"GET / HT", &[3]).1, "eof");
        assert!(read("\r\n".repeat(9).as_bytes(), &[4]).1.contains("empty lines"));
        let mut reader = Reader::new(Pieces::new(
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody",
            &[999],
        ));
        block_on(read_request_head(&mut reader, LIMIT)).unwrap();
        assert_eq!(reader.buffered(), b"body");
    }

    #[test]
    fn garbage_is_refused_before_its_end() {
        for garbage in
            [&b"\x16\x03\x01\x02\x00\x01\x00"[..], b"GET / HTTP/1.1\nHost", b"GET /\xff", b"A\rB"]
        {
            assert!(read(garbage, &[1]).1.starts_with("Refused(MalformedRequest"), "{garbage:?}");
        }
    }

    /// Requests of which about half are right, and the others wrong in one place or a few.
    fn almost_request() -> impl Strategy<Value = Vec<u8>> {
        let select = |list: &[&'static str]| proptest::sample::select(list.to_vec());
        let mostly = |good: &[&'static str], bad: &[&'static str]| prop_oneof![20 => select(good), 1 => select(bad)];
        let method = mostly(&["GET", "POST", "OPTIONS"], &["get", "PRI", "G T", ""]);
        let target = mostly(
            &["/", "/v1/models?x=1", "http://h/x", "http://[::1]?", "/{}|\\\"<>^`%", "//x:y@z"],
            &["*", "x", "/a#b", ""],
        );
        let version = mostly(&["HTTP/1.1", "HTTP/1.1", "HTTP/1.0"], &["HTTP/2.0", ""]);
        let host = mostly(
            &["Host: h", "Host: [::1]:80", "Host: 1.2.3.4.5", "Host: xn--zz."],
            &["Host: /", "X: y"],
        );
        let good = select(&[
            "Expect: 100-continue",
            "Connection: close",
            "A: b",
            "a:",
            "~!#$%&'*+-.^_`|: \"(),/:;<=>?@[\\]{}",
        ]);
        let bad = select(&[
            "Content-Length: 5",
            "Transfer-Encoding: chunked",
            " fold",
            "no colon",
            "\u{e9}: x",
            "Host: h",
        ]);
        let line = prop_oneof![
            20 => good.prop_map(str::to_owned),
            20 => "[A-Za-z-]{1,9}: [ -~\t\u{80}-\u{17f}]{0,9}",
            5 => "[!#-'*+.0-9A-Z^-z|~-]{1,9}: [a-z]{3000}",
            2 => bad.prop_map(str::to_owned),
        ];
        let end = prop_oneof![60 => Just("\r\n"), 1 => select(&["\n", "\r", ""])];
        let lines = proptest::collection::vec((line, end), 0..9);
        (method, target, version, host, lines).prop_map(|(method, target, version, host, lines)| {
            let lines: String = lines.into_iter().map(|(line, end)| line + end).collect();
            format!("{method} {target} {version}\r\n{host}\r\n{lines}\r\n").into_bytes()
        })
    }

    /// A value as it is taken: printable ASCII, tabs and bytes over 0x7F, trimmed.
    fn value_bytes() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![3 => b' '..=b'~', 1 => 0x80..=0xff_u8, 1 => Just(b'\t')];
        proptest::collection::vec(byte, 1..300)
            .prop_map(|bytes| bytes.trim_ascii().to_vec())
            .prop_filter("not empty", |bytes| !bytes.is_empty())
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(head: Vec<u8>) {
            let _ = parse_request_head(&head);
        }

        #[test]
        fn the_guard_decides_every_refusal(head in almost_request()) {
            match parse_request_head(&head) {
                Err(Error::MalformedRequest { detail }) => prop_assert!(!detail.contains("parser"), "{}", detail),
                Err(error) => { status(&error); }
                Ok(parsed) => prop_assert!(parsed.target.starts_with('/') || parsed.target == "*"),
            }
        }

        #[test]
        fn splits_change_nothing(
            heads in proptest::collection::vec(almost_request(), 1..4),
            sizes in proptest::collection::vec(1usize..99, 1..9),
        ) {
            let bytes = heads.concat();
            let whole = read(&bytes, &[usize::MAX]);
            prop_assert_eq!(&read(&bytes, &sizes), &whole);
            prop_assert_eq!(&read(&bytes, &[1]), &whole);
        }

        #[test]
        fn no_value_is_lost_or_moved(
            values in proptest::collection::vec(("[a-c]", value_bytes()), 0..90),
        ) {
            let mut head = b"GET / HTTP/1.1\r\nHost: h\r\n".to_vec();
            for (name, value) in &values {
                head.extend([name.as_bytes(), b": ", value, b"\r\n"].concat());
            }
            head.extend(b"\r\n");
            let head = parse_request_head(&head).unwrap();
            for name in ["a", "b", "c"] {
                let sent: Vec<&[u8]> = values.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_slice()).collect();
                prop_assert_eq!(head.headers.get_all(name).collect::<Vec<_>>(), sent);
            }
        }
    }
}
