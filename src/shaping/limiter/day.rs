//! A daily budget that starts anew at a time of day.
//!
//! Sends are dated on the monotonic clock; the wall clock only tells how far away a reset is. When it steps, nobody knows
//! which of its two opinions the provider shares, so a budget is over only when both agree: a reset has passed since the
//! last send by the clock as it was then, and by the clock as it is now.

use std::time::{SystemTime, UNIX_EPOCH};

use super::memory::{DayMemory, Past};
use super::{DAY, Nanos, nanos};

#[derive(Debug)]
pub(super) struct CalendarDay {
    max: u64,
    /// When a day starts here, after midnight UTC: the provider's reset and the margin.
    starts: Nanos,
    /// The last part of a day, the margin on both sides of the reset: what is sent then may count for either day, and so
    /// counts for both.
    tail: Nanos,
    spent: u64,
    spent_in_tail: u64,
    last_send: Nanos,
    /// The end of the day of `last_send`, by the clock of that time.
    ends: Nanos,
}

/// How the day on the books looks at some instant.
struct Today {
    over: bool,
    spent: u64,
    /// When the next one starts.
    next: Nanos,
}

impl CalendarDay {
    pub(super) fn new(max: u32, reset: Nanos, margin: Nanos) -> Self {
        let starts = reset.saturating_add(margin) % nanos(DAY);
        let tail = margin.saturating_mul(2);
        CalendarDay {
            max: u64::from(max.max(1)),
            starts,
            tail,
            spent: 0,
            spent_in_tail: 0,
            last_send: 0,
            ends: 0,
        }
    }

    /// When the budget allows the `n`-th send from `now`, if those before it go as soon as they can and not in a tail.
    pub(super) fn earliest(&self, now: Nanos, wall: SystemTime, n: u64) -> Nanos {
        let today = self.today(now, wall);
        let Some(too_many) = n.checked_sub(self.max.saturating_sub(today.spent)) else {
            return now;
        };
        // What was sent in the tail fills no more than the next day, however many a former limit allowed.
        let carried = if today.over { 0 } else { self.spent_in_tail.min(self.max) };
        let days = too_many.saturating_add(carried) / self.max;
        today.next.saturating_add(days.saturating_mul(nanos(DAY)))
    }

    /// What is left of the budget.
    pub(super) fn available(&self, now: Nanos, wall: SystemTime) -> u32 {
        u32::try_from(self.max.saturating_sub(self.today(now, wall).spent)).unwrap_or(u32::MAX)
    }

    pub(super) fn sent(&mut self, at: Nanos, wall: SystemTime) {
        self.spend(at, wall, 1);
    }

    /// So many sends at once, at least one.
    pub(super) fn spend(&mut self, at: Nanos, wall: SystemTime, sends: u64) {
        let at = at.max(self.last_send);
        let today = self.today(at, wall);
        let rest = nanos(DAY) - self.since_day_start(wall);
        if today.over {
            (self.spent_in_tail, self.ends) = (0, 0);
        }
        self.spent = today.spent.saturating_add(sends);
        if rest < self.tail {
            self.spent_in_tail = self.spent_in_tail.saturating_add(sends);
        }
        self.last_send = at;
        self.ends = self.ends.max(at.saturating_add(rest));
    }

    pub(super) fn memory(&self, now: Nanos) -> DayMemory {
        DayMemory {
            spent: self.spent,
            spent_in_tail: self.spent_in_tail,
            last_send_ns: now.saturating_sub(self.last_send),
            rest_ns: self.ends.saturating_sub(self.last_send),
        }
    }

    /// Where the reset was another one, the day on the books ends with the later of the two.
    pub(super) fn recall(&mut self, memory: &DayMemory, past: Past) {
        self.spent = memory.spent;
        self.spent_in_tail = memory.spent_in_tail.min(memory.spent);
        self.last_send = past.at(memory.last_send_ns);
        let rest = memory.rest_ns.min(nanos(DAY));
        self.ends = Past { now: past.now.saturating_add(rest), ..past }.at(memory.last_send_ns);
    }

    fn today(&self, now: Nanos, wall: SystemTime) -> Today {
        let since = self.since_day_start(wall);
        let next = now.saturating_add(nanos(DAY) - since);
        let started_after_last_send = self.last_send.saturating_add(since) < now;
        if now < self.ends || !started_after_last_send {
            let next = if started_after_last_send { self.ends } else { self.ends.max(next) };
            return Today { over: false, spent: self.spent, next };
        }
        let carried =
            if now < self.ends.saturating_add(nanos(DAY)) { self.spent_in_tail } else { 0 };
        Today { over: true, spent: carried, next }
    }

