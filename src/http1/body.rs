//! Where a body ends and which of its bytes are payload, for requests and responses alike (RFC 9112 sections 6 and 7).
//!
//! [`BodyDecoder::decode`] is pure and copies nothing; `drain` and `read` move payload by its word. Which framing a message has is
//! decided with its head.

use std::fmt;
use std::io;
use std::ops::Range;

use super::reader::Source;
use super::{Reader, is_token_byte};

/// The most bytes of one chunk-size line behind the size: padding and extensions.
const CHUNK_EXTENSION_LIMIT_BYTES: usize = 4 * 1024;
/// The most bytes of all trailer lines together, their line ends aside.
const TRAILER_LIMIT_BYTES: usize = 8 * 1024;
/// Hex digits of a chunk size; 16 of them fill a u64 exactly, so no sum of them overflows.
const SIZE_DIGITS_LIMIT: usize = 16;

/// The room that a body is given by its announcement alone.
const FIRST_ROOM_BYTES: usize = 16 * 1024;

/// The room that it is given for what has come of it: it need not be moved often, and who announces much has to send an eighth.
const ROOM_FOR_EACH_BYTE: usize = 8;

/// How a message's body is delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// No body.
    Empty,
    /// Exactly so many bytes.
    Length(u64),
    /// Chunked transfer coding.
    Chunked,
    /// Everything until the connection closes; responses only.
    UntilClose,
}

/// What one call to [`BodyDecoder::decode`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// Bytes of the input that are used up.
    pub consumed: usize,
    /// Which of them are payload; may be empty.
    pub data: Range<usize>,
}

/// Why a body cannot be had in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFault {
    /// Chunked framing that RFC 9112 section 7.1 does not allow, or that goes beyond a limit.
    Malformed(&'static str),
    /// The stream ended before the body did.
    Truncated,
}

impl fmt::Display for BodyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(detail) => write!(f, "bad chunked body: {detail}"),
            Self::Truncated => f.write_str("the body ended early"),
        }
    }
}

impl std::error::Error for BodyFault {}

/// Follows one body through the bytes of a connection, however they are cut into reads.
#[derive(Debug, Clone)]
pub struct BodyDecoder {
    state: State,
    payload: u64,
}

/// What the next byte is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Payload up to a known length.
    Plain { left: u64 },
    /// Payload for as long as the connection lasts.
    UntilClose,
    /// A digit of a chunk size, or what ends it.
    Size { size: u64, digits: usize },
    /// White space between a size and what ends it.
    Padding { size: u64, seen: usize },
    /// A byte of a chunk extension.
    Extension { size: u64, seen: usize },
    /// The LF of a size line.
    SizeLf { size: u64 },
    /// Payload of a chunk.
    Data { left: u64 },
    /// The CR behind a chunk's payload.
    DataCr,
    /// The LF behind a chunk's payload.
    DataLf,
    /// The first byte of a trailer line, or the CR of the empty line that ends the body.
    TrailerStart { seen: usize },
    /// A byte of a trailer's name, or the colon behind it.
    TrailerName { seen: usize },
    /// A byte of a trailer's value.
    TrailerValue { seen: usize },
    /// The LF of a trailer line.
    TrailerLf { seen: usize },
    /// The last LF.
    FinalLf,
    /// None of this body's.
    Done,
}

