//! Keeping a caller company while its request waits, so that neither it nor anything on the way gives up.
//!
//! A stream gets comments, which every reader of events skips (WHATWG HTML, section 9.2.6); Anthropic's have the event
//! `ping` for it. A plain answer gets white space, which JSON allows in front (RFC 8259 section 2). Either way the head
//! is out with the first beat, under status 200: so they start late, and end with the provider's first byte.

use std::pin::pin;
use std::time::{Duration, Instant};

use futures_lite::future;

use super::caller::{Caller, Gone};
use crate::deadline::until;
use crate::error::Dialect;
use crate::heap::pinned;
use crate::http1::BodyLength;
use crate::provider::{Progress, Whereabouts};

/// Between two beats, if the caller does not need them more often.
const EVERY: Duration = Duration::from_secs(15);

/// Beats are never closer, whatever a caller announces.
const AT_LEAST: Duration = Duration::from_millis(100);

/// White space costs a plain caller the true status of an error, so it starts so many times as late.
const PATIENCE_OF_PLAIN_CALLERS: u32 = 4;

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Into an event stream.
    Events,
    /// In front of JSON.
    WhiteSpace,
}

/// What ends a comment that stands alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommentEnd {
    /// For most: readers that split a stream at empty lines see the next event apart.
    EmptyLine,
    /// For openai-go before 3.43, which takes the empty line for an event without data and fails.
    LineEnd,
}

impl CommentEnd {
    fn as_str(self) -> &'static str {
        match self {
            CommentEnd::EmptyLine => "\n\n",
            CommentEnd::LineEnd => "\n",
        }
    }
}

/// When what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    form: Form,
    comment_end: CommentEnd,
    first: Instant,
    every: Duration,
}

impl Heartbeat {
    /// Begins `after` so long a wait from `since` on, or early enough for a caller who gives up after `patience` without a
    /// byte.
    pub fn new(
        form: Form,
        after: Duration,
        patience: Option<Duration>,
        since: Instant,
    ) -> Heartbeat {
        let after = match form {
            Form::Events => after,
            Form::WhiteSpace => after.saturating_mul(PATIENCE_OF_PLAIN_CALLERS),
        };
        let patience = patience.unwrap_or(Duration::MAX);
        let first = after.min(patience / 3 * 2).max(AT_LEAST);
        let every = EVERY.min(patience / 3).max(AT_LEAST);
        let comment_end = CommentEnd::EmptyLine;
        Heartbeat { form, comment_end, first: since + first, every }
    }

    /// The same with another end of its comments.
    pub fn ending_comments_with(self, comment_end: CommentEnd) -> Heartbeat {
        Heartbeat { comment_end, ..self }
    }

    /// What is sent.
    pub fn form(&self) -> Form {
        self.form
    }

    async fn beat(&self, progress: &Progress, caller: &mut Caller) -> Result<(), Gone> {
        let text = match self.form {
            Form::Events => {
                comment(caller.dialect(), self.comment_end, progress.whereabouts().await)
            }
            Form::WhiteSpace => "\n".to_owned(),
        };
        if !caller.began() {
            commit(self.form, caller);
        }
        caller.body(text.as_bytes());
        caller.flush().await
    }
}

/// Does the work, with a beat now and then. Dropped with the work's result still to come when the caller is gone.
pub async fn keep_company<T>(
    heartbeat: Option<Heartbeat>,
    progress: &Progress,
    caller: &mut Caller,
    work: impl Future<Output = T>,
) -> Result<T, Gone> {
    let Some(heartbeat) = heartbeat else { return Ok(work.await) };
    let mut work = pin!(work);
    let mut next = heartbeat.first;
    loop {
        let due = async {
            until(next).await;
            None
        };
        if let Some(done) = future::or(async { Some(work.as_mut().await) }, due).await {
            return Ok(done);
        }
        // The work goes on meanwhile: a caller that does not read must not keep a slot open. But a beat is never cut.
        // On the heap: most requests come without one.
        let mut beat = pinned(|| heartbeat.beat(progress, caller));
        let done =
            future::or(async { Ok(work.as_mut().await) }, async { Err(beat.as_mut().await) }).await;
        match done {
            Ok(done) => {
                beat.await?;
                return Ok(done);
            }
            Err(flushed) => flushed?,
        }
        next = Instant::now() + heartbeat.every;
    }
}

