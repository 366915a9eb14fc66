//! Writing to one caller: heads, bodies, refusals, within `write_timeout_seconds`.
//!
//! Owns the framing of what goes out and the decision whether the connection lives on. Does not read, but for the
//! lingering close.

use std::future::poll_fn;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::future;

use super::cors::Cors;
use super::lifecycle::Phase;
use super::stream::Stream;
use crate::deadline::{after, within};
use crate::error::{Dialect, Error};
use crate::http1::{self, BodyLength, FINAL_CHUNK, RequestHead};
use crate::telemetry::Trace;

/// How long a client may go on sending after the last response. A close on unread bytes sends a
/// reset, which may overtake the response (RFC 9112 section 9.6). nginx waits as long.
const LINGER: Linger = Linger {
    time: Duration::from_secs(30),
    silence: Duration::from_secs(5),
    bytes: 1024 * 1024 * 1024,
};

/// The same once the gateway shuts down, from then on.
const LINGER_AT_SHUTDOWN: Duration = Duration::from_secs(2);

/// What a connection keeps for writing between two requests.
const IDLE_BUFFER_BYTES: usize = 1024;

/// The caller can't be written to any more, or its answer was aborted: the connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

/// The writing half of a caller's connection, and what the current request asks of the answer.
pub struct Caller {
    stream: Stream,
    trace: Rc<Trace>,
    write_timeout: Duration,
    draining: Phase,
    request_id: Rc<str>,
    dialect: Dialect,
    cors: Cors,
    http_10: bool,
    head_only: bool,
    keep_alive: bool,
    began: bool,
    framing: BodyLength,
    out: Vec<u8>,
    /// Where in `out` the last byte ends that the client waits for.
    last_byte: Option<usize>,
}

impl Caller {
    /// A caller of whom nothing is known yet: answers close the connection.
    /// Once `draining` has begun, every answer is the last. What it is told is noted in `trace`.
    pub fn new(
        stream: Stream,
        trace: Rc<Trace>,
        write_timeout: Duration,
        draining: Phase,
    ) -> Caller {
        Caller {
            stream,
            trace,
            write_timeout,
            draining,
            request_id: new_request_id(),
            dialect: Dialect::OpenAi,
            cors: Cors::Off,
            http_10: false,
            head_only: false,
            keep_alive: false,
            began: false,
            framing: BodyLength::None,
            out: Vec::new(),
            last_byte: None,
        }
    }

    /// Before a head is read: whatever is answered now closes the connection.
    pub fn expect_request(&mut self) {
        self.request_id = new_request_id();
        self.trace.begins(&self.request_id);
        (self.dialect, self.cors) = (Dialect::OpenAi, Cors::Off);
        (self.http_10, self.head_only, self.keep_alive, self.began) = (false, false, false, false);
        self.last_byte = None;
        // An idle connection holds next to no memory.
        self.out.shrink_to(IDLE_BUFFER_BYTES);
    }

    /// The answer that follows is for this request, and says this of web pages.
    pub fn answer_to(&mut self, head: &RequestHead, cors: Cors) {
        self.trace.has_head(head);
        (self.dialect, self.cors) = (Dialect::of(&head.target), cors);
        self.http_10 = head.http_10;
        self.head_only = &*head.method == "HEAD";
        self.keep_alive = head.keep_alive;
    }

    /// The connection closes after this answer, and the answer says so.
    pub fn close_after(&mut self) {
        self.keep_alive = false;
    }

    /// Whether the connection may carry another request.
    pub fn keeps_alive(&self) -> bool {
        self.keep_alive
    }

    /// Whether bytes of the current answer may have reached the caller.
    pub fn began(&self) -> bool {
        self.began
    }

    /// `100 Continue`, so that the body comes.
    pub async fn go_on(&mut self) -> Result<(), Gone> {
        self.out.extend_from_slice(http1::CONTINUE);
        let flushed = self.flush().await;
        self.began = false;
        flushed
    }

