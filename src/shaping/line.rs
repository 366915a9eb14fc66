//! One provider's line and what its lanes allow: who goes next, when, and on which lane.
//!
//! Pure: takes `now`, and answers with [`Decision`]s. A *lane* is one API key with its own books; all of a provider's lanes
//! serve one [`Queue`]. One grant is open on each lane, or as many as its limits would let go at the same instant: the next
//! one counts from the instants at which those sends really went.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::books::{Ask, Books, BooksMemory, Entry, Scope, is_day};
use super::by_id::ById;
use super::lane::{Lane, LaneSnapshot, Past};
use super::limiter::{Held, Next, Now};
use super::queue::{Queue, Standing};
use super::terms::{Joining, Rules, Terms};
use super::walk::Walk;

/// How long before its slot a waiter is told to have a connection ready: a cold DNS look-up, TCP and TLS handshake to
/// another continent take less, and few servers close an idle connection sooner.
const PREPARE_AHEAD: Duration = Duration::from_secs(2);

/// Waiters told at once, whatever the rate: bounds the handshakes that one burst can start.
pub(super) const MAX_PREPARED: usize = 64;

/// Waiters told although as many requests are in flight as may be: one that goes when the next of those ends, and one in
/// case the first one's connection is lost by then.
const PREPARED_WITHOUT_ROOM: usize = 2;

/// What becomes of a waiter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Its slot is near enough to make a connection for it.
    Near(u64),
    /// Its slot is open.
    Grant {
        /// Who.
        id: u64,
        /// On which lane.
        lane: usize,
    },
    /// It waits in vain.
    Refuse(u64, Refusal),
    /// Another provider would take it sooner.
    Move(u64),
}

/// Why a waiter got no slot.
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
        /// What holds the slot; nothing: it is open, and no connection stands.
        held_by: Held,
        /// When a newcomer would be taken.
        retry_after: Duration,
    },
    /// The caller gives up before its slot comes.
    Deadline {
        /// Place in the line, from 1.
        position: usize,
        /// From joining to the slot.
        expected_wait: Duration,
        /// From joining to the caller's end.
        patience: Duration,
        /// What of that is left for the response.
        response_time: Duration,
        /// What holds the slot; nothing: it is open, and no connection stands.
        held_by: Held,
        /// When a newcomer with that patience would be taken.
        retry_after: Duration,
    },
    /// The day's budget is spent, and nobody said how long a request may wait.
    Day {
        /// When there is a new budget.
        resets_in: Duration,
    },
    /// `max_queue` wait already.
    Full {
        /// How many.
        max_queue: usize,
        /// When the line gets shorter.
        retry_after: Duration,
    },
    /// As many of this client's requests wait as may.
    ClientFull {
        /// The client.
        client: Rc<str>,
        /// How many.
        max_queue: usize,
        /// When the line gets shorter.
        retry_after: Duration,
    },
    /// Nobody is taken any more.
    Closed,
}

impl Refusal {
    /// When coming back helps, if it ever does.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Refusal::WaitExceeded { retry_after: wait, .. }
            | Refusal::Deadline { retry_after: wait, .. }
            | Refusal::Full { retry_after: wait, .. }
            | Refusal::ClientFull { retry_after: wait, .. }
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
    /// Waiters who hung up before their slot.
    pub cancelled: u64,
    /// Callers who came back to the place that was kept for them.
    pub returned: u64,
    /// Waiters who went to another provider.
    pub moved: u64,
    /// Refused for `max_wait`.
    pub rejected_wait: u64,
    /// Refused for their caller's deadline.
    pub rejected_deadline: u64,
    /// Refused for `max_queue`, the line's or the client's.
    pub rejected_full: u64,
    /// Refused because the day's budget was spent.
    pub rejected_day: u64,
    /// From the first join to the send.
    pub queue_wait: Timing,
}

