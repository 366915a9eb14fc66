//! What holds for every line: nobody is lost or let go twice, clients take turns, nobody starves, places are kept.
//!
//! A world of callers around one line on a fake clock. Times are milliseconds from the start.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use limitrate::config::{Fairness, Priority};
use limitrate::shaping::books::{Ask, Scope};
use limitrate::shaping::limiter::{Cadence, Limits};
use limitrate::shaping::line::{Decision, Line, Refusal};
use limitrate::shaping::queue::{AGEING, KEPT};
use limitrate::shaping::terms::{Joining, Rules, Terms};
use proptest::prelude::*;

use crate::{Clock, MS};

/// Between two sends on one lane.
const INTERVAL: u64 = 100;
const MODELS: usize = 2;

fn rules(lanes: usize) -> Rules {
    rules_at(lanes, INTERVAL)
}

fn rules_at(lanes: usize, interval: u64) -> Rules {
    let interval = Duration::from_millis(interval);
    Rules {
        lanes: vec![true; lanes],
        limits: Limits { cadence: Some(Cadence { interval, capacity: 1 }), ..Limits::default() },
        models: vec![Limits::default(); MODELS],
        adaptive: false,
        max_wait: None,
        max_queue: 1000,
        fairness: Fairness::Client,
    }
}

fn terms(client: usize) -> Terms {
    Terms {
        client: format!("client {client}").into(),
        class: Priority::Normal,
        urgency: Priority::Normal,
        max_queue: None,
        deadline: None,
        send_by: None,
        fingerprint: None,
        repeated: false,
    }
}

/// How somebody's wait ended.
#[derive(Debug, Clone, PartialEq)]
enum End {
    Sent { at: u64, lane: usize },
    Refused { at: u64, refusal: Refusal },
    Left,
}

struct World {
    clock: Clock,
    line: Line,
    lanes: usize,
    now: u64,
    /// What deadlines leave for the response, in ms.
    response_time: u64,
    /// When the line wants to be asked again.
    wake: Option<u64>,
    next_id: u64,
    waiting: BTreeMap<u64, Joining>,
    ends: BTreeMap<u64, End>,
    /// In the order of the sends.
    sent: Vec<u64>,
    in_flight: BTreeSet<u64>,
    /// Those who were told and have no connection yet.
    unready: Vec<u64>,
    /// Granted on a lane and not sent yet.
    open: Vec<(u64, usize, Joining)>,
    /// Whether a connection stands as soon as it is asked for.
    quick: bool,
    /// Whether some are idle when somebody joins, for open slots.
    warm: bool,
    /// Whether who is granted sends at once.
    prompt: bool,
    /// How many may go at once on a lane.
    capacity: usize,
    max_queue: usize,
}

impl World {
    fn new(rules: Rules) -> World {
        let clock = Clock::new(0);
        World {
            lanes: rules.lanes.len(),
            max_queue: rules.max_queue,
            line: Line::new(rules, &[], clock.at(0)),
            clock,
            now: 0,
            response_time: 0,
            wake: None,
            next_id: 0,
            waiting: BTreeMap::new(),
            ends: BTreeMap::new(),
            sent: Vec::new(),
            in_flight: BTreeSet::new(),
            unready: Vec::new(),
            open: Vec::new(),
            quick: true,
            warm: false,
            prompt: true,
            capacity: 1,
        }
    }

    fn join(&mut self, terms: Terms) -> u64 {
        self.join_again(terms, self.now, false)
    }

