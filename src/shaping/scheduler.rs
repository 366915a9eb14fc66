//! The task that lets one provider's requests go: it owns the queue and the limiter and drains one mailbox.
//!
//! Everybody else holds a [`Place`], a [`Permit`] or an [`InFlight`]; each tells the task by a message when it is
//! dropped, so that a caller who leaves, at whatever moment, leaves nothing behind.
//!
//! Binding is late: a slot is taken when the request head has been written, and recorded with the instant *after* that
//! write. The next grant counts from there, so two heads are never closer on the wire than the cadence. At most one
//! grant is open at a time.

use std::cell::Cell;
use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::time::{Duration, Instant, SystemTime};

use async_channel::{Receiver, Sender};
use async_io::Timer;
use futures_lite::future;

use super::books::{Ask, Books, Entry, Scope, is_day};
use super::limiter::{Held, Limits, Next, Now};
use super::observed::Observed;
use super::queue::Queue;

/// How long before its slot a waiter is told to have a connection ready: a cold DNS look-up, TCP and TLS handshake to
/// another continent take less, and few servers close an idle connection sooner.
const PREPARE_AHEAD: Duration = Duration::from_secs(2);

/// Waiters told at once, whatever the rate: bounds the handshakes that one burst can start.
const MAX_PREPARED: usize = 64;

/// Waiters told although as many requests are in flight as may be: one that goes when the next of those ends, and one in
/// case the first one's connection is lost by then.
const PREPARED_WITHOUT_ROOM: usize = 2;

/// What a scheduler keeps to.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The provider's limits.
    pub limits: Limits,
    /// Each model's own limits, by index.
    pub models: Vec<Limits>,
    /// Whether 429s may stretch the cadence.
    pub adaptive: bool,
    /// Longest wait from the first join to the send; `None` waits for ever.
    pub max_wait: Option<Duration>,
    /// Most waiters at once.
    pub max_queue: usize,
}

/// Why a waiter got no permit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The wait would be, or was, longer than `max_wait`.
    WaitExceeded {
        /// Place in the line, from 1.
        position: usize,
        /// From joining to the slot.
        expected_wait: Duration,
        /// The limit.
        max_wait: Duration,
        /// When a newcomer would be taken.
        retry_after: Duration,
    },
    /// The day's budget is spent, and nobody said how long a request may wait.
    Day {
        /// When there is a new budget.
        resets_in: Duration,
    },
    /// `max_queue` wait already.
    Full {
        /// When the line gets shorter.
        retry_after: Duration,
    },
    /// The scheduler takes nobody any more.
    Closed,
}

impl Refusal {
    /// When coming back helps, if it ever does.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Refusal::WaitExceeded { retry_after: wait, .. }
            | Refusal::Full { retry_after: wait }
            | Refusal::Day { resets_in: wait } => Some(*wait),
            Refusal::Closed => None,
        }
    }
}

/// How long something took, over many times.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timing {
    /// How many.
    pub count: u64,
    /// All together.
    pub sum: Duration,
    /// The longest.
    pub max: Duration,
}

impl Timing {
    /// Adds one.
    pub fn add(&mut self, took: Duration) {
        self.count += 1;
        self.sum += took;
        self.max = self.max.max(took);
    }
}

/// What has happened so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Request heads written.
    pub sent: u64,
    /// Waiters who hung up before their slot.
    pub cancelled: u64,
    /// Refused for `max_wait`.
    pub rejected_wait: u64,
    /// Refused for `max_queue`.
    pub rejected_full: u64,
    /// Refused because the day's budget was spent.
    pub rejected_day: u64,
    /// Answers that asked for a pause.
    pub cooldowns: u64,
    /// From the first join to the send.
    pub queue_wait: Timing,
    /// When the last head was written.
    pub last_send: Option<SystemTime>,
}

/// A scheduler as it stands.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Whole sends that could go now.
    pub available: u32,
    /// Waiters in line.
    pub queued: usize,
    /// Those of them that hold or make a connection, next to go.
    pub preparing: usize,
    /// Sent and not finished.
    pub in_flight: usize,
    /// What a request that came now would wait.
    pub estimated_wait: Duration,
    /// The limit that holds the next send.
    pub held_by: Held,
    /// Sends in the last 60 s.
    pub sent_last_minute: u32,
    /// The cadence in force where 429s may stretch it.
    pub learned_interval: Option<Duration>,
    /// Counters since the start.
    pub tally: Tally,
}

