//! The bytes of one connection to a provider, with or without TLS.

use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use async_native_tls::TlsStream;
use futures_lite::io::{AsyncRead, AsyncWrite};

use crate::socket::Socket;

/// A byte stream to a provider.
#[derive(Debug)]
pub enum Stream {
    /// http
    Plain(Socket<TcpStream>),
    /// https
    Tls(Box<TlsStream<Transport>>),
}

/// A record of TLS holds no more (RFC 8446 section 5.1).
const RECORD_BYTES: usize = 16 * 1024;

impl Stream {
    /// Writes some of two pieces as one: what begins in one segment is read at once on the other side.
    pub fn poll_write_both(&mut self, cx: &mut Context<'_>, first: &[u8], second: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Stream::Plain(tcp) => tcp.poll_write_vectored(cx, &[IoSlice::new(first), IoSlice::new(second)]),
            Stream::Tls(tls) if first.is_empty() => Pin::new(tls).poll_write(cx, second),
            Stream::Tls(tls) => {
                let room = RECORD_BYTES.saturating_sub(first.len());
                let record = [first, &second[..second.len().min(room)]].concat();
                Pin::new(tls).poll_write(cx, &record)
            }
        }
    }
}

/// The connection below TLS. Remembers its end: OpenSSL's reader says 0 bytes for it as for a close_notify, and anybody
/// on the way can end a connection (RFC 8446 section 6.1).
#[derive(Debug)]
pub struct Transport {
    tcp: Socket<TcpStream>,
    ended: bool,
}

impl Transport {
    /// A connection that stands.
    pub fn new(tcp: Socket<TcpStream>) -> Transport {
        Transport { tcp, ended: false }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(tcp) => tcp.poll_read(cx, buf),
            Stream::Tls(tls) => match ready!(Pin::new(&mut *tls).poll_read(cx, buf)) {
                Ok(0) if tls.get_ref().ended => {
                    let detail = "the connection ended inside the TLS session";
                    Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, detail)))
                }
                read => Poll::Ready(read),
            },
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let read = ready!(self.tcp.poll_read(cx, buf))?;
        self.ended |= read == 0;
        Poll::Ready(Ok(read))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.tcp.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.tcp.get_ref().shutdown(Shutdown::Write))
    }
}
