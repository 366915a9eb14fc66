//! From a request to an answer: wait for a slot, send, and where the provider refuses for its rate or fails before it
//! answers, do it again, as often as `retry` allows.
//!
//! Everything here happens before the first byte to the caller. Each send takes a slot. What remains at the end is the
//! provider's own last answer.

use std::collections::HashSet;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use async_io::Timer;
use futures_lite::future;

use super::progress::Progress;
use super::{Advice, Answer, Provider};
use crate::config::CooldownScope;
use crate::error::Error;
use crate::heap::pinned;
use crate::http1::RequestHead;
use crate::log;
use crate::shaping::books::{Ask, Scope};
use crate::shaping::limiter::backoff;
use crate::shaping::line::Refusal;
use crate::shaping::scheduler::{NoSlot, Permit, Place};
use crate::shaping::terms::{Joining, Terms};
use crate::telemetry::Trace;
use crate::upstream::Failure;
use crate::upstream::client::{self, SendFailure};
use crate::upstream::forward::Outgoing;
use crate::upstream::pool::Connection;
use crate::upstream::verdict::{self, Verdict};

/// Sends of one request on connections that turned out to be closed; they are no attempts, since nobody saw them.
const MAX_REPEATS: usize = 3;

/// Connections that the provider may close as soon as they stand, per attempt. One that it closes after a rest is replaced
/// for as long as the slot is not open.
const MAX_LOST_CONNECTIONS: usize = 5;

/// Before the next connection is made when the last one was lost while waiting.
const RECONNECT_PAUSE: Duration = Duration::from_millis(250);

/// How long others are asked first once no connection could be made.
const DOWN: Duration = Duration::from_secs(5);

/// A longer body is no refusal that could be understood.
const JUDGED_BODY_BYTES: usize = 64 * 1024;

/// A request and what its caller asks for: the same for every provider that it is offered to.
pub struct Errand<'r> {
    /// As the caller sent it.
    pub head: &'r RequestHead,
    /// On which terms it waits.
    pub terms: Rc<Terms>,
    /// When it was complete.
    pub since: Instant,
    /// Whether the answer's body may not come compressed: the gateway has something to say in it, or to read from it.
    pub plain: bool,
    /// For those who will want to know how it went.
    pub trace: &'r Trace,
    /// For those who want to know how far it is.
    pub progress: Progress,
}

/// A request as one provider gets it.
pub struct Offer {
    /// For the limits.
    pub ask: Ask,
    /// The body under the provider's own name for the model.
    pub body: Rc<Vec<u8>>,
    /// How often this provider was sent it already.
    pub attempts: u32,
    /// When another provider would take it, from now; without one it stays here.
    pub elsewhere: Option<Duration>,
    /// Whether another provider takes it over if this one can't be reached.
    pub fallback: bool,
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
    /// Nobody saw the request: its connection was closed.
    Unseen(Failure),
    /// There is no connection to be had.
    Down(Error),
    /// Sent and answered, or failed for good or ill.
    Done(Result<Box<Answer>, Error>, Judgement),
}

/// What to do with an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Judgement {
    PassOn,
    /// For the caller, unless another provider takes it.
    Unable,
    /// Send again; the scheduler knows for how long the provider pauses.
    Again,
    /// This API key has had its fill. Send again while there is one that has not said so.
    WithAnotherKey,
    /// Send again after a pause of this request's own.
    AgainAfterBackoff,
}

/// A permit, and the connection to use it on.
type Slot = (Permit, Box<Connection>);

/// Why there is none.
enum Lost {
    Slot(NoSlot),
    Connection(Failure),
}

