//! The task on its own, without a socket: who gets which slot, and what comes back.

use super::*;
use crate::config::{Fairness, Priority};
use crate::shaping::limiter::{Cadence, Day, Held, Limits, Reset};
use crate::shaping::line::MAX_PREPARED;

const ANY: Ask = Ask { model: 0, tokens: 0 };
const OTHER: Ask = Ask { model: 1, tokens: 0 };
/// Longer than any test.
const NEVER: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn every(interval: Duration) -> Limits {
    Limits { cadence: Some(Cadence { interval, capacity: 1 }), ..Limits::default() }
}

fn daily(max: u32) -> Limits {
    Limits {
        day: Some(Day { max, reset: Reset::Rolling }),
        margin: Duration::ZERO,
        ..Limits::default()
    }
}

fn one_at_a_time() -> Limits {
    Limits { concurrent: Some(1), ..Limits::default() }
}

/// One lane and two models without limits of their own, and nobody is turned away.
fn rules(limits: Limits) -> Rules {
    Rules {
        lanes: vec![true],
        limits,
        models: vec![Limits::default(); 2],
        adaptive: false,
        max_wait: None,
        max_queue: 100,
        fairness: Fairness::Client,
    }
}

/// Anybody's request, without a deadline.
fn terms() -> Rc<Terms> {
    Rc::new(Terms {
        client: "somebody".into(),
        class: Priority::Normal,
        urgency: Priority::Normal,
        max_queue: None,
        deadline: None,
        send_by: None,
        fingerprint: None,
        repeated: false,
    })
}

/// For the first time, without an idle connection.
fn joining(ask: Ask) -> Joining {
    Joining {
        ask,
        terms: terms(),
        since: Instant::now(),
        response_time: Duration::ZERO,
        again: false,
        elsewhere: None,
        movable: false,
        idle: 0,
    }
}

fn join(scheduler: &Scheduler, ask: Ask) -> Place {
    scheduler.join(joining(ask))
}

fn rejoin(scheduler: &Scheduler, ask: Ask, since: Instant) -> Place {
    scheduler.join(Joining { since, response_time: Duration::ZERO, again: true, ..joining(ask) })
}

fn sent(now: &Snapshot) -> u64 {
    now.lanes.iter().map(|lane| lane.sent).sum()
}

/// Runs a test beside the scheduler's task.
fn run_with(rules: Rules, test: impl AsyncFnOnce(&Scheduler)) {
    let (scheduler, task) = Scheduler::new(rules, &[]);
    let task = async {
        task.await;
        panic!("the task ended before its handle was dropped");
    };
    smol::block_on(future::or(test(&scheduler), task));
}

/// A snapshot in which everything that was said before has had its effect.
async fn settled(scheduler: &Scheduler) -> Snapshot {
    // The first answer comes before the task has acted on what it learned with the question.
    scheduler.snapshot().await.unwrap();
    scheduler.snapshot().await.unwrap()
}

/// Whether a place that says it is ready has its slot now; the place stays ready.
async fn is_granted(scheduler: &Scheduler, place: &Place) -> bool {
    let mut granted = Box::pin(place.granted());
    if future::poll_once(&mut granted).await.is_none() {
        settled(scheduler).await;
    }
    future::poll_once(granted).await.is_some()
}

async fn send(place: &Place) -> InFlight {
    let permit = match place.near().await.unwrap() {
        Some(permit) => permit,
        None => place.granted().await.unwrap(),
    };
    permit.spend(Instant::now())
}

/// Says that a connection stands, without waiting for the slot.
async fn ready(scheduler: &Scheduler, place: &Place) {
    assert!(future::poll_once(place.granted()).await.is_none());
    settled(scheduler).await;
}

/// The send of somebody who said that it is ready, and whose turn it is.
async fn turn(scheduler: &Scheduler, place: &Place) -> InFlight {
    settled(scheduler).await;
    let granted = future::poll_once(place.granted()).await.expect("it is its turn");
    granted.unwrap().spend(Instant::now())
}

#[test]
fn a_slot_is_spent_by_the_send_and_counted() {
    run_with(rules(every(NEVER)), async |scheduler| {
        let first = join(scheduler, ANY);
        let in_flight = send(&first).await;
        assert!(in_flight.waited() < NEVER);
        let second = join(scheduler, ANY);
        let now = settled(scheduler).await;
        let lane = &now.lanes[0];
        assert_eq!((lane.sent, lane.in_flight, now.queued, lane.available), (1, 1, 1, 0));
        assert_eq!((now.held_by, lane.sent_last_minute, now.preparing), (Held::Cadence, 1, 0));
        assert!(now.estimated_wait > NEVER, "one waits for an hour already");
        drop((in_flight, second));
        let now = settled(scheduler).await;
        assert_eq!((now.lanes[0].in_flight, now.queued, now.tally.cancelled), (0, 0, 1));
    });
}

