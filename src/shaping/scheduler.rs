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
use std::future::Future;
use std::time::{Duration, Instant, SystemTime};

use async_channel::{Receiver, Sender};
use async_io::Timer;
use futures_lite::future;

use super::limiter::{Held, Limiter, Limits, Now, SendId};
use super::queue::Queue;

/// How long before its slot a waiter is told to have a connection ready: a cold DNS look-up, TCP and TLS handshake to
/// another continent take less, and few servers close an idle connection sooner.
const PREPARE_AHEAD: Duration = Duration::from_secs(2);

/// Waiters told at once, whatever the rate: bounds the handshakes that one burst can start.
const MAX_PREPARED: usize = 64;

/// What a scheduler keeps to.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The provider's limits.
    pub limits: Limits,
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
    /// `max_queue` wait already.
    Full {
        /// When the line gets shorter.
        retry_after: Duration,
    },
    /// The scheduler takes nobody any more.
    Closed,
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
    /// Counters since the start.
    pub tally: Tally,
}

enum Message {
    Join { id: u64, since: Instant, again: bool, turns: Sender<Turn> },
    Ready { id: u64, ready: bool },
    Left { id: u64 },
    Sent { id: u64, at: Instant, waited: Duration },
    Returned,
    Finished { id: u64 },
    Snapshot(Sender<Snapshot>),
    Close,
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
}

impl Scheduler {
    /// The handle and the task behind it. The caller spawns the task; it ends when the handle and everything that came
    /// from it are gone.
    pub fn new(rules: Rules) -> (Scheduler, impl Future<Output = ()>) {
        // Unbounded, but no caller can fill it: a waiter has at most a handful of messages under way.
        let (mailbox, messages) = async_channel::unbounded();
        let core = Core::new(rules, mailbox.downgrade());
        (Scheduler { mailbox, next_id: Cell::new(0) }, run(core, messages))
    }

    /// Joins the line at its end.
    pub fn join(&self) -> Place {
        self.enter(Instant::now(), false)
    }

    /// Comes back to the head of the line after a send that has to be repeated; `since` is [`Place::since`] of the
    /// first join, for the limit on the whole wait.
    pub fn rejoin(&self, since: Instant) -> Place {
        self.enter(since, true)
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
    }

    fn enter(&self, since: Instant, again: bool) -> Place {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        // Room for every turn a waiter can be sent: near, and one of granted or refused.
        let (reply, turns) = async_channel::bounded(2);
        tell(&self.mailbox, Message::Join { id, since, again, turns: reply });
        Place { id, since, turns, mailbox: self.mailbox.clone() }
    }
}

/// A place in the line. Dropping it leaves the line.
#[derive(Debug)]
pub struct Place {
    id: u64,
    since: Instant,
    turns: Receiver<Turn>,
    mailbox: Sender<Message>,
}

impl Place {
    /// When this request first joined.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Waits until the slot is near enough to make a connection for it.
    pub async fn near(&self) -> Result<(), Refusal> {
        match self.turns.recv().await {
            Ok(Turn::Near) => Ok(()),
            Ok(Turn::Refused(refusal)) => Err(refusal),
            Ok(Turn::Granted(_)) | Err(_) => Err(Refusal::Closed),
        }
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
            Ok(Turn::Granted(_unspent)) => Ok(scheduler.rejoin(self.since)),
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
        tell(&self.mailbox, Message::Left { id: self.id });
    }
}

/// The right to write one request head, now. Dropped unspent, it goes back and costs no slot.
#[derive(Debug)]
#[must_use = "an unspent permit gives its slot back"]
pub struct Permit {
    id: u64,
    since: Instant,
    mailbox: Option<Sender<Message>>,
}

impl Permit {
    /// Spends the slot. To be called right after the head was written, with the instant after the write.
    pub fn spend(mut self, at: Instant) -> InFlight {
        let mailbox = self.mailbox.take().expect("a permit is spent once: it is consumed here");
        let waited = at.saturating_duration_since(self.since);
        tell(&mailbox, Message::Sent { id: self.id, at, waited });
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
        let wake = core.advance(Instant::now());
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
            Some(Ok(message)) => core.handle(message, Instant::now()),
            Some(Err(_)) => return,
            None => {}
        }
        while let Ok(message) = messages.try_recv() {
            core.handle(message, Instant::now());
        }
    }
}

/// Both clocks at an instant that has just been read.
fn clocks(mono: Instant) -> Now {
    Now { mono, wall: SystemTime::now() }
}

struct Waiter {
    turns: Sender<Turn>,
    since: Instant,
}

struct Core {
    limiter: Limiter,
    queue: Queue<Waiter>,
    granted: bool,
    in_flight: HashMap<u64, SendId>,
    closed: bool,
    max_wait: Option<Duration>,
    max_queue: usize,
    tally: Tally,
    mailbox: async_channel::WeakSender<Message>,
}

impl Core {
    fn new(rules: Rules, mailbox: async_channel::WeakSender<Message>) -> Core {
        Core {
            limiter: Limiter::new(&rules.limits, clocks(Instant::now())),
            queue: Queue::default(),
            granted: false,
            in_flight: HashMap::new(),
            closed: false,
            max_wait: rules.max_wait,
            max_queue: rules.max_queue,
            tally: Tally::default(),
            mailbox,
        }
    }

