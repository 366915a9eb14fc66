//! The bytes of one connection to a provider, with or without TLS.

use std::cell::Cell;
use std::io::{self, ErrorKind, IoSlice};
use std::net::TcpStream;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use futures_lite::io::AsyncRead;

use crate::socket::Socket;
use crate::tls::Session;

/// A byte stream to a provider.
#[derive(Debug)]
pub enum Stream {
    /// http
    Plain(Plain),
    /// https
    Tls(Session),
}

/// A connection without TLS.
#[derive(Debug)]
pub struct Plain {
    tcp: Socket<TcpStream>,
    has_answered: Rc<Cell<bool>>,
}

/// The first byte of a record with an alert (RFC 8446 section 5.1).
const TLS_ALERT: u8 = 21;

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
            Stream::Plain(plain) => plain.tcp.poll_write_vectored(cx, &pieces.map(IoSlice::new)),
            Stream::Tls(tls) => {
                let mut filled = pieces.iter().filter(|piece| !piece.is_empty());
                let first = filled.next().copied().unwrap_or_default();
                if first.len() >= RECORD_BYTES || filled.next().is_none() {
                    return tls.poll_write(cx, first);
                }
                // Made anew at each try: the same bytes, which OpenSSL's moving write buffers allow
                // (SslConnector sets that).
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

impl Plain {
    /// `has_answered` is shared by all connections to one server: whether it ever sent anything
    /// else than a TLS alert.
    pub fn new(tcp: Socket<TcpStream>, has_answered: Rc<Cell<bool>>) -> Plain {
        Plain { tcp, has_answered }
    }

    /// Reads. A server that has not answered yet may expect TLS: it sends an alert then, or closes
    /// the connection without a word.
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let read = ready!(self.tcp.poll_read(cx, buf));
        if self.has_answered.get() {
            return Poll::Ready(read);
        }
        let kind = match &read {
            Ok(1..) if buf[0] == TLS_ALERT => {
                let words = "it answers with a TLS alert; try https:// in base_url";
                return Poll::Ready(Err(io::Error::other(words)));
            }
            Ok(1..) => {
                self.has_answered.set(true);
                return Poll::Ready(read);
            }
            Ok(0) => ErrorKind::UnexpectedEof,
            Err(error) => error.kind(),
        };
        if !matches!(kind, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) {
            return Poll::Ready(read);
        }
        let words = "it closed the connection without an answer; \
                     if that port speaks TLS, try https:// in base_url";
        Poll::Ready(Err(io::Error::new(kind, words)))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(plain) => plain.poll_read(cx, buf),
            Stream::Tls(tls) => tls.poll_read(cx, buf),
        }
    }
}

impl Drop for Stream {
    /// A server that keeps sessions itself forgets one that ends without a close_notify (RFC 5246
    /// section 7.2.1).
    fn drop(&mut self) {
        if let Stream::Tls(tls) = self {
            tls.close_notify_now();
        }
    }
}