#[test]
fn an_unspent_permit_gives_its_slot_back() {
    run_with(rules(every(NEVER)), async |scheduler| {
        let (first, second) = (join(scheduler, ANY), join(scheduler, ANY));
        first.near().await.unwrap();
        let permit = first.granted().await.unwrap();
        assert!(!is_granted(scheduler, &second).await, "one grant is open at a time");
        drop(permit);
        assert!(is_granted(scheduler, &second).await);
        assert_eq!(sent(&settled(scheduler).await), 0);
    });
}

#[test]
fn a_burst_opens_as_many_slots_at_once_as_it_holds() {
    let bucket =
        Limits { cadence: Some(Cadence { interval: NEVER, capacity: 3 }), ..Limits::default() };
    let counted = Limits { tokens: Some(100), ..bucket.clone() };
    for (limits, at_once) in
        [(bucket, 3), (counted, 1), (Limits { concurrent: Some(2), ..Limits::default() }, 2)]
    {
        run_with(rules(limits), async |scheduler| {
            let places = [(); 4].map(|()| join(scheduler, ANY));
            let mut permits = Vec::new();
            for place in &places {
                let mut granted = Box::pin(place.granted());
                let _ = future::poll_once(&mut granted).await;
                settled(scheduler).await;
                permits.extend(future::poll_once(granted).await);
            }
            assert_eq!(permits.len(), at_once);
            drop(permits.pop());
            assert!(
                is_granted(scheduler, &places[at_once]).await,
                "what is given back is the next one's"
            );
            assert_eq!(sent(&settled(scheduler).await), 0);
        });
    }
}

#[test]
fn who_would_find_a_connection_is_granted_an_open_slot_at_once() {
    run_with(rules(one_at_a_time()), async |scheduler| {
        let warm = || scheduler.join(Joining { idle: 1, ..joining(ANY) });
        let permit = warm().near().await.unwrap().expect("the slot is open");
        let sent = permit.spend(Instant::now());
        // Not so who finds it closed: it has to say that its connection stands, like everybody.
        let (second, third) = (warm(), join(scheduler, ANY));
        assert!(second.near().await.unwrap().is_none());
        ready(scheduler, &third).await;
        drop(sent);
        let _sent = turn(scheduler, &third).await;
        assert!(!is_granted(scheduler, &second).await);
    });
}

#[test]
fn an_idle_connection_is_for_one_and_passes_nobody() {
    run_with(rules(Limits::default()), async |scheduler| {
        let idle = |idle| scheduler.join(Joining { idle, ..joining(ANY) });
        // Two idle connections, as each of them sees.
        let places = [idle(2), idle(2), idle(2)];
        let mut permits = Vec::new();
        for place in &places {
            permits.extend(place.near().await.unwrap());
        }
        assert_eq!(permits.len(), 2);
        drop(permits);
        // The third one is making a connection; who finds one idle now waits for its turn like it.
        assert!(idle(9).near().await.unwrap().is_none());
        assert!(is_granted(scheduler, &places[2]).await);
    });
}

#[test]
fn who_finds_no_connection_after_all_gives_the_permit_back_and_is_at_the_head() {
    run_with(rules(every(NEVER)), async |scheduler| {
        let place = scheduler.join(Joining { idle: 1, ..joining(ANY) });
        let permit = place.near().await.unwrap().expect("the slot is open");
        let behind = join(scheduler, ANY);
        // First, so that its own grant does not count as ahead of it.
        drop(permit);
        let place = rejoin(scheduler, ANY, Instant::now());
        assert!(place.near().await.unwrap().is_none(), "it has to make a connection first");
        assert_eq!(
            scheduler.whereabouts(place.ticket()).await.map(|(position, _)| position),
            Some(1)
        );
        assert!(
            is_granted(scheduler, &behind).await,
            "meanwhile the slot is anybody's who is ready"
        );
        assert_eq!(settled(scheduler).await.tally.cancelled, 0);
    });
}

#[test]
fn a_permit_for_somebody_who_has_left_comes_back_too() {
    run_with(rules(every(NEVER)), async |scheduler| {
        let (first, second) = (join(scheduler, ANY), join(scheduler, ANY));
        ready(scheduler, &first).await;
        drop(first);
        assert!(is_granted(scheduler, &second).await);
    });
}

