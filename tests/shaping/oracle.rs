//! Providers as they count, fed by a limiter over a network with jitter: no violation in millions of sends, and at least
//! 99 % of the sends that those providers would have taken at best.
//!
//! A provider keeps nothing but the instants at which requests reached it, and judges afterwards. `SHAPING_SENDS` sets
//! how many sends are simulated in all (default: two million).

use std::time::Duration;

use limitrate::shaping::limiter::{Day, Limiter, Limits, Reset};

use crate::{Clock, DAY, MINUTE, MS, SECOND, cadence, made_up};

/// The way to the provider takes this long and up to the default margin more.
const WAY: u64 = 30 * MS;
const JITTER: u64 = 500 * MS;

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Demand {
    /// The queue never runs dry, and sends leave on the dot.
    Endless,
    /// Bursts with pauses between them; sends leave up to 50 ms late.
    Bursts,
    /// The queue never runs dry, and sends leave up to 1 ms late.
    Late,
    /// The queue never runs dry, but the gateway is restarted now and then, at once or after a while.
    Restarts,
}

/// What went to one provider.
struct Traffic {
    sends: Vec<u64>,
    /// In the order of arrival.
    arrivals: Vec<u64>,
}

fn drive(
    limits: &Limits,
    demand: Demand,
    count: usize,
    jitter: u64,
    rng: &mut fastrand::Rng,
) -> Traffic {
    let clock = Clock::new(rng.u64(..DAY));
    let mut limiter = Limiter::new(limits, clock.at(0));
    let mut now = 0;
    let mut sends = Vec::with_capacity(count);
    for _ in 0..count {
        if demand == Demand::Bursts && rng.u8(..) < 4 {
            now += rng.u64(..3 * MINUTE);
        }
        if demand == Demand::Restarts && rng.u8(..) < 8 {
            let elapsed = if rng.bool() { 0 } else { rng.u64(..2 * MINUTE) };
            now += elapsed;
            limiter = clock.restart(limits, &limiter, elapsed, now);
        }
        let asked = now;
        now = clock.next(&limiter, now, 0);
        match demand {
            Demand::Bursts => now += rng.u64(..50 * MS),
            Demand::Late => now += rng.u64(..=MS),
            Demand::Endless | Demand::Restarts => {}
        }
        clock.send_late(&mut limiter, now, now - asked, 0);
        sends.push(now);
    }
    let mut arrivals: Vec<u64> = sends.iter().map(|at| at + WAY + rng.u64(..=jitter)).collect();
    arrivals.sort_unstable();
    Traffic { sends, arrivals }
}

/// The most arrivals in any `[t, t + span]`, both ends included.
fn most_in_sliding(arrivals: &[u64], span: u64) -> usize {
    let mut from = 0;
    let mut most = 0;
    for (to, at) in arrivals.iter().enumerate() {
        while arrivals[from] + span < *at {
            from += 1;
        }
        most = most.max(to + 1 - from);
    }
    most
}

/// The most arrivals between two ticks of a counter that is reset every `span`, first at `phase`.
fn most_in_fixed(arrivals: &[u64], span: u64, phase: u64) -> usize {
    let windows = arrivals
        .chunk_by(|one, other| (one + span - phase) / span == (other + span - phase) / span);
    windows.map(<[u64]>::len).max().unwrap_or(0)
}

/// How many arrivals a provider's own bucket, filled drop by drop, would have refused, if it has room for so much more.
fn refused_by_bucket(arrivals: &[u64], interval: u64, capacity: u64, forgives: u64) -> usize {
    let full = u128::from(interval) * u128::from(capacity) + u128::from(forgives);
    let (mut content, mut time, mut refused) = (full, 0, 0);
    for at in arrivals {
        content = full.min(content + u128::from(at - time));
        time = *at;
        match content.checked_sub(u128::from(interval)) {
            Some(rest) => content = rest,
            None => refused += 1,
        }
    }
    refused
}

fn sends_to_simulate() -> usize {
    std::env::var("SHAPING_SENDS").map_or(2_000_000, |sends| sends.parse().unwrap())
}

