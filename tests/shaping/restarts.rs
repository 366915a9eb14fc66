//! What holds when one limiter follows another, after a restart or with other limits.

use std::time::Duration;

use limitrate::shaping::books::{Ask, Books, Scope};
use limitrate::shaping::limiter::{Day, Held, Limiter, Limits, Now};
use limitrate::upstream::verdict::MAX_WAIT;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::properties::{Model, Sent, Step, lateness, some_limits, steps};
use crate::{Clock, DAY, MINUTE, MS, SECOND, cadence, least_gap, made_up, none};

/// Traffic of which everything was allowed. Returns the time at its end; `sends` gets the instants and the tokens used.
fn drive(
    limiter: &mut Limiter,
    clock: &Clock,
    mut now: u64,
    steps: Vec<Step>,
    sends: &mut Vec<Sent>,
) -> u64 {
    let mut ids = Vec::new();
    let first = sends.len();
    for step in steps {
        match step {
            Step::Wait(time) => now += time,
            Step::Send { cost, late, waited } => {
                now = clock.next(limiter, now, cost) + late;
                ids.push(limiter.sent(clock.at(now), Duration::from_nanos(waited), cost));
                sends.push(Sent { at: now, waited, tokens: cost });
            }
            Step::Settle { which, tokens } if !ids.is_empty() => {
                let which = which.index(ids.len());
                limiter.settle(&ids[which], tokens);
                sends[first + which].tokens = tokens;
            }
            Step::CoolDown { from_now } => limiter.cool_down(clock.mono(now + from_now)),
            Step::SendUnasked { .. } | Step::Settle { .. } | Step::Release => {}
        }
    }
    now
}

fn without_concurrency() -> impl Strategy<Value = Limits> {
    some_limits().prop_map(|limits| Limits { concurrent: None, ..limits })
}

/// None, or so long that some, or all, is forgotten.
fn elapsed() -> impl Strategy<Value = u64> {
    prop_oneof![2 => Just(0), 3 => 0..2 * MINUTE, 1 => 0..3 * DAY]
}