    fn join_again(&mut self, terms: Terms, since: u64, again: bool) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let ask = Ask { model: id as usize % MODELS, tokens: 0 };
        let since = self.clock.mono(since * MS);
        let joining = Joining {
            ask,
            terms: Rc::new(terms),
            since,
            response_time: Duration::from_millis(self.response_time),
            again,
            elsewhere: None,
            movable: false,
            idle: if self.warm { 3 } else { 0 },
        };
        self.waiting.insert(id, joining.clone());
        self.line.join(id, joining, self.clock.at(self.now * MS));
        if self.quick {
            // A connection stands already.
            self.line.ready(id, true);
        }
        self.settle();
        id
    }

    fn leave(&mut self, id: u64) {
        if self.waiting.remove(&id).is_some() {
            self.line.left(id, true, self.clock.at(self.now * MS));
            self.ends.insert(id, End::Left);
        }
        self.settle();
    }

    fn finish(&mut self, id: u64) {
        if self.in_flight.remove(&id) {
            self.line.finished(id, None);
        }
        self.settle();
    }

    /// Somebody who was granted sends.
    fn send(&mut self, index: usize) {
        let (id, lane, joining) = self.open.swap_remove(index);
        let at = self.clock.at(self.now * MS);
        self.line.sent(id, lane, joining.ask, at, at.mono - joining.since);
        self.end(id, End::Sent { at: self.now, lane });
        self.sent.push(id);
        self.in_flight.insert(id);
    }

    fn send_all(&mut self) {
        (0..self.open.len()).rev().for_each(|index| self.send(index));
        self.settle();
    }

    fn deadline(&self, after: u64) -> Option<std::time::Instant> {
        Some(self.clock.mono((self.now + after) * MS))
    }

    /// Lets `ms` pass.
    fn pass(&mut self, ms: u64) {
        let until = self.now + ms;
        while let Some(wake) = self.wake.filter(|wake| *wake <= until) {
            self.now = wake.max(self.now);
            self.settle();
        }
        self.now = until;
        self.settle();
    }

    /// Lets time pass until nobody waits.
    fn drain(&mut self) {
        self.unready.clear();
        self.waiting.keys().for_each(|id| self.line.ready(*id, true));
        (self.quick, self.prompt) = (true, true);
        self.send_all();
        while !self.waiting.is_empty() {
            // An end may let somebody go, whose end is awaited in turn.
            while let Some(id) = self.in_flight.first().copied() {
                self.finish(id);
            }
            if self.waiting.is_empty() {
                return;
            }
            let wake = self.wake.expect("somebody waits, and the line will never look again");
            assert!(wake < self.now + 10_000_000, "nobody goes for hours");
            self.pass(wake.saturating_sub(self.now).max(1));
        }
    }

    /// Acts on what was decided until nothing is left to do at this instant.
    fn settle(&mut self) {
        loop {
            let wake = self.line.advance(self.clock.at(self.now * MS));
            // The line's clock is finer than ours.
            self.wake = wake.map(|at| self.clock.time(at).div_ceil(MS).max(self.now + 1));
            let decisions = self.line.decisions();
            if decisions.is_empty() {
                return;
            }
            for decision in decisions {
                match decision {
                    Decision::Near(id) => {
                        assert!(self.waiting.contains_key(&id), "{id} was told and does not wait");
                        if !self.quick {
                            self.unready.push(id);
                        }
                    }
                    Decision::Grant { id, lane } => {
                        let joining = self
                            .waiting
                            .remove(&id)
                            .expect("who is granted waits, and is granted once");
                        self.open.push((id, lane, joining));
                        let open = self.open.iter().filter(|(_, on, _)| *on == lane).count();
                        assert!(open <= self.capacity, "{open} grants are open on lane {lane}");
                    }
                    Decision::Refuse(id, refusal) => {
                        self.waiting.remove(&id).expect("who is refused waits");
                        self.end(id, End::Refused { at: self.now, refusal });
                    }
                    Decision::Move(id) => panic!("{id} has nowhere to go"),
                }
            }
            if self.prompt {
                (0..self.open.len()).for_each(|_| self.send(0));
            }
        }
    }

    fn end(&mut self, id: u64, end: End) {
        assert_eq!(self.ends.insert(id, end), None, "{id} ends once");
    }

    fn sent_at(&self, id: u64) -> u64 {
        match self.ends.get(&id) {
            Some(End::Sent { at, .. }) => *at,
            other => panic!("{id} was not sent: {other:?}"),
        }
    }

    /// How many of this client's requests were sent after `from` others and before that of `id`.
    fn sends_before(
        &self,
        client: usize,
        clients: &BTreeMap<u64, usize>,
        from: usize,
        id: u64,
    ) -> usize {
        let sent = self.sent[from..].iter().take_while(|sent| **sent != id);
        sent.filter(|sent| clients[sent] == client).count()
    }
}

#[derive(Debug, Clone)]
enum Step {
    Join {
        client: usize,
        class: Priority,
        urgency: Priority,
        patience: Option<u64>,
        fingerprint: Option<u64>,
    },
    Again {
        client: usize,
    },
    Retry {
        fingerprint: u64,
        client: usize,
    },
    Leave {
        which: prop::sample::Index,
    },
    Ready {
        which: prop::sample::Index,
    },
    Unready {
        which: prop::sample::Index,
    },
    Send {
        which: prop::sample::Index,
    },
    Return {
        which: prop::sample::Index,
    },
    Finish {
        which: prop::sample::Index,
    },
    Cooldown {
        lane: usize,
        model: usize,
        whole: bool,
        wait: Option<u64>,
    },
    Accepted {
        lane: usize,
    },
    Reload {
        interval: u64,
        retired: usize,
        added: bool,
        fifo: bool,
        max_queue: usize,
    },
    Pass {
        ms: u64,
    },
}

