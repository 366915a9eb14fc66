//! A connected socket on which no system call is spent to find out that nothing has come.
//!
//! A read that brought less than it had room for has emptied the socket; the next one waits until [`readiness`] has news of it. (Not so
//! where a peer sends urgent data, or descriptors over a unix socket. Nobody does who speaks HTTP; whoever did would wait for what it
//! sends next.)
//! OpenSSL reads no more than it needs of a record, so that under TLS one read in vain is left. Knows no protocol.

mod readiness;

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::buffer::spare_capacity;
use rustix::net::{RecvFlags, recv};

use readiness::Registered;
pub use readiness::with_watched_sockets;

/// What a task reads from one socket, or writes to it, before others have their turn.
pub const FAIR_SHARE_BYTES: usize = 256 * 1024;

/// A stream socket. Clones are the same one, and each reads as if the others did not: one of them should, as one task at a time should
/// wait in each direction.
#[derive(Debug)]
pub struct Socket<T: AsFd> {
    io: Arc<Registered<T>>,
    before: Before,
    /// Bytes read since others had their turn.
    unshared: usize,
}

/// What the next read waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    /// The last read took all there was.
    News,
    /// There may be more, but it is others' turn.
    Turn,
}

impl<T: AsFd> Socket<T> {
    /// One that is connected. Who waits on it is woken by [`with_watched_sockets`] on this thread and nowhere else.
    pub fn new(io: T) -> io::Result<Socket<T>> {
        rustix::io::ioctl_fionbio(&io, true)?;
        Ok(Socket { io: Arc::new(Registered::new(io)?), before: Before::Nothing, unshared: 0 })
    }

    /// The socket itself.
    pub fn get_ref(&self) -> &T {
        self.io.get_ref()
    }
}

