//! The line in front of one provider: who waits, in which order they will go, until when.
//!
//! Pure: no clock, no channel, no limits. The line stands in the order in which it goes, so that a place in it is a
//! promise: joining decides the place, and nobody is passed later but by the rules below.
//!
//! - *Clients take turns* ([`Fairness::Client`]): a newcomer stands behind the next request of every other client, and
//!   behind the second one only with its own second. A client with one request waits for one of each other client at most.
//!   First come, first served within a client, and with [`Fairness::Fifo`] over all.
//! - *A client's places are its own*: a more urgent request takes the client's first place and its others move back by one
//!   of theirs; who leaves lets the client's others move up. No other client notices.
//! - *Priority of a client* goes before turns, and *ageing* before priority: every [`AGEING`] of waiting counts as one
//!   step more, and who has aged takes turns with those whose step it has reached.
//! - *Coming back* after a refusal by the provider leads to the front, in the order of the first join.
//! - *A kept place* belongs to a caller who left and may try again. It is nobody's obstacle.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::config::{Fairness, Priority};

/// So much waiting counts as one step of priority.
pub const AGEING: Duration = Duration::from_secs(60);

/// How long the place of a caller who left is kept: an SDK is back after 8 s at the latest (openai-python,
/// `_base_client.py`, MAX_RETRY_DELAY), and its connection has to be made.
pub const KEPT: Duration = Duration::from_secs(15);

/// Who joins, as far as the order is concerned.
#[derive(Debug, Clone)]
pub struct Standing {
    /// Whose request it is.
    pub client: Rc<str>,
    /// Of this client among clients.
    pub class: Priority,
    /// Of this request among its client's.
    pub urgency: Priority,
    /// When it first joined; ageing counts from here.
    pub since: Instant,
    /// Whether it was sent before and comes back to the front.
    pub again: bool,
}

/// One waiter in the line.
#[derive(Debug)]
pub struct Entry<T> {
    /// Chosen by the owner, unique among the living.
    pub id: u64,
    /// When waiting ends at the latest.
    pub deadline: Option<Instant>,
    /// Whether the waiter was told that its turn is near.
    pub told: bool,
    /// What the owner keeps for this waiter.
    pub waiter: T,
    standing: Standing,
    /// Index of the client.
    client: usize,
    /// Whether the waiter holds a connection and can send at once.
    ready: bool,
    /// Its caller has left; the place is kept until then.
    kept_until: Option<Instant>,
    /// The step of priority that its place accounts for.
    placed_as: Priority,
}

impl<T> Entry<T> {
    /// How it joined.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    fn is_kept(&self) -> bool {
        self.kept_until.is_some()
    }

    /// Its client's priority, raised by waiting.
    fn level(&self, now: Instant) -> Priority {
        aged(self.standing.class, self.standing.since, now)
    }

    fn next_step(&self, now: Instant) -> Option<Instant> {
        let waited = now.saturating_duration_since(self.standing.since);
        let steps = u32::try_from(waited.as_nanos() / AGEING.as_nanos()).unwrap_or(u32::MAX - 1);
        (self.level(now) != Priority::High).then(|| self.standing.since + AGEING * (steps + 1))
    }
}

fn aged(class: Priority, since: Instant, now: Instant) -> Priority {
    let waited = now.saturating_duration_since(since);
    match (class, waited >= AGEING, waited >= 2 * AGEING) {
        (Priority::Low, true, false) => Priority::Normal,
        (Priority::Normal, true, _) | (_, _, true) => Priority::High,
        (class, _, _) => class,
    }
}

/// Waiters, head first. Look-ups are linear: the line is bounded by its owner.
#[derive(Debug)]
pub struct Queue<T> {
    fairness: Fairness,
    entries: VecDeque<Entry<T>>,
    clients: Clients,
    /// Entries whose caller has left.
    kept: usize,
    ready: usize,
    /// Entries by the class of their client.
    classes: [usize; 3],
    /// Nothing comes due before this.
    due: Option<Instant>,
}

impl<T> Queue<T> {
    /// An empty line.
    pub fn new(fairness: Fairness) -> Queue<T> {
        Queue {
            fairness,
            entries: VecDeque::new(),
            clients: Clients::default(),
            kept: 0,
            ready: 0,
            classes: [0; 3],
            due: None,
        }
    }

