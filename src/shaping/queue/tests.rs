//! Tables of who stands where. A request is a letter, its client's, and a number.

use super::*;

const START: Duration = Duration::from_secs(1000);

struct World {
    base: Instant,
    now: Instant,
    queue: Queue<&'static str>,
    next_id: u64,
}

impl World {
    fn new(fairness: Fairness) -> World {
        let base = Instant::now();
        World { base, now: base + START, queue: Queue::new(fairness), next_id: 0 }
    }

    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        let late: Vec<_> = self.queue.late(self.now).into_iter().map(|(id, _)| id).collect();
        late.into_iter().for_each(|id| _ = self.queue.leave(id));
    }

    fn join_as(&mut self, name: &'static str, class: Priority, urgency: Priority) {
        let standing =
            Standing { client: name[..1].into(), class, urgency, since: self.now, again: false };
        let ahead = self.queue.ahead_of(&standing, self.now);
        self.queue.join(self.next_id, standing, None, name, self.now);
        self.next_id += 1;
        assert_eq!(
            self.queue.iter().position(|entry| entry.waiter == name),
            Some(ahead),
            "{name} was foreseen"
        );
    }

    fn join(&mut self, names: &'static str) {
        names.split(' ').for_each(|name| self.join_as(name, Priority::Normal, Priority::Normal));
    }

    /// Comes back after a refusal; it first joined so many seconds after the start.
    fn again(&mut self, name: &'static str, since: u64) {
        let since = self.base + Duration::from_secs(since);
        let (class, urgency) = (Priority::Normal, Priority::Normal);
        let standing = Standing { client: name[..1].into(), class, urgency, since, again: true };
        self.queue.join(self.next_id, standing, None, name, self.now);
        self.next_id += 1;
    }

    fn id(&self, name: &str) -> u64 {
        self.queue.iter().find(|entry| entry.waiter == name).expect("it waits").id
    }

    fn line(&self) -> String {
        self.queue.iter().map(|entry| entry.waiter).collect::<Vec<_>>().join(" ")
    }
}

#[test]
fn clients_take_turns_in_the_order_of_their_coming() {
    for (joins, line) in [
        ("a1 a2 a3", "a1 a2 a3"),
        ("a1 a2 a3 b1", "a1 b1 a2 a3"),
        ("a1 a2 a3 b1 b2 b3 b4", "a1 b1 a2 b2 a3 b3 b4"),
        ("a1 a2 b1 c1 b2 c2 a3", "a1 b1 c1 a2 b2 c2 a3"),
        ("a1 b1 b2 a2", "a1 b1 a2 b2"),
    ] {
        let mut world = World::new(Fairness::Client);
        world.join(joins);
        assert_eq!(world.line(), line, "after {joins}");
    }
    let mut world = World::new(Fairness::Fifo);
    world.join("a1 a2 b1 a3 b2");
    assert_eq!(world.line(), "a1 a2 b1 a3 b2");
}

#[test]
fn whose_turn_it_was_goes_behind_the_others() {
    let mut world = World::new(Fairness::Client);
    world.join("a1 a2 a3 b1 c1 c2");
    assert_eq!(world.queue.take(world.id("a1")), Some("a1"));
    world.join("d1 a4 b2");
    assert_eq!(world.line(), "b1 c1 a2 d1 b2 c2 a3 a4");
}

#[test]
fn a_turn_taken_early_keeps_nobody_waiting() {
    let mut world = World::new(Fairness::Client);
    world.join("a1 b1 c1 a2 b2 c2");
    // The others' connections did not stand yet.
    world.queue.take(world.id("c1"));
    world.join("d1");
    assert_eq!(world.line(), "a1 b1 d1 a2 b2 c2");
}

#[test]
fn who_leaves_lets_its_own_move_up_and_nobody_else() {
    let mut world = World::new(Fairness::Client);
    world.join("a1 a2 a3 b1 b2");
    assert_eq!(world.line(), "a1 b1 a2 b2 a3");
    assert_eq!(world.queue.leave(world.id("a1")), Some("a1"));
    assert_eq!(world.line(), "a2 b1 a3 b2");
    assert_eq!(world.queue.leave(99), None);
    let mut world = World::new(Fairness::Fifo);
    world.join("a1 b1 a2");
    world.queue.leave(world.id("a1"));
    assert_eq!(world.line(), "b1 a2");
}

#[test]
fn urgency_orders_a_clients_own_requests_in_its_own_places() {
    for fairness in [Fairness::Client, Fairness::Fifo] {
        let mut world = World::new(fairness);
        world.join("a1 b1 a2 b2");
        world.join_as("a3", Priority::Normal, Priority::High);
        assert_eq!(world.line(), "a3 b1 a1 b2 a2");
        world.join_as("a4", Priority::Normal, Priority::Low);
        world.join("a5");
        assert_eq!(world.line(), "a3 b1 a1 b2 a2 a5 a4");
        world.join_as("b3", Priority::Normal, Priority::High);
        assert!(world.line().starts_with("a3 b3 a1 b1 a2"), "{}", world.line());
    }
}

#[test]
fn a_less_urgent_request_is_passed_for_a_while_only() {
    let mut world = World::new(Fairness::Client);
    world.join_as("a1", Priority::Normal, Priority::Low);
    world.join("a2");
    world.pass(AGEING.as_secs());
    world.join("a3");
    assert_eq!(world.line(), "a2 a1 a3");
    world.join_as("a4", Priority::Normal, Priority::High);
    assert_eq!(world.line(), "a2 a4 a1 a3", "who has aged a step is still less urgent than this");
    world.pass(AGEING.as_secs());
    world.join_as("a5", Priority::Normal, Priority::High);
    assert_eq!(world.line(), "a2 a4 a1 a3 a5");
}

