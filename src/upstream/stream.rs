//! The bytes of one connection to a provider, with or without TLS.

use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_lite::io::AsyncRead;

use crate::socket::Socket;
use crate::tls::Session;

/// A byte stream to a provider.
#[derive(Debug)]
pub enum Stream {
    /// http
    Plain(Socket<TcpStream>),
    /// https
    Tls(Session),
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

impl Drop for Stream {
    /// A server that keeps sessions itself forgets one that ends without a close_notify (RFC 5246
    /// section 7.2.1).
    fn drop(&mut self) {
        if let Stream::Tls(tls) = self {
            tls.close_notify_now();
        }
    }
}
