//! The cadence: a token bucket kept as one instant, the one at which it is full again (GCRA's theoretical arrival time).
//!
//! A send that waited and went late (a timer, a task switch, the write) takes its token as of when it could have gone, so
//! that lateness does not add up and the rate is kept in the long run. How far back that reaches is bounded
//! ([`made_up`]), and so is what a gap can lose to it ([`least_gap`]): a stall of the thread is made up by several gaps.

use std::time::Duration;

use super::memory::{BucketMemory, NS_PER_MS, Past};
use super::{Cadence, Nanos, nanos};

/// A gap is shorter than the interval by no more.
const MADE_UP_BY_A_GAP: Nanos = NS_PER_MS;

/// So much lateness is made up where each gap has its bound: longer than a slice of a busy machine's scheduler.
const MADE_UP: Nanos = 20 * NS_PER_MS;

/// The most that a send's token may be dated back. In any span of length T there are at most
/// `capacity - 1 + ceil((T + made_up) / interval)` sends.
pub(super) fn made_up(interval: Nanos, capacity: u64) -> Nanos {
    // A burst has no gaps that could bound it.
    if capacity == 1 || interval <= MADE_UP_BY_A_GAP { MADE_UP } else { MADE_UP_BY_A_GAP }
}

/// No two sends under one interval are closer; under a new one what is left of a gap is priced like all that is missing.
pub(super) fn least_gap(interval: Nanos, capacity: u64) -> Nanos {
    if capacity == 1 { interval.saturating_sub(MADE_UP_BY_A_GAP) } else { 0 }
}

#[derive(Debug)]
pub(super) struct TokenBucket {
    interval: Nanos,
    capacity: u64,
    /// Each missing token puts this an interval further into the future.
    full_at: Nanos,
    /// Without bursts: the end of the last send's least gap.
    closed_until: Nanos,
}

impl TokenBucket {
    pub(super) fn new(cadence: Cadence) -> Self {
        let capacity = u64::from(cadence.capacity.max(1));
        TokenBucket {
            interval: nanos(cadence.interval).max(1),
            capacity,
            full_at: 0,
            closed_until: 0,
        }
    }

    /// When the `n`-th send from `now` has its token, if those before it go as soon as they can and the next one has
    /// waited already, as far as that counts.
    pub(super) fn earliest(&self, now: Nanos, n: u64) -> Nanos {
        let taken = self.full_at.max(now.saturating_sub(self.made_up()));
        let spent = taken.saturating_add(n.saturating_mul(self.interval));
        let by_tokens = spent.saturating_sub((self.capacity - 1).saturating_mul(self.interval));
        let by_gaps = now.max(self.closed_until).saturating_add(n.saturating_mul(self.least_gap()));
        by_tokens.max(by_gaps)
    }

    fn made_up(&self) -> Nanos {
        made_up(self.interval, self.capacity)
    }

    fn least_gap(&self) -> Nanos {
        least_gap(self.interval, self.capacity)
    }

    /// Whole tokens in the bucket. What late sends make up is not foreseen.
    pub(super) fn available(&self, now: Nanos) -> u32 {
        let missing = self.missing(now).div_ceil(self.interval);
        u32::try_from(self.capacity.saturating_sub(missing)).unwrap_or(u32::MAX)
    }

    /// Until all tokens are there, without what a late send may make up.
    fn missing(&self, now: Nanos) -> Nanos {
        self.full_at.max(self.closed_until).saturating_sub(now)
    }

    /// A send that had been wanted for `waited`. Its token is of the instant at which it was wanted and there, and at most
    /// [`made_up`] old.
    pub(super) fn sent(&mut self, at: Nanos, waited: Nanos) {
        let taken = at.saturating_sub(waited.min(self.made_up()));
        self.full_at = self.full_at.max(taken).saturating_add(self.interval);
        if self.capacity == 1 {
            self.closed_until = self.closed_until.max(at.saturating_add(self.least_gap()));
        }
    }

