//! How long something took, over many times, in buckets. Pure.

use std::time::Duration;

/// The upper bounds of the buckets, in seconds; one more bucket has all that is longer. From what a LAN takes to what a
/// patient caller does.
pub const BOUNDS: [f64; 15] =
    [0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// Counts by bucket, and the sum.
#[derive(Debug, Clone, Copy, Default)]
pub struct Histogram {
    /// Times no longer than each of [`BOUNDS`] and longer than the one before; the last: longer than all.
    pub buckets: [u64; BOUNDS.len() + 1],
    /// All times together.
    pub sum: Duration,
}

impl Histogram {
    /// Once more.
    pub fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.buckets[BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum += time;
    }

    /// How many times.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let mut histogram = Histogram::default();
        for millis in [0, 1, 2, 5, 600_000, 600_001] {
            histogram.add(Duration::from_millis(millis));
        }
        assert_eq!((histogram.buckets[0], histogram.buckets[1], histogram.buckets[2]), (2, 2, 0));
        assert_eq!(histogram.buckets[14..], [1, 1]);
        assert_eq!((histogram.count(), histogram.sum), (6, Duration::from_millis(1_200_009)));
    }
}