impl Provider {
    /// Waits for a slot, sends, and returns the answer once its head is there. Dropping the future at any moment leaves
    /// the queue or ends the provider's work.
    pub async fn exchange(self: &Rc<Self>, errand: &Errand<'_>, offer: Offer) -> Exchanged {
        let mut attempts = offer.attempts;
        let mut place = self.join(errand, &offer, attempts > 0, self.setup().pool.idle());
        let mut last = None;
        let mut repeats = 0;
        let mut spent_keys = HashSet::new();
        loop {
            let (outcome, judgement) = match self.attempt(place, errand, &offer, repeats > 0).await
            {
                Attempt::Refused(refusal) => return self.given_up(last, refusal),
                Attempt::Moved => return Exchanged::Moved { attempts },
                Attempt::Unseen(failure) if repeats == MAX_REPEATS => {
                    return Exchanged::Unable(Err(self.failed(failure)));
                }
                Attempt::Unseen(_) => {
                    repeats += 1;
                    place = self.join(errand, &offer, true, 0);
                    continue;
                }
                Attempt::Down(error) if offer.fallback => return Exchanged::Unable(Err(error)),
                Attempt::Down(error) => (Err(error), Judgement::AgainAfterBackoff),
                Attempt::Done(outcome, judgement) => (outcome, judgement),
            };
            attempts += 1;
            if judgement == Judgement::PassOn {
                return Exchanged::Final(outcome);
            }
            let all_spent = match &outcome {
                Ok(answer) if judgement == Judgement::WithAnotherKey => {
                    spent_keys.insert(answer.lane());
                    spent_keys.len() >= self.setup().config.api_keys.len()
                }
                _ => false,
            };
            let pauses = judgement == Judgement::AgainAfterBackoff;
            if judgement == Judgement::Unable
                || all_spent
                || attempts >= self.setup().config.retry.attempts
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
        self.scheduler.join(Joining { ask, terms: terms.clone(), since, again, elsewhere, idle })
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

    /// The rest of an attempt, now that its slot is open.
    async fn send(
        self: &Rc<Self>,
        (permit, connection): Slot,
        errand: &Errand<'_>,
        offer: &Offer,
    ) -> Attempt {
        errand.progress.sent();
        errand.trace.sent(Instant::now());
        let setup = self.setup();
        let metered = setup.is_metered(offer.ask.model);
        let plain = errand.plain || metered;
        let key = setup.key(permit.lane());
        let outgoing = Outgoing::new(&setup.config, key, errand.head, offer.body.clone(), plain);
        let timeout = setup.config.request_timeout;
        match client::send(permit, connection, &setup.pool, outgoing, timeout).await {
            Ok(response) => {
                let mut answer = Answer::new(
                    self,
                    response,
                    metered,
                    offer.ask.tokens,
                    setup.config.idle_timeout,
                );
                let judgement = self.judge(&mut answer, offer.ask).await;
                Attempt::Done(Ok(answer), judgement)
            }
            Err(SendFailure { failure, repeatable: true }) => {
                errand.trace.unseen();
                Attempt::Unseen(failure)
            }
            // The provider may have done the work: it is not asked for twice.
            Err(SendFailure { failure, .. }) => {
                Attempt::Done(Err(self.failed(failure)), Judgement::PassOn)
            }
        }
    }

    /// Pauses before another attempt; says no where the whole wait would get too long.
    async fn back_off(&self, attempts: u32, errand: &Errand<'_>) -> bool {
        let pause = backoff(attempts, fastrand::f64());
        let ends = Instant::now() + pause;
        let max_wait = self.setup().config.rate_limit.max_wait;
        if max_wait.is_some_and(|limit| ends > errand.since + limit)
            || errand.terms.deadline.is_some_and(|deadline| ends > deadline)
        {
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

    /// A permit for a slot that is open already, and an idle connection to use it on; else a place to wait in.
    fn open_slot(
        &self,
        place: Place,
        permit: Option<Permit>,
        errand: &Errand<'_>,
        offer: &Offer,
    ) -> Result<Slot, Place> {
        let Some(permit) = permit else { return Err(place) };
        match self.setup().pool.take() {
            Some(connection) => Ok((permit, connection)),
            None => {
                // It is gone meanwhile, and the slot waits for nobody. The permit first, so that our own grant does not count as
                // ahead of us.
                drop(permit);
                Err(self.join_again(errand, offer))
            }
        }
    }

    fn join_again(&self, errand: &Errand<'_>, offer: &Offer) -> Place {
        let place = self.join(errand, offer, true, 0);
        errand.progress.queued_as(place.ticket());
        place
    }

    /// A permit and a connection to use it on, for a slot that is near.
    async fn wait_for_slot(
        &self,
        mut place: Place,
        errand: &Errand<'_>,
        offer: &Offer,
        fresh: bool,
    ) -> Result<Slot, Lost> {
        let mut lost = 0;
        while lost < MAX_LOST_CONNECTIONS {
            let idle = if fresh { None } else { self.setup().pool.take() };
            let connection = match idle {
                Some(connection) => Ok(connection),
                // On the heap: most requests find one that is idle, and need not have the room for this.
                None => pinned(|| self.connect(&place)).await,
            };
            let mut connection = match connection {
                Ok(connection) => connection,
                Err(lost) => {
                    place.leave();
                    return Err(lost);
                }
            };
            let granted = async { Some(place.granted().await) };
            let spoiled = async {
                connection.spoiled().await;
                None
            };
            // A slot on a connection that is known to be closed would be lost.
            if let Some(permit) = future::or(spoiled, granted).await {
                return Ok((permit?, connection));
            }
            place = place.lost_connection()?.unwrap_or_else(|| self.join_again(errand, offer));
            if !connection.has_rested() {
                lost += 1;
                Timer::after(RECONNECT_PAUSE).await;
            }
        }
        place.leave();
        let detail = "it closes every connection before a request is sent on it".into();
        Err(Lost::Connection(Failure::Disconnected(detail)))
    }

    /// A new connection, if it stands before the place is taken away.
    async fn connect(&self, place: &Place) -> Result<Box<Connection>, Lost> {
        let connect = async {
            let connected = self.setup().connector.connect().await;
            self.down_until.set(connected.is_err().then(|| Instant::now() + DOWN));
            connected.map(Connection::fresh).map_err(Lost::Connection)
        };
        let taken_away = async { Err(Lost::Slot(place.taken_away().await)) };
        future::or(connect, taken_away).await
    }

    /// Whether an answer is the caller's, or a refusal that waiting may overcome. Tells the scheduler what the provider
    /// asks for.
    async fn judge(&self, answer: &mut Answer, ask: Ask) -> Judgement {
        let setup = self.setup();
        let (status, retry) = (answer.head.status, &setup.config.retry);
        let listed = retry.statuses.contains(&status);
        if !listed && !verdict::may_be_refusal(status) {
            self.scheduler.accepted(answer.lane(), ask.model);
            return Judgement::PassOn;
        }
        if !answer.read_ahead(JUDGED_BODY_BYTES).await {
            return Judgement::PassOn;
        }
        let verdict =
            verdict::judge(status, &answer.head.headers, answer.read_so_far(), SystemTime::now());
        answer.is_judged(matches!(verdict, Verdict::CoolDown { .. } | Verdict::Exhausted));
        match verdict {
            Verdict::CoolDown { wait, scope } => {
                let scope = self.scope(scope);
                self.cool_down(answer, ask, scope, wait);
                let too_long = wait.is_some_and(|wait| wait > retry.max_cooldown);
                match (listed, too_long) {
                    (true, false) => Judgement::Again,
                    (true, true) => Judgement::Unable,
                    (false, _) => Judgement::PassOn,
                }
            }
            Verdict::Exhausted => {
                answer.advice = Some(Advice::StayAway);
                if setup.has_several_keys() && listed {
                    self.scheduler.refused(answer.lane(), ask.model, Scope::Provider, None);
                    return Judgement::WithAnotherKey;
                }
                if listed { Judgement::Unable } else { Judgement::PassOn }
            }
            Verdict::Repeat | Verdict::PassOn if listed => Judgement::AgainAfterBackoff,
            Verdict::Repeat | Verdict::PassOn => Judgement::PassOn,
        }
    }

    fn cool_down(&self, answer: &mut Answer, ask: Ask, scope: Scope, wait: Option<Duration>) {
        let setup = self.setup();
        let pause = wait.map(|wait| wait.min(setup.config.retry.max_cooldown));
        self.scheduler.refused(answer.lane(), ask.model, scope, pause);
        answer.advice = Some(Advice::ComeBack(wait.map(|wait| Instant::now() + wait)));
        let who = match scope {
            Scope::Provider => "all its models",
            Scope::Model => setup.model_id(ask.model),
        };
        let (name, status) = (self.with_key(answer.lane()), answer.head.status);
        match wait {
            Some(wait) => log::warn(format_args!(
                "{name} answered {status}: {who} pause for {} s",
                wait.as_secs_f64()
            )),
            None => log::warn(format_args!("{name} answered {status} and no time: {who} back off")),
        }
    }

    fn scope(&self, said: verdict::Scope) -> Scope {
        match (self.setup().config.rate_limit.cooldown, said) {
            (CooldownScope::Provider, _) | (CooldownScope::Auto, verdict::Scope::Provider) => {
                Scope::Provider
            }
            (CooldownScope::Model, _) | (CooldownScope::Auto, verdict::Scope::Model) => {
                Scope::Model
            }
        }
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

impl From<NoSlot> for Lost {
    fn from(no_slot: NoSlot) -> Lost {
        Lost::Slot(no_slot)
    }
}
