//! From a request to an answer: wait for a slot, send, and where the provider refuses for its rate or fails before it
//! answers, do it again, as often as `retry` allows.
//!
//! Everything here happens before the first byte to the caller. Each send takes a slot. What remains at the end is the
//! provider's own last answer.

use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use async_io::Timer;
use futures_lite::future;

use super::{Advice, Answer, Provider};
use crate::config::CooldownScope;
use crate::error::Error;
use crate::http1::RequestHead;
use crate::log;
use crate::shaping::books::{Ask, Scope};
use crate::shaping::limiter::backoff;
use crate::shaping::scheduler::{Permit, Place, Refusal};
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

/// A longer body is no refusal that could be understood.
const JUDGED_BODY_BYTES: usize = 64 * 1024;

/// How one attempt went.
#[expect(clippy::large_enum_variant, reason = "it is taken apart where it is made; a box would only cost")]
enum Attempt {
    /// No slot: the scheduler takes this request no more.
    Refused(Refusal),
    /// Nobody saw the request: its connection was closed.
    Unseen(Failure),
    /// Sent and answered, or failed for good or ill.
    Done(Result<Answer, Error>, Judgement),
}

/// What to do with an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Judgement {
    PassOn,
    /// Send again; the scheduler knows for how long the provider pauses.
    Again,
    /// Send again after a pause of this request's own.
    AgainAfterBackoff,
}

/// Why there is no slot.
enum NoSlot {
    Refused(Refusal),
    Failed(Failure),
}

impl Provider {
    /// Waits for a slot, sends, and returns the answer once its head is there. Dropping the future at any moment leaves
    /// the queue or ends the provider's work.
    pub async fn exchange(self: &Rc<Self>, request: &RequestHead, body: Vec<u8>, ask: Ask) -> Result<Answer, Error> {
        let metered = self.is_metered(ask.model);
        let outgoing = Rc::new(Outgoing::new(&self.config, request, body, metered));
        let mut place = self.scheduler.join(ask);
        let since = place.since();
        let mut last = None;
        let (mut attempts, mut repeats) = (0, 0);
        loop {
            let (outcome, judgement) = match self.attempt(place, &outgoing, ask, repeats > 0).await {
                Attempt::Refused(refusal) => return self.given_up(last, refusal),
                Attempt::Unseen(failure) if repeats == MAX_REPEATS => return Err(self.failed(failure)),
                Attempt::Unseen(_) => {
                    repeats += 1;
                    place = self.scheduler.rejoin(ask, since);
                    continue;
                }
                Attempt::Done(outcome, judgement) => (outcome, judgement),
            };
            attempts += 1;
            if judgement == Judgement::PassOn || attempts >= self.config.retry.attempts {
                return outcome;
            }
            if judgement == Judgement::AgainAfterBackoff && !self.back_off(attempts, since).await {
                return outcome;
            }
            last = Some(outcome);
            place = self.scheduler.rejoin(ask, since);
        }
    }

    /// The provider's last answer, or ours where there is none.
    fn given_up(&self, last: Option<Result<Answer, Error>>, refusal: Refusal) -> Result<Answer, Error> {
        let Some(mut outcome) = last else { return Err(self.refused(refusal)) };
        if let Ok(Answer { advice: Some(Advice::ComeBack(at)), .. }) = &mut outcome {
            // Others may have been told to wait for longer since.
            *at = (*at).max(refusal.retry_after().map(|wait| Instant::now() + wait));
        }
        outcome
    }

    async fn attempt(self: &Rc<Self>, place: Place, outgoing: &Rc<Outgoing>, ask: Ask, fresh: bool) -> Attempt {
        let (permit, connection) = match self.slot(place, fresh).await {
            Ok(slot) => slot,
            Err(NoSlot::Refused(refusal)) => return Attempt::Refused(refusal),
            Err(NoSlot::Failed(failure)) => {
                return Attempt::Done(Err(self.failed(failure)), Judgement::AgainAfterBackoff);
            }
        };
        let timeout = self.config.request_timeout;
        match client::send(permit, connection, &self.pool, outgoing.clone(), timeout).await {
            Ok(response) => {
                let mut answer = Answer::new(self, response, self.is_metered(ask.model));
                let judgement = self.judge(&mut answer, ask).await;
                Attempt::Done(Ok(answer), judgement)
            }
            Err(SendFailure { failure, repeatable: true }) => Attempt::Unseen(failure),
            // The provider may have done the work: it is not asked for twice.
            Err(SendFailure { failure, .. }) => Attempt::Done(Err(self.failed(failure)), Judgement::PassOn),
        }
    }