/// Asserts that within its first `span`s of 60 s (or a day) the endless queue got 99 % of what the provider takes at best.
fn assert_full_use(traffic: &Traffic, span: u64, per_span: u64, interval: u64, capacity: u64) {
    let spans = traffic.sends.last().unwrap() / span;
    let sent = traffic.sends.partition_point(|at| *at < spans * span) as f64;
    let best = (spans * per_span).min(capacity - 1 + (spans * span).div_ceil(interval)) as f64;
    assert!(spans >= 10, "too short to tell: {spans}");
    assert!(sent >= 0.99 * best, "{sent} sent, {best} possible");
}

#[test]
fn a_bucket_and_a_window_satisfy_buckets_and_windows() {
    // (interval, capacity, sends a minute)
    let settings = [
        (SECOND / 2, 10, 120),
        (SECOND / 2, 1, 120),
        (1500 * MS, 40, 40),
        (25 * MS, 1, 40), // nearly free bursts
        (MINUTE.div_ceil(7), 3, 1000),
        (MINUTE.div_ceil(1000), 50, 1000),
        (SECOND, 5, 3000), // the window never binds
    ];
    let each = sends_to_simulate() / settings.len() / 4;
    let mut rng = fastrand::Rng::with_seed(7);
    for (interval, capacity, max) in settings {
        for demand in [Demand::Endless, Demand::Bursts, Demand::Late, Demand::Restarts] {
            let limits = Limits {
                cadence: cadence(interval, capacity),
                window: Some(max),
                ..Limits::default()
            };
            let traffic = drive(&limits, demand, each, JITTER - 1, &mut rng);
            let setting = format!("{interval} {capacity} {max} {demand:?}");
            assert!(most_in_sliding(&traffic.arrivals, MINUTE) <= max as usize, "{setting}");
            for _ in 0..4 {
                assert!(
                    most_in_fixed(&traffic.arrivals, MINUTE, rng.u64(..MINUTE)) <= max as usize,
                    "{setting}"
                );
            }
            // On a way without jitter the same bucket at the provider is never empty, if it forgives the lateness that is made
            // up (who waited for the window is late for the bucket); jitter takes what it lasts.
            let forgives = made_up(interval, capacity);
            let capacity = u64::from(capacity);
            assert_eq!(
                refused_by_bucket(&traffic.sends, interval, capacity, forgives),
                0,
                "{setting}"
            );
            assert_eq!(
                refused_by_bucket(&traffic.arrivals, interval, capacity, forgives + JITTER),
                0,
                "{setting}"
            );
            if matches!(demand, Demand::Endless | Demand::Late) {
                assert_full_use(&traffic, MINUTE, u64::from(max), interval, capacity);
            }
        }
    }
}

#[test]
fn ten_minutes_at_120_with_a_burst_of_10_send_1200_and_never_121_in_a_minute() {
    let limits =
        Limits { cadence: cadence(SECOND / 2, 10), window: Some(120), ..Limits::default() };
    let mut rng = fastrand::Rng::with_seed(1);
    let traffic = drive(&limits, Demand::Endless, 1300, JITTER - 1, &mut rng);
    assert_eq!(traffic.sends.partition_point(|at| *at < 10 * MINUTE), 1200);
    assert_eq!(most_in_sliding(&traffic.arrivals, MINUTE), 120);
    // The bucket alone lets 129 through: the oracle can tell.
    let alone = drive(&Limits { window: None, ..limits }, Demand::Endless, 1300, 0, &mut rng);
    assert_eq!(most_in_sliding(&alone.sends, MINUTE - 1), 129);
    // And a window without its margin is broken by the jitter.
    let bare =
        Limits { cadence: None, window: Some(40), margin: Duration::ZERO, ..Limits::default() };
    let bare = drive(&bare, Demand::Endless, 1300, JITTER - 1, &mut rng);
    assert!(most_in_sliding(&bare.arrivals, MINUTE) > 40);
}

