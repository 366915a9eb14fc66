//! TLS towards callers: the handshake, and the bytes of a session, on a connection that stays ours to watch.
//!
//! OpenSSL's own session, driven as its socket gets ready: a read takes what has come, a write writes, and neither waits for the other.
//! The handshake computes on a thread of its own, since the thread that relays and grants must not wait for that; it
//! may take as long as a request's head.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use futures_lite::future;
use openssl::ssl::{self, ErrorCode, Ssl, SslContext, SslStream};

use super::Gateway;
use super::accept::dismiss;
use super::stream::Stream;
use crate::aside::aside;
use crate::deadline::within;
use crate::error::Error;
use crate::socket::Socket;
use crate::stale_errors;
use crate::telemetry::Trace;

/// What one call of OpenSSL may read. It goes on by itself from a message of its own (KeyUpdate, a ClientHello again) to the
/// next, for as long as there are any: nobody may hold the thread with those.
const READS_AT_ONCE: u32 = 64;

/// A session. Clones are the same one.
#[derive(Clone)]
pub struct Tls {
    socket: Socket<TcpStream>,
    session: Rc<RefCell<SslStream<Feed>>>,
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
    let feed = Feed { socket: socket.clone(), reads: 0 };
    let session = SslStream::new(Ssl::new(context).ok()?, feed).ok()?;
    let session = aside(handshake(session)).await.ok()?;
    Some(Greeting::Tls(Tls { socket, session: Rc::new(RefCell::new(session)) }))
}

async fn handshake(mut session: SslStream<Feed>) -> io::Result<SslStream<Feed>> {
    loop {
        session.get_mut().reads = 0;
        stale_errors::forget();
        let Err(error) = session.accept() else { return Ok(session) };
        match error.code() {
            ErrorCode::WANT_READ => poll_fn(|cx| session.get_mut().socket.poll_readable(cx)).await,
            ErrorCode::WANT_WRITE => {
                poll_fn(|cx| session.get_ref().socket.poll_writable(cx)).await?
            }
            _ => return Err(into_io(error)),
        }
    }
}

impl Tls {
    /// The next read looks for what has come, whether it is known or not.
    pub fn look_first(&self) {
        self.session.borrow_mut().get_mut().socket.look_first();
    }

    /// Reads; 0 is a close_notify. An end without one is an error.
    pub fn poll_read(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.poll(cx, |session| session.ssl_read(buf))
    }

    /// Writes one record at most.
    pub fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(cx, |session| session.ssl_write(bytes))
    }

    /// Says with a close_notify that this was all (RFC 8446 section 6.1); the caller's own is not waited for.
    pub fn poll_close_notify(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(cx, |session| session.shutdown().map(|_| 0)).map_ok(|_| ())
    }

    /// Ends the connection's writing side below the session.
    pub fn shutdown(&self) -> io::Result<()> {
        self.socket.get_ref().shutdown(Shutdown::Write)
    }

    /// Tries a step until it is done, whichever way OpenSSL has to wait for it.
    fn poll(
        &self,
        cx: &mut Context<'_>,
        mut step: impl FnMut(&mut SslStream<Feed>) -> Result<usize, ssl::Error>,
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut session = self.session.borrow_mut();
            session.get_mut().reads = 0;
            stale_errors::forget();
            let error = match step(&mut session) {
                Ok(done) => return Poll::Ready(Ok(done)),
                Err(error) => error,
            };
            match error.code() {
                ErrorCode::WANT_READ => ready!(session.get_mut().socket.poll_readable(cx)),
                ErrorCode::WANT_WRITE => ready!(session.get_ref().socket.poll_writable(cx))?,
                ErrorCode::ZERO_RETURN => return Poll::Ready(Ok(0)),
                _ => return Poll::Ready(Err(into_io(error))),
            }
        }
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

fn into_io(error: ssl::Error) -> io::Error {
    error.into_io_error().unwrap_or_else(io::Error::other)
}

/// The connection as OpenSSL sees it: a call that would have to wait says so.
#[derive(Debug)]
struct Feed {
    socket: Socket<TcpStream>,
    /// Since the call of OpenSSL began.
    reads: u32,
}

impl Read for Feed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.reads == READS_AT_ONCE {
            self.socket.wait_a_turn();
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.reads += 1;
        self.socket.read(buf)
    }
}

impl Write for Feed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use futures_lite::future::{block_on, poll_once};

    use super::*;
    use crate::socket::with_watched_sockets;

    #[test]
    fn who_has_read_often_enough_gives_the_thread_back_though_there_is_more() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = Socket::new(listener.accept().unwrap().0).unwrap();
        let mut feed = Feed { socket, reads: 0 };
        caller.write_all(&[7; 200]).unwrap();
        smol::block_on(with_watched_sockets(poll_fn(|cx| feed.socket.poll_peek(cx, &mut [0]))))
            .unwrap()
            .unwrap();
        // As OpenSSL does: never more than it needs, so that no read tells that it was the last.
        let reads = std::iter::repeat_with(|| feed.read(&mut [0]))
            .take_while(|read| matches!(read, Ok(1)))
            .count();
        assert_eq!(reads, READS_AT_ONCE as usize);
        assert!(
            block_on(poll_once(poll_fn(|cx| feed.socket.poll_readable(cx)))).is_none(),
            "others have their turn"
        );
        block_on(poll_fn(|cx| feed.socket.poll_readable(cx)));
        feed.reads = 0;
        assert_eq!(feed.read(&mut [0; 200]).unwrap(), 200 - reads);
    }
}
