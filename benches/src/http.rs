//! One HTTP/1.1 message as it comes in pieces, for both ends. Just enough for programs that mean well: no limits, no
//! pipelining. Nothing is allocated for a message whose head comes in one piece.

use std::io;

/// Reads one message after the other; see [`Message::take`].
#[derive(Default)]
pub struct Message {
    state: State,
    /// What has come of a head that is not whole, or of a line of the chunked framing.
    carry: Vec<u8>,
    /// The first bytes of the head line: `GET /path`, `HTTP/1.1 200`.
    start: [u8; 16],
    /// Whether the sender closes the connection behind this message.
    pub closes: bool,
}

#[derive(Default, Clone, Copy, PartialEq)]
enum State {
    #[default]
    Head,
    Sized(u64),
    ChunkSize,
    Chunk(u64),
    Trailer,
    UntilClose,
}

impl Message {
    /// Takes what was read and hands on what is body in it. True at the end of the message: then the next one may begin.
    pub fn take(&mut self, mut bytes: &[u8], mut body: impl FnMut(&[u8])) -> io::Result<bool> {
        loop {
            match self.state {
                State::Head => match self.head(bytes)? {
                    None => return Ok(false),
                    Some(used) => bytes = &bytes[used..],
                },
                State::Sized(left) | State::Chunk(left) => {
                    let here = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    if here > 0 {
                        body(&bytes[..here]);
                    }
                    bytes = &bytes[here..];
                    let (left, is_chunk) =
                        (left - here as u64, matches!(self.state, State::Chunk(_)));
                    self.state = match (left, is_chunk) {
                        (0, false) => return self.end(bytes),
                        (0, true) => State::ChunkSize,
                        (left, false) => State::Sized(left),
                        (left, true) => State::Chunk(left),
                    };
                    if left > 0 {
                        return Ok(false);
                    }
                }
                State::ChunkSize | State::Trailer => {
                    let Some(end) = memchr::memchr(b'\n', bytes) else {
                        self.carry.extend_from_slice(bytes);
                        return Ok(false);
                    };
                    let (line, rest) = bytes.split_at(end + 1);
                    self.carry.extend_from_slice(line);
                    bytes = rest;
                    let line = self.carry.trim_ascii();
                    let (is_blank, is_trailer) = (line.is_empty(), self.state == State::Trailer);
                    let size = if is_blank || is_trailer { None } else { Some(hexadecimal(line)?) };
                    self.carry.clear();
                    match size {
                        None if is_trailer && is_blank => return self.end(bytes),
                        None => {} // a trailer, or the line end behind a chunk
                        Some(0) => self.state = State::Trailer,
                        Some(size) => self.state = State::Chunk(size),
                    }
                }
                State::UntilClose => {
                    body(bytes);
                    return Ok(false);
                }
            }
        }
    }

    /// The status of an answer, 0 of anything else.
    pub fn status(&self) -> u16 {
        let digits = self.start.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..5));
        digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(0)
    }

    pub fn is_get(&self) -> bool {
        self.start.starts_with(b"GET ")
    }

    /// Whether the message has begun.
    pub fn is_begun(&self) -> bool {
        self.state != State::Head || !self.carry.is_empty()
    }

    fn end(&mut self, rest: &[u8]) -> io::Result<bool> {
        self.state = State::Head;
        match rest.is_empty() {
            true => Ok(true),
            false => Err(io::Error::other("bytes behind the end of a message")),
        }
    }

    /// Reads the head as soon as it is whole; returns how many of `bytes` belonged to it.
    fn head(&mut self, bytes: &[u8]) -> io::Result<Option<usize>> {
        if self.carry.is_empty() {
            if let Some(end) = memchr::memmem::find(bytes, b"\r\n\r\n") {
                self.read_head(&bytes[..end + 2])?;
                return Ok(Some(end + 4));
            }
            self.carry.extend_from_slice(bytes);
            return Ok(None);
        }
        let before = self.carry.len();
        self.carry.extend_from_slice(bytes);
        let Some(end) = memchr::memmem::find(&self.carry, b"\r\n\r\n") else { return Ok(None) };
        let carry = std::mem::take(&mut self.carry);
        self.read_head(&carry[..end + 2])?;
        Ok(Some(end + 4 - before))
    }

    fn read_head(&mut self, head: &[u8]) -> io::Result<()> {
        self.start = [0; 16];
        let shown = head.len().min(16);
        self.start[..shown].copy_from_slice(&head[..shown]);
        let status = self.status();
        self.closes = false;
        if (100..200).contains(&status) {
            return Ok(()); // the answer is yet to come
        }
        let is_answer = status != 0 && status != 204 && status != 304;
        let mut state = if is_answer { State::UntilClose } else { State::Sized(0) };
        let mut from = 0;
        while let Some(end) = memchr::memchr(b'\n', &head[from..]) {
            let line = &head[from..from + end];
            from += end + 1;
            if let Some(length) = value(line, b"content-length:") {
                let digits = std::str::from_utf8(length).map_err(io::Error::other)?;
                state = State::Sized(digits.parse().map_err(io::Error::other)?);
            } else if value(line, b"transfer-encoding:").is_some() {
                state = State::ChunkSize;
            } else if let Some(option) = value(line, b"connection:") {
                self.closes = option.eq_ignore_ascii_case(b"close");
            }
        }
        self.state = state;
        Ok(())
    }
}