#[test]
fn who_is_not_ready_holds_up_nobody_and_keeps_its_place() {
    run_with(rules(one_at_a_time()), async |scheduler| {
        let [slow, quick, last] = [(); 3].map(|()| join(scheduler, ANY));
        let sent = send(&quick).await;
        ready(scheduler, &last).await;
        ready(scheduler, &slow).await;
        drop(sent);
        let _sent = turn(scheduler, &slow).await;
        assert!(!is_granted(scheduler, &last).await);
    });
}

#[test]
fn nobody_overtakes_where_the_limit_is_shared() {
    let limits = Limits { tokens: Some(100), ..Limits::default() };
    let ask = |tokens| Ask { model: 0, tokens };
    run_with(rules(limits), async |scheduler| {
        let _sent = send(&join(scheduler, ask(60))).await;
        let (large, small) = (join(scheduler, ask(90)), join(scheduler, ask(10)));
        ready(scheduler, &large).await;
        assert!(!is_granted(scheduler, &small).await);
        assert_eq!(settled(scheduler).await.held_by, Held::Tokens);
        drop(large);
        assert!(is_granted(scheduler, &small).await);
    });
}

#[test]
fn what_was_settled_makes_room_for_the_next() {
    let limits = Limits { tokens: Some(100), concurrent: Some(2), ..Limits::default() };
    let ask = Ask { model: 0, tokens: 60 };
    run_with(rules(limits), async |scheduler| {
        let first = send(&join(scheduler, ask)).await;
        let next = join(scheduler, ask);
        ready(scheduler, &next).await;
        assert_eq!(settled(scheduler).await.held_by, Held::Tokens);
        first.settle(40);
        let second = send(&next).await;
        let third = send(&join(scheduler, ANY)).await;
        let fourth = join(scheduler, ANY);
        ready(scheduler, &fourth).await;
        assert_eq!(settled(scheduler).await.held_by, Held::Concurrency);
        drop((second, third));
        assert!(is_granted(scheduler, &fourth).await);
    });
}

#[test]
fn a_model_that_is_held_leaves_the_others_going() {
    let rules = Rules { models: vec![every(NEVER), Limits::default()], ..rules(Limits::default()) };
    run_with(rules, async |scheduler| {
        let _sent = send(&join(scheduler, ANY)).await;
        let held = join(scheduler, ANY);
        assert!(!is_granted(scheduler, &held).await);
        for _ in 0..3 {
            let _sent = send(&join(scheduler, OTHER)).await;
        }
        scheduler.refused(0, 1, Scope::Model, Some(NEVER));
        assert!(!is_granted(scheduler, &join(scheduler, OTHER)).await);
        assert_eq!(settled(scheduler).await.lanes[0].cooldowns, 1);
    });
}

#[test]
fn a_lost_connection_keeps_the_place_or_gives_the_permit_back() {
    for granted_meanwhile in [false, true] {
        run_with(rules(one_at_a_time()), async |scheduler| {
            let running = send(&join(scheduler, ANY)).await;
            let [first, second, third] = [(); 3].map(|()| join(scheduler, ANY));
            for place in [&first, &second] {
                place.near().await.unwrap();
            }
            ready(scheduler, &first).await;
            let first = if granted_meanwhile {
                drop(running);
                settled(scheduler).await;
                assert!(first.lost_connection().unwrap().is_none(), "the permit has gone back");
                let first = rejoin(scheduler, ANY, Instant::now());
                first.near().await.unwrap();
                first
            } else {
                let first = first.lost_connection().unwrap().expect("it stays in line");
                settled(scheduler).await;
                drop(running);
                first
            };
            // It cannot go now, and so the one behind it does.
            let running = second.granted().await.unwrap().spend(Instant::now());
            third.near().await.unwrap();
            ready(scheduler, &third).await;
            ready(scheduler, &first).await;
            drop(running);
            drop(turn(scheduler, &first).await);
            drop(turn(scheduler, &third).await);
            assert_eq!(settled(scheduler).await.tally.cancelled, 0);
        });
    }
}

#[test]
fn leaving_is_a_hang_up_unless_it_is_said_not_to_be() {
    run_with(rules(every(NEVER)), async |scheduler| {
        join(scheduler, ANY).leave();
        assert_eq!(settled(scheduler).await.tally.cancelled, 0);
        drop(join(scheduler, ANY));
        let now = settled(scheduler).await;
        assert_eq!((now.tally.cancelled, now.queued), (1, 0));
    });
}

