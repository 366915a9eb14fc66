//! The line in front of one provider: who waits, in which order, until when.
//!
//! Pure: no clock, no channel. First come, first served; where a waiter stands that comes back after a refusal by the
//! provider, its owner says.

use std::collections::VecDeque;
use std::time::Instant;

/// One waiter in the line.
#[derive(Debug)]
pub struct Entry<T> {
    /// Chosen by the caller, unique among the living.
    pub id: u64,
    /// When waiting ends at the latest.
    pub deadline: Option<Instant>,
    /// Whether the waiter was told that its turn is near.
    pub told: bool,
    /// Whether the waiter holds a connection and can send at once.
    pub ready: bool,
    /// What the owner keeps for this waiter.
    pub waiter: T,
}

/// Waiters, head first. Lookups by id are linear: the line is bounded by `max_queue`.
#[derive(Debug)]
pub struct Queue<T> {
    entries: VecDeque<Entry<T>>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Queue { entries: VecDeque::new() }
    }
}

impl<T> Queue<T> {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many hold a connection or are making one: those whose turn is near.
    pub fn told(&self) -> usize {
        self.entries.iter().filter(|entry| entry.told).count()
    }

    /// Joins at a place, from 0; everybody from there on moves back.
    pub fn insert(&mut self, place: usize, id: u64, deadline: Option<Instant>, waiter: T) {
        self.entries.insert(place, Entry { id, deadline, told: false, ready: false, waiter });
    }

    /// Leaves the line, wherever it stands; everybody behind moves up.
    pub fn remove(&mut self, id: u64) -> Option<T> {
        let at = self.entries.iter().position(|entry| entry.id == id)?;
        self.entries.remove(at).map(|entry| entry.waiter)
    }

    /// Notes whether a waiter can send at once. Unknown ids are ignored: the waiter may have left meanwhile.
    pub fn set_ready(&mut self, id: u64, ready: bool) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.id == id) {
            entry.ready = ready;
        }
    }

    /// The head of the line.
    pub fn first(&self) -> Option<&Entry<T>> {
        self.entries.front()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Entry<T>> {
        self.entries.iter()
    }

    /// Those whose connection stands, in order: one whose handshake is slow does not hold up those behind it.
    pub fn ready(&self) -> impl Iterator<Item = &Entry<T>> {
        self.entries.iter().filter(|entry| entry.ready)
    }

    /// The waiter at a place in the line, from 0.
    pub fn get_mut(&mut self, place: usize) -> Option<&mut Entry<T>> {
        self.entries.get_mut(place)
    }

    /// Takes out everybody of whom `unwanted` is true, with the place (from 0) each had.
    pub fn take_if(&mut self, unwanted: impl Fn(&Entry<T>) -> bool) -> Vec<(usize, T)> {
        if !self.entries.iter().any(&unwanted) {
            return Vec::new();
        }
        let (mut taken, mut kept) = (Vec::new(), VecDeque::with_capacity(self.entries.len()));
        for (place, entry) in self.entries.drain(..).enumerate() {
            match unwanted(&entry) {
                true => taken.push((place, entry.waiter)),
                false => kept.push_back(entry),
            }
        }
        self.entries = kept;
        taken
    }

    /// Takes out everybody whose deadline has come.
    pub fn expire(&mut self, now: Instant) -> Vec<(usize, T)> {
        self.take_if(|entry| entry.deadline.is_some_and(|deadline| deadline <= now))
    }

    /// The first deadline of all.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.entries.iter().filter_map(|entry| entry.deadline).min()
    }

    /// Empties the line, head first.
    pub fn drain(&mut self) -> impl Iterator<Item = T> + '_ {
        self.entries.drain(..).map(|entry| entry.waiter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn names(queue: &mut Queue<&'static str>) -> Vec<&'static str> {
        queue.drain().collect()
    }

    #[test]
    fn first_come_first_served_unless_a_place_further_ahead_is_given() {
        let mut queue = Queue::default();
        queue.insert(queue.len(), 1, None, "a");
        queue.insert(queue.len(), 2, None, "b");
        queue.insert(0, 3, None, "retry");
        assert_eq!(names(&mut queue), ["retry", "a", "b"]);
    }

    #[test]
    fn who_leaves_lets_the_others_move_up() {
        let mut queue = Queue::default();
        for (id, name) in [(1, "a"), (2, "b"), (3, "c")] {
            queue.insert(queue.len(), id, None, name);
        }
        assert_eq!(queue.remove(2), Some("b"));
        assert_eq!(queue.remove(2), None);
        assert_eq!(queue.get_mut(1).map(|entry| entry.waiter), Some("c"));
    }

    #[test]
    fn only_a_waiter_with_a_connection_is_next() {
        let mut queue = Queue::default();
        queue.insert(queue.len(), 1, None, "slow handshake");
        queue.insert(queue.len(), 2, None, "warm connection");
        let first_ready = |queue: &Queue<_>| queue.ready().next().map(|entry| entry.id);
        assert_eq!(first_ready(&queue), None);
        queue.set_ready(2, true);
        assert_eq!(first_ready(&queue), Some(2));
        queue.set_ready(1, true);
        assert_eq!(first_ready(&queue), Some(1));
        queue.set_ready(1, false);
        queue.set_ready(9, true);
        assert_eq!(first_ready(&queue), Some(2));
    }

    #[test]
    fn deadlines_take_out_whoever_is_late_and_nobody_else() {
        let start = Instant::now();
        let at = |seconds| Some(start + Duration::from_secs(seconds));
        let mut queue = Queue::default();
        queue.insert(queue.len(), 1, at(5), "five");
        queue.insert(queue.len(), 2, None, "for ever");
        queue.insert(queue.len(), 3, at(3), "three");
        assert_eq!(queue.next_deadline(), at(3));
        assert!(queue.expire(start).is_empty());
        assert_eq!(queue.expire(start + Duration::from_secs(3)), [(2, "three")]);
        assert_eq!(queue.expire(start + Duration::from_secs(9)), [(0, "five")]);
        assert_eq!(names(&mut queue), ["for ever"]);
    }

    proptest! {
        #[test]
        fn the_living_keep_their_order(steps in prop::collection::vec((any::<bool>(), 0u64..40), 0..80)) {
            let mut queue = Queue::default();
            let mut model: Vec<u64> = Vec::new();
            for (next, (join, who)) in steps.into_iter().enumerate() {
                if join {
                    queue.insert(queue.len(), next as u64, None, next as u64);
                    model.push(next as u64);
                } else {
                    let known = model.iter().position(|id| *id == who);
                    prop_assert_eq!(queue.remove(who).is_some(), known.is_some());
                    known.map(|at| model.remove(at));
                }
            }
            prop_assert_eq!(queue.drain().collect::<Vec<_>>(), model);
        }
    }
}