    /// Pauses before another attempt; says no where the whole wait would get too long.
    async fn back_off(&self, attempts: u32, since: Instant) -> bool {
        let pause = backoff(attempts, fastrand::f64());
        if self.config.rate_limit.max_wait.is_some_and(|limit| since.elapsed() + pause > limit) {
            return false;
        }
        let pause = async {
            Timer::after(pause).await;
            true
        };
        let closed = async {
            self.scheduler.closed().await;
            false
        };
        future::or(pause, closed).await
    }

    /// A permit and a connection to use it on.
    async fn slot(&self, mut place: Place, fresh: bool) -> Result<(Permit, Connection), NoSlot> {
        place.near().await?;
        let mut lost = 0;
        while lost < MAX_LOST_CONNECTIONS {
            let connect = async { self.connection(fresh).await.map_err(NoSlot::Failed) };
            let refused = async { Err(NoSlot::Refused(place.refused().await)) };
            let mut connection = match future::or(connect, refused).await {
                Ok(connection) => connection,
                Err(no_slot) => {
                    place.leave();
                    return Err(no_slot);
                }
            };
            let granted = async { Some(place.granted().await) };
            let spoiled = async {
                connection.spoiled().await;
                None
            };
            if let Some(permit) = future::or(granted, spoiled).await {
                return Ok((permit?, connection));
            }
            place = place.lost_connection(&self.scheduler)?;
            if !connection.has_rested() {
                lost += 1;
                Timer::after(RECONNECT_PAUSE).await;
            }
        }
        place.leave();
        let detail = "it closes every connection before a request is sent on it".into();
        Err(NoSlot::Failed(Failure::Disconnected(detail)))
    }

    async fn connection(&self, fresh: bool) -> Result<Connection, Failure> {
        if !fresh && let Some(connection) = self.pool.take().await {
            return Ok(connection);
        }
        self.connector.connect().await.map(Connection::fresh)
    }

    /// Whether an answer is the caller's, or a refusal that waiting may overcome. Tells the scheduler what the provider
    /// asks for.
    async fn judge(&self, answer: &mut Answer, ask: Ask) -> Judgement {
        let (status, retry) = (answer.head.status, &self.config.retry);
        let listed = retry.statuses.contains(&status);
        if !listed && !verdict::may_be_refusal(status) {
            self.scheduler.accepted(ask.model);
            return Judgement::PassOn;
        }
        if !answer.read_ahead(JUDGED_BODY_BYTES).await {
            return Judgement::PassOn;
        }
        let verdict = verdict::judge(status, &answer.head.headers, answer.read_so_far(), SystemTime::now());
        answer.is_judged(matches!(verdict, Verdict::CoolDown { .. } | Verdict::Exhausted));
        match verdict {
            Verdict::CoolDown { wait, scope } => {
                let scope = self.scope(scope);
                self.cool_down(answer, ask, scope, wait);
                let too_long = wait.is_some_and(|wait| wait > retry.max_cooldown);
                if listed && !too_long { Judgement::Again } else { Judgement::PassOn }
            }
            Verdict::Exhausted => {
                answer.advice = Some(Advice::StayAway);
                Judgement::PassOn
            }
            Verdict::Repeat | Verdict::PassOn if listed => Judgement::AgainAfterBackoff,
            Verdict::Repeat | Verdict::PassOn => Judgement::PassOn,
        }
    }

    fn cool_down(&self, answer: &mut Answer, ask: Ask, scope: Scope, wait: Option<Duration>) {
        let pause = wait.map(|wait| wait.min(self.config.retry.max_cooldown));
        self.scheduler.refused(ask.model, scope, pause);
        answer.advice = Some(Advice::ComeBack(wait.map(|wait| Instant::now() + wait)));
        let who = match scope {
            Scope::Provider => "all its models",
            Scope::Model => &self.config.models[ask.model].id,
        };
        let (name, status) = (&self.config.name, answer.head.status);
        match wait {
            Some(wait) => log::line(format_args!("{name} answered {status}: {who} pause for {} s", wait.as_secs_f64())),
            None => log::line(format_args!("{name} answered {status} and no time: {who} back off")),
        }
    }

    fn scope(&self, said: verdict::Scope) -> Scope {
        match (self.config.rate_limit.cooldown, said) {
            (CooldownScope::Provider, _) | (CooldownScope::Auto, verdict::Scope::Provider) => Scope::Provider,
            (CooldownScope::Model, _) | (CooldownScope::Auto, verdict::Scope::Model) => Scope::Model,
        }
    }
}

impl From<Refusal> for NoSlot {
    fn from(refusal: Refusal) -> NoSlot {
        NoSlot::Refused(refusal)
    }
}