/// A line as it stands.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Waiters.
    pub queued: usize,
    /// Those of them that hold or make a connection, next to go.
    pub preparing: usize,
    /// Places kept for callers who left.
    pub kept: usize,
    /// What a request that came now would wait.
    pub estimated_wait: Duration,
    /// The limit that holds the next send.
    pub held_by: Held,
    /// Counters since the start.
    pub tally: Tally,
    /// One for each API key.
    pub lanes: Vec<LaneSnapshot>,
}

/// Somebody in line.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// On whose behalf.
    pub terms: Rc<Terms>,
    /// Index of the model.
    pub model: usize,
    /// When it first joined.
    pub since: Instant,
    /// Place in the line, from 1.
    pub position: usize,
    /// Until its slot, at the least.
    pub eta: Duration,
}

/// When a newcomer's slot would come; the least is the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Estimate {
    /// Whether it depends on the end of a request in flight, which nobody can foresee.
    pub waits_for_an_end: bool,
    /// Until the slot, at the least.
    pub wait: Duration,
}

/// A provider's line.
#[derive(Debug)]
pub struct Line {
    rules: Rules,
    /// Whether any limit is one of a day.
    daily: bool,
    lanes: Vec<Lane>,
    queue: Queue<Joining>,
    /// Those who have joined since the last look and would find a connection.
    warm: Vec<u64>,
    in_flight: ById<(usize, Entry)>,
    closed: bool,
    tally: Tally,
    /// How often something happened that has to be remembered.
    changes: u64,
    decisions: Vec<Decision>,
}

impl Line {
    /// Nobody waits. `pasts` has one for each lane; one that is not there was not used.
    pub fn new(rules: Rules, pasts: &[Past], now: Now) -> Line {
        let lane = |index| Lane::new(&rules, pasts.get(index).unwrap_or(&Past::Fresh), now);
        let lanes = (0..rules.lanes.len()).map(lane).collect();
        Line {
            daily: has_day(&rules),
            lanes,
            queue: Queue::new(rules.fairness),
            warm: Vec::new(),
            in_flight: ById::default(),
            closed: false,
            tally: Tally::default(),
            changes: 0,
            decisions: Vec::new(),
            rules,
        }
    }

    /// Goes on under other rules. Everybody stays in line, and all that was sent counts on. Lanes and models keep their
    /// indices: new ones come behind them, and those that are gone stay, without a use.
    pub fn reload(&mut self, rules: Rules, now: Now) {
        for (index, used) in rules.lanes.iter().enumerate() {
            match self.lanes.get_mut(index) {
                Some(lane) => lane.books.change(&rules.limits, &rules.models, rules.adaptive, now),
                None => self.lanes.push(Lane::new(&rules, &Past::Fresh, now)),
            }
            self.lanes[index].retired = !used;
        }
        self.queue.set_fairness(rules.fairness);
        self.daily = has_day(&rules);
        self.changes += 1;
        self.rules = rules;
        self.give_up_places(self.rules.max_queue);
    }

    /// What was decided since the last time, in order.
    pub fn decisions(&mut self) -> Vec<Decision> {
        std::mem::take(&mut self.decisions)
    }

    /// Somebody joins, under an id of its own.
    pub fn join(&mut self, id: u64, mut joining: Joining, now: Now) {
        if self.closed {
            return self.refuse(id, Refusal::Closed);
        }
        self.waive_response_time(&mut joining, now);
        if self.take_back(id, &joining, now) {
            return;
        }
        if let Some(refusal) = self.full(&joining, now) {
            return self.turn_away(id, &joining, refusal);
        }
        let standing = standing(&joining);
        if self.may_be_in_vain(&joining) || joining.elsewhere.is_some() {
            let ahead = self.queue.ahead_of(&standing, now.mono);
            if let Some(refusal) = self.verdict(&joining, ahead, now) {
                return self.turn_away(id, &joining, refusal);
            }
            let wait = || until(self.slot(ahead, joining.ask.model, now).at, now);
            if joining.elsewhere.is_some_and(|elsewhere| wait() > elsewhere) {
                return self.move_on(id);
            }
        }
        self.make_room_for(&joining);
        let warm = self.would_find_a_connection(&joining);
        self.queue.join(id, standing, self.deadline(&joining), joining, now.mono);
        if warm {
            self.queue.set_ready(id, true);
            self.warm.push(id);
        }
    }

