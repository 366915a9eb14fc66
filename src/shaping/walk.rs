//! A walk down a line that says when each waiter can go at the earliest, as far as sends are counted.
//!
//! Pure. Each step takes the lane that opens first. A waiter whose own model holds it longer than the provider would is
//! not in the way of those behind.

use std::time::Instant;

use super::lane::Lane;
use super::limiter::{Next, Now};

/// So many in front, counted by lane.
pub(super) struct Walk<'l> {
    lanes: &'l [Lane],
    /// Who goes first on each lane, as far as the provider as a whole is concerned.
    ahead: Vec<usize>,
    /// The same by lane and model.
    ahead_of_model: Vec<usize>,
    models: usize,
}

impl<'l> Walk<'l> {
    /// At the head of the line; open grants are in front of it.
    pub fn new(lanes: &'l [Lane], models: usize) -> Walk<'l> {
        let mut ahead_of_model = vec![0; lanes.len() * models];
        let mut ahead = vec![0; lanes.len()];
        for (index, lane) in lanes.iter().enumerate() {
            ahead[index] = lane.granted.len();
            lane.granted.iter().for_each(|model| ahead_of_model[index * models + model] += 1);
        }
        Walk { lanes, ahead, ahead_of_model, models }
    }

    /// When the next one of this model could go.
    pub fn slot(&self, now: Now, model: usize) -> Next {
        self.slot_on(self.lane_for(now, model), now, model)
    }

    /// Past one of this model; returns when it can go.
    pub fn step(&mut self, now: Now, model: usize) -> Next {
        let lane = self.lane_for(now, model);
        let slot = self.slot_on(lane, now, model);
        let of_model = lane * self.models + model;
        let waits_for_an_end =
            self.ahead_of_model[of_model] >= self.lanes[lane].books.room_of(model);
        self.ahead_of_model[of_model] += 1;
        if !waits_for_an_end && slot.at <= self.shared_slot_on(lane, now) {
            self.ahead[lane] += 1;
        }
        slot
    }

    /// How many go before the next one.
    pub fn ahead(&self) -> usize {
        self.ahead.iter().sum()
    }

    /// When the provider as a whole would let the next one go.
    pub fn shared_slot(&self, now: Now) -> Option<Instant> {
        self.in_use().filter_map(|lane| self.shared_slot_on(lane, now)).min()
    }

    /// How many of this model stand in front of the next one beyond those that may be in flight together.
    pub fn without_room(&self, model: usize) -> usize {
        let room = self.in_use().fold(0, |room: usize, lane| {
            room.saturating_add(self.lanes[lane].books.room_of(model))
        });
        let ahead: usize =
            self.in_use().map(|lane| self.ahead_of_model[lane * self.models + model]).sum();
        ahead.saturating_sub(room)
    }

    /// Whether the next one of this model has to wait for the end of one in flight.
    pub fn waits_for_an_end(&self, model: usize) -> bool {
        self.in_use().all(|lane| self.is_full(lane, model))
    }

    fn is_full(&self, lane: usize, model: usize) -> bool {
        let books = &self.lanes[lane].books;
        self.ahead[lane] >= books.room()
            || self.ahead_of_model[lane * self.models + model] >= books.room_of(model)
    }

    /// The one that opens first, those with room in flight before the others.
    fn lane_for(&self, now: Now, model: usize) -> usize {
        if self.lanes.len() == 1 {
            return 0;
        }
        let key = |lane: &usize| {
            (self.is_full(*lane, model), self.slot_on(*lane, now, model).at, self.ahead[*lane])
        };
        self.in_use().min_by_key(key).expect("a provider has a key, or does without")
    }

    fn in_use(&self) -> impl Iterator<Item = usize> {
        (0..self.lanes.len()).filter(|lane| !self.lanes[*lane].retired)
    }

    fn slot_on(&self, lane: usize, now: Now, model: usize) -> Next {
        let ahead_of_model = self.ahead_of_model[lane * self.models + model];
        self.lanes[lane].books.nth(now, model, self.ahead[lane], ahead_of_model)
    }

    fn shared_slot_on(&self, lane: usize, now: Now) -> Option<Instant> {
        self.lanes[lane].books.nth_shared(now, self.ahead[lane]).at
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::config::Fairness;
    use crate::shaping::lane::Past;
    use crate::shaping::limiter::{Cadence, Limits};
    use crate::shaping::terms::Rules;

    fn every(seconds: u64) -> Limits {
        let interval = Duration::from_secs(seconds);
        Limits { cadence: Some(Cadence { interval, capacity: 1 }), ..Limits::default() }
    }

    /// Model 0 goes every 5 s, model 1 as the provider does: every second.
    fn lanes(granted: &[&[usize]], now: Now) -> Vec<Lane> {
        let rules = Rules {
            lanes: vec![true; granted.len()],
            limits: every(1),
            models: vec![every(5), Limits::default()],
            adaptive: false,
            max_wait: None,
            max_queue: 100,
            fairness: Fairness::Client,
        };
        let lane = |granted: &&[usize]| {
            let mut lane = Lane::new(&rules, &Past::Fresh, now);
            lane.granted = granted.to_vec();
            lane
        };
        granted.iter().map(lane).collect()
    }

    #[test]
    fn it_sees_who_is_in_whose_way() {
        let now = Now { mono: Instant::now(), wall: SystemTime::UNIX_EPOCH };
        // To the millisecond that lateness of the first may take off each gap.
        let seconds =
            |next: Next| (next.at.unwrap() + Duration::from_millis(20) - now.mono).as_secs();
        for (granted, line, slots, ends, going) in [
            (&[&[][..]][..], [0, 0, 1, 1], [0, 5, 1, 2], [10, 3], 3),
            (&[&[]], [1, 1, 1, 1], [0, 1, 2, 3], [4, 4], 4),
            (&[&[0]], [0, 1, 0, 1], [5, 1, 10, 2], [15, 3], 3),
            (&[&[1]], [0, 1, 1, 0], [1, 2, 3, 5], [10, 4], 4),
            (&[&[1, 1]], [0, 1, 1, 0], [2, 3, 4, 5], [10, 5], 5),
            (&[&[], &[]], [1, 1, 1, 1], [0, 0, 1, 1], [2, 2], 4),
            (&[&[], &[]], [0, 0, 0, 1], [0, 0, 5, 1], [5, 1], 3),
            (&[&[1], &[]], [1, 1, 1, 1], [0, 1, 1, 2], [2, 2], 5),
        ] {
            let lanes = lanes(granted, now);
            let mut walk = Walk::new(&lanes, 2);
            assert_eq!(
                line.map(|model| seconds(walk.step(now, model))),
                slots,
                "{granted:?} {line:?}"
            );
            assert_eq!(
                [0, 1].map(|model| seconds(walk.slot(now, model))),
                ends,
                "{granted:?} {line:?}"
            );
            assert_eq!(walk.ahead(), going, "{granted:?} {line:?}");
        }
    }
}