proptest! {
    /// With the same limits nobody can tell that there was a restart, or a few, but for what a late send could still make up; and
    /// never does anything go earlier.
    #[test]
    fn a_successor_answers_as_its_predecessor(
        limits in without_concurrency(), past_midnight in 0..DAY, history in steps(), downtimes in vec(elapsed(), 0..3),
        later in prop_oneof![Just(0), 0..2 * MINUTE], cost in 0..150_u64,
    ) {
        let clock = Clock::new(past_midnight);
        let mut original = Limiter::new(&limits, clock.at(0));
        let mut now = drive(&mut original, &clock, 0, history, &mut Vec::new());
        let off = (1 + downtimes.len() as u64) * made_up(MS, 1);
        let mut successor = clock.restart(&limits, &original, 0, now);
        for elapsed in downtimes {
            now += elapsed;
            successor = clock.restart(&limits, &successor, elapsed, now);
        }
        for now in [now, now + later] {
            let answer = |limiter| clock.next(limiter, now, cost);
            let (want, found) = (answer(&original), answer(&successor));
            prop_assert!((want..=want + off).contains(&found), "next: {want} became {found}");
            for n in 0..20 {
                let answer = |limiter: &Limiter| clock.time(limiter.nth_at(clock.at(now), n));
                let (want, found) = (answer(&original), answer(&successor));
                prop_assert!((want..=want + off).contains(&found), "number {n}: {want} became {found}");
            }
            let available = |now| successor.available(clock.at(now));
            let want = original.available(clock.at(now));
            prop_assert!(available(now) <= want && want <= available(now + off), "{} of {want}", available(now));
        }
    }

    /// Whatever the limits were before, what is sent from now on keeps to those of now, counted over all that was ever sent. (A
    /// bucket is another matter: see the next.) Each of the former limiters may have known more or fewer kinds.
    #[test]
    fn new_limits_count_what_was_sent_under_the_former_ones(
        first in without_concurrency(), changes in vec((without_concurrency(), elapsed(), steps()), 2..4),
    ) {
        let clock = Clock::new(0);
        let mut limiter = Limiter::new(&first, clock.at(0));
        let (mut now, mut sends, mut days_known) = (0, Vec::new(), true);
        for (limits, elapsed, traffic) in changes {
            days_known &= first.day.is_some() == limits.day.is_some();
            // The margin and the reset are what the counts mean. They stay.
            let day = limits.day.map(|day| Day { reset: first.day.map_or(day.reset, |first| first.reset), ..day });
            let limits = Limits { day, margin: first.margin, ..limits };
            now += elapsed;
            limiter = clock.restart(&limits, &limiter, elapsed, now);
            let model = Limits { cadence: None, day: limits.day.filter(|_| days_known), ..limits };
            let mut model = Model { limits: model, sends: sends.clone(), cooldown: 0, in_flight: 0 };
            let former = sends.len();
            now = drive(&mut limiter, &clock, now, without_settlements(traffic), &mut sends);
            for sent in &sends[former..] {
                prop_assert!(model.allows(sent.at, sent.tokens), "{sent:?}");
                model.sends.push(*sent);
            }
        }
    }

    /// Around a change of the bucket, any span holds at most the larger burst and what each interval yields in its own time.
    #[test]
    fn a_changed_bucket_never_exceeds_its_burst_and_what_the_rates_yield(
        old in (MS..5 * SECOND, 1..6_u32), new in (MS..5 * SECOND, 1..6_u32), elapsed in elapsed(),
        before in 1..30_usize, idle in prop_oneof![Just(0), 0..5 * SECOND],
    ) {
        let clock = Clock::new(0);
        let mut former = Limiter::new(&Limits { cadence: cadence(old.0, old.1), ..none() }, clock.at(0));
        let sends = clock.greedy(&mut former, 0, before);
        let change = sends[before - 1] + idle + elapsed;
        let mut limiter = clock.restart(&Limits { cadence: cadence(new.0, new.1), ..none() }, &former, elapsed, change);
        let later = clock.greedy(&mut limiter, change, 30);
        for (i, from) in sends.iter().enumerate() {
            for (j, to) in later.iter().enumerate() {
                let yielded = (change - from) as f64 / old.0 as f64 + (to - change) as f64 / new.0 as f64;
                let count = (before - i + j + 1) as f64;
                prop_assert!(count <= f64::from(old.1.max(new.1)) + yielded + 1e-6, "{from} to {to}");
            }
        }
    }

    /// Restarts cost nothing either: every send goes at the least instant that its bounds allow, or later for each restart by
    /// what was still to be made up.
    #[test]
    fn a_schedule_with_restarts_is_the_least_solution_of_its_bounds(
        interval in MS..5 * SECOND, capacity in 1..8_u32, max in 1..40_u32,
        demand in vec((prop::option::weighted(0.2, elapsed()), lateness()), 1..120),
    ) {
        let clock = Clock::new(0);
        let limits = Limits { cadence: cadence(interval, capacity), window: Some(max), ..Limits::default() };
        let mut limiter = Limiter::new(&limits, clock.at(0));
        let (mut now, mut sends, mut taken, mut restarts) = (0, Vec::<u64>::new(), Vec::<u64>::new(), 0);
        for (n, (restart, late)) in demand.into_iter().enumerate() {
            if let Some(elapsed) = restart {
                now += elapsed;
                limiter = clock.restart(&limits, &limiter, elapsed, now);
                restarts += 1;
            }
            let by_cadence = (capacity as usize..=n).map(|k| taken[n - k] + (k as u64 + 1 - u64::from(capacity)) * interval);
            let by_window = n.checked_sub(max as usize).map(|oldest| sends[oldest] + MINUTE + 500 * MS);
            let by_gap = sends.last().map(|last| last + least_gap(interval, capacity));
            let least = by_cadence.chain(by_window).chain(by_gap).fold(now, u64::max);
            let at = clock.next(&limiter, now, 0);
            prop_assert!((least..=least + restarts * made_up(interval, capacity)).contains(&at), "send {n} at {at}, allowed at {least}");
            let asked = now;
            now = at + late;
            clock.send_late(&mut limiter, now, now - asked, 0);
            sends.push(now);
            taken.push(asked.max(now.saturating_sub(made_up(interval, capacity))));
        }
    }

    /// A reload with the same limits changes nothing for the provider and each of its models, what 429s have taught included.
    #[test]
    fn books_that_follow_others_answer_as_those(
        limits in vec(without_concurrency(), 3), asks in vec((0..2_usize, 0..90 * SECOND, 0..150_u64), 0..40),
        refusals in 0..4_usize, gap in 0..MINUTE,
    ) {
        let clock = Clock::new(0);
        let fresh = |now| Books::new(&limits[0], &limits[1..], true, now);
        let mut books = fresh(clock.at(0));
        let mut now = 0;
        for (model, wait, tokens) in asks {
            let ask = Ask { model, tokens };
            now = clock.time(books.next(clock.at(now + wait), ask).at.unwrap());
            let entry = books.sent(clock.at(now), Duration::from_nanos(wait), ask);
            books.release(entry);
        }
        for n in 0..refusals {
            now += gap;
            let scope = [Scope::Provider, Scope::Model][n % 2];
            books.refused(clock.at(now), 0, scope, Some(Duration::from_nanos(gap / 2)), 0.0);
        }
        let at: Now = clock.at(now);
        books.adapt(at);
        let mut successor = fresh(at);
        successor.recall(&books.memory(at), Duration::ZERO, at);
        // A learned rate is remembered in millionths, which stretches what is missing as well.
        let same = |want: u64, found: u64| (want..=want + made_up(MS, 1) + (want - now) / 100_000).contains(&found);
        for model in 0..2 {
            let next = |books: &Books| clock.time(books.next(at, Ask { model, tokens: 50 }).at.unwrap());
            let nth = |books: &Books| clock.time(books.nth(at, model, 5, 3).at.unwrap());
            prop_assert!(same(next(&books), next(&successor)), "{} became {}", next(&books), next(&successor));
            prop_assert!(same(nth(&books), nth(&successor)), "{} became {}", nth(&books), nth(&successor));
        }
        prop_assert!(successor.available(at) <= books.available(at));
        let learned = |books: &Books| books.learned_interval(at.mono).map(|interval| interval.as_nanos() as u64);
        prop_assert!(learned(&successor) >= learned(&books));
    }
}

/// The same traffic with estimates that prove right.
fn without_settlements(traffic: Vec<Step>) -> Vec<Step> {
    traffic.into_iter().filter(|step| !matches!(step, Step::Settle { .. })).collect()
}

#[test]
fn the_longest_pause_of_a_provider_survives_and_no_longer_one_does() {
    let clock = Clock::new(0);
    let mut limiter = Limiter::new(&none(), clock.at(0));
    for pause in [MAX_WAIT, 2 * MAX_WAIT] {
        limiter.cool_down(clock.mono(0) + pause);
        let successor = clock.restart(&none(), &limiter, SECOND, SECOND);
        let next = successor.next(clock.at(SECOND), 0);
        assert_eq!((next.at, next.held_by), (Some(clock.mono(0) + MAX_WAIT), Held::Cooldown));
    }
}