impl BodyDecoder {
    /// A decoder at the first byte of a body.
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::Empty | Framing::Length(0) => State::Done,
            Framing::Length(left) => State::Plain { left },
            Framing::Chunked => State::Size { size: 0, digits: 0 },
            Framing::UntilClose => State::UntilClose,
        };
        Self { state, payload: 0 }
    }

    /// Takes the body's next bytes: framing, at most one run of payload, and the framing behind it. Call it again with
    /// what is left until the input is used up or [`Self::is_done`]; each call makes progress or fails. Bytes behind the
    /// body are not consumed. Payload before a fault is handed out before the fault is.
    pub fn decode(&mut self, input: &[u8]) -> Result<Decoded, BodyFault> {
        let mut at = 0;
        let mut data = 0..0;
        while at < input.len() && self.state != State::Done {
            if let Some(left) = self.payload_left() {
                if !data.is_empty() {
                    break;
                }
                let n = usize::try_from(left)
                    .map_or(input.len() - at, |left| left.min(input.len() - at));
                data = at..at + n;
                at += n;
                self.pay(n as u64);
                continue;
            }
            match self.state.after(input[at]) {
                Ok(next) => self.state = next,
                Err(detail) if at == 0 => return Err(BodyFault::Malformed(detail)),
                Err(_) => break, // the next call meets this byte first
            }
            at += 1;
        }
        Ok(Decoded { consumed: at, data })
    }

    /// How much more room `out` should have for what of the payload is there or likely to come; `limit` bytes are the
    /// most that is of interest. Apart from [`Self::drain`] and [`Self::read`], so that room can be made and accounted
    /// for in the caller's own way.
    pub fn wanted_room<R>(&self, reader: &Reader<R>, out: &Vec<u8>, limit: usize) -> usize {
        let (room, buffered) = (out.capacity() - out.len(), reader.buffered().len());
        match self.state {
            State::Plain { left } if room == 0 => {
                let likely =
                    FIRST_ROOM_BYTES.max(ROOM_FOR_EACH_BYTE.saturating_mul(out.len() + buffered));
                // With one byte to spare the last read is a short one, which says that nothing else has come.
                let all = usize::try_from(left).unwrap_or(usize::MAX).saturating_add(1);
                all.min(likely)
            }
            State::Plain { .. } | State::Done => 0,
            _ if buffered <= room => 0,
            // As much again, so that it need not be moved often.
            _ => buffered.max(out.len().min(limit.saturating_sub(out.len()))),
        }
    }

    /// Moves the payload that `reader` holds to the end of `out`. Says whether the body is over; if it is not, the reader is
    /// empty now.
    pub fn drain<R>(
        &mut self,
        reader: &mut Reader<R>,
        out: &mut Vec<u8>,
    ) -> Result<bool, BodyFault> {
        while !self.is_done() && !reader.buffered().is_empty() {
            let input = reader.buffered();
            let Decoded { consumed, data } = self.decode(input)?;
            out.extend_from_slice(&input[data]);
            reader.consume(consumed);
        }
        Ok(self.is_done())
    }

    /// Waits for more of the body: payload that needs no decoding goes into the [room](Self::wanted_room) at the end of `out`, anything
    /// else into the reader, to be [drained](Self::drain). Returns the bytes that came; 0 is the end of the stream. Dropping the future loses nothing.
    pub async fn read<R: Source>(
        &mut self,
        reader: &mut Reader<R>,
        out: &mut Vec<u8>,
    ) -> io::Result<usize> {
        let State::Plain { left } = self.state else { return reader.fill().await };
        if !reader.buffered().is_empty() {
            return reader.fill().await;
        }
        let limit = usize::try_from(left).unwrap_or(usize::MAX);
        let n = reader.fill_past(out, limit).await?;
        self.pay(n.min(limit) as u64);
        Ok(n)
    }

    /// Whether the body is complete.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// What the end of the stream means here: the end of the body, or its truncation.
    pub fn at_eof(&self) -> Result<(), BodyFault> {
        match self.state {
            State::Done | State::UntilClose => Ok(()),
            _ => Err(BodyFault::Truncated),
        }
    }

    /// Bytes of payload handed out up to now.
    pub fn payload_so_far(&self) -> u64 {
        self.payload
    }

    /// How much payload comes next, if payload comes next.
    fn payload_left(&self) -> Option<u64> {
        match self.state {
            State::Plain { left } | State::Data { left } => Some(left),
            State::UntilClose => Some(u64::MAX),
            _ => None,
        }
    }

    /// Counts `n` bytes of payload, no more than are left.
    fn pay(&mut self, n: u64) {
        self.payload += n;
        match &mut self.state {
            State::Plain { left } | State::Data { left } => *left -= n,
            _ => {}
        }
        match self.state {
            State::Plain { left: 0 } => self.state = State::Done,
            State::Data { left: 0 } => self.state = State::DataCr,
            _ => {}
        }
    }
}

