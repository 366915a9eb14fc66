//! What holds for every limiter under any traffic.

use std::time::Duration;

use limitrate::shaping::limiter::{Adaptive, Cadence, Day, Held, Limiter, Limits, Reset};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::{Clock, DAY, MINUTE, MS, SECOND, cadence, least_gap, made_up, none, stepped};

/// One send.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    pub at: u64,
    /// For how long it had been asked for.
    pub waited: u64,
    pub tokens: u64,
}

/// The limits told naively: all that was ever sent, counted anew for every question.
pub struct Model {
    pub limits: Limits,
    pub sends: Vec<Sent>,
    pub cooldown: u64,
    pub in_flight: u32,
}

impl Model {
    /// Whether a send may go at `now`; concurrency apart.
    pub fn allows(&self, now: u64, cost: u64) -> bool {
        let margin = self.limits.margin.as_nanos() as u64;
        let within = |span: u64| self.sends.iter().filter(move |sent| sent.at + span > now);
        let used: u64 = within(MINUTE + margin).map(|sent| sent.tokens).sum();
        let today = |day: Day| match day.reset {
            Reset::Rolling => DAY + margin,
            // Since the reset; what went within the margin on either side of it belongs to both days.
            Reset::At(time) => {
                (now + DAY - time.as_nanos() as u64 - margin) % DAY + (2 * margin).max(1)
            }
        };
        now >= self.cooldown
            && self.limits.cadence.is_none_or(|cadence| self.has_token(cadence, now))
            && self.limits.window.is_none_or(|max| within(MINUTE + margin).count() < max as usize)
            && self.limits.day.is_none_or(|day| within(today(day)).count() < day.max as usize)
            && self.limits.tokens.is_none_or(|max| used == 0 || used + cost <= max)
    }

    /// Fills and drains a bucket from the start; its content is counted in nanoseconds of an interval. A send that waited
    /// takes its token up to [`made_up`] before it went, and leaves [`least_gap`] behind it.
    fn has_token(&self, cadence: Cadence, now: u64) -> bool {
        let token = cadence.interval.as_nanos() as i128;
        let made_up = made_up(token as u64, cadence.capacity);
        let least_gap = least_gap(token as u64, cadence.capacity);
        let full = token * i128::from(cadence.capacity);
        let (mut content, mut time) = (full, -i128::from(SECOND));
        let taken = self
            .sends
            .iter()
            .map(|sent| i128::from(sent.at) - i128::from(sent.waited.min(made_up)));
        for at in taken.chain([i128::from(now)]) {
            content = full.min(content + at - time) - token;
            time = at;
        }
        content >= 0 && self.sends.iter().all(|sent| now >= sent.at + least_gap)
    }
}

#[derive(Debug, Clone)]
pub enum Step {
    Wait(u64),
    /// Waits until it is allowed, then a little longer.
    Send {
        cost: u64,
        late: u64,
        /// For how long it had been asked for.
        waited: u64,
    },
    SendUnasked {
        cost: u64,
    },
    Settle {
        which: Index,
        tokens: u64,
    },
    Release,
    CoolDown {
        from_now: u64,
    },
}

pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => (0..40 * SECOND).prop_map(Step::Wait),
        6 => (0..150_u64, lateness(), lateness()).prop_map(|(cost, late, waited)| Step::Send { cost, late, waited }),
        1 => (0..150_u64).prop_map(|cost| Step::SendUnasked { cost }),
        2 => (any::<Index>(), 0..200_u64).prop_map(|(which, tokens)| Step::Settle { which, tokens }),
        2 => Just(Step::Release),
        1 => (0..90 * SECOND).prop_map(|from_now| Step::CoolDown { from_now }),
    ];
    vec(step, 1..80)
}

/// None, within what the cadence makes up, or more.
pub fn lateness() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 0..2 * MS, 0..SECOND]
}

pub fn some_limits() -> impl Strategy<Value = Limits> {
    let cadence = (MS + 1..20 * SECOND, 1..6_u32)
        .prop_map(|(interval, capacity)| cadence(interval, capacity).unwrap());
    // A reset that comes while the traffic runs.
    let reset = prop_oneof![
        Just(Reset::Rolling),
        (0..10 * MINUTE).prop_map(|at| Reset::At(Duration::from_nanos(at)))
    ];
    let day = (1..40_u32, reset).prop_map(|(max, reset)| Day { max, reset });
    let limits = (
        option::of(cadence),
        option::of(1..8_u32),
        option::weighted(0.4, day),
        option::of(1..300_u64),
        option::weighted(0.3, 1..4_u32),
        0..1000_u64,
    );
    limits.prop_map(|(cadence, window, day, tokens, concurrent, margin)| Limits {
        cadence,
        window,
        day,
        tokens,
        concurrent,
        margin: Duration::from_millis(margin),
    })
}

