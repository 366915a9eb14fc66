//! What a limiter remembers, so that the next one, after a restart or with other limits, goes on where it was.
//!
//! Instants of one process mean nothing in the next. So a [`Memory`] tells everything in time before the moment at which it was
//! taken, and [`Limiter::recall`] is told how much has passed since. What is rounded is rounded to the later answer, by less than
//! a millisecond, and lateness that was to be made up is forgotten. Requests in flight are not remembered: their connections end with the process.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Limiter, Limits, Nanos, Now, nanos};

pub(super) const NS_PER_MS: Nanos = 1_000_000;

/// The longest pause that is taken from a provider (`upstream::verdict::MAX_WAIT`), and so the longest that is believed here.
pub(super) const COOLDOWN_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// What one limiter remembers; by default nothing. Any value can be recalled: none holds a send back for longer than the limit's
/// own span.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// What is left of a pause.
    #[serde(skip_serializing_if = "is_zero")]
    cooldown_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cadence: Option<BucketMemory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    window: Option<Gaps>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rolling_day: Option<Gaps>,
    #[serde(skip_serializing_if = "Option::is_none")]
    calendar_day: Option<DayMemory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<TokensMemory>,
}

/// Time until the bucket is full, and of one token: what is missing is their quotient.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
pub(super) struct BucketMemory {
    pub(super) missing_ns: u64,
    pub(super) interval_ns: u64,
}

/// The day of the last send.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
pub(super) struct DayMemory {
    pub(super) spent: u64,
    pub(super) spent_in_tail: u64,
    /// How long ago.
    pub(super) last_send_ns: u64,
    /// From the last send to the end of its day. To the nanosecond, like the above: a send just before a reset must not
    /// be remembered as one after it.
    pub(super) rest_ns: u64,
}

/// Oldest first: how many milliseconds ago, and the tokens.
pub(super) type TokensMemory = Vec<(u64, u64)>;

/// Instants in milliseconds, newest first: how long ago it was, then from each to the one before it. A day's sends are short
/// numbers that way.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
pub(super) struct Gaps(Vec<u64>);

impl Gaps {
    /// Of sends so long ago each, the newest first.
    pub(super) fn new(ago: impl Iterator<Item = Nanos>) -> Gaps {
        let mut newer = 0;
        let gap = |ago| {
            let ago = ago / NS_PER_MS;
            let gap = ago - newer;
            newer = ago;
            gap
        };
        Gaps(ago.map(gap).collect())
    }

    /// The instants.
    pub(super) fn oldest_first(&self, past: Past) -> impl Iterator<Item = Nanos> {
        let mut ago = 0_u64;
        let add = |gap: &u64| {
            ago = ago.saturating_add(*gap);
            past.at(ago.saturating_mul(NS_PER_MS))
        };
        let newest_first: Vec<Nanos> = self.0.iter().map(add).collect();
        newest_first.into_iter().rev()
    }
}

/// Where the time of a memory lies on this limiter's clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Past {
    pub(super) now: Nanos,
    /// Since the memory was taken.
    pub(super) elapsed: Nanos,
}

impl Past {
    /// So long before the memory was taken. What was before the clock's beginning counts for nothing any more.
    pub(super) fn at(self, ago: Nanos) -> Nanos {
        self.now.saturating_sub(self.elapsed.saturating_add(ago))
    }
}

impl Limiter {
    /// What is to be remembered as of now.
    pub fn memory(&self, now: Now) -> Memory {
        let time = self.time(now.mono);
        Memory {
            cooldown_ms: self.cooldown.saturating_sub(time).div_ceil(NS_PER_MS),
            cadence: self.cadence.as_ref().map(|cadence| cadence.memory(time)),
            window: self.window.as_ref().map(|window| window.memory(time)),
            rolling_day: self.rolling_day.as_ref().map(|day| day.memory(time)),
            calendar_day: self.calendar_day.as_ref().map(|day| day.memory(time)),
            tokens: self.tokens.as_ref().map(|tokens| tokens.memory(time)),
        }
    }