impl State {
    /// The state behind one byte of framing, or what is wrong with it.
    fn after(self, byte: u8) -> Result<Self, &'static str> {
        match (self, byte) {
            (Self::Size { size, digits }, _) => after_size(size, digits, byte),
            (Self::Padding { size, .. } | Self::Extension { size, .. }, b'\r') => {
                Ok(Self::SizeLf { size })
            }
            (Self::Padding { seen, .. } | Self::Extension { seen, .. }, _)
                if seen >= CHUNK_EXTENSION_LIMIT_BYTES =>
            {
                Err("a chunk extension is too long")
            }
            (Self::Padding { size, seen }, b' ' | b'\t') => {
                Ok(Self::Padding { size, seen: seen + 1 })
            }
            (Self::Padding { size, seen }, b';') => Ok(Self::Extension { size, seen: seen + 1 }),
            (Self::Padding { .. }, _) => {
                Err("a chunk size is followed by something else than an extension")
            }
            (Self::Extension { size, seen }, _) if is_text(byte) => {
                Ok(Self::Extension { size, seen: seen + 1 })
            }
            (Self::Extension { .. }, _) => Err("a control character in a chunk extension"),
            (Self::SizeLf { size: 0 }, b'\n') => Ok(Self::TrailerStart { seen: 0 }),
            (Self::SizeLf { size }, b'\n') => Ok(Self::Data { left: size }),
            (Self::DataCr, b'\r') => Ok(Self::DataLf),
            (Self::DataCr, _) => Err("a chunk is longer than its size"),
            (Self::DataLf, b'\n') => Ok(Self::Size { size: 0, digits: 0 }),
            (Self::TrailerStart { .. }, b'\r') => Ok(Self::FinalLf),
            (Self::TrailerValue { seen }, b'\r') => Ok(Self::TrailerLf { seen }),
            (
                Self::TrailerStart { seen }
                | Self::TrailerName { seen }
                | Self::TrailerValue { seen },
                _,
            ) => after_trailer(self, seen, byte),
            (Self::TrailerLf { seen }, b'\n') => Ok(Self::TrailerStart { seen }),
            (Self::FinalLf, b'\n') => Ok(Self::Done),
            (Self::SizeLf { .. } | Self::DataLf | Self::TrailerLf { .. } | Self::FinalLf, _) => {
                Err("a CR without its LF")
            }
            (Self::Plain { .. } | Self::UntilClose | Self::Data { .. } | Self::Done, _) => Ok(self),
        }
    }
}

/// The state behind a byte of a chunk-size line, up to the end of its digits.
fn after_size(size: u64, digits: usize, byte: u8) -> Result<State, &'static str> {
    if let Some(digit) = char::from(byte).to_digit(16) {
        if digits == SIZE_DIGITS_LIMIT {
            return Err("a chunk size has more than 16 digits");
        }
        return Ok(State::Size { size: size << 4 | u64::from(digit), digits: digits + 1 });
    }
    match byte {
        _ if digits == 0 => Err("a chunk size is missing"),
        b'\r' => Ok(State::SizeLf { size }),
        b' ' | b'\t' => Ok(State::Padding { size, seen: 1 }),
        b';' => Ok(State::Extension { size, seen: 1 }),
        _ => Err("a chunk size is not hexadecimal"),
    }
}

