//! From a request to an answer: wait for a slot, send, and where the provider refuses for its rate or fails before it
//! answers, do it again, as often as `retry` allows.
//!
//! Everything here happens before the first byte to the caller. Each send takes a slot. What remains at the end is the
//! provider's own last answer.

use std::collections::HashSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

use async_io::Timer;
use futures_lite::future;

use super::judge::Judgement;
use super::progress::Progress;
use super::response_time::ResponseTimes;
use super::slot::{Lost, Slot};
use super::{Advice, Answer, Provider};
use crate::error::Error;
use crate::heap::pinned;
use crate::http1::{RequestHead, ResponseHead};
use crate::openai::RequestBody;
use crate::shaping::books::Ask;
use crate::shaping::limiter::backoff;
use crate::shaping::line::Refusal;
use crate::shaping::scheduler::{NoSlot, Place};
use crate::shaping::terms::{Joining, Terms};
use crate::telemetry::Trace;
use crate::upstream::Failure;
use crate::upstream::client::{self, Reached, Response, SendFailure};
use crate::upstream::forward::Outgoing;

/// How often a request joins again whose head could not be written. Those are no attempts: the provider has not seen it.
const MAX_UNWRITTEN: usize = 3;

/// A request and what its caller asks for: the same for every provider that it is offered to.
pub struct Errand<'r> {
    /// As the caller sent it.
    pub head: &'r RequestHead,
    /// On which terms it waits.
    pub terms: Rc<Terms>,
    /// When it was complete.
    pub since: Instant,
    /// Whether its client asks for a stream.
    pub stream: bool,
    /// Whether the answer's body may not come compressed: the gateway has something to say in it, or to read from it.
    pub plain: bool,
    /// For those who will want to know how it went.
    pub trace: &'r Trace,
    /// For those who want to know how far it is.
    pub progress: Progress,
}

impl Errand<'_> {
    /// When waiting ends at the latest, under this limit.
    pub(super) fn gives_up(&self, max_wait: Option<Duration>) -> Option<Instant> {
        let max_wait = max_wait.and_then(|limit| self.since.checked_add(limit));
        [max_wait, self.terms.end()].into_iter().flatten().min()
    }
}

/// A request as one provider gets it.
pub struct Offer {
    /// For the limits.
    pub ask: Ask,
    /// The body under the provider's own name for the model.
    pub body: RequestBody,
    /// How often this provider was sent it already.
    pub attempts: u32,
    /// When another provider would take it, from now; without one it stays here.
    pub elsewhere: Option<Duration>,
    /// Whether another provider takes it over if this one can't be reached.
    pub fallback: bool,
}

impl Offer {
    /// Whether another provider may take it.
    pub(super) fn has_alternative(&self) -> bool {
        self.fallback || self.is_taken_elsewhere()
    }

    /// Whether another provider would take it now or later, and has not been chosen too often.
    fn is_taken_elsewhere(&self) -> bool {
        self.elsewhere.is_some_and(|wait| wait < Duration::MAX)
    }
}

/// What came of an offer.
pub enum Exchanged {
    /// An answer for the caller, or a reason why there is none.
    Final(Result<Box<Answer>, Error>),
    /// This provider can't do it at present; another may.
    Unable(Result<Box<Answer>, Error>),
    /// Another provider would do it sooner. So many times it was sent here.
    Moved {
        /// Sends so far.
        attempts: u32,
    },
}

/// How one attempt went.
enum Attempt {
    /// No slot: the scheduler takes this request no more.
    Refused(Refusal),
    /// Another provider's slot comes sooner.
    Moved,
    /// The head was not written whole: the provider has not seen the request.
    Unwritten(Failure),
    /// The provider had closed the connection before the request came.
    Stale(Failure),
    /// There is no connection to be had.
    Down(Error),
    /// Sent and answered, or failed for good or ill.
    Done(Result<Box<Answer>, Error>, Judgement),
}

