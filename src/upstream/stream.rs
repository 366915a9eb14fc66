//! The bytes of one connection to a provider, with or without TLS.

use std::future::poll_fn;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_lite::io::AsyncRead;
use native_tls::{HandshakeError, TlsConnector};

use crate::socket::Socket;
use crate::stale_errors;

/// A byte stream to a provider.
#[derive(Debug)]
pub enum Stream {
    /// http
    Plain(Socket<TcpStream>),
    /// https
    Tls(Box<Session>),
}

/// A record of TLS holds no more (RFC 8446 section 5.1).
const RECORD_BYTES: usize = 16 * 1024;

impl Stream {
    /// Writes some of these pieces as one: what begins in one segment is read at once on the other side.
    pub fn poll_write_all(
        &mut self,
        cx: &mut Context<'_>,
        pieces: &[&[u8]; 4],
    ) -> Poll<io::Result<usize>> {
        match self {
            Stream::Plain(tcp) => tcp.poll_write_vectored(cx, &pieces.map(IoSlice::new)),
            Stream::Tls(tls) => {
                let mut filled = pieces.iter().filter(|piece| !piece.is_empty());
                let first = filled.next().copied().unwrap_or_default();
                if first.len() >= RECORD_BYTES || filled.next().is_none() {
                    return tls.poll_write(cx, first);
                }
                // Made anew at each try: the same bytes, which OpenSSL's moving write buffers allow (native-tls sets that).
                let all: usize = pieces.iter().map(|piece| piece.len()).sum();
                let mut record = Vec::with_capacity(all.min(RECORD_BYTES));
                for piece in pieces {
                    let room = RECORD_BYTES - record.len();
                    record.extend_from_slice(&piece[..piece.len().min(room)]);
                }
                tls.poll_write(cx, &record)
            }
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(tcp) => tcp.poll_read(cx, buf),
            Stream::Tls(tls) => tls.poll_read(cx, buf),
        }
    }
}

/// A TLS session whose handshake is over.
#[derive(Debug)]
pub struct Session(native_tls::TlsStream<Transport>);

impl Session {
    /// Shakes hands with `host` as this context wants it; computes on the thread that it is polled on.
    pub async fn begin(
        context: &TlsConnector,
        host: &str,
        tcp: Socket<TcpStream>,
    ) -> Result<Session, native_tls::Error> {
        stale_errors::forget();
        let mut step =
            context.connect(host, Transport { tcp, ended: false, waits_for_room: false });
        loop {
            match step {
                Ok(tls) => return Ok(Session(tls)),
                Err(HandshakeError::Failure(error)) => return Err(error),
                Err(HandshakeError::WouldBlock(mut midway)) => {
                    // What is wrong with the socket, the next step sees for itself.
                    let _ = poll_fn(|cx| midway.get_mut().poll_ready(cx)).await;
                    stale_errors::forget();
                    step = midway.handshake();
                }
            }
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        match ready!(self.poll(cx, |tls| tls.read(buf))) {
            Ok(0) if self.0.get_ref().ended => {
                let detail = "the connection ended inside the TLS session";
                Poll::Ready(Err(io::Error::new(ErrorKind::UnexpectedEof, detail)))
            }
            read => Poll::Ready(read),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(cx, |tls| tls.write(bytes))
    }

    /// Tries a step until it is done, whichever way it has to wait: a session may have to write in order to read.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut step: impl FnMut(&mut native_tls::TlsStream<Transport>) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            stale_errors::forget();
            match step(&mut self.0) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ready!(self.0.get_mut().poll_ready(cx))?
                }
                done => return Poll::Ready(done),
            }
        }
    }
}

/// The connection below TLS, on which nothing waits. Remembers its end: OpenSSL's reader says 0 bytes for it as for a
/// close_notify, and anybody on the way can end a connection (RFC 8446 section 6.1).
#[derive(Debug)]
struct Transport {
    tcp: Socket<TcpStream>,
    ended: bool,
    /// What was tried last and would have had to wait was a write.
    waits_for_room: bool,
}

impl Transport {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.waits_for_room {
            self.tcp.poll_writable(cx)
        } else {
            self.tcp.poll_readable(cx).map(Ok)
        }
    }
}

impl Read for Transport {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.waits_for_room = false;
        let read = self.tcp.read(buf)?;
        self.ended |= read == 0;
        Ok(read)
    }
}

impl Write for Transport {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.waits_for_room = true;
        self.tcp.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