/// One limit alone, without a margin, so that "exact" has one meaning.
fn one_limit() -> impl Strategy<Value = Limits> {
    let day = |max, reset| Limits { day: Some(Day { max, reset }), ..none() };
    prop_oneof![
        (MS..20 * SECOND, 1..6_u32).prop_map(|(interval, capacity)| Limits {
            cadence: cadence(interval, capacity),
            ..none()
        }),
        (1..8_u32).prop_map(|max| Limits { window: Some(max), ..none() }),
        (1..8_u32).prop_map(move |max| day(max, Reset::Rolling)),
        (1..8_u32, 0..DAY).prop_map(move |(max, at)| day(max, Reset::At(Duration::from_nanos(at)))),
    ]
}

proptest! {
    /// After any history the limiter and the naive model agree on the very nanosecond: refused before, granted at it. The
    /// history has late sends, sends that nobody allowed, settlements both ways, releases and cooldowns.
    #[test]
    fn a_grant_is_tight_and_never_early(limits in some_limits(), steps in steps(), ask in 0..150_u64) {
        let clock = Clock::new(0);
        let mut limiter = Limiter::new(&limits, clock.at(0));
        let mut model = Model { limits, sends: Vec::new(), cooldown: 0, in_flight: 0 };
        let mut ids = Vec::new();
        let mut released = 0;
        let mut now = 0;
        for step in steps {
            match step {
                Step::Wait(time) => now += time,
                Step::Send { cost, late, waited } => {
                    let Some(at) = limiter.next(clock.at(now), cost).at else { continue };
                    now = clock.time(at) + late;
                    ids.push(Some(limiter.sent(clock.at(now), Duration::from_nanos(waited), cost)));
                    model.sends.push(Sent { at: now, waited, tokens: cost });
                    model.in_flight += 1;
                }
                Step::SendUnasked { cost } => {
                    ids.push(Some(limiter.sent(clock.at(now), Duration::ZERO, cost)));
                    model.sends.push(Sent { at: now, waited: 0, tokens: cost });
                    model.in_flight += 1;
                }
                Step::Settle { which, tokens } if !ids.is_empty() => {
                    let which = which.index(ids.len());
                    let Some(id) = &ids[which] else { continue };
                    limiter.settle(id, tokens);
                    model.sends[which].tokens = tokens;
                }
                Step::Release if released < ids.len() => {
                    limiter.release(ids[released].take().unwrap());
                    released += 1;
                    model.in_flight -= 1;
                }
                Step::CoolDown { from_now } => {
                    limiter.cool_down(clock.mono(now + from_now));
                    model.cooldown = model.cooldown.max(now + from_now);
                }
                Step::Settle { .. } | Step::Release => {}
            }
            let next = limiter.next(clock.at(now), ask);
            let full = model.limits.concurrent.is_some_and(|max| model.in_flight >= max);
            prop_assert_eq!(next.at.is_none(), full);
            prop_assert_eq!(next.held_by == Held::Concurrency, full);
            let Some(at) = next.at.map(|at| clock.time(at)) else {
                prop_assert_eq!(limiter.available(clock.at(now)), 0);
                continue;
            };
            prop_assert!(model.allows(at, ask), "granted {at}, too early");
            prop_assert!(at == now || !model.allows(at - 1, ask), "granted {at}, too late");
            prop_assert_eq!(at == now, next.held_by == Held::Nothing);
            if at > now {
                let just_before = limiter.next(clock.at(at - 1), ask);
                prop_assert_eq!((just_before.at, just_before.held_by), (next.at, next.held_by));
            }
            prop_assert_eq!(limiter.next(clock.at(at), ask).held_by, Held::Nothing);
            prop_assert_eq!(limiter.available(clock.at(now)) > 0, model.allows(now, 1));
            prop_assert!(clock.time(limiter.nth_at(clock.at(now), 0)) <= at);
        }
    }

    /// With demand that comes and goes and sends that leave late, nothing is lost either: every send goes at the least
    /// instant that the bounds `s[n] >= v[n-k] + (k + 1 - capacity) * interval`, `s[n] >= s[n-1] + least gap` and
    /// `s[n] >= s[n-max] + span` allow, where `v` is when a send was asked for, at most what is made up before it went.
    #[test]
    fn a_schedule_is_the_least_solution_of_its_bounds(
        interval in MS..5 * SECOND, capacity in 1..8_u32, max in 1..40_u32,
        demand in vec((prop_oneof![3 => Just(0), 1 => 0..40 * SECOND], lateness()), 1..120),
    ) {
        let clock = Clock::new(0);
        let limits = Limits { cadence: cadence(interval, capacity), window: Some(max), ..Limits::default() };
        let mut limiter = Limiter::new(&limits, clock.at(0));
        let (mut now, mut sends, mut taken) = (0, Vec::<u64>::new(), Vec::<u64>::new());
        for (n, (gap, late)) in demand.into_iter().enumerate() {
            now += gap;
            let by_cadence = (capacity as usize..=n).map(|k| taken[n - k] + (k as u64 + 1 - u64::from(capacity)) * interval);
            let by_window = n.checked_sub(max as usize).map(|oldest| sends[oldest] + MINUTE + 500 * MS);
            let by_gap = sends.last().map(|last| last + least_gap(interval, capacity));
            let least = by_cadence.chain(by_window).chain(by_gap).fold(now, u64::max);
            prop_assert_eq!(clock.next(&limiter, now, 0), least, "send {}", n);
            let asked = now;
            now = least + late;
            clock.send_late(&mut limiter, now, now - asked, 0);
            sends.push(now);
            taken.push(asked.max(now.saturating_sub(made_up(interval, capacity))));
        }
    }

    /// The bound that everybody knows: no span of length T holds more than `burst + ceil(T / interval)`. A span that is
    /// as long as the sends in it are apart, both ends included, even holds to `burst + floor(T / interval)`.
    #[test]
    fn no_span_admits_more_than_the_burst_and_the_rate(interval in 1..3 * SECOND, capacity in 1..20_u32) {
        let clock = Clock::new(0);
        let mut limiter = Limiter::new(&Limits { cadence: cadence(interval, capacity), ..none() }, clock.at(0));
        let sends = clock.greedy(&mut limiter, 0, 60);
        for (i, first) in sends.iter().enumerate() {
            for (j, last) in sends.iter().enumerate().skip(i) {
                let count = (j + 1 - i) as u64;
                prop_assert!(count <= u64::from(capacity) + (last - first) / interval);
            }
        }
    }

    /// With sends that waited and went late: any `[t, t + T)` holds at most `burst - 1 + ceil((T + made up) / interval)`, and
    /// with no burst no gap is shorter than the interval by more than 1 ms. That is what [`Limits::worst_case`] says.
    #[test]
    fn lateness_that_is_made_up_adds_no_more_than_its_length(
        interval in prop_oneof![1..3 * MS, MS..3 * SECOND], capacity in 1..20_u32,
        demand in vec((prop_oneof![3 => Just(0), 1 => 0..10 * SECOND], lateness(), lateness()), 2..80),
    ) {
        let clock = Clock::new(0);
        let limits = Limits { cadence: cadence(interval, capacity), ..none() };
        let mut limiter = Limiter::new(&limits, clock.at(0));
        let (mut now, mut sends) = (0, Vec::new());
        for (idle, late, waited) in demand {
            now = clock.next(&limiter, now + idle, 0) + late;
            clock.send_late(&mut limiter, now, waited, 0);
            sends.push(now);
        }
        let gap = least_gap(interval, capacity);
        for (i, first) in sends.iter().enumerate() {
            for (j, last) in sends.iter().enumerate().skip(i) {
                let count = (j + 1 - i) as u64;
                let span = last - first + 1; // the shortest that has both in it
                let by_tokens = u64::from(capacity) - 1 + (span + made_up(interval, capacity)).div_ceil(interval);
                let most = span.checked_div(gap).map_or(by_tokens, |gaps| by_tokens.min(gaps + 1));
                prop_assert!(count <= most, "{count} in {span}");
                if span <= MINUTE {
                    prop_assert_eq!(limits.worst_case(Duration::from_nanos(span)), Some(most));
                }
            }
        }
        prop_assert!(sends.windows(2).all(|pair| pair[1] - pair[0] >= gap));
    }

    /// How many wait in front tells when one's turn comes: never later than it really comes, and with one limit
    /// exactly, but for what is taken off because the first may have waited.
    #[test]
    fn the_expected_turn_is_a_lower_bound_and_exact_for_one_limit(
        (limits, exact) in prop_oneof![one_limit().prop_map(|limits| (limits, true)), some_limits().prop_map(|limits| (limits, false))],
        past_midnight in 0..DAY, before in 0..12_usize, idle in prop_oneof![Just(0), 0..2 * MINUTE],
        cooldown in prop_oneof![Just(0), 0..MINUTE], waited in lateness(),
    ) {
        let clock = Clock::new(past_midnight);
        let mut limiter = Limiter::new(&limits, clock.at(0));
        let now = clock.greedy(&mut limiter, 0, before).last().copied().unwrap_or(0) + idle;
        limiter.cool_down(clock.mono(now + cooldown));
        // A pause may carry the queue over a daily reset, which the bound does not foresee.
        let daily = limits.day.is_some_and(|day| day.reset != Reset::Rolling);
        let exact = exact && (cooldown == 0 || !daily);
        let expected: Vec<u64> = (0..40).map(|n| clock.time(limiter.nth_at(clock.at(now), n))).collect();
        let off = limits.cadence.map_or(0, |cadence| made_up(cadence.interval.as_nanos() as u64, cadence.capacity));
        let (mut time, mut truth) = (now, Vec::new());
        for _ in 0..40 {
            time = clock.next(&limiter, time, 0);
            clock.send_late(&mut limiter, time, waited, 0);
            truth.push(time);
        }
        for (n, (expected, truth)) in expected.into_iter().zip(truth).enumerate() {
            prop_assert!(expected <= truth, "number {n} at {truth}, expected {expected}");
            prop_assert!(!exact || truth - expected <= off.saturating_sub(waited), "number {n} at {truth}, expected {expected}");
        }
    }

    /// Exactly as many sends go at this instant as were said to be available.
    #[test]
    fn what_is_available_goes_at_once(limits in some_limits(), before in 0..40_usize, idle in 0..2 * MINUTE) {
        let limits = Limits { tokens: None, window: limits.window.or(Some(9)), ..limits };
        let clock = Clock::new(0);
        let mut limiter = Limiter::new(&limits, clock.at(0));
        let now = clock.greedy(&mut limiter, 0, before).last().copied().unwrap_or(0) + idle;
        let available = limiter.available(clock.at(now));
        let mut in_flight = Vec::new();
        while limiter.next(clock.at(now), 0).held_by == Held::Nothing {
            in_flight.push(limiter.sent(clock.at(now), Duration::ZERO, 0));
        }
        prop_assert_eq!(in_flight.len() as u32, available);
    }

    /// A provider that was idle as long as its slowest limit remembers takes the next request at once, whatever came before.
    #[test]
    fn an_idle_provider_never_waits(limits in some_limits(), costs in vec(0..400_u64, 0..60)) {
        let limits = Limits { concurrent: None, day: None, ..limits };
        let clock = Clock::new(0);
        let fresh = Limiter::new(&limits, clock.at(0)).available(clock.at(0));
        let mut limiter = Limiter::new(&limits, clock.at(0));
        let mut now = 0;
        for cost in costs {
            now = clock.next(&limiter, now, cost);
            clock.send(&mut limiter, now, cost);
        }
        let refill = limits.cadence.map_or(0, |cadence| cadence.interval.as_nanos() as u64 * u64::from(cadence.capacity));
        now += refill.max(MINUTE + limits.margin.as_nanos() as u64);
        prop_assert_eq!(limiter.next(clock.at(now), 1_000_000).held_by, Held::Nothing);
        prop_assert_eq!(limiter.available(clock.at(now)), fresh);
    }

    /// Of many cooldowns the one that ends last counts, in whatever order they came.
    #[test]
    fn a_cooldown_is_honoured_and_never_shortened(ends in vec(0..5 * MINUTE, 1..10)) {
        let clock = Clock::new(0);
        let mut limiter = Limiter::new(&Limits { cadence: cadence(1, 1), ..none() }, clock.at(0));
        for (told, end) in ends.iter().enumerate() {
            limiter.cool_down(clock.mono(*end));
            let longest = ends[..=told].iter().copied().max().unwrap();
            prop_assert_eq!(clock.next(&limiter, 0, 0), longest);
        }
    }

    /// While the interval changes, any span holds at most the capacity plus what each interval yields in its own time;
    /// and nothing is lost: the queue gets all of that but for the token in the making and the rounding.
    #[test]
    fn a_changed_interval_never_exceeds_what_the_rates_yield(
        first in MS..5 * SECOND, capacity in 1..5_u32, changes in vec((0..9 * SECOND, MS..5 * SECOND), 1..20),
    ) {
        let clock = Clock::new(0);
        let mut limiter = Limiter::new(&Limits { cadence: cadence(first, capacity), ..none() }, clock.at(0));
        let (mut now, mut interval, mut tokens_made) = (0, first, 0.0);
        let mut sends = Vec::new(); // (instant, tokens made until then)
        for (time, new) in changes {
            let end = now + time;
            let mut at = clock.next(&limiter, now, 0);
            while at < end {
                clock.send(&mut limiter, at, 0);
                sends.push((at, tokens_made + (at - now) as f64 / interval as f64));
                at = clock.next(&limiter, at, 0);
            }
            tokens_made += time as f64 / interval as f64;
            limiter.set_interval(clock.at(end), Duration::from_nanos(new));
            (now, interval) = (end, new);
        }
        let capacity = f64::from(capacity);
        for (i, (_, from)) in sends.iter().enumerate() {
            for (j, (at, to)) in sends.iter().enumerate().skip(i) {
                prop_assert!((j - i + 1) as f64 <= capacity + to - from + 1e-6, "sends {i} to {j} (at {at})");
            }
        }
        prop_assert!(sends.len() as f64 > tokens_made + capacity - 1.0 - 1e-3 || sends.is_empty());
    }

    /// `worst_case_per_minute` is what a queue that never runs dry gets through on the dot, where one limit is set.
    #[test]
    fn the_worst_minute_is_reached_and_never_exceeded(
        interval in 100 * MS..20 * SECOND, capacity in 1..6_u32, max in 1..8_u32, windowed: bool,
    ) {
        let by_window = Limits { window: Some(max), ..none() };
        let by_cadence = Limits { cadence: cadence(interval, capacity), ..none() };
        let limits = if windowed { by_window } else { by_cadence };
        let clock = Clock::new(0);
        let sends = clock.greedy(&mut Limiter::new(&limits, clock.at(0)), 0, 700);
        let in_minute = |from: &u64| sends.iter().filter(|at| (*from..from + MINUTE).contains(at)).count() as u64;
        prop_assert_eq!(sends.iter().map(in_minute).max(), limits.worst_case_per_minute());
    }

    /// A clock that shows the wrong time for a while, within one day, gives nobody a second budget.
    #[test]
    fn a_wrong_wall_clock_never_gives_a_second_budget(
        max in 1..20_u32, start in 0..DAY / 4,
        readings in vec((0..DAY / 200, -(2 * DAY as i64)..2 * DAY as i64), 1..80),
    ) {
        let clock = Clock::new(start);
        let limits = Limits { day: Some(Day { max, reset: Reset::At(Duration::ZERO) }), ..none() };
        let mut limiter = Limiter::new(&limits, clock.at(0));
        let (mut now, mut sends) = (0, 0);
        // The clock is right at first, so that the first send knows its day.
        for (gap, error) in [(0, 0)].into_iter().chain(readings) {
            now += gap;
            let reading = stepped(clock.at(now), error);
            while limiter.next(reading, 0).held_by == Held::Nothing {
                let id = limiter.sent(reading, Duration::ZERO, 0);
                limiter.release(id);
                sends += 1;
                prop_assert!(sends <= max, "{sends} sends by {now}");
                if sends % 3 == 0 {
                    break;
                }
            }
        }
        let tomorrow = clock.at(2 * DAY - start);
        prop_assert_eq!(limiter.available(stepped(tomorrow, 3 * DAY as i64)), max, "put off by a day at most");
    }

    /// Whatever it learns, the interval stays between the configured one and eight times that.
    #[test]
    fn adaptive_never_goes_faster_than_configured(
        configured in 1..100 * SECOND, refusals in vec((0..20 * MINUTE, 0..5 * MINUTE), 0..40),
    ) {
        let clock = Clock::new(0);
        let configured = Duration::from_nanos(configured);
        let mut adaptive = Adaptive::new(configured);
        let mut now = 0;
        for (gap, pause) in refusals {
            now += gap;
            let before = adaptive.interval(clock.mono(now));
            adaptive.refused(clock.mono(now), clock.mono(now + pause));
            let after = adaptive.interval(clock.mono(now));
            prop_assert!(after >= before && after >= configured && after <= 8 * configured + Duration::from_nanos(1));
        }
        prop_assert_eq!(adaptive.interval(clock.mono(now + 60 * MINUTE)), configured);
    }
}