enum Message {
    Join { id: u64, joining: Joining, turns: Sender<Turn> },
    Ready { id: u64, ready: bool },
    Left { id: u64, hung_up: bool },
    Sent { id: u64, ask: Ask, at: Instant, waited: Duration },
    Returned,
    Settled { id: u64, tokens: u64 },
    Refused { model: usize, scope: Scope, wait: Option<Duration> },
    Accepted { model: usize },
    Finished { id: u64 },
    Snapshot(Sender<Snapshot>),
    Close,
}

/// Who joins, and how.
#[derive(Debug, Clone, Copy)]
struct Joining {
    ask: Ask,
    /// The first time.
    since: Instant,
    /// Whether it was sent before and comes back to the head.
    again: bool,
}

enum Turn {
    Near,
    Granted(Permit),
    Refused(Refusal),
}

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
    pub fn new(rules: Rules) -> (Scheduler, impl Future<Output = ()>) {
        // Unbounded, but no caller can fill it: a waiter has at most a handful of messages under way.
        let (mailbox, messages) = async_channel::unbounded();
        let core = Core::new(rules, mailbox.downgrade());
        let scheduler = Scheduler { mailbox, next_id: Cell::new(0), open: async_channel::bounded(1) };
        (scheduler, run(core, messages))
    }

    /// Joins the line at its end.
    pub fn join(&self, ask: Ask) -> Place {
        self.enter(Joining { ask, since: Instant::now(), again: false })
    }

    /// Comes back to the head of the line after a send that has to be repeated; `since` is [`Place::since`] of the
    /// first join, for the limit on the whole wait.
    pub fn rejoin(&self, ask: Ask, since: Instant) -> Place {
        self.enter(Joining { ask, since, again: true })
    }

    /// The provider refused a request of this model for its rate; see [`Books::refused`].
    pub fn refused(&self, model: usize, scope: Scope, wait: Option<Duration>) {
        tell(&self.mailbox, Message::Refused { model, scope, wait });
    }

    /// The provider took a request of this model.
    pub fn accepted(&self, model: usize) {
        tell(&self.mailbox, Message::Accepted { model });
    }

    /// How things stand.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        let (reply, answer) = async_channel::bounded(1);
        self.mailbox.try_send(Message::Snapshot(reply)).ok()?;
        answer.recv().await.ok()
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

    fn enter(&self, joining: Joining) -> Place {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        // Room for every turn a waiter can be sent: near, and one of granted or refused.
        let (reply, turns) = async_channel::bounded(2);
        tell(&self.mailbox, Message::Join { id, joining, turns: reply });
        Place { id, joining, turns, mailbox: self.mailbox.clone(), hung_up: true }
    }
}

/// A place in the line. Dropping it leaves the line.
#[derive(Debug)]
pub struct Place {
    id: u64,
    joining: Joining,
    turns: Receiver<Turn>,
    mailbox: Sender<Message>,
    /// What a drop means.
    hung_up: bool,
}

impl Place {
    /// When this request first joined.
    pub fn since(&self) -> Instant {
        self.joining.since
    }

    /// Waits until the slot is near enough to make a connection for it.
    pub async fn near(&self) -> Result<(), Refusal> {
        match self.turns.recv().await {
            Ok(Turn::Near) => Ok(()),
            Ok(Turn::Refused(refusal)) => Err(refusal),
            Ok(Turn::Granted(_)) | Err(_) => Err(Refusal::Closed),
        }
    }

    /// Leaves the line for a reason that is not the caller's.
    pub fn leave(mut self) {
        self.hung_up = false;
    }

    /// Waits until this place is taken away; for use beside making a connection, when no grant can come yet.
    pub async fn refused(&self) -> Refusal {
        loop {
            match self.turns.recv().await {
                Ok(Turn::Refused(refusal)) => return refusal,
                Ok(Turn::Near | Turn::Granted(_)) => {}
                Err(_) => return Refusal::Closed,
            }
        }
    }