/// Queues the head of an answer that is not there yet.
fn commit(form: Form, caller: &mut Caller) {
    let (id_header, request_id) =
        (caller.dialect().request_id_header(), caller.request_id().clone());
    let mut headers =
        vec![(id_header, request_id.as_bytes()), ("Cache-Control", b"no-cache".as_slice())];
    match form {
        Form::Events => {
            headers.extend([
                ("Content-Type", b"text/event-stream".as_slice()),
                ("X-Accel-Buffering", b"no"),
            ]);
        }
        Form::WhiteSpace => headers.push(("Content-Type", b"application/json")),
    }
    caller.begin(200, b"", headers.into_iter(), BodyLength::Chunked);
}

fn comment(dialect: Dialect, end: CommentEnd, whereabouts: Whereabouts) -> String {
    let text = match whereabouts {
        Whereabouts::Queued { position, eta } => {
            format!("queued position={position} eta={}s", eta.as_millis().div_ceil(1000))
        }
        Whereabouts::Pausing => "queued".to_owned(),
        Whereabouts::Sent => "sent".to_owned(),
    };
    match dialect {
        Dialect::OpenAi | Dialect::Responses => format!(": {text}{}", end.as_str()),
        // The event behind it ends it.
        Dialect::Anthropic => format!(": {text}\nevent: ping\ndata: {{\"type\": \"ping\"}}\n\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;
    use async_io::Timer;

    use crate::deadline::within;
    use crate::server::lifecycle::Lifecycle;
    use crate::server::stream::Stream;
    use crate::socket::{Socket, with_watched_sockets};
    use crate::telemetry::Trace;

    #[test]
    fn beats_start_late_and_soon_enough_for_who_would_give_up() {
        let since = Instant::now();
        let seconds = Duration::from_secs_f64;
        for (form, after, patience, first, every) in [
            (Form::Events, 15.0, None, 15.0, 15.0),
            (Form::Events, 15.0, Some(600.0), 15.0, 15.0),
            (Form::Events, 15.0, Some(30.0), 15.0, 10.0),
            (Form::Events, 15.0, Some(6.0), 4.0, 2.0),
            (Form::Events, 15.0, Some(0.001), 0.1, 0.1),
            (Form::WhiteSpace, 15.0, None, 60.0, 15.0),
            (Form::WhiteSpace, 15.0, Some(30.0), 20.0, 10.0),
        ] {
            let heartbeat = Heartbeat::new(form, seconds(after), patience.map(seconds), since);
            let comment_end = CommentEnd::EmptyLine;
            let want = Heartbeat {
                form,
                comment_end,
                first: since + seconds(first),
                every: seconds(every),
            };
            assert_eq!(heartbeat, want, "{form:?} after {after} s for {patience:?}");
        }
    }

    #[test]
    fn a_comment_says_where_the_request_is_in_the_words_of_the_dialect() {
        let eta = Duration::from_millis(11_001);
        for (whereabouts, text) in [
            (Whereabouts::Queued { position: 3, eta }, "queued position=3 eta=12s"),
            (Whereabouts::Pausing, "queued"),
            (Whereabouts::Sent, "sent"),
        ] {
            assert_eq!(
                comment(Dialect::OpenAi, CommentEnd::EmptyLine, whereabouts),
                format!(": {text}\n\n")
            );
            let in_go = comment(Dialect::Responses, CommentEnd::LineEnd, whereabouts);
            assert_eq!(in_go, format!(": {text}\n"));
            let ping = format!(": {text}\nevent: ping\ndata: {{\"type\": \"ping\"}}\n\n");
            assert_eq!(comment(Dialect::Anthropic, CommentEnd::LineEnd, whereabouts), ping);
        }
    }

    #[test]
    fn who_does_not_read_its_heartbeats_holds_up_nobodys_work() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let _unread = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let stream = Stream::Tcp(Socket::new(listener.accept().unwrap().0).unwrap());
        let trace = Rc::new(Trace::new("127.0.0.1".into()));
        let mut caller = Caller::new(stream, trace, Duration::from_secs(60), Lifecycle::new().1);
        // More than the system takes before somebody reads.
        caller.body(&vec![0; 64 << 20]);
        let heartbeat = Heartbeat {
            form: Form::WhiteSpace,
            comment_end: CommentEnd::EmptyLine,
            first: Instant::now(),
            every: AT_LEAST,
        };
        let done = Cell::new(false);
        let work = async {
            Timer::after(AT_LEAST).await;
            done.set(true);
        };
        let progress = Progress::default();
        let told =
            within(AT_LEAST * 20, keep_company(Some(heartbeat), &progress, &mut caller, work));
        assert_eq!(
            smol::block_on(with_watched_sockets(told)).unwrap(),
            None,
            "a beat that was begun is not cut off"
        );
        assert!(done.get(), "the work waits for the caller");
    }
}