    /// From now on newcomers stand by another rule; those in line keep their places.
    pub fn set_fairness(&mut self, fairness: Fairness) {
        self.fairness = fairness;
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.entries.len() - self.kept
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many places are kept for callers who left.
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// How many places are taken: by those who wait, and for callers who left.
    pub fn places(&self) -> usize {
        self.entries.len()
    }

    /// How many of these are one client's.
    pub fn places_of(&self, client: &str) -> usize {
        let Some(client) = self.clients.index(client) else { return 0 };
        self.entries.iter().filter(|entry| entry.client == client).count()
    }

    /// Gives up the kept place that ends soonest, of this client or of any. Says whether there was one.
    pub fn give_up_kept(&mut self, client: Option<&str>) -> bool {
        let is_of =
            |entry: &Entry<T>| client.is_none_or(|client| *entry.standing.client == *client);
        let kept = self.entries.iter().enumerate().filter(|(_, entry)| is_of(entry));
        let soonest = kept
            .filter_map(|(place, entry)| Some((entry.kept_until?, place)))
            .min()
            .map(|(_, place)| place);
        soonest.is_some_and(|place| {
            self.remove_own(place);
            true
        })
    }

    /// How many of one client's requests wait.
    pub fn len_of(&self, client: &str) -> usize {
        let Some(client) = self.clients.index(client) else { return 0 };
        self.iter().filter(|entry| entry.client == client).count()
    }

    /// How many hold a connection or are making one: those whose turn is near.
    pub fn told(&self) -> usize {
        self.iter().filter(|entry| entry.told).count()
    }

    /// Those who wait, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Entry<T>> {
        self.entries.iter().filter(|entry| !entry.is_kept())
    }