/// The state behind a byte of a trailer line, up to its CR. A line is a name, a colon and a value, as
/// in a head (RFC 9112 section 7.1.2): no white space before the colon, no folding.
fn after_trailer(state: State, seen: usize, byte: u8) -> Result<State, &'static str> {
    let more = seen + 1;
    match (state, byte) {
        _ if seen >= TRAILER_LIMIT_BYTES => Err("the trailers are too long"),
        (State::TrailerValue { .. }, _) if is_text(byte) => Ok(State::TrailerValue { seen: more }),
        (State::TrailerValue { .. }, _) => Err("a control character in a trailer"),
        (State::TrailerName { .. }, b':') => Ok(State::TrailerValue { seen: more }),
        _ if is_token_byte(byte) => Ok(State::TrailerName { seen: more }),
        _ => Err("a trailer line is not a name, a colon and a value"),
    }
}

/// Whether the byte may stand in a field line or an extension: no control character but the tab.
fn is_text(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

#[cfg(test)]
mod tests {
    use super::super::reader::tests::Pieces;
    use super::*;
    use futures_lite::future::block_on;
    use proptest::prelude::*;

    /// How a stream of bytes went: the payload, and `Ok` with the bytes left over, or the fault.
    type Outcome = (Vec<u8>, Result<Vec<u8>, BodyFault>);

    /// Runs a decoder over `input`, cut into reads of the given sizes, to the end of the stream.
    fn run(framing: Framing, input: &[u8], sizes: &[usize]) -> Outcome {
        let mut decoder = BodyDecoder::new(framing);
        let mut payload = Vec::new();
        let mut sizes = sizes.iter().copied().cycle();
        let (mut unread, mut waiting) = (Vec::new(), input);
        loop {
            while !decoder.is_done() && !unread.is_empty() {
                match decoder.decode(&unread) {
                    Err(fault) => return (payload, Err(fault)),
                    Ok(Decoded { consumed, data }) => {
                        assert!(consumed > 0, "no progress");
                        payload.extend_from_slice(&unread[data]);
                        unread.drain(..consumed);
                    }
                }
                assert_eq!(decoder.payload_so_far(), payload.len() as u64);
            }
            if decoder.is_done() || waiting.is_empty() {
                unread.extend_from_slice(waiting);
                return (payload, decoder.at_eof().map(|()| unread));
            }
            let (now, later) = waiting.split_at(sizes.next().unwrap().clamp(1, waiting.len()));
            unread.extend_from_slice(now);
            waiting = later;
        }
    }

    /// A whole chunked body by plain text search: its payload and what follows it; None unless it is complete and right.
    fn naive(input: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        fn line(input: &[u8]) -> Option<(&[u8], &[u8])> {
            let end = input.windows(2).position(|pair| pair == b"\r\n")?;
            let text = input[..end].iter().all(|byte| *byte == 9 || !byte.is_ascii_control());
            text.then(|| (&input[..end], &input[end + 2..]))
        }
        let (mut payload, mut rest) = (Vec::new(), input);
        loop {
            let (head, after) = line(rest)?;
            let digits = head.iter().position(|b| !b.is_ascii_hexdigit()).unwrap_or(head.len());
            let behind = head[digits..].trim_ascii_start();
            if !(1..=16).contains(&digits)
                || head.len() - digits > 4096
                || !(behind.is_empty() || behind[0] == b';')
            {
                return None;
            }
            let size =
                u64::from_str_radix(std::str::from_utf8(&head[..digits]).unwrap(), 16).unwrap();
            if size == 0 {
                rest = after;
                break;
            }
            let size = usize::try_from(size).ok().filter(|size| *size <= after.len())?;
            payload.extend_from_slice(&after[..size]);
            rest = after[size..].strip_prefix(b"\r\n")?;
        }
        let mut total = 0;
        loop {
            let (trailer, after) = line(rest)?;
            total += trailer.len();
            rest = after;
            if total > 8192 {
                return None;
            }
            if trailer.is_empty() {
                return Some((payload, rest.to_vec()));
            }
            let name = trailer.split(|byte| *byte == b':').next().unwrap();
            let separators = b"\"(),/:;<=>?@[\\]{}";
            let is_name = |byte: &u8| byte.is_ascii_graphic() && !separators.contains(byte);
            if name.len() == trailer.len() || name.is_empty() || !name.iter().all(is_name) {
                return None;
            }
        }
    }

    fn chunked(input: &str) -> Outcome {
        run(Framing::Chunked, input.as_bytes(), &[usize::MAX])
    }

    #[test]
    fn good_chunked_bodies() {
        for (input, payload, rest) in [
            ("5\r\nhello\r\n0\r\n\r\n", "hello", ""),
            ("0\r\n\r\nGET / HTTP/1.1\r\n", "", "GET / HTTP/1.1\r\n"),
            ("000a\r\n0123456789\r\n0000\r\n\r\n", "0123456789", ""),
            ("3 \t\r\nabc\r\n2;x=\"y\";z\r\nde\r\n1 ;q\r\nf\r\n0;last\r\n\r\n", "abcdef", ""),
            ("A\r\n0123456789\r\n0\r\nExpires: never\r\nX: \u{e9}\r\n\r\n!", "0123456789", "!"),
            ("0\r\nx-!#$%&'*+.^_`|~1:\r\nY: : a:b \t\r\n\r\n", "", ""),
            ("2\r\n\r\n\r\n0\r\n\r\n", "\r\n", ""),
            ("0000000000000001\r\nx\r\n0\r\n\r\n", "x", ""),
        ] {
            assert_eq!(chunked(input), (payload.into(), Ok(rest.into())), "{input:?}");
        }
    }

    const NO_TRAILER: &str = "a trailer line is not a name, a colon and a value";

    #[test]
    fn bad_chunked_bodies() {
        let long_extension = format!("1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(4096));
        let long_padding = format!("1{}\r\nx\r\n0\r\n\r\n", " ".repeat(4097));
        let long_trailers = format!("0\r\n{}\r\n", "a: b\r\n".repeat(2049));
        let long_name = format!("0\r\n{}: b\r\n\r\n", "a".repeat(8193));
        for (input, payload, detail) in [
            ("\r\n", "", "a chunk size is missing"),
            (";x\r\n", "", "a chunk size is missing"),
            (" 5\r\nhello", "", "a chunk size is missing"),
            ("+5\r\nhello", "", "a chunk size is missing"),
            ("-1\r\n", "", "a chunk size is missing"),
            ("0x5\r\nhello", "", "a chunk size is not hexadecimal"),
            ("5\nhello\r\n", "", "a chunk size is not hexadecimal"),
            ("5 5\r\nhello", "", "a chunk size is followed by something else than an extension"),
            ("5 \nhello", "", "a chunk size is followed by something else than an extension"),
            ("5;x\nhello", "", "a control character in a chunk extension"),
            ("5;\0\r\nhello", "", "a control character in a chunk extension"),
            ("5\rhello", "", "a CR without its LF"),
            ("00000000000000001\r\nx", "", "a chunk size has more than 16 digits"),
            ("10000000000000000\r\nx", "", "a chunk size has more than 16 digits"),
            ("3\r\nhello\r\n", "hel", "a chunk is longer than its size"),
            ("3\r\nhel\n0\r\n\r\n", "hel", "a chunk is longer than its size"),
            ("3\r\nhel\r0\r\n\r\n", "hel", "a CR without its LF"),
            ("3\r\nhel\r\n\r\n", "hel", "a chunk size is missing"),
            ("0\r\n\n", "", NO_TRAILER),
            ("0\r\na\r\n\r\n", "", NO_TRAILER),
            ("0\r\na b: c\r\n\r\n", "", NO_TRAILER),
            ("0\r\na : b\r\n\r\n", "", NO_TRAILER),
            ("0\r\na\t: b\r\n\r\n", "", NO_TRAILER),
            ("0\r\n: b\r\n\r\n", "", NO_TRAILER),
            ("0\r\n\u{e9}: b\r\n\r\n", "", NO_TRAILER),
            ("0\r\na: b\r\n c\r\n\r\n", "", NO_TRAILER),
            ("0\r\n\ta: b\r\n\r\n", "", NO_TRAILER),
            ("0\r\na: b\r\nGET / HTTP/1.1\r\n\r\n", "", NO_TRAILER),
            ("0\r\na: b\n\r\n", "", "a control character in a trailer"),
            ("0\r\na: \u{7f}\r\n\r\n", "", "a control character in a trailer"),
            ("0\r\na: b\r\r\n", "", "a CR without its LF"),
            ("0\r\n\rX", "", "a CR without its LF"),
            (&long_extension, "", "a chunk extension is too long"),
            (&long_padding, "", "a chunk extension is too long"),
            (&long_trailers, "", "the trailers are too long"),
            (&long_name, "", "the trailers are too long"),
        ] {
            assert_eq!(
                chunked(input),
                (payload.into(), Err(BodyFault::Malformed(detail))),
                "{input:?}"
            );
        }
    }

    #[test]
    fn every_prefix_of_a_chunked_body_is_truncated() {
        let whole = "5;x\r\nhello\r\n1 \r\n!\r\n0\r\na: b\r\n\r\n";
        for end in 0..whole.len() {
            assert_eq!(chunked(&whole[..end]).1, Err(BodyFault::Truncated), "{:?}", &whole[..end]);
        }
        assert_eq!(chunked(whole), (b"hello!".to_vec(), Ok(Vec::new())));
    }

    #[test]
    fn one_call_takes_the_framing_on_both_sides_of_a_run() {
        let mut decoder = BodyDecoder::new(Framing::Chunked);
        assert_eq!(
            decoder.decode(b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n").unwrap(),
            Decoded { consumed: 10, data: 3..5 }
        );
        assert_eq!(
            decoder.decode(b"c\r\n0\r\n\r\nx").unwrap(),
            Decoded { consumed: 8, data: 0..1 }
        );
        assert!(decoder.is_done());
        assert_eq!(decoder.decode(b"x").unwrap(), Decoded { consumed: 0, data: 0..0 });
    }

    #[test]
    fn length_and_close_framing() {
        assert_eq!(run(Framing::Empty, b"next", &[9]), (vec![], Ok(b"next".to_vec())));
        assert_eq!(run(Framing::Length(0), b"next", &[9]), (vec![], Ok(b"next".to_vec())));
        assert_eq!(
            run(Framing::Length(3), b"abcnext", &[1]),
            (b"abc".to_vec(), Ok(b"next".to_vec()))
        );
        assert_eq!(
            run(Framing::Length(9), b"abc", &[2]),
            (b"abc".to_vec(), Err(BodyFault::Truncated))
        );
        assert_eq!(
            run(Framing::Length(u64::MAX), b"abc", &[9]),
            (b"abc".to_vec(), Err(BodyFault::Truncated))
        );
        assert_eq!(run(Framing::UntilClose, b"abc", &[2]), (b"abc".to_vec(), Ok(vec![])));
        assert_eq!(run(Framing::UntilClose, b"", &[2]), (vec![], Ok(vec![])));
        assert!(!BodyDecoder::new(Framing::UntilClose).is_done());
    }

    #[test]
    fn who_announces_much_gets_little_room_until_much_has_come() {
        let [short, long] = [100_000, 1 << 30].map(|announced| {
            let mut reader = Reader::new(Pieces::new(&[b'x'; 1 << 20], &[1000, 16_000]));
            let (mut decoder, mut body) =
                (BodyDecoder::new(Framing::Length(announced)), Vec::new());
            let mut rooms = Vec::new();
            loop {
                body.reserve_exact(decoder.wanted_room(&reader, &body, usize::MAX));
                rooms.push(body.capacity());
                let fair = FIRST_ROOM_BYTES.max(9 * (body.len() + reader.buffered().len()));
                assert!(body.capacity() <= fair, "{} of {}", body.len(), body.capacity());
                if decoder.drain(&mut reader, &mut body).unwrap() {
                    break;
                }
                let before = body.capacity();
                let read = block_on(decoder.read(&mut reader, &mut body)).unwrap();
                assert_eq!(body.capacity(), before, "what is waited in is accounted for");
                if read == 0 {
                    break;
                }
            }
            rooms.dedup();
            rooms
        });
        assert_eq!(short, [FIRST_ROOM_BYTES, 100_001], "it is moved once");
        assert!(long.len() < 6, "moved with every doubling: {long:?}");
    }

    /// Bytes that look enough like a chunked body to reach every state.
    fn almost_chunked() -> impl Strategy<Value = Vec<u8>> {
        let atoms = [
            "0",
            "1",
            "5",
            "a",
            "F",
            "\r\n",
            "\r\n",
            "\r",
            "\n",
            ";x",
            " ",
            "\t",
            "hello",
            "0\r\n\r\n",
            "0\r\na-b: c\r\n\r\n",
            "0\r\na: b\r\nc",
            ": b\r\n",
            "x-y: z\r\n",
            "\0",
            "\u{e9}",
        ];
        let chunk = "[a-z\r\n]{1,20}".prop_map(|data| format!("{:x}\r\n{data}\r\n", data.len()));
        let atom = proptest::sample::select(atoms.to_vec()).prop_map(str::to_owned);
        proptest::collection::vec(prop_oneof![3 => chunk, 2 => atom], 0..12)
            .prop_map(|parts| (parts.concat() + "0\r\n\r\n").into_bytes())
    }

    /// Reads a body of this framing to its end or the stream's, by [`BodyDecoder::read`] and [`BodyDecoder::drain`].
    fn read_whole(framing: Framing, input: &[u8], sizes: &[usize]) -> Outcome {
        let mut reader = Reader::new(Pieces::new(input, sizes));
        let (mut decoder, mut payload) = (BodyDecoder::new(framing), Vec::new());
        loop {
            payload.reserve_exact(decoder.wanted_room(&reader, &payload, usize::MAX));
            match decoder.drain(&mut reader, &mut payload) {
                Err(fault) => return (payload, Err(fault)),
                Ok(true) => break,
                Ok(false) if block_on(decoder.read(&mut reader, &mut payload)).unwrap() == 0 => {
                    break;
                }
                Ok(false) => {}
            }
            assert_eq!(decoder.payload_so_far(), payload.len() as u64);
        }
        let over = decoder.at_eof();
        while block_on(reader.fill()).unwrap() > 0 {}
        (payload, over.map(|()| reader.buffered().to_vec()))
    }

    proptest! {
        #[test]
        fn reading_straight_into_the_body_changes_nothing(
            input in almost_chunked(), length in 0u64..40, chunked: bool, sizes in proptest::collection::vec(1usize..50, 1..9),
        ) {
            let framing = if chunked { Framing::Chunked } else { Framing::Length(length) };
            prop_assert_eq!(read_whole(framing, &input, &sizes), run(framing, &input, &[usize::MAX]));
        }

        #[test]
        fn splits_change_nothing(input in almost_chunked(), sizes in proptest::collection::vec(1usize..9, 1..9)) {
            let whole = run(Framing::Chunked, &input, &[usize::MAX]);
            prop_assert_eq!(&run(Framing::Chunked, &input, &sizes), &whole);
            prop_assert_eq!(&run(Framing::Chunked, &input, &[1]), &whole);
        }

        #[test]
        fn agrees_with_the_naive_decoder(input in almost_chunked()) {
            let (payload, end) = run(Framing::Chunked, &input, &[usize::MAX]);
            prop_assert_eq!(end.ok().map(|rest| (payload, rest)), naive(&input));
        }

        #[test]
        fn any_bytes_are_survived(input: Vec<u8>, sizes in proptest::collection::vec(1usize..9, 1..9)) {
            prop_assert_eq!(run(Framing::Chunked, &input, &sizes), run(Framing::Chunked, &input, &[usize::MAX]));
        }
    }
}
