//! What 429s teach: a slower cadence while they repeat, and how long to pause where the provider does not say.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::memory::COOLDOWN_MAX;

/// A refusal this soon after the former one is a repetition.
const MEMORY: Duration = Duration::from_secs(10 * 60);
/// A repeated refusal leaves this part of the rate.
const DECREASE: f64 = 1.0 / 1.5;
/// The rate never falls below this part of the configured one.
const FLOOR: f64 = 1.0 / 8.0;
/// Quiet time in which the whole configured rate would be regained.
const RECOVERY: Duration = Duration::from_secs(30 * 60);

/// Learns a longer interval from repeated 429s (additive increase, multiplicative decrease of the rate) and forgets it in
/// quiet time. Never shorter than the configured one: it learns downwards only.
#[derive(Debug)]
pub struct Adaptive {
    configured: Duration,
    /// The rate as of `quiet_since`, as a part of the configured one.
    rate: f64,
    /// The end of the last refusal's pause; `None` before the first.
    quiet_since: Option<Instant>,
}

impl Adaptive {
    /// Starts at the configured interval.
    pub fn new(configured: Duration) -> Self {
        Adaptive { configured, rate: 1.0, quiet_since: None }
    }

    /// A 429 arrived, and the provider pauses until `until`. What arrives before that (or within an interval) was under
    /// way already and teaches nothing new. The first one after a long peace, or before any, teaches nothing either.
    pub fn refused(&mut self, now: Instant, until: Instant) {
        if self.quiet_since.is_some_and(|end| now < end) {
            return;
        }
        let repeated =
            self.quiet_since.is_some_and(|end| now.saturating_duration_since(end) < MEMORY);
        let rate = self.rate(now);
        self.rate = if repeated || rate < 1.0 { (rate * DECREASE).max(FLOOR) } else { rate };
        self.quiet_since = Some(until.max(now + self.stretched(self.rate)));
    }

    /// The interval to use now.
    pub fn interval(&self, now: Instant) -> Duration {
        self.stretched(self.rate(now))
    }

    /// What is to be remembered as of now; `None` at the configured rate.
    pub fn memory(&self, now: Instant) -> Option<Learned> {
        let rate = self.rate(now);
        let quiet_in = self.quiet_since.filter(|_| rate < 1.0)?.saturating_duration_since(now);
        Some(Learned {
            rate_ppm: (rate * 1e6) as u32,
            quiet_in_ms: quiet_in.as_millis().try_into().unwrap_or(u64::MAX),
        })
    }

    /// Goes on with what was learned before; `elapsed` has passed since. That time was not quiet: nothing was asked.
    pub fn recall(&mut self, memory: &Learned, elapsed: Duration, now: Instant) {
        let quiet_in = Duration::from_millis(memory.quiet_in_ms).min(COOLDOWN_MAX);
        self.rate = (f64::from(memory.rate_ppm) / 1e6).clamp(FLOOR, 1.0);
        self.quiet_since = Some(now + quiet_in.saturating_sub(elapsed));
    }

    fn rate(&self, now: Instant) -> f64 {
        let quiet =
            self.quiet_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        (self.rate + quiet.div_duration_f64(RECOVERY)).min(1.0)
    }

    fn stretched(&self, rate: f64) -> Duration {
        let interval = (self.configured.as_nanos() as f64 / rate).ceil();
        Duration::from_nanos(interval as u64).max(self.configured)
    }
}

/// What 429s have taught, to be remembered.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Learned {
    /// The part of the configured rate, in millionths.
    rate_ppm: u32,
    /// What is left of the last refusal's pause.
    quiet_in_ms: u64,
}