    /// Less than a day.
    fn since_day_start(&self, wall: SystemTime) -> Nanos {
        let day = i128::from(nanos(DAY));
        let wall = match wall.duration_since(UNIX_EPOCH) {
            Ok(after) => after.as_nanos() as i128,
            Err(before) => -(before.duration().as_nanos() as i128),
        };
        (wall - i128::from(self.starts)).rem_euclid(day) as Nanos
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const HOUR: Nanos = 3_600_000_000_000;

    /// The wall clock of a limiter that was made at this hour of the day.
    fn wall(made_at: Nanos) -> impl Fn(Nanos) -> SystemTime {
        move |now| UNIX_EPOCH + Duration::from_nanos(20_000 * 24 * HOUR + made_at + now)
    }

    #[test]
    fn a_budget_is_new_at_the_reset_and_not_before() {
        let mut day = CalendarDay::new(2, 8 * HOUR, 1);
        let clock = wall(6 * HOUR); // two hours before the reset
        let reset = 2 * HOUR + 1;
        for (at, left, next) in
            [(0, 1, 0), (5, 0, reset), (reset, 1, reset), (reset + 7, 0, reset + 24 * HOUR)]
        {
            assert_eq!(day.earliest(at, clock(at), 0), at);
            day.sent(at, clock(at));
            assert_eq!(
                (day.available(at, clock(at)), day.earliest(at, clock(at), 0)),
                (left, next),
                "after {at}"
            );
        }
        let now = reset + 10;
        for (n, days) in [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3)] {
            assert_eq!(day.earliest(now, clock(now), n), reset + days * 24 * HOUR, "number {n}");
        }
        for (now, left) in [(reset + 24 * HOUR - 1, 0), (reset + 24 * HOUR, 2)] {
            assert_eq!(day.available(now, clock(now)), left);
        }
    }

    #[test]
    fn a_send_within_the_margin_of_the_reset_counts_for_both_days() {
        let clock = wall(23 * HOUR);
        for (at, counts_twice) in [(HOUR - 11, 0), (HOUR - 9, 1), (HOUR, 1), (HOUR + 9, 1)] {
            let mut day = CalendarDay::new(5, 0, 10);
            day.sent(at, clock(at));
            let left = |now| day.available(now, clock(now));
            assert_eq!(left(HOUR + 9), 4, "old day, sent at {at}");
            assert_eq!(left(HOUR + 10), 5 - counts_twice, "new day, sent at {at}");
            assert_eq!(left(25 * HOUR + 10), 5, "the day after, sent at {at}");
            assert_eq!(day.earliest(at, clock(at), 8), 10 + HOUR + 24 * HOUR * counts_twice as u64);
            day.sent(12 * HOUR, clock(12 * HOUR));
            let tomorrow = 25 * HOUR + 10;
            assert_eq!(day.available(tomorrow, clock(tomorrow)), 5, "nothing is carried twice");
        }
    }

    #[test]
    fn a_step_of_the_wall_clock_puts_the_reset_off_and_never_forward() {
        // Spent at noon; then the clock says something else at once. (its hour, when a send can go again)
        for (hour, want) in
            [(12, 12), (23, 12), (24, 24), (25, 23), (36, 12), (0, 24), (11, 13), (13, 12)]
        {
            let mut day = CalendarDay::new(1, 0, 0);
            day.sent(0, wall(12 * HOUR)(0));
            let stepped = wall(hour * HOUR);
            let at = day.earliest(1, stepped(1), 0);
            assert_eq!(at, want * HOUR, "the clock says {hour}");
            assert_eq!(day.available(at - 1, stepped(at - 1)), 0);
            assert_eq!(day.available(at, stepped(at)), 1);
        }
    }

    #[test]
    fn a_recalled_day_is_the_same_day_whatever_the_clock_says_then() {
        let clock = wall(12 * HOUR);
        let origin = 48 * HOUR; // noon; a successor starts there as well
        // The last two within the margin of midnight, before and after it.
        for sends in [&[HOUR][..], &[HOUR, 12 * HOUR - 5], &[12 * HOUR - 5, 12 * HOUR + 5]] {
            let mut day = CalendarDay::new(3, 0, 10);
            sends.iter().for_each(|at| day.sent(origin + at, clock(origin + at)));
            let saved = origin + 12 * HOUR + 7;
            for elapsed in [0, 2, 3, 12 * HOUR, 24 * HOUR, 100 * HOUR] {
                let mut successor = CalendarDay::new(3, 0, 10);
                successor.recall(&day.memory(saved), Past { now: origin, elapsed });
                for (later, step) in [
                    (0, 0),
                    (3, 0),
                    (24 * HOUR, 0),
                    (0, 11 * HOUR),
                    (0, 13 * HOUR),
                    (HOUR, 30 * HOUR),
                ] {
                    let now = saved + elapsed + later;
                    let wall = clock(now + step);
                    let want = (day.available(now, wall), day.earliest(now, wall, 4) - now);
                    let now = origin + later;
                    let found =
                        (successor.available(now, wall), successor.earliest(now, wall, 4) - now);
                    assert_eq!(
                        found, want,
                        "{sends:?}, {elapsed} later, {later} after that, clock off by {step}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_clock_before_1970_still_has_days() {
        let mut day = CalendarDay::new(1, 0, 0);
        let clock = |now| UNIX_EPOCH - Duration::from_nanos(30 * HOUR) + Duration::from_nanos(now);
        day.sent(0, clock(0));
        assert_eq!(day.earliest(0, clock(0), 0), 6 * HOUR);
    }
}
