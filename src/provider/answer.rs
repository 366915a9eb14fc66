//! A provider's answer on its way to the caller: its head, and its body as it comes.
//!
//! Counts how the answer ends, and finds out how many tokens it cost, if it says so and is not compressed.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::Provider;
use crate::error::Error;
use crate::http1::{Headers, ResponseHead};
use crate::openai::{EventScanner, Usage};
use crate::shaping::scheduler::InFlight;
use crate::upstream::client::{Body, Response};

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
    provider: Rc<Provider>,
}

/// Looks for the tokens that an answer says it used.
enum Meter {
    Events(Box<EventScanner>),
    /// The body so far, and how long it may get.
    Whole(Vec<u8>, usize),
    TooLong,
}

impl Answer {
    /// Counts the response. `metered`: a limit needs its tokens; `idle_timeout` is for each piece of its body.
    pub(super) fn new(
        provider: &Rc<Provider>,
        response: Response,
        metered: bool,
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
        let (plain, event_stream) =
            (is_plain(&head.headers), has_type(&head.headers, b"text/event-stream"));
        Box::new(Answer {
            event_stream: plain && event_stream,
            meter: plain.then(|| match (event_stream, metered) {
                (true, _) => Meter::Events(Box::default()),
                (false, true) => Meter::Whole(Vec::new(), METERED_BYTES),
                (false, false) if has_type(&head.headers, b"application/json") => {
                    Meter::Whole(Vec::new(), TOLD_BYTES)
                }
                (false, false) => Meter::TooLong,
            }),
            head,
            usage: Usage::default(),
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

    /// The tokens that it said it cost, once it is over.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// How long the request waited for its slot.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Whether an event can be added to the body.
    pub fn is_event_stream(&self) -> bool {
        self.event_stream
    }

    /// Appends the body bytes that are there to `out`, without waiting. True when the body is over.
    pub fn take_buffered(&mut self, out: &mut Vec<u8>) -> Result<bool, Error> {
        let from = out.len();
        out.append(&mut self.prefix);
        let over = self.body.take_buffered(out).map_err(|failure| self.provider.failed(failure))?;
        if let Some(meter) = &mut self.meter {
            meter.feed(&out[from..]);
        }
        if over {
            self.is_over();
        }
        Ok(over)
    }

    /// Waits for more of the body, for up to `idle_timeout_seconds`.
    pub async fn wait(&mut self) -> Result<(), Error> {
        self.body.wait(self.idle_timeout).await.map_err(|failure| self.provider.failed(failure))
    }

    /// Reads the body ahead, to be judged and perhaps passed on. False where it is longer than `limit` bytes or breaks off:
    /// what was read is still passed on, and then whatever follows.
    pub(super) async fn read_ahead(&mut self, limit: usize) -> bool {
        let idle = self.idle_timeout;
        while self.prefix.len() <= limit {
            match self.body.take_buffered(&mut self.prefix) {
                Ok(true) => return true,
                Ok(false) if self.body.wait(idle).await.is_ok() => {}
                _ => return false,
            }
        }
        false
    }

    /// Its body was read to the end. A request that the provider `refused` for its rate has used no tokens.
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
        if self.head.status < 400 {
            self.provider.counters.borrow_mut().succeeded += 1;
        }
        let Some(in_flight) = self.in_flight.take() else { return };
        self.usage = self.meter.take().and_then(Meter::usage).unwrap_or_default();
        if let Some(tokens) = self.usage.total() {
            in_flight.settle(tokens);
        }
    }
}

impl Meter {
    fn feed(&mut self, bytes: &[u8]) {
        match self {
            Meter::Events(scanner) => scanner.feed(bytes),
            Meter::Whole(body, limit) if body.len() + bytes.len() <= *limit => {
                body.extend_from_slice(bytes)
            }
            Meter::Whole(..) | Meter::TooLong => *self = Meter::TooLong,
        }
    }

    fn usage(self) -> Option<Usage> {
        match self {
            Meter::Events(scanner) => Some(scanner.usage()),
            Meter::Whole(body, _) => Usage::of(&body),
            Meter::TooLong => None,
        }
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
