//! Reading HTTP/1.1 off a blocking socket, for both ends of the harness: heads, exact lengths, chunks.
//!
//! Written from RFC 9112 and on its own: it shares no code with the gateway that it tests. It is strict, so that a
//! malformed message fails the test that caused it.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use openssl::ssl::SslStream;

/// Why no more bytes come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// FIN.
    Closed,
    /// RST.
    Reset,
    /// The socket's read timeout passed.
    TimedOut,
}

/// Header fields in wire order, names as sent, values as bytes.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(pub Vec<(String, Vec<u8>)>);

impl Headers {
    /// The value of a field that must not occur twice.
    pub fn get(&self, name: &str) -> Option<String> {
        let all = self.all(name);
        assert!(all.len() < 2, "{name} occurs {} times in {self:?}", all.len());
        all.into_iter().next()
    }

    /// Every value of a field, in order.
    pub fn all(&self, name: &str) -> Vec<String> {
        self.0
            .iter()
            .filter(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
            .collect()
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lossy = |value: &Vec<u8>| String::from_utf8_lossy(value).into_owned();
        f.debug_map().entries(self.0.iter().map(|(name, value)| (name, lossy(value)))).finish()
    }
}

/// A start line and header fields.
#[derive(Debug, Clone)]
pub struct Head {
    /// The request line or the status line.
    pub start: String,
    /// The fields.
    pub headers: Headers,
    /// When its first byte was read.
    pub arrived: Instant,
}

impl Head {
    /// The `n`-th word of the start line.
    pub fn word(&self, n: usize) -> &str {
        self.start.split(' ').nth(n).unwrap_or_else(|| panic!("short start line {:?}", self.start))
    }
}

/// A socket's incoming bytes: what has been read and not been taken yet, and a log of all of it.
pub struct Wire {
    stream: Arc<TcpStream>,
    /// Of the same socket.
    session: Option<SslStream<TcpStream>>,
    buffer: Vec<u8>,
    last_read: Instant,
    /// Everything that was ever read, for the message of a failing test.
    pub log: Vec<u8>,
}

impl Wire {
    pub fn new(stream: Arc<TcpStream>) -> Self {
        Wire {
            stream,
            session: None,
            buffer: Vec::new(),
            last_read: Instant::now(),
            log: Vec::new(),
        }
    }

    /// What a TLS session brings; its end without a close_notify counts as a reset.
    pub fn over_tls(session: SslStream<TcpStream>) -> Self {
        let stream = session.get_ref().try_clone().expect("a second descriptor");
        Wire { session: Some(session), ..Wire::new(Arc::new(stream)) }
    }

    pub fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match &mut self.session {
            Some(session) => session.write_all(bytes),
            None => (&*self.stream).write_all(bytes),
        }
    }

    pub fn session(&mut self) -> &mut SslStream<TcpStream> {
        self.session.as_mut().expect("it speaks TLS")
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Blocks for more bytes, once.
    pub fn fill(&mut self) -> Result<(), End> {
        let mut piece = [0; 16 * 1024];
        let n = loop {
            let read = match &mut self.session {
                Some(session) => session.read(&mut piece),
                None => (&*self.stream).read(&mut piece),
            };
            match read {
                Ok(n) => break n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Err(End::TimedOut);
                }
                Err(_) => return Err(End::Reset),
            }
        };
        if n == 0 {
            return Err(End::Closed);
        }
        self.last_read = Instant::now();
        self.buffer.extend_from_slice(&piece[..n]);
        self.log.extend_from_slice(&piece[..n]);
        Ok(())
    }

    /// A head with its blank line.
    pub fn head(&mut self) -> Result<Head, End> {
        if self.buffer.is_empty() {
            self.fill()?;
        }
        let arrived = self.last_read;
        let end = loop {
            match self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                Some(end) => break end,
                None => self.fill()?,
            }
        };
        let bytes: Vec<u8> = self.buffer.drain(..end + 4).collect();
        Ok(parse_head(&bytes[..end], arrived))
    }

    /// At least one byte and at most `limit`, with the instant of the read that brought them.
    pub fn piece(&mut self, limit: usize) -> Result<(Instant, Vec<u8>), End> {
        if self.buffer.is_empty() {
            self.fill()?;
        }
        let n = self.buffer.len().min(limit);
        Ok((self.last_read, self.buffer.drain(..n).collect()))
    }

    /// `n` bytes.
    pub fn exactly(&mut self, n: usize) -> Result<Vec<u8>, End> {
        while self.buffer.len() < n {
            self.fill()?;
        }
        Ok(self.buffer.drain(..n).collect())
    }

    /// One chunk's data; the last chunk is empty and takes its trailers along (RFC 9112 section 7.1).
    pub fn chunk(&mut self) -> Result<(Instant, Vec<u8>), End> {
        let size_line = self.line()?;
        let digits = size_line.split(';').next().unwrap_or_default().trim_end();
        let size = usize::from_str_radix(digits, 16)
            .unwrap_or_else(|_| panic!("chunk size {size_line:?}"));
        if size == 0 {
            while !self.line()?.is_empty() {}
            return Ok((self.last_read, Vec::new()));
        }
        let data = self.exactly(size)?;
        let arrived = self.last_read;
        assert_eq!(self.exactly(2)?, b"\r\n", "a chunk's data is followed by CRLF");
        Ok((arrived, data))
    }

    fn line(&mut self) -> Result<String, End> {
        let end = loop {
            match self.buffer.windows(2).position(|w| w == b"\r\n") {
                Some(end) => break end,
                None => self.fill()?,
            }
        };
        let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
        Ok(String::from_utf8_lossy(&line[..end]).into_owned())
    }
}

fn parse_head(bytes: &[u8], arrived: Instant) -> Head {
    let text = |line: &[u8]| String::from_utf8_lossy(line).into_owned();
    let mut lines =
        bytes.split(|&b| b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let start = text(lines.next().unwrap_or_default());
    let field = |line: &[u8]| {
        let colon = line.iter().position(|&b| b == b':');
        let colon = colon.unwrap_or_else(|| panic!("no header field: {:?}", text(line)));
        (text(&line[..colon]), line[colon + 1..].trim_ascii().to_vec())
    };
    Head { start, headers: Headers(lines.map(field).collect()), arrived }
}
