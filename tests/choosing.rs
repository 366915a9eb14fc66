//! Which of several providers that list a model does a request, and when it moves on.
//!
//! A provider is busy here for longer than any test takes; so who gets a request shows in who gets it at all.

mod support;

use serde_json::Value;
use support::{
    Client, ClosedPort, Gateway, PATIENCE, Reply, Response, UNSHAPED, Upstream, post, post_with,
    provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m"}"#;
const SPENT: &str = r#"{"error":{"message":"You exceeded your current quota","type":"insufficient_quota","param":null,"code":"insufficient_quota"}}"#;
const FALLBACK: &str = "fallback: true";
const EARLIEST: &str = "routing: earliest";

/// Longer than any test.
const NEVER_MS: u64 = 30_000;

/// Two providers, `a` and `b`, that both list `m`.
struct Pair {
    a: Upstream,
    b: Upstream,
    gateway: Gateway,
}

/// `a` answers with `replies`, under this limit and with further lines of its entry; `b` takes everything at once.
fn pair(server: &str, replies: impl IntoIterator<Item = Reply>, limit: &str, extras: &str) -> Pair {
    let (a, b) = (Upstream::start(replies), Upstream::start([Reply::ok()]));
    let entries = [
        provider_yaml("a", a.addr(), &["m"], limit, extras),
        provider_yaml("b", b.addr(), &["m"], UNSHAPED, ""),
    ];
    let gateway = Gateway::start_with(server, &entries.concat(), &[]);
    Pair { a, b, gateway }
}

/// Two providers that answer everything, under these limits.
fn shaped(server: &str, limits: [&str; 2]) -> Pair {
    let (a, b) = (Upstream::start([Reply::ok()]), Upstream::start([Reply::ok()]));
    let entries = [
        provider_yaml("a", a.addr(), &["m"], limits[0], ""),
        provider_yaml("b", b.addr(), &["m"], limits[1], ""),
    ];
    let gateway = Gateway::start_with(server, &entries.concat(), &[]);
    Pair { a, b, gateway }
}

fn ask(gateway: &Gateway) -> Client {
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, BODY);
    client
}

/// Who did it.
fn provider(response: &Response) -> String {
    assert_eq!(response.status, 200, "{response:?}");
    response.header("x-limitrate-provider").expect("it is told")
}

fn queued(gateway: &Gateway) -> [u64; 2] {
    let stats = gateway.stats();
    [0, 1].map(|provider: usize| {
        stats["providers"][provider]["queued_ahead"].as_u64().expect("a number")
    })
}

/// Polls until so many wait at each provider.
fn wait_queued(gateway: &Gateway, want: [u64; 2]) -> Value {
    gateway.wait_stats_of(0, |stats| stats["queued_ahead"] == want[0], PATIENCE);
    gateway.wait_stats_of(1, |stats| stats["queued_ahead"] == want[1], PATIENCE);
    assert_eq!(queued(gateway), want);
    gateway.stats()
}

// --- routing: first

#[test]
fn first_is_the_default_and_stays_with_the_first_provider() {
    for server in ["", "routing: first", FALLBACK] {
        let Pair { a: _a, b, gateway } = pair(server, [Reply::ok()], &spaced(NEVER_MS), "");
        assert_eq!(provider(&post(gateway.addr(), CHAT, BODY)), "a", "{server}");
        let _waiting = [ask(&gateway), ask(&gateway)];
        gateway.wait_queued(2);
        assert!(b.requests().is_empty(), "{server}");
        assert_eq!(gateway.stats()["server"]["routing"], "first");
    }
}

// --- routing: earliest

#[test]
fn earliest_takes_the_provider_whose_slot_comes_first() {
    let Pair { a: _a, b: _b, gateway } = shaped(EARLIEST, [&spaced(40_000), &spaced(100_000)]);
    // Both are free, and of equals it is the first in the file; then only the second is.
    for free in ["a", "b"] {
        assert_eq!(provider(&post(gateway.addr(), CHAT, BODY)), free);
    }
    // 40 s or 100 s, 80 s or 100 s, 120 s or 100 s, 120 s or 200 s.
    let mut waiting = Vec::new();
    for want in [[1, 0], [2, 0], [2, 1], [3, 1]] {
        waiting.push(ask(&gateway));
        wait_queued(&gateway, want);
    }
    assert_eq!(gateway.stats()["server"]["routing"], "earliest");
}

