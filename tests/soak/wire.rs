//! HTTP/1.1 over one socket, for both ends of the soak: bytes with the kernel's receive time, heads, bodies.
//!
//! Written from RFC 9112 and strict; shares no code with the gateway. Judges nothing but the syntax.

use std::io::{self, IoSliceMut};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use smol::Async;
use smol::future;
use smol::io::AsyncWriteExt;

use crate::{PATIENCE, pause};

/// Why no more bytes come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Closed,
    Reset,
    /// Nothing for [`PATIENCE`].
    Silent,
    /// What came is no HTTP.
    Malformed(String),
}

/// How the end of a body is told (RFC 9112 section 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
}

/// A start line, and header fields with their names in lower case.
#[derive(Debug)]
pub struct Head {
    pub start: String,
    pub fields: Vec<(String, String)>,
    /// When its first byte reached the socket, by the kernel: nanoseconds since the epoch. See [`Wire::fill`].
    pub arrived: Option<u64>,
}

impl Head {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn framing(&self, without: Framing) -> Result<Framing, End> {
        match (self.field("transfer-encoding"), self.field("content-length")) {
            (None, None) => Ok(without),
            (Some("chunked"), None) => Ok(Framing::Chunked),
            (None, Some(length)) => {
                length.parse().map(Framing::Length).map_err(|_| malformed("Content-Length", length))
            }
            (coding, length) => Err(malformed("framing", &format!("{coding:?} {length:?}"))),
        }
    }
}

/// A socket and the bytes read from it and not taken yet. Dropping it closes the connection.
pub struct Wire {
    stream: Async<TcpStream>,
    buffer: Vec<u8>,
    arrived: Option<u64>,
    scratch: Vec<u8>,
    before_each_read: Option<Duration>,
}

impl Wire {
    pub async fn connect(addr: SocketAddr) -> io::Result<Wire> {
        Async::<TcpStream>::connect(addr).await.map(Wire::new)
    }

    pub fn new(stream: Async<TcpStream>) -> Wire {
        // Fails only on a connection that is over already, and reading will tell that.
        let _ = stream.get_ref().set_nodelay(true);
        Wire {
            stream,
            buffer: Vec::new(),
            arrived: None,
            scratch: vec![0; 64 * 1024],
            before_each_read: None,
        }
    }

    /// From now on takes up to `bytes` at a time and pauses before each.
    pub fn read_slowly(&mut self, bytes: usize, pause: Duration) {
        // Best effort: a small buffer makes the gateway feel it sooner.
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(self.stream.get_ref(), bytes);
        self.scratch.truncate(bytes);
        self.before_each_read = Some(pause);
    }

    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let late = async {
            pause(PATIENCE).await;
            Err(io::ErrorKind::TimedOut.into())
        };
        future::or(self.stream.write_all(bytes), late).await
    }

    /// Sends FIN and goes on reading.
    pub fn half_close(&self) {
        let _ = self.stream.get_ref().shutdown(Shutdown::Write);
    }

    /// Makes the close a RST.
    pub fn reset_on_close(&self) {
        let _ =
            rustix::net::sockopt::set_socket_linger(self.stream.get_ref(), Some(Duration::ZERO));
    }

    /// Reads once. The kernel's time is that of the last packet that the read took from: exact for a message in one
    /// packet, but too late where more packets came before the read, and a FIN is one too.
    pub async fn fill(&mut self) -> Result<(), End> {
        if let Some(time) = self.before_each_read {
            pause(time).await;
        }
        let Wire { stream, scratch, .. } = self;
        let late = async {
            pause(PATIENCE).await;
            Err(io::ErrorKind::TimedOut.into())
        };
        match future::or(stream.read_with(|socket| receive(socket, scratch)), late).await {
            Ok((0, _)) => Err(End::Closed),
            Ok((n, arrived)) => {
                self.arrived = arrived;
                self.buffer.extend_from_slice(&self.scratch[..n]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(End::Silent),
            Err(_) => Err(End::Reset),
        }
    }

    /// Whether the other side has already ended the connection.
    pub fn has_ended(&self) -> bool {
        match self.stream.get_ref().peek(&mut [0]) {
            Ok(n) => n == 0,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }

    /// Reads on to the end of the connection: how many bytes came, and how it ended.
    pub async fn rest(&mut self) -> (usize, End) {
        loop {
            if let Err(end) = self.fill().await {
                return (self.buffer.len(), end);
            }
        }
    }

    pub async fn head(&mut self) -> Result<Head, End> {
        if self.buffer.is_empty() {
            self.fill().await?;
        }
        let arrived = self.arrived;
        let text = self.until(b"\r\n\r\n").await?;
        let mut lines = text.split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let field = |line: &str| {
            let (name, value) =
                line.split_once(':').ok_or_else(|| malformed("header field", line))?;
            Ok((name.to_ascii_lowercase(), value.trim().to_owned()))
        };
        Ok(Head { start, fields: lines.map(field).collect::<Result<_, _>>()?, arrived })
    }

    /// Appends a body to `out`, as much of it as comes.
    pub async fn body(&mut self, framing: Framing, out: &mut Vec<u8>) -> Result<(), End> {
        match framing {
            Framing::Length(length) => self.exactly(length, out).await,
            Framing::UntilClose => loop {
                match self.exactly(usize::MAX, out).await {
                    Err(End::Closed) => return Ok(()),
                    Err(end) => return Err(end),
                    Ok(()) => {}
                }
            },
            Framing::Chunked => loop {
                let line = self.until(b"\r\n").await?;
                let digits = line.split(';').next().unwrap_or_default();
                let size = usize::from_str_radix(digits, 16)
                    .map_err(|_| malformed("chunk size", &line))?;
                self.exactly(size, out).await?;
                let after = self.until(b"\r\n").await?;
                match (size, after.is_empty()) {
                    (0, true) => return Ok(()),
                    (_, true) => {}
                    _ => return Err(malformed("end of chunk", &after)),
                }
            },
        }
    }

    async fn exactly(&mut self, mut length: usize, out: &mut Vec<u8>) -> Result<(), End> {
        while length > 0 {
            if self.buffer.is_empty() {
                self.fill().await?;
            }
            let n = self.buffer.len().min(length);
            out.extend(self.buffer.drain(..n));
            length -= n;
        }
        Ok(())
    }

    async fn until(&mut self, mark: &[u8]) -> Result<String, End> {
        let at = loop {
            match self.buffer.windows(mark.len()).position(|window| window == mark) {
                Some(at) => break at,
                None => self.fill().await?,
            }
        };
        let bytes: Vec<u8> = self.buffer.drain(..at + mark.len()).collect();
        Ok(String::from_utf8_lossy(&bytes[..at]).into_owned())
    }
}

/// One read and, where the socket asked for it, the kernel's time of it.
fn receive(socket: &TcpStream, buffer: &mut [u8]) -> io::Result<(usize, Option<u64>)> {
    let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let stamp = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmTimestampns(at) => {
            Some(at.tv_sec() as u64 * 1_000_000_000 + at.tv_nsec() as u64)
        }
        _ => None,
    });
    Ok((message.bytes, stamp))
}

fn malformed(what: &str, text: &str) -> End {
    End::Malformed(format!("{what} {:?}", text.chars().take(100).collect::<String>()))
}