    /// A whole JSON answer.
    pub async fn json(
        &mut self,
        status: u16,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<(), Gone> {
        self.whole(status, "application/json", headers, body).await
    }

    /// A whole answer of some other media type.
    pub async fn whole(
        &mut self,
        status: u16,
        media_type: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<(), Gone> {
        self.queue(status, media_type, headers, body);
        self.flush().await
    }

    /// A whole answer without a body: 204.
    pub async fn no_content(&mut self, headers: &[(&str, String)]) -> Result<(), Gone> {
        let fields = headers.iter().map(|(name, value)| (*name, value.as_bytes()));
        self.head(204, b"", fields, BodyLength::None);
        self.flush().await
    }

    /// A refusal.
    pub async fn error(&mut self, error: &Error) -> Result<(), Gone> {
        self.queue_error(error);
        self.flush().await
    }

    /// Not inside of [`Caller::error`], which would hold all of this while it waits, and every connection the room for that.
    fn queue_error(&mut self, error: &Error) {
        self.trace.failed(error.code());
        if error.closes_connection() {
            self.close_after();
        }
        let headers = error.headers();
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        self.queue(
            error.status(),
            "application/json",
            &headers,
            error.to_json(self.dialect).as_bytes(),
        );
    }

    fn queue(&mut self, status: u16, media_type: &str, headers: &[(&str, &str)], body: &[u8]) {
        let request_id = self.request_id.clone();
        let fields =
            [("Content-Type", media_type), (self.dialect.request_id_header(), &request_id)];
        let fields = fields.iter().chain(headers).map(|(name, value)| (*name, value.as_bytes()));
        self.head(status, b"", fields, BodyLength::Length(body.len() as u64));
        if !self.head_only {
            self.out.extend_from_slice(body);
        }
    }

    /// Queues the head of a relayed answer; it goes out with the first bytes of the body. `length` is how the body comes; a
    /// caller that knows no chunks gets it until the close.
    pub fn begin<'a>(
        &mut self,
        status: u16,
        reason: &[u8],
        headers: impl Iterator<Item = (&'a str, &'a [u8])>,
        length: BodyLength,
    ) {
        let length = match length {
            BodyLength::Chunked if self.http_10 => BodyLength::UntilClose,
            length => length,
        };
        if length == BodyLength::UntilClose {
            self.keep_alive = false;
        }
        self.head(status, reason, headers, length);
    }

    /// Queues an error inside an answer that has begun, as an event.
    pub fn error_event(&mut self, error: &Error) {
        self.trace.failed(error.code());
        self.body(error.to_sse_event(self.dialect).as_bytes());
    }

    /// Queues a piece of the body, framed.
    pub fn body(&mut self, payload: &[u8]) {
        if self.head_only || payload.is_empty() {
            return;
        }
        match self.framing {
            BodyLength::Chunked => http1::write_chunk(&mut self.out, payload),
            _ => self.out.extend_from_slice(payload),
        }
    }

    /// What is queued by now is all that the client waits for; the end of the response may follow.
    pub fn completes(&mut self) {
        self.last_byte.get_or_insert(self.out.len());
    }

    /// Queues the end of the body.
    pub fn end(&mut self) {
        self.completes();
        if self.framing == BodyLength::Chunked && !self.head_only {
            self.out.extend_from_slice(FINAL_CHUNK);
        }
    }

    /// Forgets an answer of which nothing has gone out yet.
    pub fn take_back(&mut self) {
        debug_assert!(!self.began, "only what was not sent can be taken back");
        self.out.clear();
        self.last_byte = None;
    }

    /// Ends the connection so that the caller can tell a broken body from a whole one: by a missing final chunk or missing
    /// bytes, under TLS by a missing close_notify, and where only the close marks the end, by a reset.
    pub fn abort(&mut self) -> Gone {
        self.keep_alive = false;
        if self.framing == BodyLength::UntilClose {
            self.stream.reset_on_close();
        }
        Gone
    }

    /// Writes what is queued. A client that has everything it waits for may close before the rest.
    pub async fn flush(&mut self) -> Result<(), Gone> {
        let mut from = 0;
        while from < self.out.len() {
            self.began = true;
            if self.last_byte.is_some_and(|last| from >= last) {
                self.trace.set_delivered();
            }
            let (stream, bytes) = (&mut self.stream, &self.out[from..]);
            let write = poll_fn(|cx| stream.poll_write(cx, bytes));
            match within(self.write_timeout, write).await {
                Some(Ok(written @ 1..)) => {
                    from += written;
                    self.trace.wrote(written);
                }
                _ if self.trace.is_delivered() => {
                    self.keep_alive = false;
                    break;
                }
                _ => return Err(Gone),
            }
        }
        if self.last_byte.is_some() {
            self.last_byte = Some(0);
            self.trace.set_delivered();
        }
        self.out.clear();
        Ok(())
    }

    /// Closes without cutting off the response that is on its way to a client that may still send.
    pub async fn linger(mut self) {
        // First, as nginx does it: a client that sees the end stops its upload.
        if !matches!(within(self.write_timeout, self.stream.finish()).await, Some(Ok(()))) {
            return;
        }
        let shutdown = async {
            self.draining.begins().await;
            after(LINGER_AT_SHUTDOWN).await;
        };
        future::or(discard(&mut self.stream, LINGER), shutdown).await;
    }

    /// Closes where nothing is under way.
    pub async fn part(mut self) {
        within(self.write_timeout, self.stream.close_notify()).await;
    }

    /// In whose shapes the request under way is answered.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// What is noted of the request under way.
    pub fn trace(&self) -> &Rc<Trace> {
        &self.trace
    }

    /// What the answer under way says of web pages.
    pub fn cors(&self) -> &Cors {
        &self.cors
    }

    /// The id of the answer under way.
    pub fn request_id(&self) -> &Rc<str> {
        &self.request_id
    }

    fn head<'a>(
        &mut self,
        status: u16,
        reason: &[u8],
        headers: impl Iterator<Item = (&'a str, &'a [u8])>,
        framing: BodyLength,
    ) {
        self.trace.says(status);
        self.framing = framing;
        self.keep_alive &= !self.draining.has_begun();
        #[expect(clippy::map_identity, reason = "it shortens the lifetime to that of the others")]
        let headers = headers.map(|(name, value)| (name, value)).chain(self.cors.fields());
        http1::write_response_head(
            &mut self.out,
            status,
            reason,
            headers,
            framing,
            self.keep_alive,
        );
    }
}

