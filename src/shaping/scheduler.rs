//! The task that lets one provider's requests go: it drains one mailbox, asks the [`Line`], and sleeps.
//!
//! Everybody else holds a [`Place`], a [`Permit`] or an [`InFlight`]; each tells the task by a message when it is
//! dropped, so that a caller who leaves, at whatever moment, leaves nothing behind.
//!
//! Binding is late: a slot is taken when the request head has been written, and recorded with the instant *after* that
//! write. The next grant counts from there, so two heads are never closer on the wire than the cadence, but for the
//! millisecond of lateness that it makes up for. One grant is open at a time on each lane, or as many as a burst allows.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use async_channel::{Receiver, Sender, WeakSender};
use futures_lite::future;

use super::books::{Ask, BooksMemory, Scope};
use super::by_id::ById;
use super::lane::Past;
use super::limiter::Now;
use super::line::{Decision, Estimate, Line, Refusal, Snapshot, Waiting};
use super::terms::{Joining, Rules, Terms};
use super::word::{self, Hearer, Teller};
use crate::deadline::until;

enum Message {
    Join { id: u64, joining: Joining, turns: Teller<Turn> },
    Ready { id: u64, ready: bool },
    Left { id: u64, hung_up: bool },
    Sent { id: u64, lane: usize, ask: Ask, at: Instant, waited: Duration },
    Returned { lane: usize, model: usize },
    Refused { lane: usize, model: usize, scope: Scope, wait: Option<Duration> },
    Accepted { lane: usize, model: usize },
    MoveOn,
    Finished { id: u64, tokens: Option<u64> },
    Question(Question),
    Reload(Box<Rules>),
    Close,
}

/// What somebody wants to know; the answer goes back on the channel.
enum Question {
    Snapshot(Sender<Snapshot>),
    Waiting(Sender<Vec<Waiting>>),
    Whereabouts(u64, Sender<Option<(usize, Duration)>>),
    Estimate(Ask, Rc<Terms>, Duration, Sender<Option<Estimate>>),
    Changes(Sender<u64>),
    Memory(Sender<Vec<BooksMemory>>),
}

#[derive(Debug)]
enum Turn {
    Near,
    Granted(Permit),
    Refused(Refusal),
    Moved,
}

impl Turn {
    /// How the wait ends, if it does.
    fn ending(self) -> Option<Result<Permit, NoSlot>> {
        match self {
            Turn::Near => None,
            Turn::Granted(permit) => Some(Ok(permit)),
            Turn::Refused(refusal) => Some(Err(NoSlot::Refused(refusal))),
            Turn::Moved => Some(Err(NoSlot::Moved)),
        }
    }
}

/// Why a place in the line was taken away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoSlot {
    /// It waited in vain.
    Refused(Refusal),
    /// Another provider would take it sooner.
    Moved,
}

const CLOSED: NoSlot = NoSlot::Refused(Refusal::Closed);

/// The handle: cheap to call, never waits by itself.
#[derive(Debug)]
pub struct Scheduler {
    mailbox: Sender<Message>,
    next_id: Cell<u64>,
    /// Closed with the scheduler.
    open: (Sender<Infallible>, Receiver<Infallible>),
}

impl Scheduler {
    /// The handle and the task behind it. The caller spawns the task; it ends when the handle and everything that came
    /// from it are gone.
    pub fn new(rules: Rules, pasts: &[Past]) -> (Scheduler, impl Future<Output = ()> + use<>) {
        // Unbounded, but no caller can fill it: a waiter has at most a handful of messages under way.
        let (mailbox, messages) = async_channel::unbounded();
        let desk = Desk {
            line: Line::new(rules, pasts, clocks(Instant::now())),
            turns: ById::default(),
            questions: Vec::new(),
            mailbox: mailbox.downgrade(),
        };
        let scheduler =
            Scheduler { mailbox, next_id: Cell::new(0), open: async_channel::bounded(1) };
        (scheduler, run(desk, messages))
    }

