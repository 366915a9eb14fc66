//! The cadence: a token bucket kept as one instant, the one at which it is full again (GCRA's theoretical arrival time).

use std::time::Duration;

use super::memory::{BucketMemory, Past};
use super::{Cadence, Nanos, nanos};

#[derive(Debug)]
pub(super) struct TokenBucket {
    interval: Nanos,
    capacity: u64,
    /// Each missing token puts this an interval further into the future.
    full_at: Nanos,
}

impl TokenBucket {
    pub(super) fn new(cadence: Cadence) -> Self {
        let capacity = u64::from(cadence.capacity.max(1));
        TokenBucket { interval: nanos(cadence.interval).max(1), capacity, full_at: 0 }
    }

    /// When the `n`-th send from `now` has its token, if those before it go as soon as they can.
    pub(super) fn earliest(&self, now: Nanos, n: u64) -> Nanos {
        let spent = self.full_at.max(now).saturating_add(n.saturating_mul(self.interval));
        now.max(spent.saturating_sub((self.capacity - 1).saturating_mul(self.interval)))
    }

    /// Whole tokens in the bucket.
    pub(super) fn available(&self, now: Nanos) -> u32 {
        let missing = self.full_at.saturating_sub(now).div_ceil(self.interval);
        u32::try_from(self.capacity.saturating_sub(missing)).unwrap_or(u32::MAX)
    }

    pub(super) fn sent(&mut self, at: Nanos) {
        self.full_at = self.full_at.max(at).saturating_add(self.interval);
    }

    /// What is missing, in tokens, stays missing; only the price of a token changes. Rounded up: never too fast.
    pub(super) fn set_interval(&mut self, now: Nanos, interval: Duration) {
        let interval = nanos(interval).max(1);
        self.full_at = now.saturating_add(priced(self.full_at.saturating_sub(now), self.interval, interval));
        self.interval = interval;
    }

    pub(super) fn memory(&self, now: Nanos) -> BucketMemory {
        BucketMemory { missing_ns: self.full_at.saturating_sub(now), interval_ns: self.interval }
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
        self.full_at = self.full_at.max(now.saturating_add(self.capacity.saturating_mul(self.interval)));
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

    /// Sends at each `at` and wants the next one at `want`.
    fn table(mut bucket: TokenBucket, rows: &[(Nanos, Nanos)]) {
        for &(at, want) in rows {
            bucket.sent(at);
            assert_eq!(bucket.earliest(at, 0), want, "after the send at {at}");
        }
    }

    #[test]
    fn spacing_counts_from_the_send_and_idle_time_earns_nothing() {
        table(bucket(10, 1), &[(0, 10), (10, 20), (23, 33), (100, 110), (110, 120)]);
    }

    #[test]
    fn a_bucket_gives_its_tokens_at_once_then_one_an_interval() {
        table(bucket(10, 3), &[(0, 0), (0, 0), (0, 10), (10, 20), (25, 30), (30, 40), (90, 90), (90, 90), (90, 100)]);
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
        (0..4).for_each(|_| bucket.sent(0));
        for (now, want) in [(0, 0), (19, 0), (20, 1), (29, 1), (30, 2), (40, 3), (900, 3)] {
            assert_eq!(bucket.available(now), want, "at {now}");
        }
    }

    #[test]
    fn a_new_interval_prices_what_is_missing_from_now_on() {
        let mut bucket = bucket(10, 2);
        bucket.sent(0);
        bucket.sent(0);
        bucket.set_interval(5, Duration::from_nanos(20)); // 1.5 tokens missing: one comes after half a token, 10
        assert_eq!((bucket.earliest(5, 0), bucket.earliest(5, 1)), (15, 35));
        bucket.set_interval(11, Duration::from_nanos(3)); // 1.2 missing: 3.6 rounded up
        assert_eq!((bucket.earliest(11, 0), bucket.earliest(11, 1), bucket.earliest(11, 2)), (12, 15, 18));
    }

    #[test]
    fn extremes_saturate() {
        let mut slow = bucket(u64::MAX, u32::MAX);
        slow.sent(u64::MAX);
        slow.set_interval(0, Duration::MAX);
        assert_eq!(slow.earliest(7, u64::MAX), 7, "a burst of that size never ends");
        let mut zero = bucket(0, 0);
        zero.sent(0);
        assert_eq!((zero.earliest(0, 0), zero.available(1)), (1, 1));
    }
}