#[test]
fn earliest_spreads_a_burst_evenly() {
    let Pair { a, b, gateway } = shaped(EARLIEST, [&spaced(NEVER_MS), &spaced(NEVER_MS)]);
    let mut callers = [(); 6].map(|()| Client::connect(gateway.addr()));
    for caller in &mut callers {
        caller.post_json(CHAT, BODY);
    }
    wait_queued(&gateway, [2, 2]);
    assert_eq!([a, b].map(|upstream| upstream.wait_requests(1, PATIENCE).len()), [1, 1]);
}

#[test]
fn earliest_asks_who_would_refuse_last() {
    let limit = "{mode: spaced, interval_seconds: 30, max_wait_seconds: 1}";
    let Pair { a: _a, b: _b, gateway } = shaped(EARLIEST, [limit, &spaced(3_600_000)]);
    for free in ["a", "b"] {
        assert_eq!(provider(&post(gateway.addr(), CHAT, BODY)), free);
    }
    let _waiting = ask(&gateway);
    wait_queued(&gateway, [0, 1]);
}

#[test]
fn earliest_looks_at_the_callers_own_patience() {
    let Pair { a: _a, b: _b, gateway } =
        shaped(EARLIEST, [&spaced(NEVER_MS), &spaced(2 * NEVER_MS)]);
    for _ in 0..2 {
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    }
    // Nobody has a slot in time: the refusal is that of the one who would have had it first, or of the first.
    let refused = post_with(gateway.addr(), CHAT, "X-Limitrate-Deadline-Ms: 1000\r\n", BODY);
    assert_eq!((refused.status, refused.code().as_str()), (503, "deadline_exceeded"));
    assert!(refused.text().contains("`a`"), "{refused:?}");
}

#[test]
fn earliest_leaves_a_provider_that_answers_429_for_the_other_at_once() {
    let pause = Reply::TooMany(vec![("Retry-After", "60".to_owned())]);
    let Pair { a, b, gateway } = pair(EARLIEST, [pause], UNSHAPED, "retry: {attempts: 3}");
    for _ in 0..3 {
        assert_eq!(provider(&post(gateway.addr(), CHAT, BODY)), "b");
    }
    assert_eq!([a.requests().len(), b.requests().len()], [1, 3]);
}

#[test]
fn those_who_wait_for_a_provider_that_pauses_go_to_the_other() {
    let gate = support::Gate::closed();
    let pause =
        b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 250\r\nContent-Length: 2\r\n\r\n{}";
    let a = Upstream::start([Reply::pieces(&[pause], &gate, support::Ending::Complete)]);
    let b = Upstream::start([Reply::ok()]);
    let retry = "retry: {attempts: 3}";
    let entries = [
        provider_yaml("a", a.addr(), &["m"], &spaced(40_000), retry),
        provider_yaml("b", b.addr(), &["m"], &spaced(100_000), ""),
    ];
    let gateway = Gateway::start_with(EARLIEST, &entries.concat(), &[]);
    let _refused = ask(&gateway);
    a.wait_requests(1, PATIENCE);
    assert_eq!(provider(&post(gateway.addr(), CHAT, BODY)), "b");
    let _waiting = ask(&gateway);
    wait_queued(&gateway, [1, 0]);
    gate.release(usize::MAX);
    // b's slots are in 100 and 200 s, a's in 250 s and 290 s.
    let stats = wait_queued(&gateway, [0, 2]);
    assert!(stats["providers"][0]["moved_elsewhere"].as_u64() >= Some(1), "{stats:#}");
    assert_eq!(a.requests().len(), 1);
}

// --- fallback: true

#[test]
fn it_falls_back_from_a_provider_that_refuses_connections_and_asks_it_last_for_a_while() {
    for server in [FALLBACK, "routing: earliest\nfallback: true"] {
        let (closed, b) = (ClosedPort::new(), Upstream::start([Reply::ok()]));
        let entries = [
            provider_yaml("a", closed.addr(), &["m"], UNSHAPED, "retry: {attempts: 3}"),
            provider_yaml("b", b.addr(), &["m"], UNSHAPED, ""),
        ];
        let gateway = Gateway::start_with(server, &entries.concat(), &[]);
        for _ in 0..3 {
            assert_eq!(provider(&post(gateway.addr(), CHAT, BODY)), "b", "{server}");
        }
        let stats = gateway.stats()["providers"][0].take();
        assert_eq!((&stats["sent"], &stats["queued_ahead"]), (&0.into(), &0.into()), "{server}");
        let failures = stats["upstream_errors"].as_u64().expect("a number");
        assert!((1..=2).contains(&failures), "once in five seconds: {failures} with {server}");
    }
}