    /// Joins the line.
    pub fn join(&self, joining: Joining) -> Place {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let (reply, turns) = word::between();
        tell(&self.mailbox, Message::Join { id, joining, turns: reply });
        Place { id, turns, mailbox: self.mailbox.clone(), hung_up: true }
    }

    /// The provider refused a request of this model for its rate; see [`Line::refused`].
    pub fn refused(&self, lane: usize, model: usize, scope: Scope, wait: Option<Duration>) {
        tell(&self.mailbox, Message::Refused { lane, model, scope, wait });
    }

    /// The provider took a request of this model.
    pub fn accepted(&self, lane: usize, model: usize) {
        tell(&self.mailbox, Message::Accepted { lane, model });
    }

    /// The provider is down: requests that another one may take move on.
    pub fn move_on(&self) {
        tell(&self.mailbox, Message::MoveOn);
    }

    /// How things stand.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        self.ask(Question::Snapshot).await
    }

    /// How often something happened that has to be remembered.
    pub async fn changes(&self) -> Option<u64> {
        self.ask(Question::Changes).await
    }

    /// What is to be remembered of each lane. After [`Scheduler::close`] this is the last word.
    pub async fn memory(&self) -> Option<Vec<BooksMemory>> {
        self.ask(Question::Memory).await
    }

    /// Everybody in line, head first.
    pub async fn waiting(&self) -> Option<Vec<Waiting>> {
        self.ask(Question::Waiting).await
    }

    /// Place from 1, and the time until the slot, of somebody in line.
    pub async fn whereabouts(&self, ticket: Ticket) -> Option<(usize, Duration)> {
        self.ask(|reply| Question::Whereabouts(ticket.0, reply)).await?
    }

    /// When the slot of a newcomer would come, whose deadline has to leave `response_time`; `None` where it would be
    /// refused.
    pub async fn estimate(
        &self,
        ask: Ask,
        terms: &Rc<Terms>,
        response_time: Duration,
    ) -> Option<Estimate> {
        self.ask(|reply| Question::Estimate(ask, terms.clone(), response_time, reply)).await?
    }

    /// Goes on under other rules; see [`Line::reload`].
    pub fn reload(&self, rules: Rules) {
        tell(&self.mailbox, Message::Reload(Box::new(rules)));
    }

    /// Refuses everybody who waits and everybody who comes.
    pub fn close(&self) {
        tell(&self.mailbox, Message::Close);
        self.open.0.close();
    }

    /// Waits until [`Scheduler::close`].
    pub async fn closed(&self) {
        let _ = self.open.1.recv().await;
    }

    async fn ask<T>(&self, question: impl FnOnce(Sender<T>) -> Question) -> Option<T> {
        let (reply, answer) = async_channel::bounded(1);
        self.mailbox.try_send(Message::Question(question(reply))).ok()?;
        answer.recv().await.ok()
    }
}

/// Tells a place in line, for as long as it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// A place in the line. Dropping it leaves the line.
#[derive(Debug)]
pub struct Place {
    id: u64,
    turns: Hearer<Turn>,
    mailbox: Sender<Message>,
    /// What a drop means.
    hung_up: bool,
}

impl Place {
    /// For [`Scheduler::whereabouts`].
    pub fn ticket(&self) -> Ticket {
        Ticket(self.id)
    }

    /// Waits until the slot is near enough to make a connection for it. With a permit it is open already, for who found
    /// a connection [idle](Joining::idle).
    pub async fn near(&self) -> Result<Option<Permit>, NoSlot> {
        let ending = match self.turns.next().await {
            Some(Turn::Near) => self.turns.heard().and_then(Turn::ending),
            Some(turn) => turn.ending(),
            None => Some(Err(CLOSED)),
        };
        ending.transpose()
    }

    /// Leaves the line for a reason that is not the caller's.
    pub fn leave(mut self) {
        self.hung_up = false;
    }

    /// Waits until this place is taken away; for use beside making a connection, when no grant can come yet.
    pub async fn taken_away(&self) -> NoSlot {
        loop {
            if let Err(no_slot) = self.ending().await {
                return no_slot;
            }
        }
    }

