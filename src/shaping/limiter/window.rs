//! A rolling window: at most `max` sends in any `span`, by the instants of the last `max`, or of more while more count.

use std::collections::VecDeque;

use super::Nanos;
use super::memory::{Gaps, Past};

#[derive(Debug)]
pub(super) struct Window {
    max: usize,
    span: Nanos,
    /// Oldest first; grows as sends come. More than `max` only while all of them count: a limit that was lowered, or sends
    /// that were not allowed. They are kept, since a later limit may count them.
    sends: VecDeque<Nanos>,
}

impl Window {
    pub(super) fn new(max: u32, span: Nanos) -> Self {
        Window { max: max.max(1) as usize, span, sends: VecDeque::new() }
    }

    /// When there is room for the `n`-th send from `now`, if those before it go as soon as they can.
    pub(super) fn earliest(&self, now: Nanos, n: u64) -> Nanos {
        let max = self.max as u64;
        let (laps, n) = (n / max, (n % max) as usize);
        // It takes the place of the send `max` before it; each further lap takes a place that this lap took.
        let replaced = (self.sends.len() + n).checked_sub(self.max);
        let free = replaced.map_or(0, |index| self.sends[index].saturating_add(self.span));
        now.max(free).saturating_add(laps.saturating_mul(self.span))
    }

    /// How many more fit in the span that ends now.
    pub(super) fn available(&self, now: Nanos) -> u32 {
        let left = self.sends.partition_point(|at| at.saturating_add(self.span) <= now);
        u32::try_from(self.max.saturating_sub(self.sends.len() - left)).unwrap_or(u32::MAX)
    }

    pub(super) fn sent(&mut self, at: Nanos) {
        let at = at.max(self.sends.back().copied().unwrap_or(0));
        while self.sends.len() >= self.max
            && let Some(oldest) = self.sends.front()
            && oldest.saturating_add(self.span) <= at
        {
            self.sends.pop_front();
        }
        self.sends.push_back(at);
    }

    /// Those that count.
    pub(super) fn memory(&self, now: Nanos) -> Gaps {
        let left = self.sends.partition_point(|at| at.saturating_add(self.span) <= now);
        Gaps::new(self.sends.range(left..).rev().map(|at| now.saturating_sub(*at)))
    }

    pub(super) fn recall(&mut self, memory: &Gaps, past: Past) {
        memory.oldest_first(past).for_each(|at| self.sent(at));
    }

    /// Sends that may have gone; more than fill the window make no difference.
    pub(super) fn assume(&mut self, at: Nanos, sends: u64) {
        (0..sends.min(self.max as u64)).for_each(|_| self.sent(at));
    }

    /// Fills the window as of now.
    pub(super) fn assume_the_worst(&mut self, now: Nanos) {
        self.assume(now, self.max as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_of_the_last_three_makes_room() {
        let mut window = Window::new(3, 60);
        // (send at, then available, then the next at)
        for (at, available, next) in
            [(0, 2, 0), (10, 1, 10), (20, 0, 60), (61, 0, 70), (75, 0, 80), (200, 2, 200)]
        {
            window.sent(at);
            assert_eq!(
                (window.available(at), window.earliest(at, 0)),
                (available, next),
                "after {at}"
            );
        }
    }

    #[test]
    fn the_queue_behind_takes_the_places_in_order_lap_after_lap() {
        let mut window = Window::new(3, 60);
        window.sent(0);
        window.sent(10);
        for (n, want) in [(0, 20), (1, 60), (2, 70), (3, 80), (4, 120), (5, 130), (6, 140)] {
            assert_eq!(window.earliest(20, n), want, "number {n}");
        }
    }

    #[test]
    fn sends_that_were_not_allowed_hold_their_place_and_time_never_runs_back() {
        let mut window = Window::new(2, 60);
        for (at, next) in [(10, 10), (10, 70), (12, 70), (5, 72), (6, 72)] {
            window.sent(at);
            assert_eq!(window.earliest(10, 0), next, "after {at}");
        }
        assert_eq!(window.available(72), 2);
    }

    #[test]
    fn memory_follows_the_sends() {
        let mut window = Window::new(100_000, 60);
        assert_eq!(window.sends.capacity(), 0);
        (0..300_000).for_each(|at| window.sent(at));
        assert!(window.sends.capacity() < 200_000);
    }
}