impl Provider {
    /// Waits for a slot, sends, and returns the answer once its head is there. Dropping the future at any moment leaves
    /// the queue or ends the provider's work.
    pub async fn exchange(self: &Rc<Self>, errand: &Errand<'_>, offer: Offer) -> Exchanged {
        let mut attempts = offer.attempts;
        let mut place = self.join(errand, &offer, attempts > 0, self.setup().pool.idle());
        let mut last = None;
        let mut unwritten = 0;
        let mut fresh = false;
        let mut spent_keys = HashSet::new();
        loop {
            let (outcome, judgement) = match self.attempt(place, errand, &offer, fresh).await {
                Attempt::Refused(refusal) => return self.given_up(last, refusal),
                Attempt::Moved => return Exchanged::Moved { attempts },
                Attempt::Unwritten(failure) if unwritten == MAX_UNWRITTEN => {
                    return Exchanged::Unable(Err(self.failed(failure)));
                }
                Attempt::Unwritten(_) => {
                    unwritten += 1;
                    fresh = true;
                    place = self.join(errand, &offer, true, 0);
                    continue;
                }
                Attempt::Stale(failure) => {
                    attempts += 1;
                    if attempts >= self.setup().config.retry.attempts {
                        return Exchanged::Unable(Err(self.failed(failure)));
                    }
                    fresh = true;
                    place = self.join(errand, &offer, true, 0);
                    continue;
                }
                Attempt::Down(error) if offer.fallback => return Exchanged::Unable(Err(error)),
                Attempt::Down(_) if offer.is_taken_elsewhere() => {
                    return Exchanged::Moved { attempts };
                }
                Attempt::Down(error) => (Err(error), Judgement::AgainAfterBackoff),
                Attempt::Done(outcome, judgement) => (outcome, judgement),
            };
            attempts += 1;
            if judgement == Judgement::PassOn {
                return Exchanged::Final(outcome);
            }
            let setup = self.setup();
            let all_spent = match &outcome {
                Ok(answer) if judgement == Judgement::WithAnotherKey => {
                    spent_keys.insert(answer.lane());
                    spent_keys.len() >= setup.config.api_keys.len()
                }
                _ => false,
            };
            let pauses = judgement == Judgement::AgainAfterBackoff;
            if judgement == Judgement::Unable
                || all_spent
                || attempts >= setup.config.retry.attempts
                || pauses && !self.back_off(attempts, errand).await
            {
                return Exchanged::Unable(outcome);
            }
            if offer.elsewhere.is_some() {
                return Exchanged::Moved { attempts };
            }
            last = Some(outcome);
            place = self.join(errand, &offer, true, 0);
        }
    }

    /// The provider's last answer, or ours where there is none.
    fn given_up(&self, last: Option<Result<Box<Answer>, Error>>, refusal: Refusal) -> Exchanged {
        let spent = matches!(refusal, Refusal::Day { .. });
        let outcome = match last {
            None => Err(self.refused(refusal)),
            Some(mut outcome) => {
                if let Ok(answer) = &mut outcome
                    && let Some(Advice::ComeBack(at)) = &mut answer.advice
                {
                    // Others may have been told to wait for longer since.
                    *at = (*at).max(refusal.retry_after().map(|wait| Instant::now() + wait));
                }
                outcome
            }
        };
        if spent { Exchanged::Unable(outcome) } else { Exchanged::Final(outcome) }
    }

    /// A place in the line. `again`: it goes to the head; `idle`: see [`Joining`].
    fn join(&self, errand: &Errand<'_>, offer: &Offer, again: bool, idle: usize) -> Place {
        let &Offer { ask, elsewhere, .. } = offer;
        let &Errand { ref terms, since, .. } = errand;
        let movable = offer.fallback || elsewhere.is_some();
        self.scheduler.join(Joining {
            ask,
            terms: terms.clone(),
            since,
            response_time: self.response_time(errand, ask.model),
            again,
            elsewhere,
            movable,
            idle,
        })
    }

    async fn attempt(
        self: &Rc<Self>,
        place: Place,
        errand: &Errand<'_>,
        offer: &Offer,
        fresh: bool,
    ) -> Attempt {
        errand.progress.queued(self, place.ticket());
        let permit = match place.near().await {
            Ok(permit) => permit,
            Err(no_slot) => return no_slot.into(),
        };
        debug_assert!(
            !(fresh && permit.is_some()),
            "who wants a fresh connection does not join with an idle one"
        );
        // On the heap, both: who waits far from its slot has no need of the room for them.
        let slot = match self.open_slot(place, permit, errand, offer) {
            Ok(slot) => Ok(slot),
            Err(place) => pinned(|| self.wait_for_slot(place, errand, offer, fresh)).await,
        };
        match slot {
            Ok(slot) => pinned(|| self.send(slot, errand, offer)).await,
            Err(Lost::Slot(no_slot)) => no_slot.into(),
            Err(Lost::Connection(failure)) => Attempt::Down(self.failed(failure)),
        }
    }