    /// Makes a limiter that has sent nothing yet the successor of the one whose memory this is; `elapsed` has passed since it was
    /// taken. With the same limits it answers as the other would now, or later by what lateness was to be made up, and up to a millisecond. Other limits count what
    /// was sent under the former ones: a bucket misses as many tokens as before, at most all; a window and a day hold the
    /// same sends. A limit of the minute that the memory says nothing about is [assumed at its worst](Self::assume_the_worst); a
    /// day that it says nothing about is new.
    pub fn recall(&mut self, memory: &Memory, elapsed: Duration, now: Now) {
        let past = Past { now: self.time(now.mono), elapsed: nanos(elapsed) };
        let cooldown = Duration::from_millis(memory.cooldown_ms).min(COOLDOWN_MAX);
        self.cooldown =
            self.cooldown.max(past.now.saturating_add(nanos(cooldown.saturating_sub(elapsed))));
        match (&mut self.cadence, &memory.cadence) {
            (Some(cadence), Some(memory)) => cadence.recall(memory, past),
            (Some(cadence), None) => cadence.assume_the_worst(past.now),
            (None, _) => {}
        }
        match (&mut self.window, &memory.window) {
            (Some(window), Some(memory)) => window.recall(memory, past),
            (Some(window), None) => window.assume_the_worst(past.now),
            (None, _) => {}
        }
        match &memory.tokens {
            Some(sends) => sends.iter().for_each(|(ago, tokens)| {
                self.reserve(past.at(ago.saturating_mul(NS_PER_MS)), *tokens);
            }),
            None => self.assume_all_tokens(past.now),
        }
        self.recall_day(memory, past, now);
    }

    /// Goes on under other limits, with all that it remembers and all that is in flight; see [`Limiter::recall`].
    pub fn change(&mut self, limits: &Limits, now: Now) {
        let memory = self.memory(now);
        let mut next = Limiter::new(limits, now);
        next.recall(&memory, Duration::ZERO, now);
        next.in_flight = self.in_flight;
        // What is in flight is settled under its old number; what is assumed has one of its own.
        next.sends = self.sends + u64::from(memory.tokens.is_none());
        if let Some(tokens) = &mut next.tokens {
            tokens.renumber(next.sends);
        }
        *self = next;
    }

    /// As if all that the limits of the minute allow had just been sent: the bucket is empty, the next token a whole interval away,
    /// and the windows are full. Says nothing of the day.
    pub fn assume_the_worst(&mut self, now: Now) {
        let time = self.time(now.mono);
        if let Some(cadence) = &mut self.cadence {
            cadence.assume_the_worst(time);
        }
        if let Some(window) = &mut self.window {
            window.assume_the_worst(time);
        }
        self.assume_all_tokens(time);
    }

    /// Takes so many sends from the day's budget, and from nothing else: sends that the memory may have missed.
    pub fn spend_day(&mut self, sends: u32, now: Now) {
        let time = self.time(now.mono);
        if let Some(day) = &mut self.rolling_day {
            day.assume(time, sends.into());
        }
        if let Some(day) = &mut self.calendar_day
            && sends > 0
        {
            day.spend(time, now.wall, sends.into());
        }
    }

    /// A budget of the other kind is translated: a rolling day's sends fall into the days in which they went; a calendar day's
    /// count as of its last one (those of the day before are not known).
    fn recall_day(&mut self, memory: &Memory, past: Past, now: Now) {
        if let Some(day) = &mut self.rolling_day {
            match (&memory.rolling_day, &memory.calendar_day) {
                (Some(sends), _) => day.recall(sends, past),
                (None, Some(other)) => day.assume(past.at(other.last_send_ns), other.spent),
                (None, None) => {}
            }
        }
        let Some(day) = &mut self.calendar_day else { return };
        match (&memory.calendar_day, &memory.rolling_day) {
            (Some(memory), _) => day.recall(memory, past),
            (None, Some(sends)) => sends.oldest_first(past).for_each(|at| {
                day.sent(at, now.wall - Duration::from_nanos(past.now - at));
            }),
            (None, None) => {}
        }
    }