#[test]
fn it_falls_back_from_a_provider_whose_day_is_spent() {
    let limit = "{mode: burst, rpm: 600000, capacity: 1000, rpd: 1}";
    for server in [FALLBACK, "routing: earliest\nfallback: true"] {
        let Pair { a: _a, b: _b, gateway } = pair(server, [Reply::ok()], limit, "");
        let did = [(); 3].map(|()| provider(&post(gateway.addr(), CHAT, BODY)));
        assert_eq!(did, ["a", "b", "b"], "{server}");
    }
}

#[test]
fn it_falls_back_from_a_provider_that_fails_to_the_end_of_its_attempts() {
    let failing = Reply::Json(503, "{}".to_owned());
    let Pair { a, b, gateway } = pair(FALLBACK, [failing], UNSHAPED, "retry: {attempts: 2}");
    assert_eq!(provider(&post(gateway.addr(), CHAT, BODY)), "b");
    assert_eq!([a.requests().len(), b.requests().len()], [2, 1]);
}

#[test]
fn it_falls_back_from_a_spent_quota_and_from_a_pause_that_is_too_long() {
    for refusal in [
        Reply::Json(429, SPENT.to_owned()),
        Reply::TooMany(vec![("Retry-After", "3000".to_owned())]),
    ] {
        let Pair { a, b, gateway } =
            pair(FALLBACK, [refusal.clone()], UNSHAPED, "retry: {attempts: 5}");
        assert_eq!(provider(&post(gateway.addr(), CHAT, BODY)), "b", "{refusal:?}");
        assert_eq!([a.requests().len(), b.requests().len()], [1, 1], "{refusal:?}");
    }
}

#[test]
fn an_answer_that_is_the_callers_own_fault_is_no_reason_to_move_on() {
    for status in [400, 401, 404, 422] {
        let answer = Reply::Json(status, "{}".to_owned());
        let Pair { a: _a, b, gateway } =
            pair("routing: earliest\nfallback: true", [answer], UNSHAPED, "");
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, status);
        assert!(b.requests().is_empty(), "{status}");
    }
}

#[test]
fn a_request_whose_connection_breaks_after_the_send_is_not_done_twice() {
    for server in [FALLBACK, "routing: earliest\nfallback: true"] {
        for (reply, status) in
            [(Reply::CloseBeforeAnswer, 502), (Reply::Reset, 502), (Reply::Stall, 504)]
        {
            let extras = "retry: {attempts: 3}\nrequest_timeout_seconds: 0.3";
            let Pair { a, b, gateway } = pair(server, [reply.clone()], UNSHAPED, extras);
            assert_eq!(post(gateway.addr(), CHAT, BODY).status, status, "{reply:?}");
            assert_eq!([a.requests().len(), b.requests().len()], [1, 0], "{reply:?} with {server}");
        }
    }
}

#[test]
fn only_the_model_changes_in_a_body_that_moves_on() {
    let (a, b, c) = (
        Upstream::start([Reply::Json(503, "{}".to_owned())]),
        Upstream::start([Reply::Json(503, "{}".to_owned())]),
        Upstream::start([Reply::ok()]),
    );
    let entries = [
        provider_yaml("a", a.addr(), &["{id: m, upstream: a-much-longer-name}"], UNSHAPED, ""),
        provider_yaml("b", b.addr(), &["{id: m, upstream: b}"], UNSHAPED, ""),
        provider_yaml("c", c.addr(), &["m"], UNSHAPED, ""),
    ];
    let gateway = Gateway::start_with(FALLBACK, &entries.concat(), &[]);
    let (before, after) = (
        "{ \"x\":1E400, \"model\" :\t",
        " ,\n\"messages\":[\"\\u00e9\",{\"model\":\"m\"}],\"z\":-0.0} ",
    );
    let body = |model: &str| format!("{before}\"{model}\"{after}");
    assert_eq!(provider(&post(gateway.addr(), CHAT, body("m"))), "c");
    let sent = [&a, &b, &c].map(|upstream| upstream.requests()[0].text());
    assert_eq!(sent, [body("a-much-longer-name"), body("b"), body("m")]);
}