    /// What is missing, in tokens, stays missing; only the price of a token changes. Rounded up: never too fast. A full
    /// bucket stays full since when it was.
    pub(super) fn set_interval(&mut self, now: Nanos, interval: Duration) {
        let interval = nanos(interval).max(1);
        for at in [&mut self.full_at, &mut self.closed_until] {
            if let Some(missing) = at.checked_sub(now) {
                *at = now.saturating_add(priced(missing, self.interval, interval));
            }
        }
        self.interval = interval;
    }

    pub(super) fn memory(&self, now: Nanos) -> BucketMemory {
        BucketMemory { missing_ns: self.missing(now), interval_ns: self.interval }
    }

    /// Whatever is missing, nothing waits longer than the bucket takes to fill.
    pub(super) fn recall(&mut self, memory: &BucketMemory, past: Past) {
        let missing = memory.missing_ns.saturating_sub(past.elapsed);
        let missing = priced(missing, memory.interval_ns.max(1), self.interval);
        let most = (2 * self.capacity - 1).saturating_mul(self.interval);
        self.full_at = past.now.saturating_add(missing.min(most));
    }

    /// Empties the bucket: the next token is a whole interval away.
    pub(super) fn assume_the_worst(&mut self, now: Nanos) {
        self.full_at =
            self.full_at.max(now.saturating_add(self.capacity.saturating_mul(self.interval)));
    }
}