/// How long to pause after the `refusals`-th 429 in a row (from 1) that named no time: 1 s, doubled each time up to 60 s,
/// less up to a quarter by `random` in `[0, 1)`, so that gateways which share a key do not come back together.
pub fn backoff(refusals: u32, random: f64) -> Duration {
    let doublings = refusals.saturating_sub(1).min(6);
    let full = Duration::from_secs(60.min(1 << doublings));
    full.mul_f64(1.0 - random.clamp(0.0, 1.0) / 4.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn repeated_refusals_stretch_the_interval_and_quiet_time_restores_it() {
        let start = Instant::now();
        let mut adaptive = Adaptive::new(seconds(2));
        // (429 at, pause until, then the interval in ms)
        let refusals = [
            (0, 10, 2000),      // the first
            (5, 60, 2000),      // of the same pause
            (12, 20, 3000),     // a repetition: x 1.5
            (19, 90, 3000),     // of the same pause
            (20, 20, 4500),     // again; its own pause lasts an interval
            (24, 24, 4500),     // within it
            (25, 25, 6745),     // again, after 0.5 s of recovery
            (2000, 2000, 2000), // recovered long ago, and the memory is gone
            (2300, 2300, 3000), // five minutes later: a repetition
            (2304, 2304, 4496), // again
            (2950, 2950, 3744), // over ten minutes later, but not yet recovered
        ];
        for (at, until, want) in refusals {
            adaptive.refused(start + seconds(at), start + seconds(until));
            let interval = adaptive.interval(start + seconds(at)).as_millis();
            assert_eq!(interval, want, "after the 429 at {at} s");
        }
        let since = 2950.0 + 3.744;
        for (at, part) in [
            (2953.0, 2.0 / 3.744),
            (since + 180.0, 2.0 / 3.744 + 0.1),
            (since + 840.0, 1.0),
            (9e9, 1.0),
        ] {
            let interval = adaptive.interval(start + Duration::from_secs_f64(at)).as_secs_f64();
            assert!((interval - 2.0 / part).abs() < 0.002, "{interval} at {at} s");
            assert!(interval >= 2.0);
        }
    }

    #[test]
    fn what_was_learned_is_remembered_and_heals_in_quiet_time_only() {
        let start = Instant::now();
        let at = |at| start + seconds(at);
        let mut adaptive = Adaptive::new(seconds(2));
        adaptive.refused(at(0), at(0));
        assert_eq!(adaptive.memory(at(10)), None, "nothing was stretched");
        adaptive.refused(at(10), at(100));
        // (remembered at, elapsed, then a 429 so much later, whether it is of the same pause)
        for (saved, elapsed, later, same) in [
            (20, 0, 79, true),
            (20, 0, 80, false),
            (20, 30, 49, true),
            (20, 30, 50, false),
            (150, 0, 0, false),
        ] {
            let memory = adaptive.memory(at(saved)).unwrap();
            let mut successor = Adaptive::new(seconds(2));
            successor.recall(&memory, seconds(elapsed), at(1000));
            let interval = |adaptive: &Adaptive, now| adaptive.interval(at(now)).as_millis();
            assert_eq!(
                interval(&successor, 1000),
                interval(&adaptive, saved),
                "{saved} s, {elapsed} s"
            );
            let before = interval(&successor, 1000 + later);
            successor.refused(at(1000 + later), at(1000 + later));
            assert_eq!(
                interval(&successor, 1000 + later) == before,
                same,
                "{saved} s, {elapsed} s, {later} s"
            );
        }
        assert_eq!(adaptive.memory(at(100 + 600)), None, "it has healed");
        for (rate_ppm, interval) in [(0, 16), (u32::MAX, 2), (500_000, 4)] {
            let mut successor = Adaptive::new(seconds(2));
            successor.recall(&Learned { rate_ppm, quiet_in_ms: u64::MAX }, seconds(0), at(0));
            assert_eq!(successor.interval(at(7 * 24 * 3600)), seconds(interval), "{rate_ppm}");
            assert_eq!(successor.interval(at(8 * 24 * 3600)), seconds(2), "{rate_ppm}");
        }
    }

    #[test]
    fn the_stretch_is_bounded() {
        let start = Instant::now();
        let mut adaptive = Adaptive::new(seconds(1));
        for at in (0..1000).step_by(10) {
            adaptive.refused(start + seconds(at), start + seconds(at));
        }
        assert_eq!(adaptive.interval(start + seconds(990)), seconds(8));
    }

    #[test]
    fn backoff_doubles_to_a_minute_less_its_jitter() {
        for (refusals, want) in [
            (0, 1),
            (1, 1),
            (2, 2),
            (3, 4),
            (4, 8),
            (5, 16),
            (6, 32),
            (7, 60),
            (8, 60),
            (u32::MAX, 60),
        ] {
            assert_eq!(backoff(refusals, 0.0), seconds(want));
            assert_eq!(backoff(refusals, 0.5), seconds(want).mul_f64(0.875));
            assert!(backoff(refusals, 0.999_999) > seconds(want).mul_f64(0.75));
        }
    }
}
