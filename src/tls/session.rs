//! One TLS session on a socket that stays ours to watch.
//!
//! OpenSSL takes a step whenever the socket gets ready: a read takes what has come, a write writes,
//! and neither waits for the other. A handshake computes for about a millisecond, so its callers
//! run it on the thread of `aside`.

use std::fmt;
use std::future::poll_fn;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::task::{Context, Poll, ready};

use openssl::ssl::{self, ErrorCode, Ssl, SslStream};

use super::Problem;
use super::client::{self, Server};
use crate::socket::Socket;
use crate::stale_errors;

/// Reads in one call of OpenSSL. A call continues by itself behind a message of the protocol's own
/// (KeyUpdate, a second ClientHello), so a peer that sends nothing else would hold the thread.
const READS_AT_ONCE: u32 = 64;

/// A session whose handshake is done.
pub struct Session(SslStream<Feed>);

impl Session {
    /// Performs a client's handshake.
    pub async fn connect(server: Server, socket: Socket<TcpStream>) -> Result<Session, Problem> {
        let ssl = server.ssl().map_err(|stack| Problem::of_stack(&stack, ""))?;
        Session::begin(ssl, socket, SslStream::connect).await
    }

    /// Performs a server's handshake.
    pub async fn accept(ssl: Ssl, socket: Socket<TcpStream>) -> Result<Session, Problem> {
        Session::begin(ssl, socket, SslStream::accept).await
    }

    async fn begin(
        ssl: Ssl,
        socket: Socket<TcpStream>,
        handshake: fn(&mut SslStream<Feed>) -> Result<(), ssl::Error>,
    ) -> Result<Session, Problem> {
        let stream = SslStream::new(ssl, Feed { socket, reads: 0 });
        let mut session = Session(stream.map_err(|stack| Problem::of_stack(&stack, ""))?);
        let done = poll_fn(|cx| session.poll(cx, |stream| handshake(stream).map(|()| 1))).await;
        match done {
            Ok(1..) => Ok(session),
            // 0 is a close_notify.
            failed => {
                client::forget_sessions(session.0.ssl());
                Err(failed.err().unwrap_or(Problem::Closed))
            }
        }
    }

    /// Makes the next read look for what has come, whether the socket knows of it or not.
    pub fn look_first(&mut self) {
        self.0.get_mut().socket.look_first();
    }

    /// Reads; 0 is a close_notify. An end without one is an error.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.poll(cx, |stream| stream.ssl_read(buf)).map_err(Problem::into_io)
    }

    /// Writes one record at most. After `Pending`, the same bytes have to come again.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(cx, |stream| stream.ssl_write(bytes)).map_err(Problem::into_io)
    }

    /// Sends a close_notify (RFC 8446 section 6.1) and does not wait for the peer's.
    pub fn poll_close_notify(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = ready!(self.poll(cx, |stream| stream.shutdown().map(|_| 0)));
        Poll::Ready(sent.map(|_| ()).map_err(Problem::into_io))
    }

    /// Sends a close_notify if the socket has room for it now.
    pub fn close_notify_now(&mut self) {
        stale_errors::forget();
        // On a connection that is broken there is nobody to tell.
        let _ = self.0.shutdown();
    }

    /// Takes a step until it is done, whichever way OpenSSL has to wait for it.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut step: impl FnMut(&mut SslStream<Feed>) -> Result<usize, ssl::Error>,
    ) -> Poll<Result<usize, Problem>> {
        let Session(stream) = self;
        loop {
            stream.get_mut().reads = 0;
            stale_errors::forget();
            let error = match step(stream) {
                Ok(done) => return Poll::Ready(Ok(done)),
                Err(error) => error,
            };
            match error.code() {
                ErrorCode::WANT_READ => ready!(stream.get_mut().socket.poll_readable(cx)),
                ErrorCode::WANT_WRITE => {
                    ready!(stream.get_ref().socket.poll_writable(cx)).map_err(Problem::Io)?
                }
                ErrorCode::ZERO_RETURN => return Poll::Ready(Ok(0)),
                _ => {
                    let problem = Problem::of(error, stream.ssl());
                    if problem.is_fatal_alert() {
                        client::forget_sessions(stream.ssl());
                    }
                    return Poll::Ready(Err(problem));
                }
            }
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Session").field(&self.0.get_ref().socket).finish()
    }
}

/// The connection as OpenSSL sees it: a call that would have to wait says so.
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
    fn a_call_that_has_read_often_enough_gives_the_thread_back_though_there_is_more() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = Socket::new(listener.accept().unwrap().0).unwrap();
        let mut feed = Feed { socket, reads: 0 };
        peer.write_all(&[7; 200]).unwrap();
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