impl<T: AsFd> Socket<T>
where
    for<'a> &'a T: Read + Write,
{
    /// Reads what has come; 0 is the end.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |socket| socket.read(buf))
    }

    /// Reads what has come to the end of `out`, into the room that it has; 0 is the end.
    pub fn poll_append(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut Vec<u8>,
    ) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |socket| {
            socket.read_with(out.capacity() - out.len(), |io| {
                Ok(recv(io, spare_capacity(out), RecvFlags::empty())?.0)
            })
        })
    }

    fn poll_with(
        &mut self,
        cx: &mut Context<'_>,
        mut read: impl FnMut(&mut Self) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_readable(cx));
            match read(self) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read),
            }
        }
    }

    /// Waits until a read may bring something.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.before {
            Before::Nothing => {}
            Before::News => {
                if self.io.poll_readable(cx).is_pending() {
                    self.unshared = 0;
                    return Poll::Pending;
                }
            }
            Before::Turn => {
                (self.before, self.unshared) = (Before::Nothing, 0);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        self.before = Before::Nothing;
        Poll::Ready(())
    }

    /// The next read waits its turn, whatever there is: who has read enough for once gives the thread back so.
    pub fn wait_a_turn(&mut self) {
        self.before = Before::Turn;
    }

    /// The next read looks for itself: what has come may not be known yet.
    pub fn look_first(&mut self) {
        self.before = Before::Nothing;
    }

    /// Writes what the kernel takes.
    pub fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    /// Writes what the kernel takes of these, one after the other.
    pub fn poll_write_vectored(
        &self,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.write_vectored(pieces) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ready!(self.poll_writable(cx))?
                }
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

    fn read_with(
        &mut self,
        room: usize,
        mut read: impl FnMut(&T) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if self.before != Before::Nothing {
            return Err(ErrorKind::WouldBlock.into());
        }
        loop {
            match read(self.get_ref()) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(read) => {
                    // An end can be read again and again, and may stand behind these bytes without being told again.
                    if (1..room).contains(&read) && !self.io.has_ended() {
                        self.before = Before::News;
                    }
                    // A peer that sends as fast as this task reads would never let it wait.
                    self.unshared += read;
                    if self.unshared >= FAIR_SHARE_BYTES && self.before == Before::Nothing {
                        self.before = Before::Turn;
                    }
                    return Ok(read);
                }
                Err(error) => {
                    if error.kind() == ErrorKind::WouldBlock {
                        self.before = Before::News;
                    }
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

impl Socket<TcpStream> {
    /// Waits for what a read would bring, and leaves it to be read.
    pub fn poll_peek(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        // Without room, nothing counts as a short read: what was seen is still there.
        self.poll_with(cx, |socket| socket.read_with(0, |io| io.peek(buf)))
    }
}

impl<T: AsFd> Clone for Socket<T> {
    fn clone(&self) -> Self {
        Socket { io: self.io.clone(), before: self.before, unshared: 0 }
    }
}

impl<T: AsFd> AsFd for Socket<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::{Shutdown, TcpListener};
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use futures_lite::future::{block_on, poll_once};

    use super::*;

    fn pair() -> (Socket<UnixStream>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Socket::new(ours).unwrap(), theirs)
    }

    fn tcp_pair() -> (Socket<TcpStream>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Socket::new(listener.accept().unwrap().0).unwrap(), theirs)
    }

    fn watched<T>(work: impl Future<Output = T>) -> T {
        smol::block_on(with_watched_sockets(work)).unwrap()
    }

    fn read<T: AsFd>(socket: &mut Socket<T>, room: usize) -> Option<Vec<u8>>
    where
        for<'a> &'a T: Read + Write,
    {
        let mut buf = vec![0; room];
        let read = block_on(poll_once(poll_fn(|cx| socket.poll_read(cx, &mut buf))))?.unwrap();
        Some(buf[..read].to_vec())
    }

    fn wait<T: AsFd>(socket: &mut Socket<T>)
    where
        for<'a> &'a T: Read + Write,
    {
        watched(poll_fn(|cx| socket.poll_readable(cx)));
    }

    #[test]
    fn nothing_is_lost_between_a_short_read_and_the_next_one() {
        let (mut socket, mut peer) = pair();
        for round in 0..100u8 {
            peer.write_all(&[round; 3]).unwrap();
            wait(&mut socket);
            assert_eq!(read(&mut socket, 8).unwrap(), [round; 3]);
            // Here before anybody waits.
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

    /// The kernel tells of both at once, and of an end only once.
    #[test]
    fn an_end_that_came_with_the_last_bytes_is_seen_after_them() {
        fn check<T: AsFd>(mut socket: Socket<T>, mut peer: impl Write, end: impl FnOnce())
        where
            for<'a> &'a T: Read + Write,
        {
            assert_eq!(read(&mut socket, 8), None);
            peer.write_all(b"last").unwrap();
            end();
            wait(&mut socket);
            assert_eq!(read(&mut socket, 8).unwrap(), b"last");
            wait(&mut socket);
            assert_eq!(read(&mut socket, 8).unwrap(), b"");
        }
        let (socket, peer) = pair();
        check(socket, &peer, || peer.shutdown(Shutdown::Write).unwrap());
        let (socket, peer) = tcp_pair();
        check(socket, &peer, || peer.shutdown(Shutdown::Write).unwrap());
    }

    #[test]
    fn a_reset_is_seen_after_what_came_before_it() {
        let (mut socket, mut peer) = tcp_pair();
        peer.write_all(b"last").unwrap();
        wait(&mut socket);
        rustix::net::sockopt::set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
        drop(peer);
        assert_eq!(read(&mut socket, 8).unwrap(), b"last");
        let reset = watched(poll_fn(|cx| socket.poll_read(cx, &mut [0; 8])));
        assert_eq!(reset.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn what_is_appended_fills_the_room_there_is_and_no_more() {
        let (mut socket, mut peer) = pair();
        peer.write_all(b"abcde").unwrap();
        let mut out = Vec::with_capacity(4);
        out.push(b'>');
        let append = |socket: &mut Socket<UnixStream>, out: &mut Vec<u8>| {
            watched(poll_fn(|cx| socket.poll_append(cx, out))).unwrap()
        };
        assert_eq!((append(&mut socket, &mut out), &*out, out.capacity()), (3, &b">abc"[..], 4));
        out.reserve_exact(8);
        assert_eq!((append(&mut socket, &mut out), &*out), (2, &b">abcde"[..]));
        assert!(
            block_on(poll_once(poll_fn(|cx| socket.poll_append(cx, &mut out)))).is_none(),
            "it is drained"
        );
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
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "nobody has looked");
        wait(&mut socket);
        assert_eq!(socket.read(&mut [0; 4]).unwrap(), 1);
    }

    #[test]
    fn who_waits_a_turn_goes_on_without_news_and_who_looks_first_without_a_wait() {
        let (mut socket, mut peer) = pair();
        peer.write_all(b"abc").unwrap();
        wait(&mut socket);
        assert_eq!(read(&mut socket, 1).unwrap(), b"a");
        socket.wait_a_turn();
        assert_eq!(socket.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(read(&mut socket, 1), None, "there is something, but others have their turn");
        socket.wait_a_turn();
        wait(&mut socket);
        assert_eq!(read(&mut socket, 8).unwrap(), b"bc");
        drop(peer);
        socket.look_first();
        assert_eq!(
            read(&mut socket, 8).unwrap(),
            b"",
            "the end is seen before anybody was told of it"
        );
    }

    #[test]
    fn a_peer_that_sends_on_and_on_leaves_others_their_turn() {
        const PIECE: usize = 64 * 1024;
        let (mut socket, _peer) = pair();
        for _ in 0..3 {
            for _ in 0..FAIR_SHARE_BYTES / PIECE {
                assert_eq!(socket.read_with(PIECE, |_| Ok(PIECE)).unwrap(), PIECE);
            }
            let refused = socket.read_with(PIECE, |_| panic!("it is others' turn"));
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::WouldBlock);
            assert!(block_on(poll_once(poll_fn(|cx| socket.poll_readable(cx)))).is_none());
            assert!(block_on(poll_once(poll_fn(|cx| socket.poll_readable(cx)))).is_some());
        }
    }

    #[test]
    fn a_full_socket_waits_for_room_again_and_again() {
        let (socket, mut peer) = pair();
        let mut sent = 0;
        for _ in 0..3 {
            while let Some(written) =
                block_on(poll_once(poll_fn(|cx| socket.poll_write(cx, &[7; 9999]))))
            {
                sent += written.unwrap();
            }
            let reading = thread::spawn(move || {
                peer.read_exact(&mut vec![0; sent]).unwrap();
                peer
            });
            sent = watched(poll_fn(|cx| socket.poll_write(cx, b"more"))).unwrap();
            peer = reading.join().unwrap();
        }
    }

    #[test]
    fn who_waits_on_another_thread_is_woken_by_this_one() {
        let (mut socket, mut peer) = pair();
        let (told, waits) = async_channel::bounded(1);
        let waiting = thread::spawn(move || {
            // It waits before there is anything.
            let first = block_on(poll_once(poll_fn(|cx| socket.poll_read(cx, &mut [0]))));
            told.send_blocking(first.is_none()).unwrap();
            block_on(poll_fn(|cx| socket.poll_read(cx, &mut [0]))).unwrap();
            told.send_blocking(true).unwrap();
        });
        assert!(waits.recv_blocking().unwrap());
        peer.write_all(b"x").unwrap();
        assert_eq!(watched(waits.recv()), Ok(true));
        waiting.join().unwrap();
    }
}
