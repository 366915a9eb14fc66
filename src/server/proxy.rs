//! Sending a request on and relaying the answer as it comes: one write per read, the head together with the first bytes
//! of the body, and never a tidy end for a body that broke off.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures_lite::future;
use pin_project_lite::pin_project;

use super::Gateway;
use super::caller::{Caller, Gone};
use super::heartbeat::{Form, keep_company};
use super::lifecycle::Watch;
use super::request_body::{Body, LARGE_BODY_BYTES};
use super::seam::Seam;
use super::terms::{self, Wishes};
use crate::aside::BODIES;
use crate::dispatch::Dispatch;
use crate::error::{self, Dialect, Error};
use crate::heap::pinned;
use crate::http1::{self, BodyLength, Framing, RequestHead};
use crate::openai;
use crate::provider::{Advice, Answer, Errand, Progress};
use crate::socket::FAIR_SHARE_BYTES;

/// The largest answer that becomes one event of a stream that had begun already.
const LATE_ANSWER_BYTES: usize = 1024 * 1024;

/// A byte order mark in UTF-8, which a stream may begin with and nothing else (WHATWG HTML, section 9.2.5).
const BOM: &[u8] = b"\xef\xbb\xbf";

/// Routes by the `model` in the body, waits for a provider's slot, and relays.
pub async fn forward(
    gateway: &Gateway,
    peer: &Rc<str>,
    head: &RequestHead,
    body: Body,
    caller: &mut Caller,
    abort: &mut Watch,
) -> Result<(), Gone> {
    let since = Instant::now();
    let Body { bytes: body, examined, reserved } = body;
    let trace = caller.trace().clone();
    trace.is_complete(body.0.len(), since);
    let examined = examined.map_or_else(
        || terms::examine(&body.0, &head.target, terms::fingerprints(gateway, head)),
        |examined| *examined,
    );
    let prepared = examined.and_then(|examined| {
        Ok((terms::wishes(gateway, peer, head, &examined, since)?, examined.peek))
    });
    let (Wishes { terms, named, heartbeat }, peek) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return caller.error(&error).await,
    };
    trace.asks(&peek.model, peek.stream);
    if named {
        trace.is_of(&terms.client);
    }
    let form = heartbeat.map(|heartbeat| heartbeat.form());
    let errand = Errand {
        head,
        stream: peek.stream,
        terms,
        since,
        plain: form.is_some(),
        trace: &trace,
        progress: Progress::default(),
    };
    let dispatch = Dispatch {
        providers: &gateway.providers,
        registry: &gateway.registry,
        routing: gateway.config.routing,
        fallback: gateway.config.fallback,
    };
    // On the heap: each future around it would weigh its weight twice, for as long as a request waits.
    let work = unless(abort, pinned(|| dispatch.run(&errand, body, peek)));
    let outcome = keep_company(heartbeat, &errand.progress, caller, work).await?;
    trace.answered(Instant::now());
    drop(reserved);
    // On the heap likewise: nothing of it is there while the request waits.
    match (outcome, form.filter(|_| caller.began())) {
        (Ok(answer), None) => {
            begin(&answer, caller);
            pinned(|| relay_body(abort, answer, caller)).await
        }
        (Err(error), None) => caller.error(&error).await,
        (outcome, Some(form)) => pinned(|| relay_late(abort, outcome, form, caller)).await,
    }
}

/// The answer to a caller whose own answer has begun with a heartbeat.
async fn relay_late(
    abort: &mut Watch,
    outcome: Result<Box<Answer>, Error>,
    form: Form,
    caller: &mut Caller,
) -> Result<(), Gone> {
    match (outcome, form) {
        (Ok(answer), Form::WhiteSpace) if answer.is_json() => {
            return relay_body(abort, answer, caller).await;
        }
        (Ok(answer), Form::Events) if answer.is_event_stream() && answer.head.status < 400 => {
            return relay_body(abort, answer, caller).await;
        }
        (Ok(answer), form) => replace(abort, answer, form, caller).await,
        (Err(error), form) => late_error(&error, form, caller),
    }
    caller.end();
    caller.flush().await
}

