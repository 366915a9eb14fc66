//! A connection's byte stream that writes while it is read.
//!
//! A request is handed over whole; every read first pushes out what the socket takes of it. So an answer that comes
//! before the upload has ended (413, 401) is seen at once, and no task is needed for the other direction. The permit is spent here,
//! when the last byte of the request head has been written.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_lite::io::AsyncRead;

use super::forward::Outgoing;
use super::stream::Stream;
use crate::shaping::scheduler::{InFlight, Permit};
use crate::socket::FAIR_SHARE_BYTES;

/// A stream and the request that is going out on it, if any.
pub struct Wire {
    stream: Stream,
    sending: Option<Sending>,
}

struct Sending {
    request: Outgoing,
    written: usize,
    permit: Option<Permit>,
    sent: Option<Sent>,
    /// A write failed; the provider may still have said why.
    broken: bool,
}

/// A request whose head is on the wire.
#[derive(Debug)]
pub struct Sent {
    /// Counts as in flight until dropped.
    pub in_flight: InFlight,
    /// The instant after the write.
    pub at: Instant,
}

impl Wire {
    /// Nothing to write yet.
    pub fn new(stream: Stream) -> Wire {
        Wire { stream, sending: None }
    }

    /// Hands over a request; reading sends it.
    pub fn send(&mut self, permit: Permit, request: Outgoing) {
        self.sending =
            Some(Sending { request, written: 0, permit: Some(permit), sent: None, broken: false });
    }

    /// The proof that the head was written; `None` if it was not, and then the permit goes back with this wire. A request
    /// that is out whole is forgotten: its body may be large, and the answer long.
    pub fn take_sent(&mut self) -> Option<Sent> {
        let sent = self.sending.as_mut()?.sent.take();
        self.finish_sending();
        sent
    }

    /// Whether no part of a request is still to be written; forgets the request then.
    pub fn finish_sending(&mut self) -> bool {
        let done = self.sending.as_ref().is_none_or(Sending::is_written);
        if done {
            self.sending = None;
        }
        done
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the request: its head holds the provider's key.
        f.debug_struct("Wire")
            .field("stream", &self.stream)
            .field("sending", &self.sending.is_some())
            .finish()
    }
}

impl Sending {
    fn is_written(&self) -> bool {
        self.written == self.request.head.len() + self.request.body.len()
    }

    /// Writes until the socket takes no more, or others should have their turn.
    fn push(&mut self, stream: &mut Stream, cx: &mut Context<'_>) {
        let mut unshared = 0;
        while !self.broken && !self.is_written() {
            if unshared >= FAIR_SHARE_BYTES {
                // A provider that reads as fast as this writes would never let it wait.
                cx.waker().wake_by_ref();
                return;
            }
            match stream.poll_write_all(cx, &self.next_pieces()) {
                Poll::Ready(Ok(written @ 1..)) => {
                    unshared += written;
                    self.wrote(written);
                }
                // What the provider said before it closed is worth more than the write error.
                Poll::Ready(_) => self.broken = true,
                Poll::Pending => return,
            }
        }
    }

    /// What one write gets: the same until some of it is written, and no more than a fair share.
    fn next_pieces(&self) -> [&[u8]; 4] {
        let Outgoing { head, body } = &self.request;
        let [before, model, after] = body.pieces();
        let (mut written, mut room) = (self.written, FAIR_SHARE_BYTES);
        [head, before, model, after].map(|piece| {
            let left = &piece[written.min(piece.len())..];
            written = written.saturating_sub(piece.len());
            let left = &left[..left.len().min(room)];
            room -= left.len();
            left
        })
    }

    fn wrote(&mut self, bytes: usize) {
        self.written += bytes;
        if self.written < self.request.head.len() {
            return;
        }
        if let Some(permit) = self.permit.take() {
            // After the write: the next head then can't be closer to this one on the wire than the cadence allows.
            let at = Instant::now();
            self.sent = Some(Sent { in_flight: permit.spend(at), at });
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let Wire { stream, sending } = &mut *self;
        if let Some(sending) = sending {
            sending.push(stream, cx);
            if sending.broken && sending.permit.is_some() {
                // Not even the head went out: there is nothing to be answered.
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
        }
        Pin::new(stream).poll_read(cx, buf)
    }
}
