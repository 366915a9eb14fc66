//! A connected socket on which no system call is spent to find out that nothing has come.
//!
//! A read that brought less than it had room for has emptied the socket; the next one asks the reactor first, which costs a
//! call of the kernel only where nobody has asked since the last event. One that waits and is given up stays asked for.
//! OpenSSL reads no more than it needs of a record, so that under TLS one read in vain is left. Knows no protocol.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use async_io::Async;
use rustix::buffer::spare_capacity;
use rustix::net::{RecvFlags, recv};

/// A stream socket. Clones are the same one, and each reads as if the others did not: one of them should.
#[derive(Debug)]
pub struct Socket<T> {
    io: Arc<Async<T>>,
    /// The last read took all there was.
    drained: bool,
}

impl<T> Socket<T> {
    /// The socket itself.
    pub fn get_ref(&self) -> &T {
        self.io.get_ref()
    }
}

impl<T> Socket<T>
where
    for<'a> &'a T: Read + Write,
{
    /// Reads what has come; 0 is the end.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |socket| socket.read(buf))
    }

    fn poll_with(
        &mut self,
        cx: &mut Context<'_>,
        mut read: impl FnMut(&mut Self) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_readable(cx))?;
            match read(self) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read),
            }
        }
    }

    /// Waits until a read may bring something.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.drained {
            ready!(self.io.poll_readable(cx))?;
            self.drained = false;
        }
        Poll::Ready(Ok(()))
    }

    /// The next read asks the reactor first, whatever there is: who has read enough for once gives the thread back so.
    pub fn ask_first(&mut self) {
        self.drained = true;
    }

    /// The next read looks for itself: the reactor may not have seen yet what has come.
    pub fn look_first(&mut self) {
        self.drained = false;
    }

    /// Writes what the kernel takes.
    pub fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    /// Writes what the kernel takes of these, one after the other.
    pub fn poll_write_vectored(&self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            match self.write_vectored(pieces) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => ready!(self.poll_writable(cx))?,
                written => return Poll::Ready(written),
            }
        }
    }

    /// Waits until a write may take something.
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.poll_writable(cx)
    }

    /// Reads what has come, for who waits in its own way: `WouldBlock` where nothing has.
    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.read_with(buf.len(), |mut io| io.read(buf))
    }

    fn read_with(&mut self, room: usize, mut read: impl FnMut(&T) -> io::Result<usize>) -> io::Result<usize> {
        if self.drained {
            return Err(ErrorKind::WouldBlock.into());
        }
        loop {
            match read(self.get_ref()) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(read) => {
                    // An end can be read again and again.
                    self.drained = (1..room).contains(&read);
                    return Ok(read);
                }
                Err(error) => {
                    self.drained = error.kind() == ErrorKind::WouldBlock;
                    return Err(error);
                }
            }
        }
    }

    /// Writes what the kernel takes, likewise.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            match self.get_ref().write_vectored(pieces) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                written => return written,
            }
        }
    }
}

impl<T: AsFd> Socket<T>
where
    for<'a> &'a T: Read + Write,
{
    /// Reads what has come to the end of `out`, into the room that it has; 0 is the end.
    pub fn poll_append(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |socket| {
            socket.read_with(out.capacity() - out.len(), |io| Ok(recv(io, spare_capacity(out), RecvFlags::empty())?.0))
        })
    }
}

impl Socket<TcpStream> {
    /// Waits for what a read would bring, and leaves it to be read.
    pub fn poll_peek(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_readable(cx))?;
            match self.get_ref().peek(buf) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.drained = true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                peeked => return Poll::Ready(peeked),
            }
        }
    }
}

impl<T> Clone for Socket<T> {
    fn clone(&self) -> Self {
        Socket { io: self.io.clone(), drained: self.drained }
    }
}

impl<T> From<Async<T>> for Socket<T> {
    fn from(io: Async<T>) -> Self {
        Arc::new(io).into()
    }
}

impl<T> From<Arc<Async<T>>> for Socket<T> {
    fn from(io: Arc<Async<T>>) -> Self {
        Socket { io, drained: false }
    }
}