    /// Says that a connection stands and waits for the slot.
    pub async fn granted(&self) -> Result<Permit, NoSlot> {
        tell(&self.mailbox, Message::Ready { id: self.id, ready: true });
        self.ending().await
    }

    async fn ending(&self) -> Result<Permit, NoSlot> {
        loop {
            let Some(turn) = self.turns.next().await else { return Err(CLOSED) };
            if let Some(ending) = turn.ending() {
                return ending;
            }
        }
    }

    /// Says that the connection was lost before the slot. The place in line stays; none is left where a permit was granted at the
    /// same moment: it has gone back, and who had it joins [again](Joining::again).
    pub fn lost_connection(self) -> Result<Option<Place>, NoSlot> {
        match self.turns.heard().and_then(Turn::ending) {
            Some(Ok(unspent)) => {
                drop(unspent);
                Ok(None)
            }
            Some(Err(no_slot)) => Err(no_slot),
            None => {
                tell(&self.mailbox, Message::Ready { id: self.id, ready: false });
                Ok(Some(self))
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Who has been granted, refused or sent elsewhere is in line no more.
        if !self.turns.is_over() {
            tell(&self.mailbox, Message::Left { id: self.id, hung_up: self.hung_up });
        }
    }
}

/// The right to write one request head, now. Dropped unspent, it goes back and costs no slot.
#[derive(Debug)]
#[must_use = "an unspent permit gives its slot back"]
pub struct Permit {
    id: u64,
    lane: usize,
    ask: Ask,
    since: Instant,
    mailbox: Option<Sender<Message>>,
}

impl Permit {
    /// Which of the provider's API keys it is for, by index.
    pub fn lane(&self) -> usize {
        self.lane
    }

    /// Spends the slot. To be called right after the head was written, with the instant after the write.
    pub fn spend(mut self, at: Instant) -> InFlight {
        let mailbox = self.mailbox.take().expect("a permit is spent once: it is consumed here");
        let waited = at.saturating_duration_since(self.since);
        tell(&mailbox, Message::Sent { id: self.id, lane: self.lane, ask: self.ask, at, waited });
        InFlight { id: self.id, lane: self.lane, waited, tokens: None, mailbox }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(mailbox) = &self.mailbox {
            tell(mailbox, Message::Returned { lane: self.lane, model: self.ask.model });
        }
    }
}

/// A request that was sent and whose answer is not over. Dropping it ends that.
#[derive(Debug)]
pub struct InFlight {
    id: u64,
    lane: usize,
    waited: Duration,
    tokens: Option<u64>,
    mailbox: Sender<Message>,
}

impl InFlight {
    /// From the first join to the send.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The API key it was sent with, by index.
    pub fn lane(&self) -> usize {
        self.lane
    }

    /// Ends it, with the tokens that the request has really used, in the place of those it reserved.
    pub fn settle(mut self, tokens: u64) {
        self.tokens = Some(tokens);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        tell(&self.mailbox, Message::Finished { id: self.id, tokens: self.tokens });
    }
}

fn tell(mailbox: &Sender<Message>, message: Message) {
    // Fails only when the task is gone, and then there is nobody left to tell.
    let _ = mailbox.try_send(message);
}

async fn run(mut desk: Desk, messages: Receiver<Message>) {
    let mut now = clocks(Instant::now());
    loop {
        let wake = desk.advance(now);
        let message = match wake {
            Some(at) => {
                future::or(async { Some(messages.recv().await) }, async {
                    until(at).await;
                    None
                })
                .await
            }
            None => Some(messages.recv().await),
        };
        // One look at the clocks for all that has come: nothing here takes long.
        now = clocks(Instant::now());
        match message {
            Some(Ok(message)) => desk.handle(message, now),
            Some(Err(_)) => return,
            None => {}
        }
        while let Ok(message) = messages.try_recv() {
            desk.handle(message, now);
        }
        desk.answer_all(now);
    }
}

/// Both clocks at an instant that has just been read.
fn clocks(mono: Instant) -> Now {
    Now { mono, wall: SystemTime::now() }
}

/// The line, and how its decisions reach those who wait.
struct Desk {
    line: Line,
    turns: ById<Waiter>,
    /// Asked and not answered yet.
    questions: Vec<Question>,
    mailbox: WeakSender<Message>,
}

/// What a grant needs to know.
struct Waiter {
    turns: Teller<Turn>,
    ask: Ask,
    since: Instant,
}

impl Desk {
    fn advance(&mut self, now: Now) -> Option<Instant> {
        let wake = self.line.advance(now);
        self.tell_all();
        wake
    }

    fn handle(&mut self, message: Message, now: Now) {
        match message {
            Message::Join { id, joining, turns } => {
                self.turns.insert(id, Waiter { turns, ask: joining.ask, since: joining.since });
                self.line.join(id, joining, now);
                self.tell_all();
            }
            Message::Ready { id, ready } => self.line.ready(id, ready),
            Message::Left { id, hung_up } => {
                if self.turns.remove(&id).is_some() {
                    self.line.left(id, hung_up, now);
                }
            }
            Message::Sent { id, lane, ask, at, waited } => {
                self.line.sent(id, lane, ask, Now { mono: at, wall: now.wall }, waited);
            }
            Message::Returned { lane, model } => self.line.returned(lane, model),
            Message::Refused { lane, model, scope, wait } => {
                self.line.refused(lane, model, scope, wait, now, fastrand::f64());
            }
            Message::Accepted { lane, model } => self.line.accepted(lane, model),
            Message::MoveOn => self.line.move_those(|joining| joining.movable),
            Message::Finished { id, tokens } => self.line.finished(id, tokens),
            Message::Question(question) => self.questions.push(question),
            Message::Reload(rules) => self.line.reload(*rules, now),
            Message::Close => self.line.close(),
        }
    }

    /// Answers what was asked, after all that has come and all that is due by now: however late the timer is, nobody is
    /// told of what is over.
    fn answer_all(&mut self, now: Now) {
        if self.questions.is_empty() {
            return;
        }
        self.advance(now);
        for question in std::mem::take(&mut self.questions) {
            self.answer(question, now);
        }
    }

    fn answer(&mut self, question: Question, now: Now) {
        // Whoever asked may have left.
        let _ = match question {
            Question::Snapshot(reply) => reply.try_send(self.line.snapshot(now)).is_ok(),
            Question::Waiting(reply) => reply.try_send(self.line.waiting(now)).is_ok(),
            Question::Whereabouts(id, reply) => {
                reply.try_send(self.line.whereabouts(id, now)).is_ok()
            }
            Question::Estimate(ask, terms, response_time, reply) => {
                reply.try_send(self.line.estimate(ask, &terms, response_time, now)).is_ok()
            }
            Question::Changes(reply) => reply.try_send(self.line.changes()).is_ok(),
            Question::Memory(reply) => reply.try_send(self.line.memory(now)).is_ok(),
        };
    }

    fn tell_all(&mut self) {
        for decision in self.line.decisions() {
            match decision {
                Decision::Near(id) => {
                    if let Some(waiter) = self.turns.get(&id) {
                        waiter.turns.tell(Turn::Near);
                    }
                }
                Decision::Grant { id, lane } => self.grant(id, lane),
                Decision::Refuse(id, refusal) => self.end(id, Turn::Refused(refusal)),
                Decision::Move(id) => self.end(id, Turn::Moved),
            }
        }
    }

    fn grant(&mut self, id: u64, lane: usize) {
        let waiter = self
            .turns
            .remove(&id)
            .expect("who is in line is told how it ends: both forget who leaves");
        let Some(mailbox) = self.mailbox.upgrade() else {
            return self.line.returned(lane, waiter.ask.model);
        };
        let permit =
            Permit { id, lane, ask: waiter.ask, since: waiter.since, mailbox: Some(mailbox) };
        // If the waiter is gone, the permit comes back right here, by its Drop.
        waiter.turns.tell(Turn::Granted(permit));
    }

    fn end(&mut self, id: u64, turn: Turn) {
        if let Some(waiter) = self.turns.remove(&id) {
            waiter.turns.tell(turn);
        }
    }
}

#[cfg(test)]
mod tests;