    /// And more, so that a request of no tokens waits as well.
    fn assume_all_tokens(&mut self, time: Nanos) {
        self.reserve(time, u64::MAX);
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use std::time::{Instant, SystemTime};

    use super::*;
    use crate::shaping::limiter::{Cadence, DAY, Day, Held, MINUTE, Reset};
    use proptest::prelude::*;
    use serde_json::json;

    const NOON: Duration = Duration::from_secs(20_000 * 86_400 + 43_200);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// From noon; milliseconds.
    fn clock() -> impl Fn(u64) -> Now {
        let base = Instant::now();
        move |time| Now { mono: base + ms(time), wall: SystemTime::UNIX_EPOCH + NOON + ms(time) }
    }

    fn send(limiter: &mut Limiter, at: Now, tokens: u64) {
        let id = limiter.sent(at, Duration::ZERO, tokens);
        limiter.release(id);
    }

    fn none() -> Limits {
        Limits { margin: Duration::ZERO, ..Limits::default() }
    }

    fn every(interval_ms: u64, capacity: u32) -> Limits {
        Limits { cadence: Some(Cadence { interval: ms(interval_ms), capacity }), ..none() }
    }

    fn daily(max: u32, reset: Reset) -> Limits {
        Limits { day: Some(Day { max, reset }), ..none() }
    }

    /// Each limit alone, with the longest that it holds anything back.
    fn each_alone() -> Vec<(Limits, Duration)> {
        vec![
            (every(1500, 1), ms(1500)),
            (every(100, 7), ms(700)),
            (Limits { window: Some(3), ..Limits::default() }, MINUTE + ms(500)),
            (Limits { tokens: Some(100), ..Limits::default() }, MINUTE + ms(500)),
            (daily(5, Reset::Rolling), DAY),
            // What is sent in the tail spends the next day as well.
            (daily(5, Reset::At(Duration::ZERO)), 2 * DAY),
        ]
    }

    fn wait(limiter: &Limiter, now: Now, tokens: u64) -> Duration {
        limiter.next(now, tokens).at.unwrap() - now.mono
    }

    fn recalled(limits: &Limits, memory: &Memory, elapsed: Duration, now: Now) -> Limiter {
        let mut limiter = Limiter::new(limits, now);
        limiter.recall(memory, elapsed, now);
        limiter
    }

    #[test]
    fn the_format_stands() {
        let at = clock();
        let mut limits = Limits {
            window: Some(3),
            tokens: Some(1000),
            day: Some(Day { max: 9, reset: Reset::Rolling }),
            ..every(1000, 2)
        };
        let mut rolling = Limiter::new(&limits, at(0));
        limits.day = Some(Day { max: 9, reset: Reset::At(Duration::ZERO) });
        let mut calendar = Limiter::new(&limits, at(0));
        for limiter in [&mut rolling, &mut calendar] {
            for (time, tokens) in [(0, 7), (1000, 8), (1500, 9), (70_000, 10)] {
                send(limiter, at(time), tokens);
            }
        }
        rolling.cool_down(at(71_000).mono + Duration::from_nanos(1));
        let cadence = json!({"missing_ns": 750_000_000, "interval_ns": 1_000_000_000});
        let both = json!({"cadence": cadence, "window": [250], "tokens": [[250, 10]]});
        let mut want = [both.clone(), both];
        want[0]["cooldown_ms"] = json!(751);
        want[0]["rolling_day"] = json!([250, 68_500, 500, 1000]);
        want[1]["calendar_day"] = json!({
            "spent": 4, "spent_in_tail": 0, "last_send_ns": 250_000_000, "rest_ns": (43_200 - 70) * 1_000_000_000_u64,
        });
        for (limiter, want) in [rolling, calendar].iter().zip(want) {
            let memory = limiter.memory(at(70_250));
            assert_eq!(serde_json::to_value(&memory).unwrap(), want);
            assert_eq!(serde_json::from_value::<Memory>(want).unwrap(), memory);
        }
        assert_eq!(
            serde_json::to_value(Limiter::new(&none(), at(0)).memory(at(5))).unwrap(),
            json!({})
        );
    }

    #[test]
    fn the_worst_is_one_span_and_never_more() {
        let at = clock();
        for (limits, longest) in each_alone() {
            let mut limiter = Limiter::new(&limits, at(0));
            limiter.assume_the_worst(at(0));
            let want = match (limits.day, limits.cadence) {
                (Some(_), _) => Duration::ZERO,
                (_, Some(cadence)) => cadence.interval,
                _ => longest,
            };
            assert_eq!(wait(&limiter, at(0), 1), want, "{limits:?}");
            assert_eq!(limiter.available(at(0)) == 0, limits.day.is_none());
            assert_eq!(
                recalled(&limits, &Memory::default(), DAY, at(0)).memory(at(0)),
                limiter.memory(at(0))
            );
            // Once the span is over, everything is as if nothing had been.
            let later = at(longest.as_millis() as u64);
            assert_eq!(limiter.available(later), Limiter::new(&limits, later).available(later));
            // Twice is no more than once.
            limiter.assume_the_worst(at(0));
            assert_eq!(wait(&limiter, at(0), 1), want, "{limits:?}");
        }
    }

    #[test]
    fn only_the_limits_that_a_memory_does_not_know_are_at_their_worst() {
        let at = clock();
        let known = every(1000, 1);
        let mut limiter = Limiter::new(&known, at(0));
        send(&mut limiter, at(0), 5);
        let memory = limiter.memory(at(400));
        let held = |limits: Limits| {
            let limiter = recalled(&limits, &memory, ms(100), at(5000));
            (wait(&limiter, at(5000), 1), limiter.next(at(5000), 1).held_by)
        };
        assert_eq!(held(known.clone()), (ms(500), Held::Cadence));
        assert_eq!(held(Limits { window: Some(9), ..known.clone() }), (MINUTE, Held::Window));
        assert_eq!(held(Limits { tokens: Some(9), ..known.clone() }), (MINUTE, Held::Tokens));
        let day = Some(Day { max: 1, reset: Reset::Rolling });
        assert_eq!(held(Limits { day, ..known }), (ms(500), Held::Cadence));
        assert_eq!(held(none()), (ms(0), Held::Nothing));
    }

    #[test]
    fn missing_tokens_keep_their_number_at_another_interval_and_never_exceed_the_bucket() {
        let at = clock();
        let mut limiter = Limiter::new(&every(1000, 10), at(0));
        (0..10).for_each(|_| send(&mut limiter, at(0), 0));
        let memory = limiter.memory(at(500)); // 9.5 tokens are missing
        for (interval, capacity, elapsed, next, available) in [
            (1000, 10, 0, 500, 0),
            (1000, 10, 2000, 0, 2),
            (3000, 10, 0, 1500, 0),
            (200, 10, 0, 100, 0),
            (1000, 20, 0, 0, 10),
            (1000, 1, 0, 1000, 0),
            (1000, 4, 0, 4000, 0), // 7 at most
            (3000, 10, 600_000, 0, 10),
        ] {
            let limiter = recalled(&every(interval, capacity), &memory, ms(elapsed), at(0));
            let found = (wait(&limiter, at(0), 0), limiter.available(at(0)));
            assert_eq!(found, (ms(next), available), "{interval} {capacity} {elapsed}");
        }
    }

    #[test]
    fn a_window_that_was_narrower_for_a_while_forgets_nothing() {
        let at = clock();
        let window = |max| Limits { window: Some(max), ..none() };
        let mut limiter = Limiter::new(&window(5), at(0));
        (0..5).for_each(|n| send(&mut limiter, at(n), 0));
        let narrow = recalled(&window(2), &limiter.memory(at(10)), ms(0), at(10));
        assert_eq!((wait(&narrow, at(10), 0), narrow.available(at(10))), (MINUTE - ms(7), 0));
        let wide = recalled(&window(5), &narrow.memory(at(20)), ms(0), at(20));
        assert_eq!((wait(&wide, at(20), 0), wide.available(at(20))), (MINUTE - ms(20), 0));
    }

    #[test]
    fn sends_from_before_cannot_be_settled() {
        let at = clock();
        let limits = Limits { tokens: Some(100), ..none() };
        let mut limiter = Limiter::new(&limits, at(0));
        send(&mut limiter, at(0), 40);
        send(&mut limiter, at(1), 20);
        let mut limiter = recalled(&limits, &limiter.memory(at(1)), ms(0), at(1));
        let id = limiter.sent(at(2), Duration::ZERO, 40);
        limiter.settle(&id, 1);
        limiter.release(id);
        let next = [39, 40, 80].map(|tokens| wait(&limiter, at(2), tokens));
        assert_eq!(next, [ms(0), MINUTE - ms(2), MINUTE - ms(1)]);
    }

    #[test]
    fn further_sends_cost_the_day_and_nothing_else() {
        let at = clock();
        for reset in [Reset::Rolling, Reset::At(Duration::ZERO)] {
            let limits = Limits { window: Some(1), ..daily(5, reset) };
            let mut limiter = Limiter::new(&limits, at(0));
            for (sends, left) in [(0, 1), (4, 1), (1, 0), (u32::MAX, 0)] {
                limiter.spend_day(sends, at(0));
                assert_eq!(limiter.available(at(0)), left, "{sends} {reset:?}");
            }
            let opens = if reset == Reset::Rolling { DAY } else { DAY / 2 };
            assert_eq!(wait(&limiter, at(0), 0), opens);
        }
        let mut without = Limiter::new(&every(10, 1), at(0));
        without.spend_day(7, at(0));
        assert_eq!(wait(&without, at(0), 0), ms(0));
    }

    #[test]
    fn a_day_of_the_other_kind_is_translated() {
        let at = clock();
        let hour = 3_600_000;
        let [rolling, calendar] =
            [Reset::Rolling, Reset::At(Duration::ZERO)].map(|reset| daily(9, reset));
        // From noon: three sends today, two tomorrow.
        let sends = |limits: &Limits| {
            let mut limiter = Limiter::new(limits, at(0));
            [1, 2, 3, 14, 15].into_iter().for_each(|hours| send(&mut limiter, at(hours * hour), 0));
            limiter.memory(at(16 * hour))
        };
        let left = |limits: &Limits, memory: &Memory, elapsed_hours: u64| {
            let now = at((16 + elapsed_hours) * hour);
            recalled(limits, memory, ms(elapsed_hours * hour), now).available(now)
        };
        for (elapsed, want) in [(0, 7), (19, 7), (20, 9), (10_000, 9)] {
            assert_eq!(left(&calendar, &sends(&rolling), elapsed), want, "after {elapsed} h");
        }
        for (elapsed, want) in [(0, 7), (22, 7), (23, 9)] {
            assert_eq!(left(&rolling, &sends(&calendar), elapsed), want, "after {elapsed} h");
        }
    }

    /// Numbers at which something could overflow, and others.
    fn number() -> impl Strategy<Value = u64> {
        let edge = prop::sample::select(vec![
            0,
            1,
            86_400_000,
            u64::from(u32::MAX),
            u64::MAX / 1_000_000,
            u64::MAX - 1,
            u64::MAX,
        ]);
        prop_oneof![edge, any::<u64>(), 0..200_000_u64]
    }

    fn any_memory() -> impl Strategy<Value = Memory> {
        let gaps = || prop::option::of(prop::collection::vec(number(), 0..20).prop_map(Gaps));
        let bucket = (number(), number())
            .prop_map(|(missing_ns, interval_ns)| BucketMemory { missing_ns, interval_ns });
        let day = (number(), number(), number(), number());
        let day = day.prop_map(|(spent, spent_in_tail, last_send_ns, rest_ns)| DayMemory {
            spent,
            spent_in_tail,
            last_send_ns,
            rest_ns,
        });
        let tokens = prop::option::of(prop::collection::vec((number(), number()), 0..20));
        let all =
            (number(), prop::option::of(bucket), gaps(), gaps(), prop::option::of(day), tokens);
        all.prop_map(|(cooldown_ms, cadence, window, rolling_day, calendar_day, tokens)| Memory {
            cooldown_ms,
            cadence,
            window,
            rolling_day,
            calendar_day,
            tokens,
        })
    }

    proptest! {
        /// Whatever a file says, it can be recalled, holds nothing back beyond the limit's own span or the longest pause, and
        /// goes on from there.
        #[test]
        fn no_memory_holds_a_send_back_for_ever(memory in any_memory(), elapsed in number(), which in 0..6_usize) {
            let at = clock();
            let (limits, longest) = each_alone().swap_remove(which);
            let elapsed = Duration::from_nanos(elapsed);
            let mut limiter = recalled(&limits, &memory, elapsed, at(0));
            let pause = ms(memory.cooldown_ms).min(COOLDOWN_MAX).saturating_sub(elapsed);
            let (next, longest) = (wait(&limiter, at(0), u64::MAX), longest.max(pause));
            prop_assert!(next <= longest, "{next:?}");
            prop_assert!(next >= pause);
            prop_assert!(limiter.nth_at(at(0), 3) >= limiter.nth_at(at(0), 0));
            for _ in 0..3 {
                send(&mut limiter, at(0), u64::MAX);
                limiter.spend_day(u32::MAX, at(0));
                limiter.available(at(0));
            }
            let again = recalled(&limits, &limiter.memory(at(7)), elapsed, at(7));
            again.nth_at(at(7), usize::MAX);
        }
    }
}
