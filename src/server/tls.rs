//! TLS towards callers: the handshake, and the bytes of a session, on a connection that stays ours to watch.
//!
//! The handshake computes on a thread of its own, since the thread that relays and grants must not wait for that; it
//! may take as long as a request's head.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::task::{Context, Poll};

use futures_lite::future;
use openssl::ssl::{Ssl, SslContext};

use super::Gateway;
use super::accept::dismiss;
use super::stream::Stream;
use crate::aside::aside;
use crate::deadline::within;
use crate::error::Error;
use crate::socket::Socket;
use crate::telemetry::Trace;
use crate::tls::Session;

/// A session. Clones are the same one.
#[derive(Clone)]
pub struct Tls {
    socket: Socket<TcpStream>,
    session: Rc<RefCell<Session>>,
}

/// What a caller's connection becomes under `server.tls`; nothing if that fails. Who speaks plain HTTP to the port is told
/// so in plain HTTP, which `trace` notes.
pub async fn secure(gateway: &Gateway, stream: Stream, trace: &Rc<Trace>) -> Option<Stream> {
    match (&gateway.config.tls, stream) {
        // Boxed, so that no other connection holds the room for it.
        (Some(tls), Stream::Tcp(tcp)) => {
            Box::pin(shake_hands(gateway, tls.context(), tcp, trace)).await
        }
        (_, stream) => Some(stream),
    }
}

async fn shake_hands(
    gateway: &Gateway,
    context: &SslContext,
    tcp: Socket<TcpStream>,
    trace: &Rc<Trace>,
) -> Option<Stream> {
    let going_down = async {
        gateway.draining.begins().await;
        None
    };
    let greeting = future::or(greeting(context, tcp.clone()), going_down);
    match within(gateway.config.header_timeout, greeting).await?? {
        Greeting::Tls(tls) => Some(Stream::Tls(tls)),
        Greeting::PlainHttp => {
            dismiss(gateway, Stream::Tcp(tcp), trace, &Error::PlainHttp, true).await;
            None
        }
    }
}

enum Greeting {
    Tls(Tls),
    PlainHttp,
}

/// A handshake begins with the byte 22 (RFC 8446 section 5.1), a request with a letter.
async fn greeting(context: &SslContext, mut socket: Socket<TcpStream>) -> Option<Greeting> {
    let mut first = [0];
    if poll_fn(|cx| socket.poll_peek(cx, &mut first)).await.ok()? == 0 {
        return None;
    }
    if first[0].is_ascii_alphabetic() {
        return Some(Greeting::PlainHttp);
    }
    let ssl = Ssl::new(context).ok()?;
    let session = aside(Session::accept(ssl, socket.clone())).await.ok()?;
    Some(Greeting::Tls(Tls { socket, session: Rc::new(RefCell::new(session)) }))
}

impl Tls {
    /// The next read looks for what has come, whether it is known or not.
    pub fn look_first(&self) {
        self.session.borrow_mut().look_first();
    }

    /// Reads; 0 is a close_notify. An end without one is an error.
    pub fn poll_read(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.session.borrow_mut().poll_read(cx, buf)
    }

    /// Writes one record at most.
    pub fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.session.borrow_mut().poll_write(cx, bytes)
    }

    /// Says with a close_notify that this was all (RFC 8446 section 6.1); the caller's own is not waited for.
    pub fn poll_close_notify(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.session.borrow_mut().poll_close_notify(cx)
    }

    /// Ends the connection's writing side below the session.
    pub fn shutdown(&self) -> io::Result<()> {
        self.socket.get_ref().shutdown(Shutdown::Write)
    }
}

impl AsFd for Tls {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tls").field(&self.socket).finish()
    }
}