    /// Says that a connection stands and waits for the slot.
    pub async fn granted(&self) -> Result<Permit, Refusal> {
        tell(&self.mailbox, Message::Ready { id: self.id, ready: true });
        loop {
            match self.turns.recv().await {
                Ok(Turn::Granted(permit)) => return Ok(permit),
                Ok(Turn::Refused(refusal)) => return Err(refusal),
                Ok(Turn::Near) => {}
                Err(_) => return Err(Refusal::Closed),
            }
        }
    }

    /// Says that the connection was lost before the slot. The place in line stays; a permit that was granted at the
    /// same moment goes back, and its holder is at the head again.
    pub fn lost_connection(self, scheduler: &Scheduler) -> Result<Place, Refusal> {
        match self.turns.try_recv() {
            Ok(Turn::Granted(unspent)) => {
                // First, so that our own grant does not count as ahead of us.
                drop(unspent);
                Ok(scheduler.rejoin(self.joining.ask, self.joining.since))
            }
            Ok(Turn::Refused(refusal)) => Err(refusal),
            Ok(Turn::Near) | Err(_) => {
                tell(&self.mailbox, Message::Ready { id: self.id, ready: false });
                Ok(self)
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        tell(&self.mailbox, Message::Left { id: self.id, hung_up: self.hung_up });
    }
}

/// The right to write one request head, now. Dropped unspent, it goes back and costs no slot.
#[derive(Debug)]
#[must_use = "an unspent permit gives its slot back"]
pub struct Permit {
    id: u64,
    ask: Ask,
    since: Instant,
    mailbox: Option<Sender<Message>>,
}

impl Permit {
    /// Spends the slot. To be called right after the head was written, with the instant after the write.
    pub fn spend(mut self, at: Instant) -> InFlight {
        let mailbox = self.mailbox.take().expect("a permit is spent once: it is consumed here");
        let waited = at.saturating_duration_since(self.since);
        tell(&mailbox, Message::Sent { id: self.id, ask: self.ask, at, waited });
        InFlight { id: self.id, waited, mailbox }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(mailbox) = &self.mailbox {
            tell(mailbox, Message::Returned);
        }
    }
}

/// A request that was sent and whose answer is not over. Dropping it ends that.
#[derive(Debug)]
pub struct InFlight {
    id: u64,
    waited: Duration,
    mailbox: Sender<Message>,
}

impl InFlight {
    /// From the first join to the send.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The tokens that the request has really used, in the place of those it reserved.
    pub fn settle(&self, tokens: u64) {
        tell(&self.mailbox, Message::Settled { id: self.id, tokens });
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        tell(&self.mailbox, Message::Finished { id: self.id });
    }
}

fn tell(mailbox: &Sender<Message>, message: Message) {
    // Fails only when the task is gone, and then there is nobody left to tell.
    let _ = mailbox.try_send(message);
}

async fn run(mut core: Core, messages: Receiver<Message>) {
    loop {
        let wake = core.advance(clocks(Instant::now()));
        let message = match wake {
            Some(at) => {
                future::or(async { Some(messages.recv().await) }, async {
                    Timer::at(at).await;
                    None
                })
                .await
            }
            None => Some(messages.recv().await),
        };
        match message {
            Some(Ok(message)) => core.handle(message, clocks(Instant::now())),
            Some(Err(_)) => return,
            None => {}
        }
        while let Ok(message) = messages.try_recv() {
            core.handle(message, clocks(Instant::now()));
        }
    }
}

/// Both clocks at an instant that has just been read.
fn clocks(mono: Instant) -> Now {
    Now { mono, wall: SystemTime::now() }
}

struct Waiter {
    turns: Sender<Turn>,
    joining: Joining,
}

struct Core {
    books: Books,
    queue: Queue<Waiter>,
    granted: Option<usize>,
    in_flight: HashMap<u64, Entry>,
    closed: bool,
    max_wait: Option<Duration>,
    max_queue: usize,
    models: usize,
    tally: Tally,
    observed: Observed,
    mailbox: async_channel::WeakSender<Message>,
}

impl Core {
    fn new(rules: Rules, mailbox: async_channel::WeakSender<Message>) -> Core {
        let now = clocks(Instant::now());
        Core {
            books: Books::new(&rules.limits, &rules.models, rules.adaptive, now),
            queue: Queue::default(),
            granted: None,
            in_flight: HashMap::new(),
            closed: false,
            max_wait: rules.max_wait,
            max_queue: rules.max_queue,
            models: rules.models.len(),
            tally: Tally::default(),
            observed: Observed::new(now.mono),
            mailbox,
        }
    }

    fn handle(&mut self, message: Message, now: Now) {
        match message {
            Message::Join { id, joining, turns } => self.join(id, joining, turns, now),
            Message::Ready { id, ready } => self.queue.set_ready(id, ready),
            Message::Left { id, hung_up } => {
                if self.queue.remove(id).is_some() && hung_up {
                    self.tally.cancelled += 1;
                }
            }
            Message::Sent { id, ask, at, waited } => {
                self.granted = None;
                self.in_flight.insert(id, self.books.sent(clocks(at), ask));
                self.tally.sent += 1;
                self.tally.queue_wait.add(waited);
                self.tally.last_send = Some(SystemTime::now());
                self.observed.sent(at);
            }
            Message::Returned => self.granted = None,
            Message::Settled { id, tokens } => {
                if let Some(entry) = self.in_flight.get(&id) {
                    self.books.settle(entry, tokens);
                }
            }
            Message::Refused { model, scope, wait } => {
                self.tally.cooldowns += 1;
                self.books.refused(now, model, scope, wait, fastrand::f64());
            }
            Message::Accepted { model } => self.books.accepted(model),
            Message::Finished { id } => {
                if let Some(entry) = self.in_flight.remove(&id) {
                    self.books.release(entry);
                }
            }
            Message::Snapshot(reply) => {
                let _ = reply.try_send(self.snapshot(now));
            }
            Message::Close => {
                self.closed = true;
                for waiter in self.queue.drain() {
                    let _ = waiter.turns.try_send(Turn::Refused(Refusal::Closed));
                }
            }
        }
    }

    fn join(&mut self, id: u64, joining: Joining, turns: Sender<Turn>, now: Now) {
        let place = self.place_for(joining);
        if let Some(refusal) = self.refusal(joining, place, now) {
            let _ = turns.try_send(Turn::Refused(refusal));
            return;
        }
        let deadline = self.max_wait.map(|limit| joining.since + limit);
        self.queue.insert(place, id, deadline, Waiter { turns, joining });
    }

    /// The end of the line; or in front of all who were never sent, among those who were in the order of their first join.
    fn place_for(&self, joining: Joining) -> usize {
        let comes_first = |other: &Joining| other.again && other.since <= joining.since;
        match joining.again {
            true => self.queue.iter().take_while(|entry| comes_first(&entry.waiter.joining)).count(),
            false => self.queue.len(),
        }
    }

    /// Whether somebody who would stand at `place` must be turned away at once.
    fn refusal(&mut self, joining: Joining, place: usize, now: Now) -> Option<Refusal> {
        if self.closed {
            return Some(Refusal::Closed);
        }
        if !joining.again && self.queue.len() >= self.max_queue {
            self.tally.rejected_full += 1;
            let opens = self.books.nth(now, joining.ask.model, 0, 0).at;
            return Some(Refusal::Full { retry_after: until(opens, now) });
        }
        let slot = self.slot(place, joining.ask.model, now);
        let expected = now.mono.saturating_duration_since(joining.since) + until(slot.at, now);
        match self.max_wait {
            Some(max_wait) if expected <= max_wait => None,
            _ if is_day(slot) => Some(self.day(until(slot.at, now))),
            Some(_) => Some(self.exceeded(joining.ask.model, place, expected, now)),
            None => None,
        }
    }

    fn day(&mut self, resets_in: Duration) -> Refusal {
        self.tally.rejected_day += 1;
        Refusal::Day { resets_in }
    }

    fn exceeded(&mut self, model: usize, place: usize, expected_wait: Duration, now: Now) -> Refusal {
        self.tally.rejected_wait += 1;
        let max_wait = self.max_wait.unwrap_or(Duration::MAX);
        // The line shortens as fast as the clock runs: a newcomer fits once the line's own wait is down to the limit.
        let retry_after = until(self.slot_at_the_end(model, now).at, now).saturating_sub(max_wait);
        Refusal::WaitExceeded { position: place + 1, expected_wait, max_wait, retry_after }
    }

    /// When somebody who joined now could go at the earliest.
    fn slot_at_the_end(&self, model: usize, now: Now) -> Next {
        self.slot(self.queue.len(), model, now)
    }

    /// When a request of this model could go at the earliest if it stood at `place`.
    fn slot(&self, place: usize, model: usize, now: Now) -> Next {
        self.walk(place, now).slot(&self.books, now, model)
    }

    /// Past the waiters in front of a place.
    fn walk(&self, place: usize, now: Now) -> Walk {
        let mut walk = Walk::new(self.models, self.granted);
        for entry in self.queue.iter().take(place) {
            walk.step(&self.books, now, entry.waiter.joining.ask.model);
        }
        walk
    }

    /// Does what is due and says when to come back; messages may call it earlier.
    fn advance(&mut self, now: Now) -> Option<Instant> {
        self.books.adapt(now);
        for (place, waiter) in self.queue.expire(now.mono) {
            let waited = now.mono.saturating_duration_since(waiter.joining.since);
            let refusal = self.exceeded(waiter.joining.ask.model, place, waited, now);
            let _ = waiter.turns.try_send(Turn::Refused(refusal));
        }
        self.refuse_the_next_day(now);
        let next_near = self.announce(now);
        let next_grant = self.grant(now);
        [self.queue.next_deadline(), next_near, next_grant].into_iter().flatten().min()
    }

    /// Turns away those whom repeated sends have cost their place in the day's budget.
    fn refuse_the_next_day(&mut self, now: Now) {
        if self.max_wait.is_some() || self.queue.is_empty() {
            return;
        }
        let next = |model| self.books.next(now, Ask { model, tokens: 0 });
        let tomorrow: Vec<_> = (0..self.models).map(|model| Some(next(model)).filter(|next| is_day(*next))).collect();
        for (_, waiter) in self.queue.take_if(|entry| tomorrow[entry.waiter.joining.ask.model].is_some()) {
            let opens = tomorrow[waiter.joining.ask.model].and_then(|next| next.at);
            let refusal = self.day(until(opens, now));
            let _ = waiter.turns.try_send(Turn::Refused(refusal));
        }
    }

    /// Tells those whose slot is near; returns when the next one will be.
    fn announce(&mut self, now: Now) -> Option<Instant> {
        let horizon = now.mono + PREPARE_AHEAD;
        let head = self.queue.first()?.waiter.joining.ask;
        if let Some(at) = self.books.next_shared(now, head.tokens).at
            && at > horizon
        {
            return Some(at - PREPARE_AHEAD);
        }
        let most = MAX_PREPARED.min(self.books.room().saturating_add(PREPARED_WITHOUT_ROOM));
        let mut walk = Walk::new(self.models, self.granted);
        let mut next_near: Option<Instant> = None;
        for place in 0..self.queue.len() {
            let shared = walk.shared_slot(&self.books, now).filter(|slot| *slot > horizon);
            if walk.ahead >= most || shared.is_some() {
                // Nobody behind is nearer.
                let near = shared.map(|slot| slot - PREPARE_AHEAD);
                return [next_near, near].into_iter().flatten().min();
            }
            let entry = self.queue.get_mut(place).expect("place < len");
            let model = entry.waiter.joining.ask.model;
            let without_room = walk.ahead_of_model[model].saturating_sub(self.books.room_of(model));
            let slot = walk.step(&self.books, now, model).at.unwrap_or(now.mono);
            if slot > horizon {
                let near = slot - PREPARE_AHEAD;
                next_near = Some(next_near.map_or(near, |first| first.min(near)));
            } else if !entry.told && without_room < PREPARED_WITHOUT_ROOM {
                entry.told = true;
                let _ = entry.waiter.turns.try_send(Turn::Near);
            }
        }
        next_near
    }

    /// Opens the slot for the first waiter that is ready and that only its own model's limits could hold; returns when
    /// that will be, if it is only a matter of time.
    fn grant(&mut self, now: Now) -> Option<Instant> {
        if self.granted.is_some() {
            return None;
        }
        let mut held_models = vec![false; self.models];
        let mut opens: Option<Instant> = None;
        let mut chosen = None;
        for entry in self.queue.ready() {
            let ask = entry.waiter.joining.ask;
            let shared = self.books.next_shared(now, ask.tokens).at;
            if shared.is_none_or(|at| at > now.mono) {
                // Nobody overtakes: a large request would wait for ever while small ones use up what it waits for.
                opens = [opens, shared].into_iter().flatten().min();
                break;
            }
            if held_models[ask.model] {
                continue;
            }
            match self.books.next(now, ask).at {
                Some(at) if at <= now.mono => {
                    chosen = Some(entry.id);
                    break;
                }
                later => {
                    held_models[ask.model] = true;
                    opens = [opens, later].into_iter().flatten().min();
                }
            }
        }
        let Some(id) = chosen else { return opens };
        let Waiter { turns, joining } = self.queue.remove(id).expect("the chosen waiter is in the queue");
        let mailbox = self.mailbox.upgrade()?;
        self.granted = Some(joining.ask.model);
        // If the waiter is gone, the permit comes back right here, by its Drop.
        let permit = Permit { id, ask: joining.ask, since: joining.since, mailbox: Some(mailbox) };
        let _ = turns.try_send(Turn::Granted(permit));
        None
    }

    fn snapshot(&mut self, now: Now) -> Snapshot {
        // What a newcomer would wait, for the model that would go first.
        let end = self.walk(self.queue.len(), now);
        let soonest = (0..self.models).filter_map(|model| end.slot(&self.books, now, model).at).min();
        Snapshot {
            available: self.books.available(now),
            queued: self.queue.len(),
            preparing: self.queue.told(),
            in_flight: self.in_flight.len(),
            estimated_wait: until(soonest, now),
            held_by: self.held_by(now),
            sent_last_minute: self.observed.per_minute(now.mono),
            learned_interval: self.books.learned_interval(now.mono),
            tally: self.tally,
        }
    }

    /// What the head of the line waits for; with nobody in line, what the next request would.
    fn held_by(&self, now: Now) -> Held {
        match self.queue.first() {
            Some(head) => self.books.next(now, head.waiter.joining.ask).held_by,
            None => self.books.next_shared(now, 0).held_by,
        }
    }
}

/// Walks down the line and says when each waiter can go at the earliest, as far as sends are counted. A waiter whose own
/// model holds it longer than the provider would is not in the way of those behind.
struct Walk {
    ahead: usize,
    ahead_of_model: Vec<usize>,
}

impl Walk {
    fn new(models: usize, granted: Option<usize>) -> Walk {
        let mut walk = Walk { ahead: 0, ahead_of_model: vec![0; models] };
        if let Some(model) = granted {
            walk.ahead = 1;
            walk.ahead_of_model[model] = 1;
        }
        walk
    }

    fn slot(&self, books: &Books, now: Now, model: usize) -> Next {
        books.nth(now, model, self.ahead, self.ahead_of_model[model])
    }

    fn step(&mut self, books: &Books, now: Now, model: usize) -> Next {
        let slot = self.slot(books, now, model);
        let waits_for_an_end = self.ahead_of_model[model] >= books.room_of(model);
        self.ahead_of_model[model] += 1;
        if !waits_for_an_end && slot.at <= self.shared_slot(books, now) {
            self.ahead += 1;
        }
        slot
    }

    /// When the provider as a whole would let the next one go.
    fn shared_slot(&self, books: &Books, now: Now) -> Option<Instant> {
        books.nth_shared(now, self.ahead).at
    }
}

fn until(at: Option<Instant>, now: Now) -> Duration {
    at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now.mono))
}

#[cfg(test)]
mod tests;