/// The bounds of a lingering close.
struct Linger {
    time: Duration,
    /// Between two reads.
    silence: Duration,
    bytes: usize,
}

/// Reads and throws away what comes, until the client ends or one of the bounds is reached.
async fn discard(stream: &mut Stream, bounds: Linger) {
    let reads = async {
        let mut left = bounds.bytes;
        while left > 0 {
            let read = poll_fn(|cx| http1::reader::poll_discard(stream, cx));
            let Some(Ok(bytes @ 1..)) = within(bounds.silence, read).await else { return };
            left = left.saturating_sub(bytes);
        }
    };
    within(bounds.time, reads).await;
}

fn new_request_id() -> Rc<str> {
    let mut id = *b"req_00000000000000000000000000000000";
    let mut random = fastrand::u128(..);
    for digit in &mut id[4..] {
        *digit = b"0123456789abcdef"[(random % 16) as usize];
        random /= 16;
    }
    std::str::from_utf8(&id).expect("hexadecimal digits").into()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Instant;

    use super::*;
    use crate::socket::{Socket, with_watched_sockets};

    const FAR: Duration = Duration::from_secs(3600);
    const NEAR: Duration = Duration::from_millis(50);

    /// How much a client has sent, and how long it was read from within these bounds. It sends `pieces` of
    /// 64 KiB with so long a pause before each, then nothing until the connection ends.
    fn discarded(bounds: Linger, pieces: usize, pause: Duration) -> (usize, Duration) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let writing = thread::spawn(move || {
            let mut sent = 0;
            for _ in 0..pieces {
                thread::sleep(pause);
                let Ok(written) = theirs.write(&[7; 64 * 1024]) else { break };
                sent += written;
            }
            let _ = theirs.read(&mut [0]);
            sent
        });
        let mut stream = Stream::Unix(Socket::new(ours).unwrap());
        let start = Instant::now();
        smol::block_on(with_watched_sockets(discard(&mut stream, bounds))).unwrap();
        let took = start.elapsed();
        drop(stream);
        (writing.join().unwrap(), took)
    }

    #[test]
    fn a_client_that_sends_on_is_read_up_to_the_bytes_and_the_time() {
        let bounds = |time, bytes| Linger { time, silence: FAR, bytes };
        let (sent, _) = discarded(bounds(FAR, 4 << 20), 4000, Duration::ZERO);
        assert!((4 << 20..8 << 20).contains(&sent), "{sent} bytes");
        let (_, took) = discarded(bounds(NEAR, usize::MAX), 200, Duration::from_millis(1));
        assert!(took >= NEAR, "{took:?}");
    }

    #[test]
    fn a_client_that_pauses_is_not_waited_for() {
        let bounds = Linger { time: FAR, silence: NEAR, bytes: usize::MAX };
        let (_, took) = discarded(bounds, 2, Duration::ZERO);
        assert!(took >= NEAR, "{took:?}");
    }
}
