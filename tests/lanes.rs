//! Several API keys of one provider: each has its own limits, and one that has to pause leaves the others going.
//!
//! What the provider sees tells the keys apart: each counts the requests under its own `Authorization`.

mod support;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{
    Client, Gateway, PATIENCE, Recorded, Reply, UNSHAPED, Upstream, post, provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m"}"#;
const SPENT: &str = r#"{"error":{"message":"You exceeded your current quota","type":"insufficient_quota","param":null,"code":"insufficient_quota"}}"#;

/// Longer than any test: a slot that is not open at the start does not come.
const NEVER_MS: u64 = 30_000;

fn gateway(upstream: &Upstream, keys: &str, rate_limit: &str, more: &str) -> Gateway {
    let extras = format!("api_keys: [{keys}]\n{more}");
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], rate_limit, &extras))
}

fn ask(gateway: &Gateway) -> Client {
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, BODY);
    client
}

/// The key that a request came with.
fn key(request: &Recorded) -> String {
    let sent = request.header("authorization").expect("every request has a key");
    sent.strip_prefix("Bearer ").expect("as OpenAI's clients send it").to_owned()
}

fn keys(requests: &[Recorded]) -> Vec<String> {
    requests.iter().map(key).collect()
}

/// A provider that answers each key in its own way; those without one get a 200.
fn by_key(replies: &[(&'static str, Reply)]) -> Upstream {
    let replies: HashMap<_, _> = replies.iter().cloned().collect();
    Upstream::answering(move |request, _| {
        replies.get(&*key(request)).cloned().unwrap_or_else(Reply::ok)
    })
}

fn pause(seconds: &str) -> Reply {
    Reply::TooMany(vec![("Retry-After", seconds.to_owned())])
}

fn lanes(gateway: &Gateway) -> Vec<Value> {
    gateway.stats()["providers"][0]["lanes"].as_array().expect("a list").clone()
}

#[test]
fn two_keys_send_two_at_once_and_each_keeps_its_own_gaps() {
    let interval = Duration::from_millis(250);
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "one, two", &spaced(250), "");
    let start = Instant::now();
    let mut callers = [(); 6].map(|()| ask(&gateway));
    let requests = upstream.wait_requests(6, PATIENCE);
    for of in ["one", "two"] {
        let arrivals: Vec<Instant> = requests
            .iter()
            .filter(|request| key(request) == of)
            .map(|request| request.arrived)
            .collect();
        assert_eq!(arrivals.len(), 3, "{of} of {:?}", keys(&requests));
        for (n, arrival) in arrivals.iter().enumerate() {
            let (at, earliest) = (*arrival - start, interval * n as u32);
            assert!(
                at >= earliest,
                "request {n} of {of} came after {at:?}, its slot opens after {earliest:?}"
            );
        }
        for pair in arrivals.windows(2) {
            assert!(pair[1] - pair[0] > interval / 2, "two of {of} came together: {arrivals:?}");
        }
    }
    // With one key it would be five intervals.
    let last = requests.iter().map(|request| request.arrived).max().expect("six came");
    assert!(
        last - start < interval * 2 + Duration::from_secs(2),
        "slower than the budget of two keys"
    );
    for caller in &mut callers {
        assert_eq!(caller.read_response().status, 200);
    }
}

#[test]
fn every_limit_counts_for_each_key_by_itself() {
    for (limit, together) in [
        (spaced(NEVER_MS), 2),
        ("{mode: burst, interval_seconds: 30, capacity: 2}".to_owned(), 4),
        ("{mode: window, rpm: 3}".to_owned(), 6),
        ("{mode: burst, rpm: 600000, capacity: 1000, max_concurrent: 1}".to_owned(), 2),
        ("{mode: burst, rpm: 600000, capacity: 1000, tpm: 150}".to_owned(), 2),
    ] {
        let upstream = Upstream::start([Reply::Stall]);
        let gateway = gateway(&upstream, "one, two", &limit, "");
        let body = r#"{"model":"m","max_tokens":90}"#;
        let _callers: Vec<Client> = (0..together + 2)
            .map(|_| {
                let mut client = Client::connect(gateway.addr());
                client.post_json(CHAT, body);
                client
            })
            .collect();
        let requests = upstream.wait_requests(together, PATIENCE);
        let stats = gateway.wait_queued(2);
        assert_eq!(stats["sent"], together, "{limit}: {stats:#}");
        let of_one = keys(&requests).iter().filter(|key| *key == "one").count();
        assert_eq!((requests.len(), of_one), (together, together / 2), "{limit}");
    }
}

#[test]
fn a_day_is_spent_when_it_is_for_each_key() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway =
        gateway(&upstream, "one, two", "{mode: burst, rpm: 600000, capacity: 1000, rpd: 1}", "");
    let statuses = [(); 3].map(|()| post(gateway.addr(), CHAT, BODY).status);
    assert_eq!(statuses, [200, 200, 503]);
    let mut seen = keys(&upstream.requests());
    seen.sort();
    assert_eq!(seen, ["one", "two"]);
}

