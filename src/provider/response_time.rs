//! How long a provider usually takes from the send to the response head, by model: what a client's deadline has to leave
//! for it.
//!
//! Pure. Plain responses and streams are counted apart: the head of a plain one comes when all of it is written.

use std::cell::RefCell;
use std::time::Duration;

/// The latest responses of a model that count.
const KEPT: usize = 8;

/// What is left for a response while none has been seen, or a quarter of the client's time where that is shorter.
const UNKNOWN: Duration = Duration::from_secs(1);

/// The times of one provider.
#[derive(Debug, Default)]
pub(super) struct ResponseTimes(RefCell<Vec<[Recent; 2]>>);

/// A ring of the latest times.
#[derive(Debug, Clone, Default)]
struct Recent {
    times: [Duration; KEPT],
    count: usize,
}

impl ResponseTimes {
    /// A response head came after `took`.
    pub fn add(&self, model: usize, stream: bool, took: Duration) {
        let mut models = self.0.borrow_mut();
        if models.len() <= model {
            models.resize(model + 1, Default::default());
        }
        models[model][usize::from(stream)].add(took);
    }

    /// None came within `waited`, when the client gave up. Says nothing where responses usually take longer.
    pub fn add_missing(&self, model: usize, stream: bool, waited: Duration) {
        if self.known(model, stream).is_some_and(|usual| waited > usual) {
            self.add(model, stream, waited);
        }
    }

    /// What a client that waits for `patience` has to leave for the response: three of four have come by then.
    pub fn usual(&self, model: usize, stream: bool, patience: Duration) -> Duration {
        self.known(model, stream).unwrap_or_else(|| UNKNOWN.min(patience / 4))
    }

    fn known(&self, model: usize, stream: bool) -> Option<Duration> {
        self.0.borrow().get(model)?[usize::from(stream)].upper_quartile()
    }
}

impl Recent {
    fn add(&mut self, took: Duration) {
        self.times[self.count % KEPT] = took;
        self.count += 1;
    }

    fn upper_quartile(&self) -> Option<Duration> {
        let mut times = self.times;
        let times = &mut times[..self.count.min(KEPT)];
        times.sort_unstable();
        times.get((times.len() * 3).div_ceil(4).saturating_sub(1)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_model_without_responses_gets_a_floor() {
        let times = ResponseTimes::default();
        assert_eq!(times.usual(0, false, seconds(60)), seconds(1));
        assert_eq!(times.usual(7, true, seconds(2)), Duration::from_millis(500));
        times.add_missing(0, false, seconds(9));
        assert_eq!(times.usual(0, false, seconds(60)), seconds(1), "nothing is known yet");
    }

    #[test]
    fn three_of_four_of_the_latest_responses_fit() {
        let times = ResponseTimes::default();
        for (took, usual) in
            [(4, 4), (2, 4), (1, 4), (1, 2), (9, 4), (9, 9), (1, 9), (1, 4), (1, 2)]
        {
            times.add(1, true, seconds(took));
            assert_eq!(times.usual(1, true, seconds(60)), seconds(usual), "after {took}");
        }
        assert_eq!(times.usual(1, false, seconds(60)), seconds(1), "plain responses are others");
        (0..KEPT).for_each(|_| times.add(1, true, seconds(3)));
        assert_eq!(times.usual(1, true, seconds(60)), seconds(3), "the latest count");
    }

    #[test]
    fn a_response_that_does_not_come_counts_as_long_as_it_was_waited_for() {
        let times = ResponseTimes::default();
        times.add(0, false, seconds(2));
        times.add_missing(0, false, seconds(1));
        assert_eq!(times.usual(0, false, seconds(60)), seconds(2));
        times.add_missing(0, false, seconds(10));
        assert_eq!(times.usual(0, false, seconds(60)), seconds(10));
    }
}