    /// The rest of an attempt, now that its slot is open. All of it is under the configuration of the slot.
    async fn send(self: &Rc<Self>, slot: Slot, errand: &Errand<'_>, offer: &Offer) -> Attempt {
        errand.progress.sent();
        errand.trace.sent(Instant::now());
        let Slot { permit, connection, setup } = slot;
        let metered = setup.is_metered(offer.ask.model);
        let plain = errand.plain || metered;
        let key = setup.key(permit.lane());
        let body = offer.body.clone();
        let outgoing = Outgoing::new(&setup.config, key, errand.head, body, plain);
        let timeout = setup.config.request_timeout;
        let wait = WaitForHead::begin(&self.response_times, offer.ask.model, errand.stream);
        let sent = client::send(permit, connection, &setup.pool, outgoing, timeout).await;
        wait.ends(&sent);
        match sent {
            Ok(response) => {
                let (tokens, idle) = (offer.ask.tokens, setup.config.idle_timeout);
                let mut answer = Answer::new(self, response, metered, tokens, idle);
                let judgement = self.judge(&setup, &mut answer, offer.ask).await;
                Attempt::Done(Ok(answer), judgement)
            }
            Err(SendFailure { failure, reached: Reached::Unwritten }) => {
                errand.trace.unseen();
                Attempt::Unwritten(failure)
            }
            Err(SendFailure { failure, reached: Reached::Stale }) => Attempt::Stale(failure),
            // The provider may have done the work: it is not asked for twice.
            Err(SendFailure { failure, reached: Reached::Perhaps }) => {
                Attempt::Done(Err(self.failed(failure)), Judgement::PassOn)
            }
        }
    }

    /// Pauses before another attempt; says no where the whole wait would get too long.
    async fn back_off(&self, attempts: u32, errand: &Errand<'_>) -> bool {
        let pause = backoff(attempts, fastrand::f64());
        let ends = Instant::now() + pause;
        let gives_up = errand.gives_up(self.setup().config.rate_limit.max_wait);
        if gives_up.is_some_and(|end| ends > end) {
            return false;
        }
        errand.progress.pausing();
        let pause = async {
            Timer::at(ends).await;
            true
        };
        let closed = async {
            self.scheduler.closed().await;
            false
        };
        future::or(pause, closed).await
    }

    /// A new place at the head of the queue, in the same attempt.
    pub(super) fn join_again(&self, errand: &Errand<'_>, offer: &Offer) -> Place {
        let place = self.join(errand, offer, true, 0);
        errand.progress.queued_as(place.ticket());
        place
    }
}

impl From<NoSlot> for Attempt {
    fn from(no_slot: NoSlot) -> Attempt {
        match no_slot {
            NoSlot::Refused(refusal) => Attempt::Refused(refusal),
            NoSlot::Moved => Attempt::Moved,
        }
    }
}

/// Measures how long a response head takes. Dropped before it is there, the client has given up.
struct WaitForHead<'p> {
    times: &'p ResponseTimes,
    model: usize,
    stream: bool,
    since: Instant,
    is_over: bool,
}

impl<'p> WaitForHead<'p> {
    fn begin(times: &'p ResponseTimes, model: usize, stream: bool) -> WaitForHead<'p> {
        WaitForHead { times, model, stream, since: Instant::now(), is_over: false }
    }

    fn ends(mut self, sent: &Result<Response, SendFailure>) {
        self.is_over = true;
        // A refusal comes sooner than a response.
        if let Ok(Response { head: ResponseHead { status: ..400, .. }, latency, .. }) = sent {
            self.times.add(self.model, self.stream, *latency);
        }
    }
}

impl Drop for WaitForHead<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.times.add_missing(self.model, self.stream, self.since.elapsed());
        }
    }
}