#[test]
fn a_daily_budget_satisfies_days_and_rolling_days() {
    let each = sends_to_simulate() / 20;
    let mut rng = fastrand::Rng::with_seed(3);
    for max in [50, 1000] {
        for demand in [Demand::Endless, Demand::Bursts, Demand::Restarts] {
            let day = |reset| Limits {
                day: Some(Day { max, reset }),
                cadence: cadence(SECOND, 5),
                ..Limits::default()
            };
            let rolling = drive(&day(Reset::Rolling), demand, each, JITTER - 1, &mut rng);
            assert!(most_in_sliding(&rolling.arrivals, DAY) <= max as usize);
            if demand == Demand::Endless {
                assert_full_use(&rolling, DAY, u64::from(max), SECOND, 5);
            }

            // The provider resets at 05:00 and the limiter starts at some other hour.
            let reset = 5 * 60 * MINUTE;
            let past_midnight = rng.u64(..DAY);
            let clock = Clock::new(past_midnight);
            let limits = day(Reset::At(Duration::from_nanos(reset)));
            let mut limiter = Limiter::new(&limits, clock.at(0));
            let (mut now, mut arrivals) = (0, Vec::with_capacity(each));
            for _ in 0..each {
                // Now and then the queue is dry until a moment before or after a reset.
                if demand == Demand::Bursts && rng.u32(..max) == 0 {
                    let to_reset = DAY - (past_midnight + now + DAY - reset) % DAY;
                    now += (to_reset + JITTER).saturating_sub(rng.u64(..3 * JITTER));
                }
                if demand == Demand::Restarts && rng.u8(..) < 8 {
                    let elapsed = if rng.bool() { 0 } else { rng.u64(..DAY) };
                    now += elapsed;
                    limiter = clock.restart(&limits, &limiter, elapsed, now);
                }
                now = clock.next(&limiter, now, 0);
                clock.send(&mut limiter, now, 0);
                // Early as well as late: the provider's clock may be behind ours.
                arrivals.push(past_midnight + DAY + now + rng.u64(..2 * JITTER - 1) - (JITTER - 1));
            }
            arrivals.sort_unstable();
            assert!(most_in_fixed(&arrivals, DAY, reset) <= max as usize, "{max} {demand:?}");
            let days = now / DAY;
            if demand == Demand::Endless {
                assert!(each as u64 >= days * u64::from(max), "a day was left unused");
            }
        }
    }
}

#[test]
fn tokens_satisfy_a_provider_that_counts_what_was_really_used() {
    const MAX: u64 = 2_000_000;
    let count = sends_to_simulate() / 10;
    let clock = Clock::new(0);
    let limits = Limits { tokens: Some(MAX), ..Limits::default() };
    let mut limiter = Limiter::new(&limits, clock.at(0));
    let mut rng = fastrand::Rng::with_seed(5);
    let mut now = 0;
    let mut arrivals = Vec::with_capacity(count); // (arrival, tokens used)
    let mut running = std::collections::VecDeque::new();
    for _ in 0..count {
        let estimate = rng.u64(1..500);
        let used = rng.u64(..=estimate);
        // Answers come while others wait; a few only after their send has left the window.
        while running.len() > rng.usize(..20) {
            let Some((id, used)) = running.pop_front() else {
                break;
            };
            limiter.settle(&id, used);
            limiter.release(id);
        }
        now = clock.next(&limiter, now, estimate);
        running.push_back((limiter.sent(clock.at(now), Duration::ZERO, estimate), used));
        arrivals.push((now + WAY + rng.u64(..JITTER), used));
    }
    arrivals.sort_unstable();
    let (mut from, mut in_minute, mut most) = (0, 0, 0);
    for (at, used) in &arrivals {
        in_minute += used;
        while arrivals[from].0 + MINUTE < *at {
            in_minute -= arrivals[from].1;
            from += 1;
        }
        most = most.max(in_minute);
    }
    assert!(most <= MAX, "{most}");
    let total: u64 = arrivals.iter().map(|(_, used)| used).sum();
    let best = (now as f64 / MINUTE as f64) * MAX as f64;
    assert!(total as f64 >= 0.99 * best, "{total} of {best}");
}
