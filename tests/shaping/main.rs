//! Proofs of the limiter on a fake clock: properties under random traffic, and millions of sends counted by naive
//! providers. Times are nanoseconds since the limiter was made.

#![allow(clippy::unwrap_used)] // these are tests, helpers included

mod line;
mod oracle;
mod properties;
mod restarts;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use limitrate::shaping::limiter::{Cadence, Limiter, Limits, Now};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
const MINUTE: u64 = 60 * SECOND;
const DAY: u64 = 24 * 60 * MINUTE;

/// A steady clock; at 0 the wall shows this much past midnight UTC.
#[derive(Clone, Copy)]
struct Clock {
    base: Instant,
    past_midnight: u64,
}

impl Clock {
    fn new(past_midnight: u64) -> Self {
        Clock { base: Instant::now(), past_midnight }
    }

    fn at(&self, time: u64) -> Now {
        let wall = UNIX_EPOCH + Duration::from_nanos(20_000 * DAY + self.past_midnight + time);
        Now { mono: self.mono(time), wall }
    }

    fn mono(&self, time: u64) -> Instant {
        self.base + Duration::from_nanos(time)
    }

    fn time(&self, instant: Instant) -> u64 {
        (instant - self.base).as_nanos() as u64
    }

    /// When a send of `cost` may go; concurrency must not hold it.
    fn next(&self, limiter: &Limiter, now: u64, cost: u64) -> u64 {
        self.time(limiter.next(self.at(now), cost).at.unwrap())
    }

    /// Sends what was asked for at this very instant, and gets the answer within it.
    fn send(&self, limiter: &mut Limiter, at: u64, cost: u64) {
        self.send_late(limiter, at, 0, cost);
    }

    /// The same for what has been asked for since `waited`.
    fn send_late(&self, limiter: &mut Limiter, at: u64, waited: u64, cost: u64) {
        let id = limiter.sent(self.at(at), Duration::from_nanos(waited), cost);
        limiter.release(id);
    }

    /// The limiter of the next run, which starts at `now`, when `elapsed` has passed since the former one's end; what is remembered
    /// goes through a file.
    fn restart(&self, limits: &Limits, former: &Limiter, elapsed: u64, now: u64) -> Limiter {
        let memory = serde_json::to_vec(&former.memory(self.at(now - elapsed))).unwrap();
        let mut limiter = Limiter::new(limits, self.at(now));
        limiter.recall(
            &serde_json::from_slice(&memory).unwrap(),
            Duration::from_nanos(elapsed),
            self.at(now),
        );
        limiter
    }

    /// The instants of `count` sends from `now` by a queue that never runs dry.
    fn greedy(&self, limiter: &mut Limiter, now: u64, count: usize) -> Vec<u64> {
        let mut now = now;
        let send = |_| {
            now = self.next(limiter, now, 0);
            self.send(limiter, now, 0);
            now
        };
        (0..count).map(send).collect()
    }
}

fn cadence(interval: u64, capacity: u32) -> Option<Cadence> {
    Some(Cadence { interval: Duration::from_nanos(interval), capacity })
}

/// The lateness that the cadence makes up for.
fn made_up(interval: u64, capacity: u32) -> u64 {
    if capacity > 1 && interval > MS { MS } else { 20 * MS }
}

/// Between two sends without a burst.
fn least_gap(interval: u64, capacity: u32) -> u64 {
    if capacity > 1 { 0 } else { interval.saturating_sub(MS) }
}

/// Limits without any, and without a margin.
fn none() -> Limits {
    Limits { margin: Duration::ZERO, ..Limits::default() }
}

/// A wall clock that is off by `error` nanoseconds.
fn stepped(now: Now, error: i64) -> Now {
    let step = Duration::from_nanos(error.unsigned_abs());
    let wall: SystemTime = if error < 0 { now.wall - step } else { now.wall + step };
    Now { wall, ..now }
}