/// Queues an error in an answer that has begun: as an event, or as JSON behind white space.
fn late_error(error: &Error, form: Form, caller: &mut Caller) {
    match form {
        Form::Events => caller.error_event(error),
        Form::WhiteSpace => {
            caller.trace().failed(error.code());
            caller.body(error.to_json(caller.dialect()).as_bytes());
        }
    }
}

/// Queues what can be said of an answer that does not fit behind what has gone out: an error under its own words if they
/// have the shape of one, a whole answer as an event of a stream, or an error of ours that quotes it.
async fn replace(abort: &mut Watch, mut answer: Box<Answer>, form: Form, caller: &mut Caller) {
    let dialect = caller.dialect();
    let (status, provider) = (answer.head.status, answer.provider().to_owned());
    let mut body = Vec::new();
    let read = unless(abort, async {
        while !answer.take_buffered(&mut body)? && body.len() <= LATE_ANSWER_BYTES {
            answer.wait().await?;
        }
        Ok(())
    });
    if let Err(error) = read.await {
        return late_error(&error, form, caller);
    }
    caller.trace().used(answer.usage());
    let is_large = body.len() >= LARGE_BODY_BYTES;
    let made = move || {
        let said = match (form, dialect) {
            (Form::WhiteSpace, _) => None,
            _ if status >= 400 => openai::error_event(dialect, &body),
            (_, Dialect::OpenAi) => openai::event(&body),
            // A whole message or response is none of the events that their SDKs know by name, and they pass over all
            // others in silence.
            (_, Dialect::Anthropic | Dialect::Responses) => None,
        };
        (body, said)
    };
    let (body, said) = if is_large { BODIES.run(async { made() }).await } else { made() };
    let detail = match body.trim_ascii() {
        b"" => "its body is empty".to_owned(),
        said => String::from_utf8_lossy(said).into_owned(),
    };
    let refused = Error::UpstreamRefused { provider, status, detail };
    let Some(said) = said else { return late_error(&refused, form, caller) };
    if status >= 400 {
        caller.trace().failed(refused.code());
    }
    caller.body(said.as_bytes());
}

async fn relay_body(
    abort: &mut Watch,
    mut answer: Box<Answer>,
    caller: &mut Caller,
) -> Result<(), Gone> {
    let mut payload = Vec::new();
    let mut seam = answer.is_event_stream().then(Seam::default);
    let mut waited = Ok(());
    let mut head_alone = true;
    let mut unshared = 0;
    // eventsource-parser loses the first event where a byte order mark follows a comment.
    let mut bom = if caller.began() && seam.is_some() { BOM } else { b"" };
    loop {
        let (over, broken) = match waited.and_then(|()| answer.take_buffered(&mut payload)) {
            Ok(over) => (over, None),
            Err(error) => (false, Some(error)),
        };
        if !bom.is_empty() && payload.len() >= bom.len() {
            let kept = payload.strip_prefix(bom).map_or(payload.len(), <[u8]>::len);
            payload.drain(..payload.len() - kept);
            bom = b"";
        }
        let goes_on =
            seam.as_mut().filter(|_| !over).map_or(payload.len(), |seam| seam.whole(&payload));
        caller.body(&payload[..goes_on]);
        caller.trace().used(answer.usage());
        if answer.is_complete() {
            caller.completes();
        }
        if let Some(error) = broken {
            return broken_off(&error, seam, caller).await;
        }
        if over {
            caller.end();
            return caller.flush().await;
        }
        if head_alone && payload.is_empty() {
            // Most bodies begin right behind the head: one look spares a packet.
            head_alone = false;
            if let Some(more) = future::poll_once(answer.wait()).await {
                waited = more;
                continue;
            }
        }
        caller.flush().await?;
        payload.drain(..goes_on);
        unshared += goes_on;
        if unshared > FAIR_SHARE_BYTES {
            // A stream that never has to wait would keep the thread from everybody else.
            unshared = 0;
            future::yield_now().await;
        }
        waited = unless(abort, answer.wait()).await;
    }
}

pin_project! {
    /// See [`unless`].
    struct Unless<'a, W> {
        abort: &'a mut Watch,
        // None once it is over: what was cut off holds its place and its connection no longer.
        #[pin]
        work: Option<W>,
    }
}