#[test]
fn a_client_with_priority_goes_first_and_those_have_turns_among_themselves() {
    let mut world = World::new(Fairness::Client);
    world.join_as("l1", Priority::Low, Priority::Normal);
    world.join("a1 a2 b1");
    for name in ["h1", "h2", "g1"] {
        world.join_as(name, Priority::High, Priority::Normal);
    }
    assert_eq!(world.line(), "h1 g1 h2 a1 b1 a2 l1");
}

#[test]
fn who_has_aged_takes_turns_with_those_above() {
    let mut world = World::new(Fairness::Client);
    let high = |world: &mut World, names: &'static str| {
        names.split(' ').for_each(|name| world.join_as(name, Priority::High, Priority::Normal));
    };
    world.join("a1 a2");
    high(&mut world, "h1 h2 h3");
    world.join_as("l1", Priority::Low, Priority::Normal);
    assert_eq!(world.line(), "h1 h2 h3 a1 a2 l1");
    world.pass(AGEING.as_secs() - 1);
    assert_eq!(world.line(), "h1 h2 h3 a1 a2 l1");
    world.pass(1);
    assert_eq!(world.line(), "h1 a1 h2 a2 h3 l1");
    high(&mut world, "h4 g1");
    assert_eq!(world.line(), "h1 a1 g1 h2 a2 h3 h4 l1");
    world.pass(AGEING.as_secs());
    assert_eq!(world.line(), "h1 a1 g1 l1 h2 a2 h3 h4");
}

#[test]
fn who_comes_back_after_a_refusal_goes_first_in_the_order_of_the_first_join() {
    for fairness in [Fairness::Client, Fairness::Fifo] {
        let mut world = World::new(fairness);
        world.join_as("h1", Priority::High, Priority::High);
        world.join("a1");
        world.again("a8", 8);
        world.again("b7", 7);
        world.again("a9", 9);
        assert_eq!(world.line(), "b7 a8 a9 h1 a1");
        world.queue.leave(world.id("a8"));
        assert_eq!(world.line(), "b7 a9 h1 a1", "nobody takes a place at the front");
    }
}

#[test]
fn a_kept_place_is_in_nobodys_way_and_given_up_in_time() {
    let mut world = World::new(Fairness::Client);
    world.join("a1 b1 c1");
    let former = world.id("b1");
    world.queue.step_aside(former, world.now);
    assert_eq!((world.line().as_str(), world.queue.len(), world.queue.kept()), ("a1 c1", 2, 1));
    assert_eq!(world.queue.find_kept(|entry| entry.waiter == "b1"), Some((former, 1)));
    world.queue.come_back(former, 77, None, "b1'");
    assert_eq!((world.line().as_str(), world.queue.kept()), ("a1 b1' c1", 0));
    world.queue.step_aside(77, world.now);
    world.pass(KEPT.as_secs());
    assert_eq!((world.queue.find_kept(|_| true), world.queue.kept()), (None, 0));
    assert_eq!(world.queue.next_due(), None);
}

#[test]
fn only_a_waiter_with_a_connection_is_ready() {
    let mut world = World::new(Fairness::Client);
    world.join("a1 b1");
    let ready = |world: &World| world.queue.ready().map(|entry| entry.waiter).collect::<Vec<_>>();
    assert!(ready(&world).is_empty());
    let [a, b] = ["a1", "b1"].map(|name| world.id(name));
    world.queue.set_ready(b, true);
    world.queue.set_ready(b, true);
    assert_eq!(ready(&world), ["b1"]);
    world.queue.set_ready(a, true);
    assert_eq!(ready(&world), ["a1", "b1"]);
    world.queue.set_ready(a, false);
    world.queue.set_ready(9, true);
    assert_eq!(ready(&world), ["b1"]);
    world.queue.step_aside(b, world.now);
    assert!(ready(&world).is_empty());
}

#[test]
fn deadlines_name_who_is_late_and_nobody_else() {
    let mut world = World::new(Fairness::Client);
    let now = world.now;
    let at = |seconds| Some(now + Duration::from_secs(seconds));
    for (id, deadline, name) in [(1, at(5), "a1"), (2, None, "b1"), (3, at(3), "c1")] {
        let (class, urgency) = (Priority::Normal, Priority::Normal);
        let standing = Standing { client: name.into(), class, urgency, since: now, again: false };
        world.queue.join(id, standing, deadline, name, now);
    }
    assert_eq!(world.queue.next_due(), at(3));
    assert_eq!(world.queue.late(now), []);
    assert_eq!(world.queue.late(now + Duration::from_secs(3)), [(3, 2)]);
    world.queue.leave(3);
    assert_eq!(world.queue.late(now + Duration::from_secs(9)), [(1, 0)]);
    world.queue.leave(1);
    assert_eq!(
        (world.line().as_str(), world.queue.late(now + Duration::from_secs(99))),
        ("b1", vec![])
    );
    assert_eq!(world.queue.next_due(), None);
}

#[test]
fn a_client_is_forgotten_with_its_last_entry() {
    let mut world = World::new(Fairness::Client);
    for _ in 0..3 {
        world.join("a1 b1 a2");
        assert_eq!(["a", "b", "c"].map(|client| world.queue.len_of(client)), [2, 1, 0]);
        for name in ["a1", "b1", "a2"] {
            world.queue.take(world.id(name));
        }
        assert_eq!((world.queue.clients.by_name.len(), world.queue.clients.slots.len()), (0, 2));
    }
}
