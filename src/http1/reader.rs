//! Bytes that came from a peer and are not used yet. Knows nothing of what they mean.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_lite::io::AsyncRead;

use crate::socket::FAIR_SHARE_BYTES;

/// Room offered to one read.
const READ_CHUNK_BYTES: usize = 64 * 1024;

/// The same where little is awaited, a request head or nothing: as much of a body as comes with it is moved twice.
const LITTLE_READ_BYTES: usize = 16 * 1024;

thread_local! {
    /// Where the reads of a thread go first, since nobody knows how much will come: a connection holds what has, and one that
    /// waits holds nothing.
    static LANDING: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_CHUNK_BYTES]);
}

/// What bytes come from.
pub trait Source: AsyncRead + Unpin {
    /// Reads once, to the end of `out`, into the room that it has: nothing more is allocated.
    fn poll_append(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<io::Result<usize>>;
}

/// [`Source::poll_append`] for what can only read into memory that was written before.
pub fn poll_append_landed(
    io: &mut (impl AsyncRead + Unpin),
    cx: &mut Context<'_>,
    out: &mut Vec<u8>,
) -> Poll<io::Result<usize>> {
    poll_land(io, cx, out.capacity() - out.len(), out)
}

/// Reads once and throws away what came. Allocates nothing.
pub fn poll_discard(
    io: &mut (impl AsyncRead + Unpin),
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    LANDING.with_borrow_mut(|landing| Pin::new(io).poll_read(cx, landing))
}

/// Reads once, `room` bytes at most, to the end of `out`.
fn poll_land(
    io: &mut (impl AsyncRead + Unpin),
    cx: &mut Context<'_>,
    room: usize,
    out: &mut Vec<u8>,
) -> Poll<io::Result<usize>> {
    LANDING.with_borrow_mut(|landing| {
        let room = landing.len().min(room);
        let n = ready!(Pin::new(io).poll_read(cx, &mut landing[..room]))?;
        out.extend_from_slice(&landing[..n]);
        Poll::Ready(Ok(n))
    })
}

/// A connection's reading half with what was read ahead. Nothing read is ever lost: what one message leaves is the
/// beginning of the next.
#[derive(Debug)]
pub struct Reader<R> {
    io: R,
    /// Unread from `start` on.
    buf: Vec<u8>,
    start: usize,
}

impl<R> Reader<R> {
    /// A reader without a buffer; the first bytes bring one.
    pub fn new(io: R) -> Self {
        Self { io, buf: Vec::new(), start: 0 }
    }

    /// What was read and not consumed.
    pub fn buffered(&self) -> &[u8] {
        &self.buf[self.start..]
    }

    /// Marks the first `n` buffered bytes as used.
    ///
    /// # Panics
    /// If fewer than `n` bytes are buffered.
    pub fn consume(&mut self, n: usize) {
        assert!(n <= self.buf.len() - self.start, "consumed more than is buffered");
        self.start += n;
        if self.start == self.buf.len() {
            self.start = 0;
            self.buf.clear();
        }
    }

    /// Gives the buffer back to the allocator when nothing is in it: for a connection that will idle.
    pub fn release(&mut self) {
        if self.buffered().is_empty() {
            self.buf = Vec::new();
        }
    }

    /// The connection below, for somebody else; what is buffered is lost.
    pub fn into_inner(self) -> R {
        self.io
    }

    /// The connection below. Reading from it directly leaves out what is buffered.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.io
    }
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Reads once and appends what came; 0 is the end of the stream. Dropping the future loses no byte.
    pub async fn fill(&mut self) -> io::Result<usize> {
        poll_fn(|cx| self.poll_fill(cx, READ_CHUNK_BYTES)).await
    }

    /// The same where a request head comes next, or nothing.
    pub async fn fill_little(&mut self) -> io::Result<usize> {
        poll_fn(|cx| self.poll_fill(cx, LITTLE_READ_BYTES)).await
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, room: usize) -> Poll<io::Result<usize>> {
        self.buf.drain(..self.start);
        self.start = 0;
        poll_land(&mut self.io, cx, room, &mut self.buf)
    }
}

