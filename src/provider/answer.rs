//! A provider's answer on its way to the caller: its head, and its body as it comes.
//!
//! Counts how the answer ends, and finds out how many tokens it cost, if it says so and is not compressed.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::Provider;
use crate::error::Error;
use crate::http1::{Headers, ResponseHead};
use crate::openai::{self, EventScanner, Usage};
use crate::shaping::scheduler::InFlight;
use crate::upstream::client::{Body, Response};

/// After the last event of a stream, or the whole of a JSON body, the provider has this long to end the response, and
/// may send this many bytes more. Its connection can be used again then.
pub const END_GRACE: Duration = Duration::from_secs(1);
const END_GRACE_BYTES: usize = 64 * 1024;

/// How often a JSON body is looked at to see whether it is whole before the provider says so.
const MAX_LOOKS: u32 = 8;

/// A plain answer larger than this is not searched for its usage where a limit on tokens needs it.
const METERED_BYTES: usize = 1024 * 1024;

/// The same where it is merely told.
const TOLD_BYTES: usize = 64 * 1024;

/// What a refusal that is passed on tells the caller about coming back, in the place of the provider's own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Coming back helps, as far as is known from this instant on.
    ComeBack(Option<Instant>),
    /// It does not.
    StayAway,
}

/// An answer whose body is still to come.
pub struct Answer {
    /// Status and headers.
    pub head: ResponseHead,
    /// Set where waiting has not helped.
    pub advice: Option<Advice>,
    /// Body bytes that were read to judge the answer.
    prefix: Vec<u8>,
    body: Body,
    in_flight: Option<InFlight>,
    event_stream: bool,
    waited: Duration,
    lane: usize,
    idle_timeout: Duration,
    meter: Option<Meter>,
    usage: Usage,
    /// What the limits reserved for the request.
    reserved_tokens: u64,
    /// Since when everything that a client waits for has passed, and how many bytes came afterwards.
    complete: Option<(Instant, usize)>,
    provider: Rc<Provider>,
}

/// Looks for the tokens that an answer says it used.
enum Meter {
    Events(Box<EventScanner>),
    Whole(Whole),
    TooLong,
}

/// A plain body so far.
struct Whole {
    body: Vec<u8>,
    /// The longest that is kept.
    limit: usize,
    is_json: bool,
    looks: u32,
}

impl Answer {
    /// Counts the response. `metered`: a limit needs its tokens, of which it `reserved_tokens`; `idle_timeout` is for
    /// each piece of its body.
    pub(super) fn new(
        provider: &Rc<Provider>,
        response: Response,
        metered: bool,
        reserved_tokens: u64,
        idle_timeout: Duration,
    ) -> Box<Answer> {
        let Response { head, body, in_flight, latency } = response;
        let mut counters = provider.counters.borrow_mut();
        counters.latency.add(latency);
        match head.status {
            400..=499 => counters.upstream_4xx += 1,
            500.. => counters.upstream_5xx += 1,
            _ => {}
        }
        let plain = is_plain(&head.headers);
        let event_stream = has_type(&head.headers, b"text/event-stream");
        let is_json = has_type(&head.headers, b"application/json");
        let whole = |limit| Meter::Whole(Whole { body: Vec::new(), limit, is_json, looks: 0 });
        Box::new(Answer {
            event_stream: plain && event_stream,
            meter: plain.then(|| match (event_stream, metered) {
                (true, _) => Meter::Events(Box::default()),
                (false, true) => whole(METERED_BYTES),
                (false, false) if is_json => whole(TOLD_BYTES),
                (false, false) => Meter::TooLong,
            }),
            head,
            usage: Usage::default(),
            reserved_tokens,
            complete: None,
            advice: None,
            prefix: Vec::new(),
            body,
            waited: in_flight.waited(),
            lane: in_flight.lane(),
            idle_timeout,
            in_flight: Some(in_flight),
            provider: provider.clone(),
        })
    }

    /// The provider's name.
    pub fn provider(&self) -> &str {
        self.provider.name()
    }

    /// The API key that it was sent with, by index.
    pub(super) fn lane(&self) -> usize {
        self.lane
    }

    /// The tokens that it has said it cost; of a plain body only once it is complete.
    pub fn usage(&self) -> Usage {
        match &self.meter {
            Some(Meter::Events(scanner)) => scanner.usage(),
            _ => self.usage,
        }
    }

    /// Whether everything that a client waits for has passed: the last event of a stream, or a whole JSON body. The
    /// end of the response may still be to come.
    pub fn is_complete(&self) -> bool {
        self.complete.is_some()
    }

    /// How long the request waited for its slot.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Whether an event can be added to the body.
    pub fn is_event_stream(&self) -> bool {
        self.event_stream
    }

    /// Whether the body is JSON, by its media type.
    pub fn is_json(&self) -> bool {
        has_type(&self.head.headers, b"application/json")
    }

    /// Appends the body bytes that are there to `out`, without waiting. True when the body is over. A stream whose last
    /// event has passed is over however the provider ends it.
    pub fn take_buffered(&mut self, out: &mut Vec<u8>) -> Result<bool, Error> {
        let from = out.len();
        out.append(&mut self.prefix);
        let taken = self.body.take_buffered(out);
        if let Some(meter) = &mut self.meter {
            meter.feed(&out[from..]);
        }
        let over = match taken {
            Ok(true) => true,
            Ok(false) => self.has_sent_too_much(out.len() - from),
            Err(_) if self.has_last_event() => true,
            Err(failure) => return Err(self.provider.failed(failure)),
        };
        if over {
            self.body.close();
            self.is_over();
        }
        Ok(over)
    }