#[test]
fn a_request_takes_the_key_whose_slot_comes_first() {
    let interval = Duration::from_secs(2);
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "one, two", &spaced(2000), "");
    let start = Instant::now();
    for n in 1..=2 {
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
        upstream.wait_requests(n, PATIENCE);
        std::thread::sleep(Duration::from_millis(300));
    }
    let _callers = [ask(&gateway), ask(&gateway)];
    let requests = upstream.wait_requests(4, PATIENCE);
    let of = keys(&requests);
    assert_eq!((&of[0], &of[1]), (&of[2], &of[3]), "{of:?}");
    assert_ne!(of[0], of[1], "{of:?}");
    // The second key's slot comes 300 ms after the first one's.
    assert!(requests[2].arrived - start >= interval, "{:?}", requests[2].arrived - start);
    assert!(
        requests[3].arrived - start >= interval + Duration::from_millis(300),
        "{:?}",
        requests[3].arrived - start
    );
}

#[test]
fn a_429_pauses_one_key_and_the_request_goes_out_with_the_other_at_once() {
    let upstream = by_key(&[("one", pause("60"))]);
    let gateway = gateway(&upstream, "one, two", UNSHAPED, "retry: {attempts: 3}");
    for _ in 0..4 {
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    }
    let requests = upstream.requests();
    assert_eq!(keys(&requests), ["one", "two", "two", "two", "two"]);
    assert_eq!(requests[0].body, requests[1].body);
    let lanes = lanes(&gateway);
    let state =
        |lane: &Value| (lane["cooldowns"].clone(), lane["held_by"].clone(), lane["sent"].clone());
    assert_eq!(state(&lanes[0]), (1.into(), "cooldown".into(), 1.into()));
    assert_eq!(state(&lanes[1]), (0.into(), "nothing".into(), 4.into()));
}

#[test]
fn those_who_wait_for_a_key_that_pauses_go_out_with_the_other() {
    let upstream = by_key(&[("one", pause("60"))]);
    let gateway = gateway(&upstream, "one, two", &spaced(1000), "retry: {attempts: 5}");
    let mut callers = [(); 3].map(|()| ask(&gateway));
    for caller in &mut callers {
        assert_eq!(caller.read_response().status, 200);
    }
    let of = keys(&upstream.requests());
    assert_eq!(of.iter().filter(|key| *key == "one").count(), 1, "{of:?}");
    assert_eq!(of.len(), 4, "{of:?}");
}

#[test]
fn when_every_key_pauses_the_first_to_be_over_is_waited_for() {
    let upstream = Upstream::answering(|request, nth| match (nth, &*key(request)) {
        (0, _) => pause("60"),
        (1, _) => pause("1"),
        _ => Reply::ok(),
    });
    let gateway = gateway(&upstream, "one, two", UNSHAPED, "retry: {attempts: 3}");
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let requests = upstream.requests();
    assert_eq!(keys(&requests), ["one", "two", "two"]);
    assert!(requests[2].arrived - requests[1].arrived >= Duration::from_secs(1));
}

#[test]
fn a_key_without_quota_leaves_the_request_to_the_other() {
    let upstream = by_key(&[("one", Reply::Json(429, SPENT.to_owned()))]);
    let gateway = gateway(&upstream, "one, two", UNSHAPED, "retry: {attempts: 3}");
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    assert_eq!(keys(&upstream.requests()), ["one", "two"]);
}