fn priority() -> impl Strategy<Value = Priority> {
    prop_oneof![Just(Priority::Low), Just(Priority::Normal), Just(Priority::High)]
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        6 => (0..4_usize, priority(), priority(), prop::option::weighted(0.2, 0..3000_u64), prop::option::of(0..5_u64))
            .prop_map(|(client, class, urgency, patience, fingerprint)| {
                Step::Join { client, class, urgency, patience, fingerprint }
            }),
        1 => (0..4_usize).prop_map(|client| Step::Again { client }),
        1 => (0..5_u64, 0..4_usize).prop_map(|(fingerprint, client)| Step::Retry { fingerprint, client }),
        2 => index().prop_map(|which| Step::Leave { which }),
        4 => index().prop_map(|which| Step::Ready { which }),
        1 => index().prop_map(|which| Step::Unready { which }),
        4 => index().prop_map(|which| Step::Send { which }),
        1 => index().prop_map(|which| Step::Return { which }),
        3 => index().prop_map(|which| Step::Finish { which }),
        1 => (0..3_usize, 0..MODELS, any::<bool>(), prop::option::of(0..3000_u64))
            .prop_map(|(lane, model, whole, wait)| Step::Cooldown { lane, model, whole, wait }),
        1 => (0..3_usize).prop_map(|lane| Step::Accepted { lane }),
        1 => (INTERVAL..3 * INTERVAL, 0..4_usize, any::<bool>(), any::<bool>(), 3..60_usize).prop_map(
            |(interval, retired, added, fifo, max_queue)| Step::Reload { interval, retired, added, fifo, max_queue }
        ),
        4 => prop_oneof![9 => 0..500_u64, 1 => 0..200_000_u64].prop_map(|ms| Step::Pass { ms }),
    ]
}

fn pick<T: Copy>(which: &prop::sample::Index, from: impl IntoIterator<Item = T>) -> Option<T> {
    let all: Vec<T> = from.into_iter().collect();
    (!all.is_empty()).then(|| all[which.index(all.len())])
}

impl World {
    fn take(&mut self, step: Step) {
        match step {
            Step::Join { client, class, urgency, patience, fingerprint } => {
                let deadline = patience.and_then(|patience| self.deadline(patience));
                self.join(Terms { class, urgency, deadline, fingerprint, ..terms(client) });
            }
            Step::Again { client } => {
                self.join_again(terms(client), self.now.saturating_sub(50), true);
            }
            Step::Retry { fingerprint, client } => {
                self.join(Terms {
                    fingerprint: Some(fingerprint),
                    repeated: true,
                    ..terms(client)
                });
            }
            Step::Leave { which } => {
                if let Some(id) = pick(&which, self.waiting.keys().copied()) {
                    self.leave(id);
                }
            }
            Step::Ready { which } => {
                if let Some(id) = pick(&which, self.unready.iter().copied()) {
                    self.unready.retain(|unready| *unready != id);
                    self.line.ready(id, true);
                    self.settle();
                }
            }
            Step::Unready { which } => {
                if let Some(id) = pick(&which, self.waiting.keys().copied()) {
                    self.line.ready(id, false);
                    self.unready.push(id);
                }
            }
            Step::Send { which } => {
                if let Some(index) = pick(&which, 0..self.open.len()) {
                    self.send(index);
                    self.settle();
                }
            }
            Step::Return { which } => {
                if let Some(index) = pick(&which, 0..self.open.len()) {
                    let (id, lane, joining) = self.open.swap_remove(index);
                    self.line.returned(lane, joining.ask.model);
                    self.end(id, End::Left);
                    self.settle();
                }
            }
            Step::Finish { which } => {
                if let Some(id) = pick(&which, self.in_flight.iter().copied()) {
                    self.finish(id);
                }
            }
            Step::Cooldown { lane, model, whole, wait } => {
                let scope = if whole { Scope::Provider } else { Scope::Model };
                let (now, wait) = (self.clock.at(self.now * MS), wait.map(Duration::from_millis));
                self.line.refused(lane % self.lanes, model, scope, wait, now, 0.5);
                self.settle();
            }
            Step::Reload { interval, retired, added, fifo, max_queue } => {
                let mut rules = rules_at(self.lanes + usize::from(added), interval);
                self.lanes = rules.lanes.len();
                rules.fairness = if fifo { Fairness::Fifo } else { Fairness::Client };
                rules.max_queue = max_queue;
                self.max_queue = max_queue;
                let capacity = self.capacity as u32;
                rules.limits.cadence =
                    rules.limits.cadence.map(|cadence| Cadence { capacity, ..cadence });
                if self.lanes > 1 {
                    rules.lanes[retired % self.lanes] = false;
                }
                self.line.reload(rules, self.clock.at(self.now * MS));
                self.settle();
            }
            Step::Accepted { lane } => {
                (0..MODELS).for_each(|model| self.line.accepted(lane % self.lanes, model))
            }
            Step::Pass { ms } => self.pass(ms),
        }
    }

