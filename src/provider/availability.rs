//! Whether connections to a provider can be made at present, as far as is known.
//!
//! Pure: takes `now`. Does not know who else could take a request.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long other providers are asked first after the first failure; twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What the latest tries to connect have shown.
#[derive(Debug, Default)]
pub(super) struct Availability {
    /// In a row.
    failures: Cell<u32>,
    last_failure: Cell<Option<Instant>>,
    /// Until then the provider counts as down.
    down_until: Cell<Option<Instant>>,
}

impl Availability {
    /// Whether no connection could be made a moment ago.
    pub fn is_down(&self, now: Instant) -> bool {
        self.down_until.get().is_some_and(|until| now < until)
    }

    /// A connection stands.
    pub fn reached(&self) {
        self.failures.set(0);
        self.down_until.set(None);
    }

    /// A connection that was `begun` then could not be made. False if that is known already: it was begun before the
    /// latest failure.
    pub fn failed(&self, begun: Instant, now: Instant) -> bool {
        if self.last_failure.get().is_some_and(|last| begun < last) {
            return false;
        }
        let doublings = self.failures.get().min(8);
        let pause = LONGEST_PAUSE.min(FIRST_PAUSE * (1 << doublings));
        self.failures.set(self.failures.get().saturating_add(1));
        self.last_failure.set(Some(now));
        self.down_until.set(Some(now + pause));
        true
    }

    /// One request tries whether the provider is back, for up to `limit`; it still counts as down for the others.
    pub fn is_probed(&self, now: Instant, limit: Duration) {
        if self.failures.get() > 0 && !self.is_down(now) {
            self.down_until.set(Some(now + limit));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn each_further_failure_doubles_the_pause_and_a_success_ends_it() {
        let (provider, start) = (Availability::default(), Instant::now());
        assert!(!provider.is_down(start));
        let mut now = start;
        for pause in [5, 10, 20, 40, 60, 60] {
            assert!(provider.failed(now, now));
            assert!(provider.is_down(now + seconds(pause) - Duration::from_nanos(1)), "{pause}");
            now += seconds(pause);
            assert!(!provider.is_down(now), "{pause}");
        }
        provider.failed(now, now);
        provider.reached();
        assert!(!provider.is_down(now));
        provider.failed(now, now);
        assert!(!provider.is_down(now + seconds(5)), "the pauses begin anew");
    }

    #[test]
    fn connections_that_fail_together_count_once() {
        let (provider, start) = (Availability::default(), Instant::now());
        assert!(provider.failed(start, start + seconds(1)));
        assert!(!provider.failed(start, start + seconds(2)));
        assert!(!provider.is_down(start + seconds(6)));
    }

    #[test]
    fn one_request_probes_while_the_provider_counts_as_down_for_the_others() {
        let (provider, start) = (Availability::default(), Instant::now());
        provider.is_probed(start, seconds(3));
        assert!(!provider.is_down(start), "nothing has failed");
        provider.failed(start, start);
        provider.is_probed(start + seconds(5), seconds(3));
        assert!(provider.is_down(start + seconds(7)));
        assert!(
            !provider.is_down(start + seconds(8)),
            "a probe that brings no result is not waited for"
        );
        assert!(provider.failed(start + seconds(5), start + seconds(8)));
        assert!(provider.is_down(start + seconds(17)));
    }
}