impl<R: Source> Reader<R> {
    /// Reads once like [`Reader::fill`], but what came goes straight to the end of `out`, which has room for something; what is
    /// beyond `limit` bytes is buffered. For payload that nothing stands in front of: the buffer has to be empty.
    pub async fn fill_past(&mut self, out: &mut Vec<u8>, limit: usize) -> io::Result<usize> {
        assert!(self.buffered().is_empty(), "what is buffered comes first");
        assert!(out.len() < out.capacity(), "nothing read would be taken for the end");
        let end = out.len().saturating_add(limit);
        // One read straight into a large room may bring megabytes.
        let is_large = out.capacity() - out.len() > FAIR_SHARE_BYTES;
        let n = match is_large {
            false => poll_fn(|cx| self.io.poll_append(cx, out)).await?,
            true => poll_fn(|cx| poll_append_landed(&mut self.io, cx, out)).await?,
        };
        self.buf.extend_from_slice(out.get(end..).unwrap_or_default());
        out.truncate(end);
        Ok(n)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once};

    /// A peer whose bytes arrive in pieces of the given sizes (the last one repeats), each after one Pending.
    pub(crate) struct Pieces {
        bytes: io::Cursor<Vec<u8>>,
        sizes: Vec<usize>,
        ready: bool,
    }

    impl Pieces {
        pub(crate) fn new(bytes: &[u8], sizes: &[usize]) -> Self {
            Self { bytes: io::Cursor::new(bytes.to_vec()), sizes: sizes.to_vec(), ready: false }
        }
    }

    impl Source for Pieces {
        fn poll_append(
            &mut self,
            cx: &mut Context<'_>,
            out: &mut Vec<u8>,
        ) -> Poll<io::Result<usize>> {
            poll_append_landed(self, cx, out)
        }
    }

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            self.ready = !self.ready;
            if self.ready {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let size = if self.sizes.len() > 1 { self.sizes.remove(0) } else { self.sizes[0] };
            let room = size.clamp(1, buf.len());
            let n = io::Read::read(&mut self.bytes, &mut buf[..room])?;
            Poll::Ready(Ok(n))
        }
    }

    #[test]
    fn every_byte_comes_once_and_in_order() {
        let bytes: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
        let mut reader = Reader::new(Pieces::new(&bytes, &[1, 5000, 17_000, 3, 9999]));
        let mut seen = Vec::new();
        while block_on(reader.fill()).unwrap() > 0 {
            let keep = reader.buffered().len() / 3;
            let take = reader.buffered().len() - keep;
            seen.extend_from_slice(&reader.buffered()[..take]);
            reader.consume(take);
        }
        seen.extend_from_slice(reader.buffered());
        assert!(seen == bytes);
        assert!(
            reader.buf.len() <= 4 * READ_CHUNK_BYTES,
            "the buffer grew to {}",
            reader.buf.len()
        );
    }

    #[test]
    fn what_is_beyond_the_limit_is_buffered() {
        let mut reader = Reader::new(Pieces::new(b"abcdefg", &[3]));
        let mut out = Vec::with_capacity(16);
        assert_eq!(block_on(reader.fill_past(&mut out, 5)).unwrap(), 3);
        assert_eq!((out.as_slice(), reader.buffered()), (&b"abc"[..], &b""[..]));
        assert_eq!(block_on(reader.fill_past(&mut out, 2)).unwrap(), 3);
        assert_eq!((out.as_slice(), reader.buffered()), (&b"abcde"[..], &b"f"[..]));
        assert_eq!(block_on(reader.fill()).unwrap(), 1);
        assert_eq!(reader.buffered(), b"fg");
    }

    #[test]
    fn a_dropped_fill_loses_nothing() {
        let mut reader = Reader::new(Pieces::new(b"abc", &[1]));
        for _ in 0..3 {
            assert!(block_on(poll_once(reader.fill())).is_none());
            assert_eq!(block_on(poll_once(reader.fill())).unwrap().unwrap(), 1);
        }
        assert_eq!(reader.buffered(), b"abc");
        assert_eq!(block_on(reader.fill()).unwrap(), 0);
    }

    #[test]
    fn waiting_idle_holds_no_memory() {
        let mut reader = Reader::new(Pieces::new(&[7; 40_000], &[3000]));
        assert!(block_on(poll_once(reader.fill())).is_none());
        assert_eq!(reader.buf.capacity(), 0);
        block_on(reader.fill()).unwrap();
        reader.release();
        assert_eq!(reader.buffered().len(), 3000, "unread bytes stay");
        reader.consume(3000);
        reader.release();
        assert_eq!(reader.buf.capacity(), 0);
    }
}
