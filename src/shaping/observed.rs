//! How many sends really went out in the last minute.

use std::time::{Duration, Instant};

const SLOTS: usize = 60;
const SLOT: Duration = Duration::from_secs(1);

/// A count of the last 60 s, in steps of one second.
#[derive(Debug)]
pub struct Observed {
    start: Instant,
    /// Sends by the second in which they went, modulo 60.
    slots: [u32; SLOTS],
    /// The second that was last written or read.
    head: u64,
}

impl Observed {
    /// Nothing was sent yet.
    pub fn new(now: Instant) -> Observed {
        Observed { start: now, slots: [0; SLOTS], head: 0 }
    }

    /// One send.
    pub fn sent(&mut self, at: Instant) {
        self.forget(at);
        self.slots[(self.head % SLOTS as u64) as usize] += 1;
    }

    /// Sends in the last 60 s.
    pub fn per_minute(&mut self, now: Instant) -> u32 {
        self.forget(now);
        self.slots.iter().sum()
    }

    /// Clears the slots of the seconds that have passed since.
    fn forget(&mut self, now: Instant) {
        let second = now.saturating_duration_since(self.start).as_secs() / SLOT.as_secs();
        let passed = second.saturating_sub(self.head).min(SLOTS as u64);
        for step in 1..=passed {
            self.slots[((self.head + step) % SLOTS as u64) as usize] = 0;
        }
        if passed == SLOTS as u64 {
            self.slots = [0; SLOTS];
        }
        self.head = self.head.max(second);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_minute_counts() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut observed = Observed::new(start);
        for seconds in [0.0, 0.5, 30.0, 59.9] {
            observed.sent(at(seconds));
        }
        assert_eq!(observed.per_minute(at(59.9)), 4);
        assert_eq!(observed.per_minute(at(60.0)), 2);
        assert_eq!(observed.per_minute(at(90.0)), 1);
        observed.sent(at(90.2));
        assert_eq!(observed.per_minute(at(119.0)), 1);
        assert_eq!(observed.per_minute(at(1e6)), 0);
    }
}