    /// A waiter's connection stands, or was lost.
    pub fn ready(&mut self, id: u64, ready: bool) {
        self.queue.set_ready(id, ready);
    }

    /// Somebody leaves, by a hang-up or for a reason of ours. Unknown ids are ignored: the slot may have come meanwhile.
    pub fn left(&mut self, id: u64, hung_up: bool, now: Now) {
        let Some(entry) = self.queue.iter().find(|entry| entry.id == id) else { return };
        let may_return = hung_up && entry.waiter.terms.fingerprint.is_some();
        self.tally.cancelled += u64::from(hung_up);
        self.drop_out(id, may_return, now);
    }

    /// The send of a granted request, at the instant `at`, `waited` after it first joined.
    pub fn sent(&mut self, id: u64, lane: usize, ask: Ask, at: Now, waited: Duration) {
        let Some(on) = self.lanes.get_mut(lane) else { return };
        self.changes += 1;
        self.in_flight.insert(id, (lane, on.sent(at, waited, ask)));
        self.tally.queue_wait.add(waited);
    }

    /// A grant for this model was not used.
    pub fn returned(&mut self, lane: usize, model: usize) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.returned(model);
        }
    }

    /// A request is over, and has really used so many tokens, if that is known.
    pub fn finished(&mut self, id: u64, tokens: Option<u64>) {
        let Some((lane, entry)) = self.in_flight.remove(&id) else { return };
        if let Some(tokens) = tokens {
            self.changes += 1;
            self.lanes[lane].books.settle(&entry, tokens);
        }
        self.lanes[lane].finished(entry);
    }

    /// The provider refused a request of this model for its rate; see [`Books::refused`]. Whoever can go elsewhere looks
    /// around.
    pub fn refused(
        &mut self,
        lane: usize,
        model: usize,
        scope: Scope,
        wait: Option<Duration>,
        now: Now,
        random: f64,
    ) {
        let Some(lane) = self.lanes.get_mut(lane) else { return };
        self.changes += 1;
        lane.refused(model, scope, wait, now, random);
        self.move_those(|joining| {
            joining.elsewhere.is_some() && (scope == Scope::Provider || joining.ask.model == model)
        });
    }

    /// Sends those queued requests to other providers.
    pub fn move_those(&mut self, are_movable: impl Fn(&Joining) -> bool) {
        let movable = self.queue.iter().filter(|entry| are_movable(&entry.waiter));
        let moving: Vec<u64> = movable.map(|entry| entry.id).collect();
        for id in moving {
            self.queue.leave(id);
            self.move_on(id);
        }
    }

    /// The provider took a request of this model.
    pub fn accepted(&mut self, lane: usize, model: usize) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.books.accepted(model);
        }
    }

    /// Refuses everybody who waits and everybody who comes.
    pub fn close(&mut self) {
        self.closed = true;
        for id in self.queue.drain() {
            self.refuse(id, Refusal::Closed);
        }
    }

    /// Does what is due and says when to come back; anything else may call for it earlier.
    pub fn advance(&mut self, now: Now) -> Option<Instant> {
        for lane in &mut self.lanes {
            lane.books.adapt(now);
        }
        self.refuse_the_late(now);
        self.refuse_the_next_day(now);
        let next_near = self.announce(now);
        let next_grant = self.grant(now);
        for id in std::mem::take(&mut self.warm) {
            // Whose slot is not open makes sure of a connection before it is.
            self.queue.set_ready(id, false);
        }
        [self.queue.next_due(), next_near, next_grant].into_iter().flatten().min()
    }

    /// When the slot of a newcomer on these terms would come; `None` where it would be refused.
    pub fn estimate(
        &self,
        ask: Ask,
        terms: &Rc<Terms>,
        response_time: Duration,
        now: Now,
    ) -> Option<Estimate> {
        let mut joining = Joining {
            ask,
            terms: terms.clone(),
            since: now.mono,
            response_time,
            again: false,
            elsewhere: None,
            movable: false,
            idle: 0,
        };
        if self.closed || self.full(&joining, now).is_some() {
            return None;
        }
        self.waive_response_time(&mut joining, now);
        let ahead = self.queue.ahead_of(&standing(&joining), now.mono);
        if self.verdict(&joining, ahead, now).is_some() {
            return None;
        }
        let walk = self.walk(ahead, now);
        let waits_for_an_end = walk.waits_for_an_end(ask.model);
        let foreseen = walk.slot(now, ask.model).at;
        // The head's tokens are known; those of the line in front are not.
        let exact = if ahead == 0 { self.next(now, ask).at } else { None };
        Some(Estimate { waits_for_an_end, wait: until(foreseen.max(exact), now) })
    }

    /// Place from 1, and the time until the slot, of somebody in line.
    pub fn whereabouts(&self, id: u64, now: Now) -> Option<(usize, Duration)> {
        let (ahead, entry) = self.queue.iter().enumerate().find(|(_, entry)| entry.id == id)?;
        Some((ahead + 1, until(self.slot(ahead, entry.waiter.ask.model, now).at, now)))
    }

    /// Everybody in line, head first.
    pub fn waiting(&self, now: Now) -> Vec<Waiting> {
        let mut walk = Walk::new(&self.lanes, self.rules.models.len());
        let waiting = self.queue.iter().zip(1..).map(|(entry, position)| {
            let Joining { ask, terms, since, .. } = &entry.waiter;
            let slot = walk.step(now, ask.model);
            Waiting {
                terms: terms.clone(),
                model: ask.model,
                since: *since,
                position,
                eta: until(slot.at, now),
            }
        });
        waiting.collect()
    }

    /// How often something happened that has to be remembered.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// What is to be remembered of each lane.
    pub fn memory(&mut self, now: Now) -> Vec<BooksMemory> {
        if self.closed {
            self.lanes.iter_mut().for_each(|lane| lane.give_up_grants(now));
        }
        self.lanes.iter().map(|lane| lane.books.memory(now)).collect()
    }

    /// How things stand.
    pub fn snapshot(&mut self, now: Now) -> Snapshot {
        // What a newcomer would wait, for the model that would go first.
        let end = self.walk(self.queue.len(), now);
        let soonest =
            (0..self.rules.models.len()).filter_map(|model| end.slot(now, model).at).min();
        let held_by = self.held_by(now);
        Snapshot {
            queued: self.queue.len(),
            preparing: self.queue.told(),
            kept: self.queue.kept(),
            estimated_wait: until(soonest, now),
            held_by,
            tally: self.tally,
            lanes: self.lanes.iter_mut().map(|lane| lane.snapshot(now)).collect(),
        }
    }

    /// What the head of the line waits for; with nobody in line, what the next request would.
    fn held_by(&self, now: Now) -> Held {
        match self.queue.iter().next() {
            Some(head) => self.next(now, head.waiter.ask).held_by,
            None => self.next_shared(now, 0).held_by,
        }
    }

    /// Gives a caller who tries again the place of its former try.
    fn take_back(&mut self, id: u64, joining: &Joining, now: Now) -> bool {
        let Some(fingerprint) =
            joining.terms.fingerprint.filter(|_| joining.terms.repeated && !joining.again)
        else {
            return false;
        };
        let found = self.queue.find_kept(|entry| {
            let former = &entry.waiter.terms;
            former.fingerprint == Some(fingerprint) && former.client == joining.terms.client
        });
        let Some((former, ahead)) = found else { return false };
        if let Some(refusal) = self.verdict(joining, ahead, now) {
            self.turn_away(id, joining, refusal);
            return true;
        }
        self.tally.returned += 1;
        self.queue.come_back(former, id, self.deadline(joining), joining.clone());
        true
    }

    /// Whether a newcomer could send at once. Nobody is passed by it who is about to have a connection, too, and no
    /// connection is counted twice.
    fn would_find_a_connection(&self, joining: &Joining) -> bool {
        let spoken_for =
            self.warm.len() + self.lanes.iter().map(|lane| lane.granted.len()).sum::<usize>();
        joining.idle > spoken_for && self.queue.are_all_ready()
    }

    fn full(&self, joining: &Joining, now: Now) -> Option<Refusal> {
        if joining.again {
            return None;
        }
        let Terms { client, max_queue, .. } = &*joining.terms;
        let retry_after = || {
            until(
                Walk::new(&self.lanes, self.rules.models.len()).slot(now, joining.ask.model).at,
                now,
            )
        };
        if self.queue.len() >= self.rules.max_queue {
            return Some(Refusal::Full {
                max_queue: self.rules.max_queue,
                retry_after: retry_after(),
            });
        }
        let max_queue = max_queue.filter(|max| self.queue.len_of(client) >= *max)?;
        Some(Refusal::ClientFull { client: client.clone(), max_queue, retry_after: retry_after() })
    }

    /// Nothing is to be had here for a newcomer; elsewhere there may be, if others have not been quicker there too often.
    fn turn_away(&mut self, id: u64, joining: &Joining, refusal: Refusal) {
        if joining.elsewhere.is_some_and(|elsewhere| elsewhere < Duration::MAX) {
            return self.move_on(id);
        }
        match refusal {
            Refusal::Day { .. } => self.tally.rejected_day += 1,
            Refusal::Deadline { .. } => self.tally.rejected_deadline += 1,
            Refusal::Full { .. } | Refusal::ClientFull { .. } => self.tally.rejected_full += 1,
            _ => self.tally.rejected_wait += 1,
        }
        self.refuse(id, refusal);
    }

    /// Whether there is a limit on its wait at all.
    fn may_be_in_vain(&self, joining: &Joining) -> bool {
        self.rules.max_wait.is_some() || joining.terms.end().is_some() || self.daily
    }

    /// Why somebody with so many in front would wait in vain, if it would.
    fn verdict(&self, joining: &Joining, ahead: usize, now: Now) -> Option<Refusal> {
        if !self.may_be_in_vain(joining) {
            return None;
        }
        let slot = self.slot(ahead, joining.ask.model, now);
        let wait = until(slot.at, now);
        let expected = now.mono.saturating_duration_since(joining.since) + wait;
        let exceeds = self.rules.max_wait.is_some_and(|max_wait| expected > max_wait);
        let late = joining.send_by().is_some_and(|end| now.mono + wait > end);
        if is_day(slot) && (exceeds || late || self.rules.max_wait.is_none()) {
            return Some(Refusal::Day { resets_in: wait });
        }
        if exceeds {
            return Some(self.exceeded(joining, ahead, expected, now));
        }
        late.then(|| self.missed(joining, ahead, expected, now))
    }

    fn exceeded(
        &self,
        joining: &Joining,
        ahead: usize,
        expected_wait: Duration,
        now: Now,
    ) -> Refusal {
        let max_wait = self.rules.max_wait.unwrap_or(Duration::MAX);
        let retry_after = self.retry_after(joining.ask.model, max_wait, now);
        let (position, held_by) = (ahead + 1, self.held_by_at(ahead, joining.ask, now));
        Refusal::WaitExceeded { position, expected_wait, max_wait, held_by, retry_after }
    }

    fn missed(
        &self,
        joining: &Joining,
        ahead: usize,
        expected_wait: Duration,
        now: Now,
    ) -> Refusal {
        let response_time = joining.response_time;
        let end = joining.terms.end().unwrap_or(now.mono);
        let patience = end.saturating_duration_since(joining.since);
        let in_queue = joining.send_by().unwrap_or(end).saturating_duration_since(joining.since);
        let retry_after = self.retry_after(joining.ask.model, in_queue, now);
        let (position, held_by) = (ahead + 1, self.held_by_at(ahead, joining.ask, now));
        Refusal::Deadline { position, expected_wait, patience, response_time, held_by, retry_after }
    }

    /// A request that can go at once is sent whatever its client's deadline leaves for the response: to wait would not
    /// help, and only what is sent tells whether responses have become faster.
    fn waive_response_time(&self, joining: &mut Joining, now: Now) {
        if joining.response_time.is_zero() || joining.terms.deadline.is_none() {
            return;
        }
        let (ahead, model) = (self.queue.ahead_of(&standing(joining), now.mono), joining.ask.model);
        let walk = self.walk(ahead, now);
        let is_open = |next: Next| next.at.is_some_and(|at| at <= now.mono);
        let is_first_open = || ahead > 0 || is_open(self.next(now, joining.ask));
        if !walk.waits_for_an_end(model) && is_open(walk.slot(now, model)) && is_first_open() {
            joining.response_time = Duration::ZERO;
        }
    }

    /// What a request waits for with so many in front.
    fn held_by_at(&self, ahead: usize, ask: Ask, now: Now) -> Held {
        // Only of the head, it is known that its tokens hold it.
        let next = if ahead == 0 { self.next(now, ask) } else { self.slot(ahead, ask.model, now) };
        next.held_by
    }

    /// The line shortens as fast as the clock runs: a newcomer fits once the line's own wait is down to its patience.
    fn retry_after(&self, model: usize, patience: Duration, now: Now) -> Duration {
        until(self.slot(self.queue.len(), model, now).at, now).saturating_sub(patience)
    }

    fn deadline(&self, joining: &Joining) -> Option<Instant> {
        let max_wait = self.rules.max_wait.map(|limit| joining.since + limit);
        [max_wait, joining.send_by()].into_iter().flatten().min()
    }

    /// When a request of this model could go at the earliest with so many in front.
    fn slot(&self, ahead: usize, model: usize, now: Now) -> Next {
        self.walk(ahead, now).slot(now, model)
    }

    /// Past the first waiters.
    fn walk(&self, ahead: usize, now: Now) -> Walk<'_> {
        let mut walk = Walk::new(&self.lanes, self.rules.models.len());
        for entry in self.queue.iter().take(ahead) {
            walk.step(now, entry.waiter.ask.model);
        }
        walk
    }

    fn refuse(&mut self, id: u64, refusal: Refusal) {
        self.decisions.push(Decision::Refuse(id, refusal));
    }

    fn move_on(&mut self, id: u64) {
        self.tally.moved += 1;
        self.decisions.push(Decision::Move(id));
    }

    /// Gives up kept places, those that end soonest first, so that a newcomer takes no more than `max_queue` allows.
    fn make_room_for(&mut self, joining: &Joining) {
        self.give_up_places(self.rules.max_queue.saturating_sub(1));
        let Terms { client, max_queue, .. } = &*joining.terms;
        let Some(max_queue) = max_queue else { return };
        while self.queue.places_of(client) >= *max_queue && self.queue.give_up_kept(Some(client)) {}
    }

    /// Gives up kept places until there are no more than so many places in all, or none is kept.
    fn give_up_places(&mut self, most: usize) {
        while self.queue.places() > most && self.queue.give_up_kept(None) {}
    }

    /// The place stays for a caller who may return, unless more wait than may, as those do that come back.
    fn drop_out(&mut self, id: u64, may_return: bool, now: Now) {
        if may_return && self.queue.places() <= self.rules.max_queue {
            self.queue.step_aside(id, now.mono);
        } else {
            self.queue.leave(id);
        }
    }

    fn refuse_the_late(&mut self, now: Now) {
        for (id, ahead) in self.queue.late(now.mono) {
            let Some(entry) = self.queue.iter().find(|entry| entry.id == id) else { continue };
            let joining = entry.waiter.clone();
            let waited = now.mono.saturating_duration_since(joining.since);
            let gave_up = joining.send_by().is_some_and(|end| end <= now.mono);
            self.drop_out(id, gave_up && joining.terms.fingerprint.is_some(), now);
            let refusal = if gave_up {
                self.tally.rejected_deadline += 1;
                self.missed(&joining, ahead, waited, now)
            } else {
                self.tally.rejected_wait += 1;
                self.exceeded(&joining, ahead, waited, now)
            };
            self.refuse(id, refusal);
        }
    }

    /// Turns away those whom repeated sends have cost their place in the day's budget.
    fn refuse_the_next_day(&mut self, now: Now) {
        if !self.daily || self.rules.max_wait.is_some() || self.queue.is_empty() {
            return;
        }
        let tomorrow: Vec<_> = (0..self.rules.models.len())
            .map(|model| {
                Some(self.next(now, Ask { model, tokens: 0 })).filter(|next| is_day(*next))
            })
            .collect();
        let model_and_id =
            |(model, id): (usize, u64)| tomorrow[model].map(|next| (id, until(next.at, now)));
        let waiting = self.queue.iter().map(|entry| (entry.waiter.ask.model, entry.id));
        let refused: Vec<_> = waiting.filter_map(model_and_id).collect();
        for (id, resets_in) in refused {
            self.tally.rejected_day += 1;
            self.queue.leave(id);
            self.refuse(id, Refusal::Day { resets_in });
        }
    }

    /// Tells those whose slot is near; returns when the next one will be.
    fn announce(&mut self, now: Now) -> Option<Instant> {
        let horizon = now.mono + PREPARE_AHEAD;
        let head = self.queue.iter().next()?.waiter.ask;
        let opens = self.lanes_in_use().map(|lane| lane.books.next_shared(now, head.tokens).at);
        // A lane without a time may open at any moment.
        if let Some(at) = opens.min().flatten()
            && at > horizon
        {
            return Some(at - PREPARE_AHEAD);
        }
        let room =
            self.lanes_in_use().fold(0, |room: usize, lane| room.saturating_add(lane.books.room()));
        let most = MAX_PREPARED.min(room.saturating_add(PREPARED_WITHOUT_ROOM));
        if self.are_all_near(most, horizon, now) {
            let open: usize = self.lanes.iter().map(|lane| lane.granted.len()).sum();
            for entry in
                self.queue.iter_mut().take(most.saturating_sub(open)).filter(|entry| !entry.told)
            {
                entry.told = true;
                self.decisions.push(Decision::Near(entry.id));
            }
            return None;
        }
        let mut walk = Walk::new(&self.lanes, self.rules.models.len());
        let mut next_near: Option<Instant> = None;
        for entry in self.queue.iter_mut() {
            let shared = walk.shared_slot(now).filter(|slot| *slot > horizon);
            if walk.ahead() >= most || shared.is_some() {
                // Nobody behind is nearer.
                let near = shared.map(|slot| slot - PREPARE_AHEAD);
                return [next_near, near].into_iter().flatten().min();
            }
            let model = entry.waiter.ask.model;
            let without_room = walk.without_room(model);
            let slot = walk.step(now, model).at.unwrap_or(now.mono);
            if slot > horizon {
                let near = slot - PREPARE_AHEAD;
                next_near = Some(next_near.map_or(near, |first| first.min(near)));
            } else if !entry.told && without_room < PREPARED_WITHOUT_ROOM {
                entry.told = true;
                self.decisions.push(Decision::Near(entry.id));
            }
        }
        next_near
    }

    /// Whether the slots of the first `most` are within the horizon for sure, without a walk past each: with one lane, whose
    /// limits count sends, the last one's is the latest. A busy line asks this at every send.
    fn are_all_near(&self, most: usize, horizon: Instant, now: Now) -> bool {
        let mut lanes = self.lanes_in_use();
        let (Some(lane), None) = (lanes.next(), lanes.next()) else { return false };
        lane.books.room() == usize::MAX
            && lane.books.are_shared_alone(now)
            && lane
                .books
                .nth_shared(now, self.queue.len().min(most))
                .at
                .is_some_and(|at| at <= horizon)
    }

    /// Opens the slots that are due, each for the first waiter that is ready and that only its own model's limits could
    /// hold; returns when the next opens, if it is only a matter of time.
    fn grant(&mut self, now: Now) -> Option<Instant> {
        self.queue.ready().next()?;
        let models = self.rules.models.len();
        let mut closed: Vec<bool> = self.lanes.iter().map(|lane| !lane.may_grant(now)).collect();
        let mut held = vec![false; self.lanes.len() * models];
        let mut opens: Option<Instant> = None;
        let mut chosen = Vec::new();
        for entry in self.queue.ready() {
            if closed.iter().all(|closed| *closed) {
                break;
            }
            let ask = entry.waiter.ask;
            let mut best: Option<usize> = None;
            for (index, lane) in self.lanes.iter().enumerate() {
                if closed[index] || held[index * models + ask.model] {
                    continue;
                }
                let shared = lane.books.next_shared(now, ask.tokens).at;
                if shared.is_none_or(|at| at > now.mono) {
                    // Nobody overtakes: a large request would wait for ever while small ones use up what it waits for.
                    closed[index] = true;
                    opens = [opens, shared].into_iter().flatten().min();
                    continue;
                }
                match lane.books.next(now, ask).at {
                    // Of several that are open, the one with the fewest open grants that has rested longest.
                    Some(at) if at <= now.mono => {
                        let used = |index: usize| {
                            (self.lanes[index].granted.len(), self.lanes[index].rests_since())
                        };
                        best =
                            Some(best.filter(|best| used(*best) <= used(index)).unwrap_or(index));
                    }
                    later => {
                        held[index * models + ask.model] = true;
                        opens = [opens, later].into_iter().flatten().min();
                    }
                }
            }
            if let Some(index) = best {
                let lane = &mut self.lanes[index];
                lane.granted.push(ask.model);
                closed[index] = !lane.may_grant(now);
                chosen.push((entry.id, index));
            }
        }
        for (id, lane) in chosen {
            self.queue.take(id);
            self.decisions.push(Decision::Grant { id, lane });
        }
        opens
    }

    /// When a request may go, on the lane that opens first.
    fn next(&self, now: Now, ask: Ask) -> Next {
        self.first_to_open(|books| books.next(now, ask))
    }

    /// The same as far as the provider as a whole is concerned.
    fn next_shared(&self, now: Now, tokens: u64) -> Next {
        self.first_to_open(|books| books.next_shared(now, tokens))
    }

    fn first_to_open(&self, next: impl Fn(&Books) -> Next) -> Next {
        let all = self.lanes_in_use().map(|lane| next(&lane.books));
        all.reduce(Next::earliest).expect("a provider has a key, or does without")
    }

    fn lanes_in_use(&self) -> impl Iterator<Item = &Lane> {
        self.lanes.iter().filter(|lane| !lane.retired)
    }
}

/// Whether anybody can be told in advance to wait for another day.
fn has_day(rules: &Rules) -> bool {
    rules.limits.day.is_some() || rules.models.iter().any(|model| model.day.is_some())
}

fn standing(joining: &Joining) -> Standing {
    let Joining { terms, since, again, .. } = joining;
    let Terms { client, class, urgency, .. } = &**terms;
    Standing {
        client: client.clone(),
        class: *class,
        urgency: *urgency,
        since: *since,
        again: *again,
    }
}

pub(super) fn until(at: Option<Instant>, now: Now) -> Duration {
    at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now.mono))
}