#[test]
fn those_who_come_back_stand_in_front_in_the_order_of_their_first_join() {
    run_with(rules(one_at_a_time()), async |scheduler| {
        let start = Instant::now();
        let mut sent = send(&join(scheduler, ANY)).await;
        let fresh = join(scheduler, ANY);
        let [second, first, third] =
            [2, 1, 3].map(|n| rejoin(scheduler, ANY, start + Duration::from_nanos(n)));
        for place in [&fresh, &third, &second, &first] {
            ready(scheduler, place).await;
        }
        for place in [&first, &second, &third, &fresh] {
            drop(sent);
            sent = turn(scheduler, place).await;
        }
    });
}

#[test]
fn a_spent_day_turns_newcomers_away_at_once() {
    run_with(rules(daily(1)), async |scheduler| {
        let _sent = send(&join(scheduler, ANY)).await;
        let Err(NoSlot::Refused(Refusal::Day { resets_in })) = join(scheduler, ANY).near().await
        else {
            panic!("it may wait for a day")
        };
        assert!(DAY - ms(10_000) < resets_in && resets_in <= DAY, "{resets_in:?}");
        assert_eq!(settled(scheduler).await.tally.rejected_day, 1);
    });
}

#[test]
fn max_wait_says_whether_tomorrow_is_waited_for() {
    for (max_wait, waits) in [(DAY, true), (DAY - ms(60_000), false)] {
        run_with(Rules { max_wait: Some(max_wait), ..rules(daily(1)) }, async |scheduler| {
            let _sent = send(&join(scheduler, ANY)).await;
            let place = join(scheduler, ANY);
            let now = settled(scheduler).await;
            assert_eq!((now.queued, now.tally.rejected_day), if waits { (1, 0) } else { (0, 1) });
            if !waits {
                assert!(matches!(place.near().await, Err(NoSlot::Refused(Refusal::Day { .. }))));
            }
        });
    }
}

#[test]
fn who_would_wait_too_long_is_told_where_it_stood_and_when_to_come_back() {
    let rules = Rules { max_wait: Some(ms(150_000)), ..rules(every(ms(100_000))) };
    run_with(rules, async |scheduler| {
        let _sent = send(&join(scheduler, ANY)).await;
        let _waits = join(scheduler, ANY);
        let refused = join(scheduler, ANY).near().await.unwrap_err();
        let NoSlot::Refused(Refusal::WaitExceeded {
            position,
            expected_wait,
            max_wait,
            held_by: Held::Cadence,
            retry_after,
        }) = refused
        else {
            panic!("{refused:?}");
        };
        assert_eq!((position, max_wait), (2, ms(150_000)));
        assert!(ms(190_000) < expected_wait && expected_wait <= ms(200_000), "{expected_wait:?}");
        assert!(ms(40_000) < retry_after && retry_after <= ms(50_000), "{retry_after:?}");
        assert_eq!(settled(scheduler).await.tally.rejected_wait, 1);
    });
}

#[test]
fn the_deadline_counts_from_the_first_join() {
    run_with(Rules { max_wait: Some(ms(60_000)), ..rules(one_at_a_time()) }, async |scheduler| {
        let _sent = send(&join(scheduler, ANY)).await;
        let now = Instant::now();
        let place = rejoin(scheduler, ANY, now - ms(59_900));
        place.near().await.unwrap();
        assert!(matches!(
            place.taken_away().await,
            NoSlot::Refused(Refusal::WaitExceeded { position: 1, .. })
        ));
        assert!(
            now.elapsed() >= ms(100) && now.elapsed() < ms(30_000),
            "after {:?}",
            now.elapsed()
        );
        let late = rejoin(scheduler, ANY, now - ms(60_000));
        assert!(matches!(late.near().await, Err(NoSlot::Refused(Refusal::WaitExceeded { .. }))));
    });
}

#[test]
fn a_full_line_takes_only_those_who_come_back() {
    run_with(Rules { max_queue: 1, ..rules(every(NEVER)) }, async |scheduler| {
        let _sent = send(&join(scheduler, ANY)).await;
        let _waits = join(scheduler, ANY);
        let refused = join(scheduler, ANY).near().await;
        assert!(
            matches!(refused, Err(NoSlot::Refused(Refusal::Full { max_queue: 1, retry_after })) if retry_after <= NEVER),
            "{refused:?}"
        );
        let _again = rejoin(scheduler, ANY, Instant::now());
        let now = settled(scheduler).await;
        assert_eq!((now.queued, now.tally.rejected_full), (2, 1));
    });
}