#[test]
fn a_provider_that_is_asked_for_by_name_does_it_or_nobody() {
    for server in [FALLBACK, "routing: earliest\nfallback: true"] {
        for (reply, status) in
            [(Reply::Json(503, "{}".to_owned()), 503), (Reply::Json(429, SPENT.to_owned()), 429)]
        {
            let Pair { a, b, gateway } = pair(server, [reply], UNSHAPED, "");
            assert_eq!(post(gateway.addr(), CHAT, r#"{"model":"a/m"}"#).status, status, "{server}");
            assert_eq!([a.requests().len(), b.requests().len()], [1, 0], "{server}");
        }
        let (closed, b) = (ClosedPort::new(), Upstream::start([Reply::ok()]));
        let entries = [
            provider_yaml("a", closed.addr(), &["m"], UNSHAPED, ""),
            provider_yaml("b", b.addr(), &["m"], UNSHAPED, ""),
        ];
        let gateway = Gateway::start_with(server, &entries.concat(), &[]);
        for _ in 0..2 {
            assert_eq!(
                post(gateway.addr(), CHAT, r#"{"model":"a/m"}"#).code(),
                "upstream_unreachable",
                "{server}"
            );
        }
        assert!(b.requests().is_empty(), "{server}");
    }
    // Nor for an earlier slot.
    let Pair { a: _a, b, gateway } = shaped(EARLIEST, [&spaced(NEVER_MS), UNSHAPED]);
    let _callers = [(); 2].map(|()| {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, r#"{"model":"a/m"}"#);
        client
    });
    gateway.wait_queued(1);
    assert!(b.requests().is_empty());
}

#[test]
fn without_fallback_the_refusal_is_passed_on() {
    for server in ["", EARLIEST] {
        for (reply, status) in
            [(Reply::Json(503, "{}".to_owned()), 503), (Reply::Json(429, SPENT.to_owned()), 429)]
        {
            let Pair { a: _a, b, gateway } = pair(server, [reply], UNSHAPED, "");
            assert_eq!(post(gateway.addr(), CHAT, BODY).status, status, "{server}");
            assert!(b.requests().is_empty(), "{server}");
        }
    }
    let limit = "{mode: burst, rpm: 600000, capacity: 1000, rpd: 1}";
    let Pair { a: _a, b, gateway } = pair("", [Reply::ok()], limit, "");
    assert_eq!(provider(&post(gateway.addr(), CHAT, BODY)), "a");
    assert_eq!(post(gateway.addr(), CHAT, BODY).code(), "daily_limit_reached");
    assert!(b.requests().is_empty());

    let (closed, b) = (ClosedPort::new(), Upstream::start([Reply::ok()]));
    let entries = [
        provider_yaml("a", closed.addr(), &["m"], UNSHAPED, ""),
        provider_yaml("b", b.addr(), &["m"], UNSHAPED, ""),
    ];
    let gateway = Gateway::start(&entries.concat());
    assert_eq!(post(gateway.addr(), CHAT, BODY).code(), "upstream_unreachable");
    assert!(b.requests().is_empty());
}

#[test]
fn when_nobody_can_the_last_refusal_is_the_answer() {
    let closed = [ClosedPort::new(), ClosedPort::new()];
    let entries = [
        provider_yaml("a", closed[0].addr(), &["m"], UNSHAPED, ""),
        provider_yaml("b", closed[1].addr(), &["m"], UNSHAPED, ""),
    ];
    for server in [FALLBACK, "routing: earliest\nfallback: true"] {
        let gateway = Gateway::start_with(server, &entries.concat(), &[]);
        let refused = post(gateway.addr(), CHAT, BODY);
        assert_eq!(
            (refused.status, refused.code().as_str()),
            (502, "upstream_unreachable"),
            "{server}"
        );
        assert!(refused.text().contains("`b`"), "{server}: {refused:?}");
    }
    // With the provider's own words, where there are any.
    let upstream = Upstream::start([Reply::Json(429, SPENT.to_owned())]);
    let entries = [
        provider_yaml("a", closed[0].addr(), &["m"], UNSHAPED, ""),
        provider_yaml("b", upstream.addr(), &["m"], UNSHAPED, ""),
    ];
    let gateway = Gateway::start_with(FALLBACK, &entries.concat(), &[]);
    let refused = post(gateway.addr(), CHAT, BODY);
    assert_eq!((refused.status, refused.text().as_str()), (429, SPENT));
    assert_eq!(refused.header("x-should-retry").as_deref(), Some("false"));
}
