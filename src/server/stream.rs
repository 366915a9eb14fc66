//! The bytes of one caller's connection, whichever way it came.

use std::future::poll_fn;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_lite::io::AsyncRead;

use super::tls::Tls;
use crate::http1::Source;
use crate::http1::reader::poll_append_landed;
use crate::socket::Socket;

/// A caller's connection. Clones are the same connection.
#[derive(Debug, Clone)]
pub enum Stream {
    /// TCP.
    Tcp(Socket<TcpStream>),
    /// A unix socket.
    Unix(Socket<UnixStream>),
    /// TLS over TCP.
    Tls(Tls),
}

impl Stream {
    /// The next read looks for what has come, whether it is known or not.
    pub fn look_first(&mut self) {
        match self {
            Stream::Tcp(tcp) => tcp.look_first(),
            Stream::Unix(unix) => unix.look_first(),
            Stream::Tls(tls) => tls.look_first(),
        }
    }

    /// Writes some of the bytes.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Stream::Tcp(tcp) => tcp.poll_write(cx, bytes),
            Stream::Unix(unix) => unix.poll_write(cx, bytes),
            Stream::Tls(tls) => tls.poll_write(cx, bytes),
        }
    }

    /// Says that nothing more comes; reading goes on.
    pub async fn finish(&mut self) -> io::Result<()> {
        self.close_notify().await?;
        match self {
            Stream::Tcp(tcp) => tcp.get_ref().shutdown(Shutdown::Write),
            Stream::Unix(unix) => unix.get_ref().shutdown(Shutdown::Write),
            Stream::Tls(tls) => tls.shutdown(),
        }
    }

    /// Says under TLS that what came is whole.
    pub async fn close_notify(&mut self) -> io::Result<()> {
        match self {
            Stream::Tcp(_) | Stream::Unix(_) => Ok(()),
            Stream::Tls(tls) => poll_fn(|cx| tls.poll_close_notify(cx)).await,
        }
    }

    /// The close will be a reset, which nobody takes for an end. Unix sockets have none.
    pub fn reset_on_close(&self) {
        let _ = rustix::net::sockopt::set_socket_linger(self, Some(Duration::ZERO));
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(tcp) => tcp.as_fd(),
            Stream::Unix(unix) => unix.as_fd(),
            Stream::Tls(tls) => tls.as_fd(),
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
            Stream::Tcp(tcp) => tcp.poll_read(cx, buf),
            Stream::Unix(unix) => unix.poll_read(cx, buf),
            Stream::Tls(tls) => tls.poll_read(cx, buf),
        }
    }
}

impl Source for Stream {
    fn poll_append(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<io::Result<usize>> {
        match self {
            Stream::Tcp(tcp) => tcp.poll_append(cx, out),
            Stream::Unix(unix) => unix.poll_append(cx, out),
            Stream::Tls(_) => poll_append_landed(self, cx, out),
        }
    }
}