/// The time of as many tokens at a new interval, rounded up.
fn priced(missing: Nanos, interval: Nanos, new: Nanos) -> Nanos {
    let time = (u128::from(missing) * u128::from(new)).div_ceil(u128::from(interval));
    Nanos::try_from(time).unwrap_or(Nanos::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(interval: u64, capacity: u32) -> TokenBucket {
        TokenBucket::new(Cadence { interval: Duration::from_nanos(interval), capacity })
    }

    /// Sends at each `at`, asked for at that instant, and wants the next one at `want`.
    fn table(mut bucket: TokenBucket, rows: &[(Nanos, Nanos)]) {
        for &(at, want) in rows {
            bucket.sent(at, 0);
            assert_eq!(bucket.earliest(at, 0), want, "after the send at {at}");
        }
    }

    #[test]
    fn spacing_counts_from_the_send_and_idle_time_earns_nothing() {
        table(bucket(10, 1), &[(0, 10), (10, 20), (23, 33), (100, 110), (110, 120)]);
    }

    const MS: Nanos = NS_PER_MS;

    #[test]
    fn a_line_that_is_late_at_each_send_keeps_the_rate() {
        for (interval, late) in
            [(MS, 300_000), (10 * MS, 300_000), (10 * MS, MS), (10 * MS, 20 * MS), (MS, 20 * MS)]
        {
            let mut bucket = bucket(interval, 1);
            let mut at = 0;
            // Everybody has waited since the start, and now and then the thread stalls.
            for n in 0..1000 {
                at = bucket.earliest(at, 0) + if n % 100 == 99 { late } else { 300_000 };
                bucket.sent(at, at);
            }
            let exact = 999 * interval;
            assert!(
                (exact..=exact + exact / 200 + late).contains(&at),
                "{interval} {late}: the last at {at}"
            );
        }
    }

    #[test]
    fn a_late_send_is_made_up_by_several_gaps_and_what_is_later_moves_those_behind_it() {
        let mut bucket = bucket(100 * MS, 1);
        // Two milliseconds late; then 30, of which 20 count.
        for (at, next) in [(2, 101), (101, 200), (200, 300), (330, 429), (429, 528), (528, 627)] {
            bucket.sent(at * MS, at * MS);
            assert_eq!(bucket.earliest(at * MS, 0), next * MS, "after the send at {at} ms");
        }
        let mut at = 627 * MS;
        for _ in 0..30 {
            bucket.sent(at, at);
            at = bucket.earliest(at, 0);
        }
        assert_eq!(at, 310 * MS + 33 * 100 * MS);
    }

    #[test]
    fn after_an_idle_spell_the_interval_counts_from_when_the_send_was_asked_for() {
        let idle = 1000 * MS;
        for (interval, capacity, waited, made_up) in [
            (10 * MS, 1, 0, 0),
            (10 * MS, 1, 400_000, 400_000),
            (10 * MS, 1, 7 * MS, 7 * MS),
            (10 * MS, 1, 500 * MS, 20 * MS),
            (10 * MS, 2, 400_000, 400_000),
            (10 * MS, 2, 7 * MS, MS),
            (MS + 1, 2, 500 * MS, MS),
            (MS, 2, 7 * MS, 7 * MS),
            (MS, 2, 500 * MS, 20 * MS),
        ] {
            let mut bucket = bucket(interval, capacity);
            bucket.sent(0, 0);
            bucket.sent(idle, waited);
            assert_eq!(bucket.full_at, idle - made_up + interval, "{interval} {capacity} {waited}");
        }
    }

    #[test]
    fn a_turn_is_never_expected_later_than_it_may_come() {
        let mut waiting = bucket(10 * MS, 1);
        waiting.sent(0, 0);
        // The bucket has been full since 10 ms, and who is next may have waited longer than that counts.
        let now = 50 * MS;
        assert_eq!([0, 1, 2].map(|n| waiting.earliest(now, n)), [now, 59 * MS, 68 * MS]);
        waiting.sent(now, 30 * MS);
        assert_eq!([0, 1].map(|n| waiting.earliest(now, n)), [59 * MS, 68 * MS]);
    }

    #[test]
    fn an_interval_that_stays_takes_no_lateness_away() {
        let mut bucket = bucket(10 * MS, 1);
        bucket.sent(0, 0);
        bucket.set_interval(10 * MS + 300_000, Duration::from_millis(10));
        bucket.sent(10 * MS + 300_000, 10 * MS);
        assert_eq!(bucket.full_at, 20 * MS);
        bucket.set_interval(20 * MS + 300_000, Duration::from_millis(40));
        bucket.sent(20 * MS + 300_000, 10 * MS);
        assert_eq!(bucket.full_at, 60 * MS);
    }

    #[test]
    fn a_bucket_gives_its_tokens_at_once_then_one_an_interval() {
        table(
            bucket(10, 3),
            &[(0, 0), (0, 0), (0, 10), (10, 20), (25, 30), (30, 40), (90, 90), (90, 90), (90, 100)],
        );
    }

    #[test]
    fn sends_that_were_not_allowed_are_paid_back() {
        table(bucket(10, 1), &[(0, 10), (0, 20), (0, 30), (5, 40), (40, 50)]);
        table(bucket(10, 2), &[(0, 0), (0, 10), (0, 20), (0, 30), (31, 40)]);
    }

    #[test]
    fn available_counts_whole_tokens() {
        let mut bucket = bucket(10, 3);
        assert_eq!(bucket.available(0), 3);
        (0..4).for_each(|_| bucket.sent(0, 0));
        for (now, want) in [(0, 0), (19, 0), (20, 1), (29, 1), (30, 2), (40, 3), (900, 3)] {
            assert_eq!(bucket.available(now), want, "at {now}");
        }
    }

    #[test]
    fn a_new_interval_prices_what_is_missing_from_now_on() {
        let mut bucket = bucket(10, 2);
        bucket.sent(0, 0);
        bucket.sent(0, 0);
        bucket.set_interval(5, Duration::from_nanos(20)); // 1.5 tokens missing: one comes after half a token, 10
        assert_eq!((bucket.earliest(5, 0), bucket.earliest(5, 1)), (15, 35));
        bucket.set_interval(11, Duration::from_nanos(3)); // 1.2 missing: 3.6 rounded up
        assert_eq!(
            (bucket.earliest(11, 0), bucket.earliest(11, 1), bucket.earliest(11, 2)),
            (12, 15, 18)
        );
    }

    #[test]
    fn extremes_saturate() {
        let mut slow = bucket(u64::MAX, u32::MAX);
        slow.sent(u64::MAX, u64::MAX);
        slow.set_interval(0, Duration::MAX);
        assert_eq!(slow.earliest(7, u64::MAX), 7, "a burst of that size never ends");
        let mut zero = bucket(0, 0);
        zero.sent(0, u64::MAX);
        assert_eq!((zero.earliest(0, 0), zero.available(1)), (1, 1));
    }
}