#[test]
fn a_closed_scheduler_refuses_everybody() {
    run_with(rules(every(NEVER)), async |scheduler| {
        let sent = send(&join(scheduler, ANY)).await;
        let waiting = join(scheduler, ANY);
        scheduler.close();
        assert_eq!(waiting.near().await.err(), Some(NoSlot::Refused(Refusal::Closed)));
        assert_eq!(join(scheduler, ANY).near().await.err(), Some(NoSlot::Refused(Refusal::Closed)));
        assert_eq!(
            rejoin(scheduler, ANY, Instant::now()).near().await.err(),
            Some(NoSlot::Refused(Refusal::Closed))
        );
        assert_eq!(settled(scheduler).await.lanes[0].in_flight, 1, "what was sent goes on");
        drop(sent);
    });
}

#[test]
fn the_task_ends_with_the_last_handle() {
    let (scheduler, task) = Scheduler::new(rules(every(NEVER)), &[]);
    let place = join(&scheduler, ANY);
    drop(scheduler);
    smol::block_on(async {
        let mut task = Box::pin(task);
        assert!(future::poll_once(&mut task).await.is_none(), "a place is still held");
        drop(place);
        task.await;
    });
}

#[test]
fn connections_are_made_for_those_whose_slot_is_near() {
    run_with(rules(every(ms(1500))), async |scheduler| {
        let _sent = send(&join(scheduler, ANY)).await;
        let places = [(); 3].map(|()| join(scheduler, ANY));
        // 1.5 s away, 3 s away, 4.5 s away.
        let now = settled(scheduler).await;
        assert_eq!((now.queued, now.preparing), (3, 1));
        drop(places);
    });
}

#[test]
fn a_burst_starts_no_more_handshakes_than_its_bound() {
    run_with(Rules { max_queue: 1000, ..rules(Limits::default()) }, async |scheduler| {
        let places: Vec<_> = (0..MAX_PREPARED + 10).map(|_| join(scheduler, ANY)).collect();
        assert_eq!(settled(scheduler).await.preparing, MAX_PREPARED);
        drop(places);
    });
}

#[test]
fn who_could_go_elsewhere_is_told_to_and_not_refused() {
    let soon = Duration::from_secs(1);
    let full = Rules { max_queue: 1, ..rules(every(NEVER)) };
    let impatient = Rules { max_wait: Some(soon), ..rules(every(NEVER)) };
    for (rules, waiting) in [(full, 1), (impatient, 0), (rules(every(NEVER)), 1)] {
        run_with(rules, async |scheduler| {
            let _sent = send(&join(scheduler, ANY)).await;
            let _waits: Vec<_> = (0..waiting).map(|_| join(scheduler, ANY)).collect();
            let moved = scheduler.join(Joining { elsewhere: Some(soon), ..joining(ANY) });
            assert_eq!(moved.near().await.err(), Some(NoSlot::Moved));
            let now = settled(scheduler).await;
            assert_eq!(
                (now.tally.moved, now.tally.rejected_full, now.tally.rejected_wait),
                (1, 0, 0)
            );
        });
    }
    run_with(Rules { max_queue: 1, ..rules(every(NEVER)) }, async |scheduler| {
        let _sent = send(&join(scheduler, ANY)).await;
        let _waits = join(scheduler, ANY);
        // It has looked around often enough.
        let refused = scheduler.join(Joining { elsewhere: Some(Duration::MAX), ..joining(ANY) });
        assert!(matches!(refused.near().await, Err(NoSlot::Refused(Refusal::Full { .. }))));
    });
}

#[test]
fn a_pause_sends_those_away_who_can_go_elsewhere() {
    run_with(rules(every(NEVER)), async |scheduler| {
        let _sent = send(&join(scheduler, ANY)).await;
        let elsewhere = Some(Duration::MAX);
        let [movable, of_other_model] =
            [ANY, OTHER].map(|ask| scheduler.join(Joining { elsewhere, ..joining(ask) }));
        let stays = join(scheduler, ANY);
        scheduler.refused(0, 0, Scope::Model, Some(NEVER));
        assert_eq!(movable.near().await.err(), Some(NoSlot::Moved));
        assert_eq!(settled(scheduler).await.queued, 2);
        scheduler.refused(0, 0, Scope::Provider, Some(NEVER));
        assert_eq!(of_other_model.near().await.err(), Some(NoSlot::Moved));
        assert_eq!(settled(scheduler).await.queued, 1);
        drop(stays);
    });
}