impl<T: AsFd> AsFd for Socket<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::os::unix::net::UnixStream;

    use futures_lite::future::{block_on, poll_once};

    use super::*;

    fn pair() -> (Socket<UnixStream>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Async::new(ours).unwrap().into(), theirs)
    }

    fn read(socket: &mut Socket<UnixStream>, room: usize) -> Option<Vec<u8>> {
        let mut buf = vec![0; room];
        let read = block_on(poll_once(poll_fn(|cx| socket.poll_read(cx, &mut buf))))?.unwrap();
        Some(buf[..read].to_vec())
    }

    fn wait(socket: &mut Socket<UnixStream>) {
        block_on(poll_fn(|cx| socket.poll_readable(cx))).unwrap();
    }

    #[test]
    fn nothing_is_lost_between_a_short_read_and_the_next_one() {
        let (mut socket, mut peer) = pair();
        for round in 0..100u8 {
            peer.write_all(&[round; 3]).unwrap();
            wait(&mut socket);
            assert_eq!(read(&mut socket, 8).unwrap(), [round; 3]);
            // Here before anybody asks the reactor.
            peer.write_all(&[round; 2]).unwrap();
            wait(&mut socket);
            assert_eq!(read(&mut socket, 2).unwrap(), [round; 2]);
            assert_eq!(read(&mut socket, 8), None);
        }
        assert_eq!(read(&mut socket, 8), None, "a wait that is given up");
        drop(peer);
        wait(&mut socket);
        assert_eq!(read(&mut socket, 8).unwrap(), b"");
        assert_eq!(read(&mut socket, 8).unwrap(), b"", "the end stays");
    }

    #[test]
    fn what_is_appended_fills_the_room_there_is_and_no_more() {
        let (mut socket, mut peer) = pair();
        peer.write_all(b"abcde").unwrap();
        let mut out = Vec::with_capacity(4);
        out.push(b'>');
        let append = |socket: &mut Socket<UnixStream>, out: &mut Vec<u8>| {
            wait(socket);
            block_on(poll_fn(|cx| socket.poll_append(cx, out))).unwrap()
        };
        assert_eq!((append(&mut socket, &mut out), &*out, out.capacity()), (3, &b">abc"[..], 4));
        out.reserve_exact(8);
        assert_eq!((append(&mut socket, &mut out), &*out), (2, &b">abcde"[..]));
        assert!(block_on(poll_once(poll_fn(|cx| socket.poll_append(cx, &mut out)))).is_none(), "it is drained");
        drop(peer);
        assert_eq!(append(&mut socket, &mut out), 0, "the end");
    }

    #[test]
    fn an_empty_socket_costs_no_read() {
        let (mut socket, mut peer) = pair();
        peer.write_all(b"abc").unwrap();
        assert_eq!(socket.read(&mut [0; 4]).unwrap(), 3);
        peer.write_all(b"d").unwrap();
        let error = socket.read(&mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "the reactor was not asked");
        wait(&mut socket);
        assert_eq!(socket.read(&mut [0; 4]).unwrap(), 1);
    }

    #[test]
    fn who_asks_first_gives_the_thread_back_and_who_looks_first_sees_what_is_there() {
        let (mut socket, mut peer) = pair();
        peer.write_all(b"ab").unwrap();
        socket.ask_first();
        assert_eq!(read(&mut socket, 1), None, "there is something, but the reactor has its say");
        wait(&mut socket);
        assert_eq!(read(&mut socket, 8).unwrap(), b"ab");
        drop(peer);
        socket.look_first();
        assert_eq!(read(&mut socket, 8).unwrap(), b"", "the end is seen without the reactor");
    }

    #[test]
    fn a_full_socket_waits_for_room() {
        let (socket, mut peer) = pair();
        let mut sent = 0;
        while let Some(written) = block_on(poll_once(poll_fn(|cx| socket.poll_write(cx, &[7; 9999])))) {
            sent += written.unwrap();
        }
        let reading = std::thread::spawn(move || {
            let mut received = Vec::new();
            peer.read_to_end(&mut received).unwrap();
            received.len()
        });
        sent += block_on(poll_fn(|cx| socket.poll_write(cx, b"more"))).unwrap();
        drop(socket);
        assert_eq!(reading.join().unwrap(), sent);
    }
}