    /// The same, to be told something.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry<T>> {
        self.entries.iter_mut().filter(|entry| !entry.is_kept())
    }

    /// Those whose connection stands, in order: one whose handshake is slow does not hold up those behind it.
    pub fn ready(&self) -> impl Iterator<Item = &Entry<T>> {
        self.entries.iter().filter(|entry| entry.ready).take(self.ready)
    }

    /// Whether each of those who wait can send at once.
    pub fn are_all_ready(&self) -> bool {
        self.ready == self.len()
    }

    /// How many would stand in front of somebody who joined now.
    pub fn ahead_of(&self, standing: &Standing, now: Instant) -> usize {
        let client = self.clients.index(&standing.client);
        let place = self.place(self.entries.len(), standing, client, standing.class, now);
        let place = self.yielding(place, standing, client, now).last().unwrap_or(place);
        self.ahead(place)
    }

    /// Joins.
    pub fn join(
        &mut self,
        id: u64,
        standing: Standing,
        deadline: Option<Instant>,
        waiter: T,
        now: Instant,
    ) {
        let client = self.clients.enter(&standing.client);
        let placed_as = aged(standing.class, standing.since, now);
        let mut place = self.place(self.entries.len(), &standing, Some(client), placed_as, now);
        let yielding: Vec<usize> = self.yielding(place, &standing, Some(client), now).collect();
        self.classes[standing.class as usize] += 1;
        let (told, ready, kept_until) = (false, false, None);
        let entry =
            Entry { id, deadline, told, waiter, standing, client, ready, kept_until, placed_as };
        self.entries.insert(place, entry);
        for other in yielding {
            self.entries.swap(other, place);
            place = other;
        }
        self.look_after(place, now);
    }

    /// The place that is kept for a former try of the same request, if one is: whose it was, and how many are in front.
    pub fn find_kept(&self, is_former: impl Fn(&Entry<T>) -> bool) -> Option<(u64, usize)> {
        let place = self.entries.iter().position(|entry| entry.is_kept() && is_former(entry))?;
        Some((self.entries[place].id, self.ahead(place)))
    }

    /// Takes the place that is kept for `former`.
    pub fn come_back(&mut self, former: u64, id: u64, deadline: Option<Instant>, waiter: T) {
        let Some(entry) =
            self.entries.iter_mut().find(|entry| entry.id == former && entry.is_kept())
        else {
            return;
        };
        (entry.id, entry.deadline, entry.waiter, entry.kept_until) = (id, deadline, waiter, None);
        self.kept -= 1;
        self.due = earlier(self.due, deadline);
    }

    /// Takes somebody out whose turn it is: the place is used up.
    pub fn take(&mut self, id: u64) -> Option<T> {
        let place = self.place_of(id)?;
        Some(self.remove(place).waiter)
    }

    /// Leaves the line, wherever it stands; everybody behind moves up, the client's own in its places first.
    pub fn leave(&mut self, id: u64) -> Option<T> {
        let place = self.place_of(id)?;
        Some(self.remove_own(place).waiter)
    }

    /// Leaves the line for now: its place is kept for [`KEPT`].
    pub fn step_aside(&mut self, id: u64, now: Instant) {
        let Some(place) = self.place_of(id) else { return };
        let entry = &mut self.entries[place];
        self.ready -= usize::from(entry.ready);
        (entry.told, entry.ready, entry.deadline) = (false, false, None);
        entry.kept_until = Some(now + KEPT);
        self.kept += 1;
        self.due = earlier(self.due, Some(now + KEPT));
    }

    /// Notes whether a waiter can send at once. Unknown ids are ignored: the waiter may have left meanwhile.
    pub fn set_ready(&mut self, id: u64, ready: bool) {
        let Some(place) = self.place_of(id) else { return };
        let entry = &mut self.entries[place];
        self.ready = self.ready + usize::from(ready) - usize::from(entry.ready);
        entry.ready = ready;
    }

    /// Takes out everybody who waits. Kept places are given up.
    pub fn drain(&mut self) -> Vec<u64> {
        let waiting = self.iter().map(|entry| entry.id).collect();
        *self = Queue::new(self.fairness);
        waiting
    }

    /// Does what is due at `now` (gives up places that were kept for too long, moves up who has aged) and says whose deadline
    /// has come, with how many stand in front of each.
    pub fn late(&mut self, now: Instant) -> Vec<(u64, usize)> {
        if self.due.is_none_or(|due| due > now) {
            return Vec::new();
        }
        while let Some(place) =
            self.entries.iter().position(|entry| entry.kept_until.is_some_and(|end| end <= now))
        {
            self.remove_own(place);
        }
        if self.is_mixed() {
            self.move_up_the_aged(now);
        }
        self.due = self.entries.iter().filter_map(|entry| self.due_of(entry, now)).min();
        let is_late = |entry: &Entry<T>| entry.deadline.is_some_and(|deadline| deadline <= now);
        self.iter()
            .enumerate()
            .filter(|(_, entry)| is_late(entry))
            .map(|(ahead, entry)| (entry.id, ahead))
            .collect()
    }

    /// When to ask [`Queue::late`] again at the latest.
    pub fn next_due(&self) -> Option<Instant> {
        self.due
    }

    /// Where somebody has to stand among the first `among` entries, who are numbered by their turn within their client.
    fn place(
        &self,
        among: usize,
        new: &Standing,
        client: Option<usize>,
        level: Priority,
        now: Instant,
    ) -> usize {
        if !new.again && client.is_some() && self.clients.are_one() {
            // Alone with itself.
            return among;
        }
        let among = || self.entries.iter().take(among);
        let own = among().filter(|entry| Some(entry.client) == client).count();
        let mut turns = vec![0; self.clients.slots()];
        // Whose last turn came before the newcomer's own last one has the next one before it, too.
        let mut turns_before_own = None;
        let (mut place, mut passed) = (0, false);
        for (index, other) in among().enumerate() {
            turns[other.client] += 1;
            let turn = turns[other.client];
            if Some(other.client) == client && turn == own {
                turns_before_own = Some(turns.clone());
            }
            let goes_first = if new.again {
                other.standing.again && other.standing.since <= new.since
            } else if other.standing.again
                || other.standing.class > level
                || Some(other.client) == client
            {
                true
            } else if other.level(now) < level {
                continue;
            } else {
                let had_turn = |before: &Vec<usize>| before[other.client] >= own;
                let in_turn = turn <= own
                    || turn == own + 1 && turns_before_own.as_ref().is_none_or(had_turn);
                !passed && (self.fairness == Fairness::Fifo || in_turn)
            };
            if goes_first {
                place = index + 1;
            }
            passed = !goes_first;
        }
        place
    }

    /// The places in front of `place` that the client has for less urgent requests, the nearest first.
    fn yielding(
        &self,
        place: usize,
        new: &Standing,
        client: Option<usize>,
        now: Instant,
    ) -> impl Iterator<Item = usize> {
        let own = (0..place).rev().filter(move |other| Some(self.entries[*other].client) == client);
        own.take_while(move |other| {
            let other = &self.entries[*other].standing;
            !other.again && !new.again && aged(other.urgency, other.since, now) < new.urgency
        })
    }

    fn move_up_the_aged(&mut self, now: Instant) {
        let mut highest = Priority::Low;
        for from in 0..self.entries.len() {
            let entry = &self.entries[from];
            let (level, class) = (entry.level(now), entry.standing.class);
            let aged = std::mem::replace(&mut self.entries[from].placed_as, level) < level;
            // Only who was passed over for a priority has something to make up for.
            if aged && highest > class {
                let entry = &self.entries[from];
                let to = self.place(from, &entry.standing, Some(entry.client), level, now);
                let entry = self.entries.remove(from).expect("from < len");
                self.entries.insert(to, entry);
            }
            highest = highest.max(class);
        }
    }

    /// Whether clients of more than one class wait.
    fn is_mixed(&self) -> bool {
        self.classes.iter().filter(|count| **count > 0).count() > 1
    }

    /// An entry has come to this place: when does something come due that did not before?
    fn look_after(&mut self, place: usize, now: Instant) {
        let entry = &self.entries[place];
        let first_of_its_class = self.classes[entry.standing.class as usize] == 1;
        let soon =
            if first_of_its_class && self.is_mixed() { Some(now) } else { self.due_of(entry, now) };
        self.due = earlier(self.due, soon);
    }

    fn due_of(&self, entry: &Entry<T>, now: Instant) -> Option<Instant> {
        let ages = if self.is_mixed() { entry.next_step(now) } else { None };
        earlier(earlier(entry.deadline, entry.kept_until), ages)
    }

    fn place_of(&self, id: u64) -> Option<usize> {
        self.entries.iter().position(|entry| entry.id == id && !entry.is_kept())
    }

    fn ahead(&self, place: usize) -> usize {
        self.entries.iter().take(place).filter(|entry| !entry.is_kept()).count()
    }

    /// Takes an entry out so that its client loses its last place and not this one.
    fn remove_own(&mut self, mut place: usize) -> Entry<T> {
        let (client, again) = (self.entries[place].client, self.entries[place].standing.again);
        if self.fairness == Fairness::Client && !again {
            for other in place + 1..self.entries.len() {
                if self.entries[other].client == client && !self.entries[other].is_kept() {
                    self.entries.swap(place, other);
                    place = other;
                }
            }
        }
        self.remove(place)
    }

    fn remove(&mut self, place: usize) -> Entry<T> {
        let entry = self.entries.remove(place).expect("the place was found in the line");
        self.clients.leave(entry.client);
        self.classes[entry.standing.class as usize] -= 1;
        self.ready -= usize::from(entry.ready);
        self.kept -= usize::from(entry.is_kept());
        entry
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    [one, other].into_iter().flatten().min()
}

/// The clients in line, as small numbers.
#[derive(Debug, Default)]
struct Clients {
    by_name: HashMap<Rc<str>, usize>,
    /// Each client's name and how many entries it has; a number without any is free.
    slots: Vec<(Rc<str>, usize)>,
    free: Vec<usize>,
}

impl Clients {
    fn index(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    fn are_one(&self) -> bool {
        self.by_name.len() == 1
    }

    fn slots(&self) -> usize {
        self.slots.len()
    }

    fn enter(&mut self, name: &Rc<str>) -> usize {
        let index = match self.index(name) {
            Some(index) => index,
            None => {
                let index = self.free.pop().unwrap_or(self.slots.len());
                self.slots.resize_with(self.slots.len().max(index + 1), || (name.clone(), 0));
                self.slots[index] = (name.clone(), 0);
                self.by_name.insert(name.clone(), index);
                index
            }
        };
        self.slots[index].1 += 1;
        index
    }

    fn leave(&mut self, index: usize) {
        let (name, entries) = &mut self.slots[index];
        *entries -= 1;
        if *entries == 0 {
            self.by_name.remove(name);
            self.free.push(index);
        }
    }
}

#[cfg(test)]
mod tests;