    fn handle(&mut self, message: Message, now: Instant) {
        match message {
            Message::Join { id, since, again, turns } => self.join(id, since, again, turns, now),
            Message::Ready { id, ready } => self.queue.set_ready(id, ready),
            Message::Left { id } => {
                if self.queue.remove(id).is_some() {
                    self.tally.cancelled += 1;
                }
            }
            Message::Sent { id, at, waited } => {
                self.granted = false;
                self.in_flight.insert(id, self.limiter.sent(clocks(at), 0));
                self.tally.sent += 1;
                self.tally.queue_wait.add(waited);
                self.tally.last_send = Some(SystemTime::now());
            }
            Message::Returned => self.granted = false,
            Message::Finished { id } => {
                if let Some(send) = self.in_flight.remove(&id) {
                    self.limiter.release(send);
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

    fn join(&mut self, id: u64, since: Instant, again: bool, turns: Sender<Turn>, now: Instant) {
        let place = if again { 0 } else { self.queue.len() };
        let refusal = self.refusal(place, since, again, now);
        if let Some(refusal) = refusal {
            let _ = turns.try_send(Turn::Refused(refusal));
            return;
        }
        let deadline = self.max_wait.map(|limit| since + limit);
        let waiter = Waiter { turns, since };
        match again {
            true => self.queue.push_front(id, deadline, waiter),
            false => self.queue.push_back(id, deadline, waiter),
        }
    }

    /// Whether a waiter that wants this place (from 0) must be turned away at once.
    fn refusal(&mut self, place: usize, since: Instant, again: bool, now: Instant) -> Option<Refusal> {
        if self.closed {
            return Some(Refusal::Closed);
        }
        if !again && self.queue.len() >= self.max_queue {
            self.tally.rejected_full += 1;
            return Some(Refusal::Full { retry_after: self.wait_for_place(0, now) });
        }
        let waited = now.saturating_duration_since(since);
        let expected = waited + self.wait_for_place(place, now);
        (expected > self.max_wait?).then(|| self.exceeded(place, expected, now))
    }

    fn exceeded(&mut self, place: usize, expected_wait: Duration, now: Instant) -> Refusal {
        self.tally.rejected_wait += 1;
        let max_wait = self.max_wait.unwrap_or(Duration::MAX);
        // The line shortens as fast as the clock runs: a newcomer fits once the line's own wait is down to the limit.
        let retry_after = self.wait_for_place(self.queue.len(), now).saturating_sub(max_wait);
        Refusal::WaitExceeded { position: place + 1, expected_wait, max_wait, retry_after }
    }

    /// How long until the waiter at a place (from 0) can go, as far as the limits tell.
    fn wait_for_place(&self, place: usize, now: Instant) -> Duration {
        self.slot_of(place, now).saturating_duration_since(now)
    }

    fn slot_of(&self, place: usize, now: Instant) -> Instant {
        self.limiter.nth_at(clocks(now), place + usize::from(self.granted))
    }

    /// Does what is due and says when to come back; messages may call it earlier.
    fn advance(&mut self, now: Instant) -> Option<Instant> {
        for (place, waiter) in self.queue.expire(now) {
            let refusal = self.exceeded(place, now.saturating_duration_since(waiter.since), now);
            let _ = waiter.turns.try_send(Turn::Refused(refusal));
        }
        let next_near = self.announce(now);
        let next_grant = self.grant(now);
        [self.queue.next_deadline(), next_near, next_grant].into_iter().flatten().min()
    }

    /// Tells those whose slot is near; returns when the next one will be.
    fn announce(&mut self, now: Instant) -> Option<Instant> {
        for place in 0..self.queue.len().min(MAX_PREPARED) {
            let slot = self.slot_of(place, now);
            if slot > now + PREPARE_AHEAD {
                return slot.checked_sub(PREPARE_AHEAD);
            }
            let entry = self.queue.get_mut(place).expect("place < len");
            if !entry.told {
                entry.told = true;
                let _ = entry.waiter.turns.try_send(Turn::Near);
            }
        }
        None
    }

    /// Opens the slot for the first waiter that is ready; returns when that will be, if it is only a matter of time.
    fn grant(&mut self, now: Instant) -> Option<Instant> {
        if self.granted {
            return None;
        }
        let id = self.queue.first_ready()?.id;
        let at = self.limiter.next(clocks(now), 0).at?;
        if at > now {
            return Some(at);
        }
        let waiter = self.queue.remove(id).expect("first_ready names a waiter in the queue");
        let mailbox = self.mailbox.upgrade()?;
        self.granted = true;
        // If the waiter is gone, the permit comes back right here, by its Drop.
        let permit = Permit { id, since: waiter.since, mailbox: Some(mailbox) };
        let _ = waiter.turns.try_send(Turn::Granted(permit));
        None
    }

    fn snapshot(&self, now: Instant) -> Snapshot {
        Snapshot {
            available: self.limiter.available(clocks(now)),
            queued: self.queue.len(),
            preparing: self.queue.told(),
            in_flight: self.in_flight.len(),
            estimated_wait: self.wait_for_place(self.queue.len(), now),
            held_by: self.limiter.next(clocks(now), 0).held_by,
            tally: self.tally,
        }
    }
}