#[test]
fn when_no_key_has_quota_left_the_refusal_is_passed_on_at_once() {
    let upstream = Upstream::start([Reply::Json(429, SPENT.to_owned())]);
    let gateway = gateway(&upstream, "one, two, three", UNSHAPED, "retry: {attempts: 9}");
    let refused = post(gateway.addr(), CHAT, BODY);
    assert_eq!((refused.status, refused.text().as_str()), (429, SPENT));
    assert_eq!(refused.header("x-should-retry").as_deref(), Some("false"));
    assert_eq!(keys(&upstream.requests()), ["one", "two", "three"]);
}

#[test]
fn a_key_that_pauses_is_waited_for_when_the_other_has_no_quota() {
    let upstream = Upstream::answering(|request, nth| match (nth, &*key(request)) {
        (0, _) => pause("2"),
        (_, "two") => Reply::Json(429, SPENT.to_owned()),
        _ => Reply::ok(),
    });
    let gateway = gateway(&upstream, "one, two", UNSHAPED, "retry: {attempts: 9}");
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let requests = upstream.requests();
    let (first, last) = (&requests[0], &requests[requests.len() - 1]);
    assert_eq!((key(first), key(last)), ("one".to_owned(), "one".to_owned()));
    assert!(
        last.arrived - first.arrived >= Duration::from_secs(2),
        "{:?}",
        last.arrived - first.arrived
    );
}

#[test]
fn a_key_that_answers_badly_is_not_blamed() {
    let upstream = by_key(&[("one", Reply::Json(400, "{}".to_owned()))]);
    let gateway = gateway(&upstream, "one, two", UNSHAPED, "retry: {attempts: 3}");
    let statuses = [(); 2].map(|()| post(gateway.addr(), CHAT, BODY).status);
    assert_eq!(statuses, [400, 200]);
    assert_eq!(keys(&upstream.requests()), ["one", "two"]);
}

#[test]
fn each_key_is_sent_where_the_api_has_it() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "one, two", &spaced(NEVER_MS), "");
    for _ in 0..2 {
        assert_eq!(post(gateway.addr(), "/v1/messages", BODY).status, 200);
    }
    let sent: Vec<_> =
        upstream.requests().iter().map(|request| request.header("x-api-key")).collect();
    assert_eq!(sent, [Some("one".to_owned()), Some("two".to_owned())]);
}

#[test]
fn the_stats_have_a_row_for_each_key_and_show_no_key() {
    let upstream = Upstream::start([Reply::ok()]);
    let own = ["sk-one-2345678-abcd", "sk-23456789x", "sk-23456789xy"];
    let gateway = gateway(&upstream, &own.join(", "), &spaced(NEVER_MS), "");
    for _ in 0..2 {
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    }
    let stats = gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
    let lanes = lanes(&gateway);
    let column = |name: &str| lanes.iter().map(|lane| lane[name].clone()).collect::<Vec<_>>();
    // The second has twelve characters: four of them would be too many to tell.
    assert_eq!(column("key"), ["...abcd", "#2", "...89xy"]);
    assert_eq!(column("sent"), [1, 1, 0]);
    assert_eq!(column("available"), [0, 0, 1]);
    assert_eq!(column("held_by"), ["cadence", "cadence", "nothing"]);
    assert_eq!(column("observed_rpm"), [1, 1, 0]);
    assert_eq!(column("effective_rpm"), [2.0, 2.0, 2.0]);
    assert!(
        lanes[0]["last_send_time"].is_f64() && lanes[2]["last_send_time"].is_null(),
        "{lanes:?}"
    );
    // The provider's own numbers are those of all its keys.
    for (name, want) in
        [("sent", 2.0), ("tokens", 1.0), ("effective_rpm", 6.0), ("observed_rpm", 2.0)]
    {
        assert_eq!(stats[name].as_f64(), Some(want), "{name}");
    }
    assert!(own.iter().all(|key| !stats.to_string().contains(key)), "{stats}");
}

#[test]
fn one_key_and_none_have_one_row() {
    let upstream = Upstream::start([Reply::ok()]);
    for (extras, label) in
        [("", "#1"), ("api_key: short", "#1"), ("api_keys: [sk-one-2345678-abcd]", "...abcd")]
    {
        let gateway =
            Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, extras));
        let lanes = lanes(&gateway);
        assert_eq!((lanes.len(), &lanes[0]["key"]), (1, &label.into()), "{extras}");
    }
}