    /// Requests that come back after a refusal may be too many for `max_queue`; then no place is kept beside them.
    fn places_are_bounded(&mut self) {
        let now = self.line.snapshot(self.clock.at(self.now * MS));
        let places = now.queued + now.kept;
        assert!(
            now.kept == 0 || places <= self.max_queue,
            "{} wait and {} places are kept, and max_queue is {}",
            now.queued,
            now.kept,
            self.max_queue
        );
    }

    /// Between a send and the first one that its lane's burst does not cover, but for the millisecond by which a send that
    /// was late may be followed too soon.
    fn gaps_are_kept(&self) {
        for lane in 0..self.lanes {
            let on_lane = self.sent.iter().filter_map(|id| match self.ends[id] {
                End::Sent { at, lane: on } if on == lane => Some(at),
                _ => None,
            });
            let times: Vec<u64> = on_lane.collect();
            let spans = times.windows(self.capacity + 1);
            assert!(
                spans.into_iter().all(|of| of[self.capacity] + 1 >= of[0] + INTERVAL),
                "lane {lane}: {times:?}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever happens, each one's wait ends once, every lane keeps its cadence, and nothing is left over.
    #[test]
    fn nobody_is_lost_and_nobody_goes_twice(
        lanes in 1..4_usize,
        fifo in any::<bool>(),
        concurrent in prop::option::of(1..4_u32),
        max_wait in prop::option::of(100..20_000_u64),
        max_queue in 3..60_usize,
        capacity in prop_oneof![2 => Just(1), 1 => 2..5_u32],
        [quick, warm, prompt] in any::<[bool; 3]>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let base = rules(lanes);
        let cadence = base.limits.cadence.map(|cadence| Cadence { capacity, ..cadence });
        let mut world = World::new(Rules {
            limits: Limits { concurrent, cadence, ..base.limits.clone() },
            fairness: if fifo { Fairness::Fifo } else { Fairness::Client },
            max_wait: max_wait.map(Duration::from_millis),
            max_queue,
            ..base
        });
        (world.quick, world.warm, world.prompt) = (quick, warm, prompt);
        world.capacity = capacity as usize;
        for step in steps {
            world.take(step);
            world.places_are_bounded();
        }
        for id in world.in_flight.clone() {
            world.finish(id);
        }
        world.drain();
        for id in world.in_flight.clone() {
            world.finish(id);
        }
        prop_assert_eq!(world.ends.len() as u64, world.next_id, "everybody's wait ends");
        world.gaps_are_kept();
        world.pass(KEPT.as_millis() as u64 + 1);
        let now = world.line.snapshot(world.clock.at(world.now * MS));
        prop_assert_eq!((now.queued, now.preparing, now.kept), (0, 0, 0));
        for lane in &now.lanes {
            prop_assert_eq!(lane.in_flight, 0);
        }
    }

    /// A client's only request waits for at most one of each other client, however many those have.
    #[test]
    fn a_single_request_waits_for_one_of_each_other_client(
        lanes in 1..4_usize,
        arrivals in prop::collection::vec((0..5_usize, 0..4 * INTERVAL / 3), 1..150),
        hang_ups in prop::collection::vec((any::<prop::sample::Index>(), 0..200_usize), 0..20),
    ) {
        let mut world = World::new(rules(lanes));
        let mut clients = BTreeMap::new();
        // Those that were alone in line when they came: how many had been sent until then.
        let mut alone = Vec::new();
        for (number, (client, gap)) in arrivals.into_iter().enumerate() {
            let others = world.waiting.keys().any(|id| clients[id] == client);
            let from = world.sent.len();
            let id = world.next_id;
            clients.insert(id, client);
            world.join(terms(client));
            if !others {
                alone.push((id, client, from));
            }
            for (which, _) in hang_ups.iter().filter(|(_, at)| *at == number) {
                if let Some(id) = pick(which, world.waiting.keys().copied()) {
                    world.leave(id);
                }
            }
            world.pass(gap);
        }
        world.drain();
        for (id, client, from) in alone {
            if !matches!(world.ends[&id], End::Sent { .. }) {
                continue;
            }
            for other in (0..5).filter(|other| *other != client) {
                let sends = world.sends_before(other, &clients, from, id);
                prop_assert!(sends <= 1, "{} waited for {} of client {}", id, sends, other);
            }
        }
    }

    /// Within a client, and over all with `fifo`, those who came first go first.
    #[test]
    fn first_come_first_served_within_a_client(
        fifo in any::<bool>(),
        lanes in 1..3_usize,
        arrivals in prop::collection::vec((0..4_usize, 0..INTERVAL), 1..100),
    ) {
        let fairness = if fifo { Fairness::Fifo } else { Fairness::Client };
        let mut world = World::new(Rules { fairness, ..rules(lanes) });
        let mut clients = BTreeMap::new();
        for (client, gap) in arrivals {
            clients.insert(world.join(terms(client)), client);
            world.pass(gap);
        }
        world.drain();
        for client in 0..4 {
            let own: Vec<u64> = world.sent.iter().copied().filter(|id| fifo || clients[id] == client).collect();
            prop_assert!(own.is_sorted(), "{:?}", own);
        }
    }

    /// A request of the lowest class is through after two steps of ageing and a turn of each client, whatever the others do.
    #[test]
    fn nobody_starves(
        classes in prop::collection::vec(priority(), 1..5),
        urgent in any::<bool>(),
        gap in INTERVAL / 4..INTERVAL,
    ) {
        let mut world = World::new(rules(1));
        let urgency = if urgent { Priority::High } else { Priority::Normal };
        let flood = |world: &mut World, count: usize| {
            for (client, class) in classes.iter().enumerate() {
                (0..count).for_each(|_| _ = world.join(Terms { class: *class, urgency, ..terms(client) }));
            }
        };
        flood(&mut world, 100);
        let low = world.join(Terms { class: Priority::Low, urgency: Priority::Low, ..terms(99) });
        while world.waiting.contains_key(&low) {
            prop_assert!(world.now < 10 * AGEING.as_millis() as u64, "it waits for ever");
            world.pass(gap);
            if world.waiting.len() < 500 {
                flood(&mut world, 1);
            }
        }
        let longest = 2 * AGEING.as_millis() as u64 + (classes.len() as u64 + 2) * INTERVAL;
        prop_assert!(world.sent_at(low) <= longest, "{} ms", world.sent_at(low));
    }

    /// Nobody is sent so late that its deadline leaves no time for the response, unless it could go at once. Who could not be sent in time learns it at once, and who is told so was told the
    /// truth: without it the wait would not have been shorter.
    #[test]
    fn deadlines_are_kept_or_refused_at_once(
        lanes in 1..3_usize,
        arrivals in prop::collection::vec((0..3_usize, 0..2 * INTERVAL, prop::option::of(0..3000_u64)), 1..80),
        response_time in 0..1500_u64,
    ) {
        let mut world = World::new(rules(lanes));
        world.response_time = response_time;
        let mut asked = Vec::new();
        for (client, gap, patience) in arrivals {
            let deadline = patience.and_then(|patience| world.deadline(patience));
            let at = world.now;
            asked.push((world.join(Terms { deadline, ..terms(client) }), at, patience));
            world.pass(gap);
        }
        world.drain();
        for (id, came, patience) in asked {
            match (&world.ends[&id], patience) {
                (End::Sent { at, .. }, Some(patience)) => {
                    prop_assert!(*at == came || *at + response_time <= came + patience, "{} {}", at, came);
                    prop_assert!(*at <= came + patience);
                }
                (End::Refused { at, refusal: Refusal::Deadline { expected_wait, .. } }, Some(patience)) => {
                    prop_assert!(*at <= came + patience);
                    prop_assert!(*expected_wait + Duration::from_millis(response_time) >= Duration::from_millis(patience));
                }
                (End::Sent { .. }, None) => {}
                (other, patience) => prop_assert!(false, "{:?} with {:?}", other, patience),
            }
        }
    }

    /// A caller who hangs up and comes back in time goes as if it had stayed.
    #[test]
    fn a_place_is_kept_for_who_comes_back(
        fifo in any::<bool>(),
        front in 0..40_usize,
        behind in 0..40_usize,
        absent in 0..KEPT.as_millis() as u64,
    ) {
        let run = |hang_up: bool| {
            let fairness = if fifo { Fairness::Fifo } else { Fairness::Client };
            let mut world = World::new(Rules { fairness, ..rules(1) });
            let terms_of = |repeated| Terms { fingerprint: Some(7), repeated, ..terms(0) };
            // Nothing goes while it is away.
            let now = world.clock.at(0);
            world.line.refused(0, 0, Scope::Provider, Some(KEPT), now, 0.0);
            (0..front).for_each(|n| _ = world.join(terms(n % 7)));
            let mut id = world.join(terms_of(false));
            (0..behind).for_each(|n| _ = world.join(terms(10 + n % 7)));
            if hang_up {
                world.leave(id);
                world.pass(absent);
                id = world.join(terms_of(true));
            }
            world.drain();
            let place = world.sent.iter().position(|sent| *sent == id).unwrap();
            (place, world.line.snapshot(world.clock.at(world.now * MS)).tally.returned)
        };
        let ((stayed, _), (returned, count)) = (run(false), run(true));
        prop_assert_eq!((returned, count), (stayed, 1));
    }

    /// A newcomer is refused only where so many wait: it takes the kept place that ends soonest, its own client's where
    /// that client has too many.
    #[test]
    fn a_newcomer_takes_the_room_of_the_kept_place_that_ends_soonest(
        max_queue in 2..20_usize,
        waiting in 0..20_usize,
        own in any::<bool>(),
    ) {
        let waiting = waiting.min(max_queue - 1);
        let kept = max_queue - waiting;
        let mut world = World::new(Rules { max_queue: if own { 1000 } else { max_queue }, ..rules(1) });
        let now = world.clock.at(0);
        world.line.refused(0, 0, Scope::Provider, Some(KEPT), now, 0.0);
        let of = |fingerprint, repeated| Terms {
            fingerprint: Some(fingerprint),
            repeated,
            max_queue: own.then_some(max_queue),
            ..terms(0)
        };
        if own {
            // Another client's place, which ends before all of these.
            let id = world.join(Terms { fingerprint: Some(99), ..terms(1) });
            world.leave(id);
        }
        (0..waiting).for_each(|n| _ = world.join(of(1000 + n as u64, false)));
        let leaving: Vec<u64> = (0..kept).map(|n| world.join(of(n as u64, false))).collect();
        for id in leaving {
            world.pass(1);
            world.leave(id);
        }
        let newcomer = world.join(of(2000, false));
        prop_assert!(world.waiting.contains_key(&newcomer), "{:?}", world.ends.get(&newcomer));
        let returned = |world: &mut World| {
            world.line.snapshot(world.clock.at(world.now * MS)).tally.returned
        };
        for fingerprint in 1..kept as u64 {
            world.join(of(fingerprint, true));
        }
        prop_assert_eq!(returned(&mut world), kept as u64 - 1, "the others come back to their places");
        let late = world.join(of(0, true));
        prop_assert!(!world.waiting.contains_key(&late), "all places are taken by those who wait");
        if own {
            world.join(Terms { fingerprint: Some(99), repeated: true, ..terms(1) });
            prop_assert_eq!(returned(&mut world), kept as u64, "nobody else's place was touched");
        }
    }

    /// Several keys together are as quick as the sum of them, and one that pauses is passed over.
    #[test]
    fn lanes_add_up_and_a_pausing_one_is_passed_over(lanes in 1..5_usize, pausing in 0..5_usize, count in 1..60_usize) {
        let mut world = World::new(rules(lanes));
        let pausing = pausing.min(lanes - 1);
        let pause = Duration::from_secs(3600);
        let now = world.clock.at(0);
        (0..pausing).for_each(|lane| world.line.refused(lane, 0, Scope::Provider, Some(pause), now, 0.0));
        (0..count).for_each(|n| _ = world.join(terms(n % 3)));
        world.drain();
        let going = lanes - pausing;
        prop_assert_eq!(world.now / INTERVAL, ((count - 1) / going) as u64, "{} at {}", world.now, going);
        let on_pausing = world.ends.values().filter(|end| matches!(end, End::Sent { lane, .. } if *lane < pausing));
        prop_assert_eq!(on_pausing.count(), 0);
    }
}