    /// Waits for more of the body, for up to `idle_timeout_seconds`, or after the last event for what is left of
    /// [`END_GRACE`].
    pub async fn wait(&mut self) -> Result<(), Error> {
        let grace = self.complete.filter(|_| self.has_last_event());
        let limit =
            grace.map_or(self.idle_timeout, |(since, _)| END_GRACE.saturating_sub(since.elapsed()));
        match self.body.wait(limit).await {
            Err(_) if grace.is_some() => {
                self.body.close();
                Ok(())
            }
            waited => waited.map_err(|failure| self.provider.failed(failure)),
        }
    }

    /// Notes whether the body is complete by now. True if the provider has sent more behind the last event than is
    /// waited for; `bytes` have just come.
    fn has_sent_too_much(&mut self, bytes: usize) -> bool {
        if let Some((_, extra)) = &mut self.complete {
            *extra += bytes;
            return *extra > END_GRACE_BYTES && self.has_last_event();
        }
        let Some(meter) = &mut self.meter else { return false };
        if meter.is_complete() {
            self.usage = meter.usage().unwrap_or_default();
            self.complete = Some((Instant::now(), 0));
        }
        false
    }

    fn has_last_event(&self) -> bool {
        matches!(&self.meter, Some(Meter::Events(scanner)) if scanner.has_last_event())
    }

    /// Reads up to `limit` bytes of the body ahead, for up to `time`, to be judged and perhaps passed on: what was read
    /// goes on first, and then whatever follows.
    pub(super) async fn read_ahead(&mut self, limit: usize, time: Duration) {
        let end = Instant::now() + time;
        while self.prefix.len() <= limit {
            let taken = self.body.take_buffered(&mut self.prefix);
            let left = end.saturating_duration_since(Instant::now());
            if taken != Ok(false) || self.body.wait(left).await.is_err() {
                return;
            }
        }
    }

    /// As much of its body was read as is waited for. A request that the provider `refused` for its rate has used no tokens.
    pub(super) fn is_judged(&mut self, refused: bool) {
        let Some(in_flight) = self.in_flight.take() else { return };
        if refused {
            in_flight.settle(0);
        }
    }

    /// What [`Answer::read_ahead`] read.
    pub(super) fn read_so_far(&self) -> &[u8] {
        &self.prefix
    }

    fn is_over(&mut self) {
        if let Some(meter) = self.meter.take() {
            self.usage = meter.usage().unwrap_or_default();
        }
        self.has_succeeded();
        self.settle(self.usage.total());
    }

    fn has_succeeded(&self) {
        if self.head.status < 400 {
            self.provider.counters.borrow_mut().succeeded += 1;
        }
    }

    /// Ends the request for the limits, with the tokens that it cost where they are known.
    fn settle(&mut self, tokens: Option<u64>) {
        let Some(in_flight) = self.in_flight.take() else { return };
        if let Some(tokens) = tokens {
            in_flight.settle(tokens);
        }
    }
}

impl Drop for Answer {
    /// Where it is not over, the client or the provider has cut it off. Tokens that were told count all the same; if
    /// content came after them, the reservation stands where it is higher.
    fn drop(&mut self) {
        if self.is_complete() && self.meter.is_some() {
            self.has_succeeded();
        }
        let is_current = match &self.meter {
            Some(Meter::Events(scanner)) => scanner.usage_is_current(),
            _ => true,
        };
        let least = if is_current { 0 } else { self.reserved_tokens };
        self.settle(self.usage().total().map(|tokens| tokens.max(least)));
    }
}

impl Meter {
    fn feed(&mut self, bytes: &[u8]) {
        match self {
            Meter::Events(scanner) => scanner.feed(bytes),
            Meter::Whole(whole) if whole.body.len() + bytes.len() <= whole.limit => {
                whole.body.extend_from_slice(bytes);
            }
            Meter::Whole(_) | Meter::TooLong => *self = Meter::TooLong,
        }
    }

    fn is_complete(&mut self) -> bool {
        match self {
            Meter::Events(scanner) => scanner.has_last_event(),
            Meter::Whole(whole) => whole.is_complete(),
            Meter::TooLong => false,
        }
    }

    /// Of a plain body only where it is whole.
    fn usage(&self) -> Option<Usage> {
        match self {
            Meter::Events(scanner) => Some(scanner.usage()),
            Meter::Whole(whole) => Usage::of(&whole.body),
            Meter::TooLong => None,
        }
    }
}

impl Whole {
    fn is_complete(&mut self) -> bool {
        let may_end = matches!(self.body.trim_ascii_end(), [.., b'}' | b']']);
        if !self.is_json || !may_end || self.looks == MAX_LOOKS {
            return false;
        }
        self.looks += 1;
        openai::is_json(&self.body)
    }
}

fn has_type(headers: &Headers, wanted: &[u8]) -> bool {
    let media = headers.get("content-type").unwrap_or_default();
    media
        .split(|byte| *byte == b';')
        .next()
        .is_some_and(|kind| kind.trim_ascii().eq_ignore_ascii_case(wanted))
}

/// Whether the body can be read as it is.
fn is_plain(headers: &Headers) -> bool {
    headers.get("content-encoding").is_none_or(|coding| coding.eq_ignore_ascii_case(b"identity"))
}