/// The value of a header line that has this name (in lower case, with its colon).
fn value<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (start, value) = line.split_at_checked(name.len())?;
    start.eq_ignore_ascii_case(name).then(|| value.trim_ascii())
}

/// The size of a chunk, whatever extension stands behind it.
fn hexadecimal(line: &[u8]) -> io::Result<u64> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    let digits = std::str::from_utf8(digits).map_err(io::Error::other)?;
    u64::from_str_radix(digits, 16).map_err(io::Error::other)
}

/// Counts the events of a stream, and reads the time of sending that the mock put into each.
#[derive(Default)]
pub struct Events {
    /// A line whose end has not come.
    carry: Vec<u8>,
}

/// What stands on both sides of a time of sending.
pub const TIME_MARK: u8 = b'@';

impl Events {
    /// Calls `event` with the nanoseconds in each `data:` line, 0 where there are none.
    pub fn take(&mut self, mut bytes: &[u8], mut event: impl FnMut(u64)) {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let line = &bytes[..end];
            if self.carry.is_empty() {
                read_line(line, &mut event);
            } else {
                self.carry.extend_from_slice(line);
                read_line(&self.carry, &mut event);
                self.carry.clear();
            }
            bytes = &bytes[end + 1..];
        }
        self.carry.extend_from_slice(bytes);
    }
}

fn read_line(line: &[u8], event: &mut impl FnMut(u64)) {
    if !line.starts_with(b"data:") || line.starts_with(b"data: [DONE]") {
        return;
    }
    let digits = memchr::memchr(TIME_MARK, line).map_or(&[][..], |at| &line[at + 1..]);
    let digits = digits.iter().take_while(|byte| byte.is_ascii_digit());
    event(
        digits
            .fold(0, |sum: u64, digit| sum.wrapping_mul(10).wrapping_add(u64::from(digit - b'0'))),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Body and times of a message that comes in pieces of `size`.
    fn read(wire: &[u8], size: usize) -> (Vec<u8>, Vec<u64>, bool) {
        let (mut message, mut events) = (Message::default(), Events::default());
        let (mut body, mut times, mut ended) = (Vec::new(), Vec::new(), false);
        for piece in wire.chunks(size) {
            assert!(!ended, "bytes behind the end");
            let take = |part: &[u8]| {
                body.extend_from_slice(part);
                events.take(part, |time| times.push(time));
            };
            ended = message.take(piece, take).unwrap();
        }
        (body, times, ended)
    }

    #[test]
    fn a_message_is_the_same_however_it_is_cut() {
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
            b;x=1\r\ndata: @12@\n\r\n10\r\n\ndata: [DONE]\n\n \r\n0\r\nA: b\r\n\r\n";
        let sized =
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-LENGTH: 7\r\n\r\ndata: 1";
        for size in 1..chunked.len() {
            let (body, times, ended) = read(chunked, size);
            assert_eq!(
                (&body[..], ended),
                (&b"data: @12@\n\ndata: [DONE]\n\n "[..], true),
                "in pieces of {size}"
            );
            assert_eq!(times, [12], "in pieces of {size}");
            assert_eq!(read(sized, size).0, b"data: 1", "in pieces of {size}");
        }
    }
}
