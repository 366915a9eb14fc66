//! The bytes of one caller's connection, whichever way it came.

use std::future::poll_fn;
use std::io;
use std::net;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_io::Async;
use async_net::unix::UnixStream;
use async_net::{Shutdown, TcpStream};
use futures_lite::io::{AsyncRead, AsyncWrite};

use super::tls::Tls;

/// A caller's connection. Clones are the same connection.
#[derive(Debug, Clone)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// A unix socket.
    Unix(UnixStream),
    /// TLS over TCP.
    Tls(Tls),
}

impl Stream {
    /// Waits until more has come from the caller, the end included. Asks the reactor only: that costs no system call each time
    /// it is polled for another reason.
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(tcp) => Arc::<Async<net::TcpStream>>::from(tcp.clone()).readable().await,
            Stream::Unix(unix) => Arc::<Async<unix::net::UnixStream>>::from(unix.clone()).readable().await,
            Stream::Tls(tls) => tls.readable().await,
        }
    }

    /// Writes some of the bytes.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Stream::Tcp(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Stream::Unix(unix) => Pin::new(unix).poll_write(cx, bytes),
            Stream::Tls(tls) => tls.poll_write(cx, bytes),
        }
    }

    /// Says that nothing more comes; reading goes on.
    pub async fn finish(&mut self) -> io::Result<()> {
        self.close_notify().await?;
        match self {
            Stream::Tcp(tcp) => tcp.shutdown(Shutdown::Write),
            Stream::Unix(unix) => unix.shutdown(Shutdown::Write),
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
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Stream::Unix(unix) => Pin::new(unix).poll_read(cx, buf),
            Stream::Tls(tls) => tls.poll_read(cx, buf),
        }
    }
}