/// Waits for the provider for as long as the gateway lets running requests go on.
fn unless<T, W: Future<Output = Result<T, Error>>>(abort: &mut Watch, work: W) -> Unless<'_, W> {
    Unless { abort, work: Some(work) }
}

impl<T, W: Future<Output = Result<T, Error>>> Future for Unless<'_, W> {
    type Output = Result<T, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let work = this.work.as_mut().as_pin_mut().expect("nobody asks for an outcome twice");
        let outcome = match work.poll(cx) {
            Poll::Pending => {
                ready!(Pin::new(&mut **this.abort).poll(cx).map(|()| Err(Error::ShuttingDown)))
            }
            Poll::Ready(done) => done,
        };
        this.work.set(None);
        Poll::Ready(outcome)
    }
}

/// Queues the head: the provider's, less what belongs to its connection, plus what happened here.
fn begin(answer: &Answer, caller: &mut Caller) {
    let head = &answer.head;
    let length = match head.framing {
        Framing::Empty => BodyLength::None,
        // A stream that breaks off ends in an event of ours, and that must not fill up a length to look whole.
        Framing::Length(_) if answer.is_event_stream() => BodyLength::Chunked,
        Framing::Length(length) => BodyLength::Length(length),
        Framing::Chunked | Framing::UntilClose => BodyLength::Chunked,
    };
    let mut queued_ms = itoa::Buffer::new();
    let queued_ms = queued_ms.format(answer.waited().as_millis());
    let request_id = caller.request_id().clone();
    let missing = |name| head.headers.get(name).is_none();
    let id_header = caller.dialect().request_id_header();
    // Keep proxies between us and the caller from collecting a stream.
    let uncached = answer.is_event_stream() && missing("cache-control");
    let ours = [
        Some(("x-limitrate-provider", answer.provider())),
        Some(("x-limitrate-queued-ms", queued_ms)),
        uncached.then_some(("cache-control", "no-cache")),
        answer.is_event_stream().then_some(("x-accel-buffering", "no")),
        missing(id_header).then_some((id_header, &request_id)),
    ];
    let advice = answer.advice.map(advice_headers).unwrap_or_default();
    let advice_fields = advice.iter().map(|(name, value)| (*name, value.as_str()));
    let ours = ours
        .into_iter()
        .flatten()
        .chain(advice_fields)
        .map(|(name, value)| (name, value.as_bytes()));
    let replaced: &[&str] = if answer.advice.is_some() { &ADVICE_HEADERS } else { &[] };
    let passed = http1::of_response(&head.headers)
        .filter(|(name, _)| !replaced.iter().any(|ours| ours.eq_ignore_ascii_case(name)));
    caller.begin(head.status, &head.reason, passed.chain(ours), length);
}

/// What tells an SDK whether and when to try again.
const ADVICE_HEADERS: [&str; 3] = ["retry-after", "retry-after-ms", "x-should-retry"];

fn advice_headers(advice: Advice) -> Vec<(&'static str, String)> {
    let mut headers = match advice {
        Advice::ComeBack(Some(at)) => {
            error::come_back_after(at.saturating_duration_since(Instant::now()))
        }
        Advice::ComeBack(None) => Vec::new(),
        Advice::StayAway => vec![("x-should-retry", "false".to_owned())],
    };
    if headers.iter().all(|(name, _)| *name != "x-should-retry") {
        headers.push(("x-should-retry", "true".to_owned()));
    }
    headers
}

/// The provider failed inside its answer. Where nothing has gone out yet the caller gets the error itself; in an event
/// stream it gets it as an event, since Node's SDK takes a mere abort for a short answer.
async fn broken_off(error: &Error, seam: Option<Seam>, caller: &mut Caller) -> Result<(), Gone> {
    if !caller.began() {
        caller.take_back();
        return caller.error(error).await;
    }
    if let Some(seam) = seam {
        caller.body(seam.ending());
        caller.error_event(error);
        if caller.dialect() == Dialect::Responses {
            // `response.failed` is a last event. Codex forgets it if the connection breaks behind it.
            caller.end();
            return caller.flush().await;
        }
    } else {
        caller.trace().failed(error.code());
    }
    caller.flush().await?;
    Err(caller.abort())
}
