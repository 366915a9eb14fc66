//! When requests leave for the provider, and who gets which slot.
//!
//! Arrivals are measured at the provider. A reader thread may notice an arrival late but never early, so a lower bound
//! counts from an instant before the callers asked: that bound holds on the busiest machine. A slot that must be lost or
//! won shows in an upper bound of at least half an interval's slack, or, where the interval is half a minute, in whether
//! a request comes at all.

mod support;

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;
use support::{
    Client, ClosedPort, Ending, Gate, Gateway, PATIENCE, Recorded, Reply, Upstream, burst, get,
    post, provider_at, provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

/// Longer than any test: a slot that is not open at the start does not come.
const NEVER_MS: u64 = 30_000;

fn gateway(upstream: &Upstream, rate_limit: &str) -> Gateway {
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], rate_limit, ""))
}

/// A caller whose request is on its way.
fn ask(gateway: &Gateway, tag: &str) -> Client {
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, format!(r#"{{"model":"m","tag":"{tag}"}}"#));
    client
}

/// Callers who ask one after the other, behind one whose request has left already.
fn line_up(gateway: &Gateway, tags: &[&str]) -> Vec<Client> {
    let mut queued = 0;
    let one = |tag: &&str| {
        let client = ask(gateway, tag);
        queued += 1;
        gateway.wait_queued(queued);
        client
    };
    tags.iter().map(one).collect()
}

fn tags(requests: &[Recorded]) -> String {
    requests
        .iter()
        .map(|request| request.json()["tag"].as_str().unwrap_or_default().to_owned())
        .collect()
}

/// The `n`-th request came no sooner than its slot, counted from `start` with `free` sends at once.
#[track_caller]
fn assert_not_faster(requests: &[Recorded], start: Instant, interval: Duration, free: usize) {
    for (n, request) in requests.iter().enumerate() {
        let earliest = interval * (n + 1).saturating_sub(free) as u32;
        let at = request.arrived - start;
        assert!(at >= earliest, "request {n} came after {at:?}, its slot opens after {earliest:?}");
    }
}

#[test]
fn three_at_once_leave_one_interval_apart() {
    let interval = Duration::from_millis(150);
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &spaced(150));
    let start = Instant::now();
    let mut callers = ["a", "b", "c"].map(|tag| ask(&gateway, tag));
    let requests = upstream.wait_requests(3, PATIENCE);
    assert_not_faster(&requests, start, interval, 1);
    for pair in requests.windows(2) {
        let gap = pair[1].arrived - pair[0].arrived;
        assert!(gap > interval / 2, "two came together: {gap:?}");
    }
    assert!(
        requests[2].arrived - start < interval * 2 + Duration::from_secs(2),
        "slower than the budget"
    );
    for caller in &mut callers {
        assert_eq!(caller.read_response().status, 200);
    }
}

#[test]
fn idle_time_earns_no_burst_in_spaced_mode() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &spaced(100));
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    let _callers = ["a", "b", "c"].map(|tag| ask(&gateway, tag));
    let requests = upstream.wait_requests(4, PATIENCE);
    assert_not_faster(&requests[1..], start, Duration::from_millis(100), 1);
}

#[test]
fn a_burst_is_full_at_the_start_and_no_larger() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &burst(NEVER_MS, 3));
    let _callers = ["a", "b", "c", "d", "e"].map(|tag| ask(&gateway, tag));
    upstream.wait_requests(3, PATIENCE);
    gateway.wait_queued(2);
    assert_eq!(upstream.requests().len(), 3);
}

#[test]
fn a_burst_refills_one_token_per_interval() {
    let interval = Duration::from_millis(150);
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &burst(150, 2));
    let start = Instant::now();
    let _callers = ["a", "b", "c", "d"].map(|tag| ask(&gateway, tag));
    let requests = upstream.wait_requests(4, PATIENCE);
    assert_not_faster(&requests, start, interval, 2);
    assert!(
        requests[3].arrived - start < interval * 2 + Duration::from_secs(2),
        "slower than the budget"
    );
}

#[test]
fn idle_time_fills_a_burst_up_to_its_capacity() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &burst(50, 2));
    let _callers = ["a", "b"].map(|tag| ask(&gateway, tag));
    upstream.wait_requests(2, PATIENCE);
    let full = gateway.wait_stats(|stats| stats["tokens"] == 2.0, PATIENCE);
    assert_eq!(full["capacity"], 2);
    thread::sleep(Duration::from_millis(200));
    assert_eq!(gateway.stats()["providers"][0]["tokens"], 2.0);
}

#[test]
fn a_burst_without_a_capacity_holds_one() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "{mode: burst, rpm: 2}");
    let _callers = ["a", "b"].map(|tag| ask(&gateway, tag));
    upstream.wait_requests(1, PATIENCE);
    assert_eq!(gateway.wait_queued(1)["capacity"], 1);
    assert_eq!(upstream.requests().len(), 1);
}

#[test]
fn the_stricter_of_rpm_and_interval_wins_in_both_modes() {
    for mode in ["spaced", "burst"] {
        for rate in ["rpm: 600, interval_seconds: 0.01", "rpm: 60000, interval_seconds: 0.1"] {
            let upstream = Upstream::start([Reply::ok()]);
            let gateway = gateway(&upstream, &format!("{{mode: {mode}, {rate}}}"));
            let start = Instant::now();
            let _callers = ["a", "b", "c"].map(|tag| ask(&gateway, tag));
            let requests = upstream.wait_requests(3, PATIENCE);
            assert_not_faster(&requests, start, Duration::from_millis(100), 1);
            assert_eq!(gateway.stats()["providers"][0]["interval_seconds"], 0.1, "{mode} {rate}");
        }
    }
}

#[test]
fn requests_leave_in_the_order_in_which_they_came() {
    let upstream = Upstream::start([Reply::ok()]);
    let limit = "{mode: spaced, interval_seconds: 0.3, max_wait_seconds: null}";
    let gateway = gateway(&upstream, limit);
    let _first = ask(&gateway, "a");
    upstream.wait_requests(1, PATIENCE);
    let _callers = line_up(&gateway, &["b", "c", "d", "e"]);
    assert_eq!(tags(&upstream.wait_requests(5, PATIENCE)), "abcde");
}

#[test]
fn providers_do_not_wait_for_each_other() {
    let (slow, fast) = (Upstream::start([Reply::ok()]), Upstream::start([Reply::ok()]));
    let gateway = Gateway::start(
        &[
            provider_yaml("slow", slow.addr(), &["m"], &spaced(NEVER_MS), ""),
            provider_yaml("fast", fast.addr(), &["other"], &spaced(10), ""),
        ]
        .concat(),
    );
    let _callers = ["a", "b"].map(|tag| ask(&gateway, tag));
    gateway.wait_queued(1);
    for _ in 0..3 {
        assert_eq!(post(gateway.addr(), CHAT, r#"{"model":"other"}"#).status, 200);
    }
}

/// `a` leaves at once; `b`, `c`, `d` wait; `leave` makes `b` go away. Then `d` gets the slot that `c` would have had.
fn assert_leaving_costs_no_slot(body: impl Fn(&str) -> String, leave: impl FnOnce(Client)) {
    let interval = Duration::from_millis(500);
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &spaced(500));
    let start = Instant::now();
    let mut callers = Vec::new();
    for (n, tag) in ["a", "b", "c", "d"].into_iter().enumerate() {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, body(tag));
        callers.push(client);
        match n {
            0 => drop(upstream.wait_requests(1, PATIENCE)),
            _ => drop(gateway.wait_queued(n as u64)),
        }
    }
    leave(callers.remove(1));
    let stats = gateway.wait_queued(2);
    assert_eq!(stats["cancelled_in_queue"], 1);
    let requests = upstream.wait_requests(3, PATIENCE);
    assert_eq!(tags(&requests), "acd");
    assert_not_faster(&requests, start, interval, 1);
    assert!(
        requests[2].arrived - requests[0].arrived < interval * 3,
        "the slot of the one who left was lost"
    );
    assert_eq!(gateway.stats()["providers"][0]["sent"], 3);
}

fn plain(tag: &str) -> String {
    format!(r#"{{"model":"m","tag":"{tag}"}}"#)
}

#[test]
fn a_caller_who_hangs_up_in_the_queue_costs_no_slot() {
    assert_leaving_costs_no_slot(plain, drop);
}

#[test]
fn a_streaming_caller_who_hangs_up_in_the_queue_costs_no_slot() {
    assert_leaving_costs_no_slot(
        |tag| format!(r#"{{"model":"m","stream":true,"tag":"{tag}"}}"#),
        drop,
    );
}

#[test]
fn a_caller_who_resets_in_the_queue_costs_no_slot() {
    assert_leaving_costs_no_slot(plain, Client::reset);
}

#[test]
fn a_caller_who_half_closes_in_the_queue_counts_as_gone() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &spaced(NEVER_MS));
    let _first = ask(&gateway, "a");
    upstream.wait_requests(1, PATIENCE);
    let mut second = line_up(&gateway, &["b"]).remove(0);
    second.half_close();
    gateway.wait_queued(0);
    assert!(second.is_closed(PATIENCE));
}

#[test]
fn the_connection_stands_before_its_slot() {
    // What is seen only after the slot, since the machine had other things to do, says nothing.
    let seen_in_time = (0..5).any(|_| {
        let upstream = Upstream::start([Reply::Stall]);
        let gateway = gateway(&upstream, &spaced(1500));
        let start = Instant::now();
        let _callers = ["a", "b"].map(|tag| ask(&gateway, tag));
        upstream.wait_requests(1, PATIENCE);
        upstream.wait_connections(2, PATIENCE);
        let sent = upstream.requests().len();
        let in_time = start.elapsed() < Duration::from_millis(1500);
        assert!(!in_time || sent == 1, "{sent} were sent");
        in_time
    });
    assert!(seen_in_time, "no connection before its slot, five times");
}

#[test]
fn a_connection_that_cannot_be_made_costs_no_slot_and_is_no_hang_up() {
    let closed = ClosedPort::new();
    let gateway = Gateway::start(&provider_yaml("p", closed.addr(), &["m"], &spaced(NEVER_MS), ""));
    for _ in 0..3 {
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 502);
    }
    let stats = gateway.wait_queued(0);
    assert_eq!((&stats["sent"], &stats["cancelled_in_queue"]), (&0.into(), &0.into()), "{stats:#}");
    assert_eq!(
        (&stats["upstream_errors"], &stats["last_send_time"]),
        (&3.into(), &().into()),
        "{stats:#}"
    );
}

#[test]
fn what_the_gateway_refuses_itself_costs_no_slot() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &spaced(NEVER_MS));
    for (body, status) in [("{", 400), ("{}", 400), (r#"{"model":"other"}"#, 404), (BODY, 200)] {
        assert_eq!(post(gateway.addr(), CHAT, body).status, status, "{body}");
    }
}

#[test]
fn a_request_that_would_wait_too_long_is_refused_at_once() {
    let upstream = Upstream::start([Reply::ok()]);
    let limit = "{mode: spaced, interval_seconds: 30, max_wait_seconds: 6}";
    let gateway = gateway(&upstream, limit);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let start = Instant::now();
    let refused = post(gateway.addr(), CHAT, BODY);
    assert!(start.elapsed() < Duration::from_secs(6), "refused only after {:?}", start.elapsed());
    assert_eq!(refused.status, 503);
    // 30 s until the slot less the 6 s that may be waited, a part of a second ago.
    let retry_after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((23..=24).contains(&retry_after), "{retry_after}");
    assert_eq!(refused.header("x-should-retry"), None);
    let error = refused.error();
    assert_eq!(
        (&error["type"], &error["code"]),
        (&"rate_limit_error".into(), &"queue_wait_exceeded".into())
    );
    let message = error["message"].as_str().unwrap();
    for part in ["`p`", "position 1", "6 s"] {
        assert!(message.contains(part), "no {part:?} in {message:?}");
    }
    assert!(
        message.contains("30 s") || message.contains("29."),
        "the expected wait is missing: {message:?}"
    );
    let stats = gateway.wait_queued(0);
    assert_eq!((&stats["rejected_wait"], &stats["sent"]), (&1.into(), &1.into()));
}

#[test]
fn a_refusal_for_more_than_a_minute_tells_the_sdk_not_to_retry() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "{mode: spaced, interval_seconds: 100, max_wait_seconds: 1}");
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let refused = post(gateway.addr(), CHAT, BODY);
    let retry_after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((98..=99).contains(&retry_after), "{retry_after}");
    assert_eq!(refused.header("x-should-retry").as_deref(), Some("false"));
}

#[test]
fn those_who_fit_into_max_wait_are_served_and_retry_after_is_never_zero() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "{mode: spaced, interval_seconds: 1, max_wait_seconds: 1.5}");
    let mut callers = ["a", "b", "c"].map(|tag| ask(&gateway, tag));
    let answers = callers.each_mut().map(Client::read_response);
    let refused: Vec<_> = answers.iter().filter(|answer| answer.status == 503).collect();
    assert_eq!((upstream.requests().len(), refused.len()), (2, 1), "{answers:?}");
    assert_eq!(refused[0].header("retry-after").as_deref(), Some("1"));
}

#[test]
fn a_request_that_outlives_max_wait_after_all_gets_the_same_answer_then() {
    // The slot is open, but the connection does not come to stand: this provider never says its part of the handshake.
    let upstream = Upstream::start([Reply::Stall]);
    let limit = "{mode: spaced, interval_seconds: 0.1, max_wait_seconds: 0.4}";
    let base_url = format!("https://{}/v1", upstream.addr());
    let gateway =
        Gateway::start(&provider_at("p", &base_url, &["m"], limit, "connect_timeout_seconds: 60"));
    let start = Instant::now();
    let refused = post(gateway.addr(), CHAT, BODY);
    assert!(start.elapsed() >= Duration::from_millis(400), "refused after {:?}", start.elapsed());
    assert_eq!((refused.status, refused.code().as_str()), (503, "queue_wait_exceeded"));
    assert_eq!(refused.header("retry-after").as_deref(), Some("1"));
}

#[test]
fn the_stats_count_the_queue_down_below_zero() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "{mode: spaced, rpm: 2, max_wait_seconds: 600}");
    let before = gateway.wait_queued(0);
    assert_eq!((&before["provider"], &before["mode"]), (&"p".into(), &"spaced".into()));
    assert_eq!((&before["interval_seconds"], &before["capacity"]), (&30.0.into(), &1.into()));
    assert_eq!((&before["rpm"], &before["max_wait_seconds"]), (&2.0.into(), &600.0.into()));
    assert_eq!((&before["tokens"], &before["last_send_time"]), (&1.0.into(), &().into()));
    assert_eq!(
        (&before["estimated_wait_seconds"], &before["waiting_in_acquire"]),
        (&0.0.into(), &0.into())
    );

    let sent_after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    assert_eq!(gateway.stats()["providers"][0]["tokens"], 0.0);
    let _waiting = line_up(&gateway, &["b", "c"]);

    let stats = gateway.wait_queued(2);
    assert_eq!(stats["tokens"], -2.0);
    let last_send = stats["last_send_time"].as_f64().unwrap();
    assert!(
        last_send >= sent_after && last_send < sent_after + 20.0,
        "{last_send} after {sent_after}"
    );
    let estimate = stats["estimated_wait_seconds"].as_f64().unwrap();
    assert!((60.0..=90.0).contains(&estimate), "two wait, the next one would be third: {estimate}");
    assert_eq!((&stats["sent"], &stats["succeeded"]), (&1.into(), &1.into()));
    assert_eq!(
        (&stats["queue_wait_seconds"]["count"], &stats["upstream_latency_seconds"]["count"]),
        (&1.into(), &1.into())
    );
}

#[test]
fn the_stats_add_up_the_waits_and_the_latencies_and_keep_the_longest() {
    let thinking = Duration::from_millis(100);
    let gate = Gate::closed();
    let held = Reply::pieces(
        &[b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"],
        &gate,
        Ending::Complete,
    );
    let upstream = Upstream::start([held, Reply::ok()]);
    let gateway = gateway(&upstream, &spaced(400));
    let zero = json!({"count": 0, "sum": 0.0, "max": 0.0});
    let fresh = gateway.wait_queued(0);
    assert_eq!((&fresh["queue_wait_seconds"], &fresh["upstream_latency_seconds"]), (&zero, &zero));

    let start = Instant::now();
    let mut callers = ["a", "b", "c"].map(|tag| ask(&gateway, tag));
    upstream.wait_requests(1, PATIENCE);
    thread::sleep(thinking);
    gate.release(usize::MAX);
    let told = callers.each_mut().map(|caller| {
        let waited =
            caller.read_response().header("x-limitrate-queued-ms").expect("the wait is told");
        waited.parse::<f64>().expect("milliseconds") / 1000.0
    });
    let took = start.elapsed().as_secs_f64();

    let stats = gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
    let summary = |name: &str| {
        assert_eq!(stats[name]["count"], 3, "{name}");
        ["sum", "max"].map(|part| stats[name][part].as_f64().expect("a number"))
    };
    // Each is told in whole milliseconds.
    let [sum, max] = summary("queue_wait_seconds");
    assert!((sum - told.iter().sum::<f64>()).abs() < 0.004, "{sum}, told {told:?}");
    assert!((max - told.into_iter().fold(0.0, f64::max)).abs() < 0.002, "{max}, told {told:?}");
    assert!(max < sum && max <= took, "{max} of {sum} within {took}");
    let [sum, max] = summary("upstream_latency_seconds");
    assert!(max >= thinking.as_secs_f64() && max <= took, "{max} within {took}");
    assert!(max < sum && sum <= 3.0 * max, "{max} of {sum}");
}

#[test]
fn the_next_in_line_shows_as_waiting_in_acquire() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &spaced(1500));
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let _waiting = ask(&gateway, "b");
    gateway.wait_stats(
        |stats| stats["queued_ahead"] == 1 && stats["waiting_in_acquire"] == 1,
        PATIENCE,
    );
}

#[test]
fn nothing_stays_in_flight_however_a_request_ends() {
    let upstream = Upstream::start([Reply::Stall, Reply::Reset, Reply::ok()]);
    let gateway = gateway(&upstream, support::UNSHAPED);
    let leaver = ask(&gateway, "a");
    upstream.wait_requests(1, PATIENCE);
    gateway.wait_stats(|stats| stats["in_flight"] == 1, PATIENCE);
    drop(leaver);
    upstream.wait_closed(0, PATIENCE);
    gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 502);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let stats = gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
    assert_eq!(
        (&stats["sent"], &stats["succeeded"], &stats["upstream_errors"]),
        (&3.into(), &1.into(), &1.into())
    );
}

#[test]
fn every_kind_of_answer_is_counted() {
    let json = |status| Reply::Json(status, "{}".into());
    let upstream =
        Upstream::start([json(200), json(400), json(499), json(500), json(599), json(399)]);
    let gateway = gateway(&upstream, support::UNSHAPED);
    let mut client = Client::connect(gateway.addr());
    for status in [200, 400, 499, 500, 599, 399] {
        client.post_json(CHAT, BODY);
        assert_eq!(client.read_response().status, status);
    }
    let stats = gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
    assert_eq!(
        (&stats["succeeded"], &stats["upstream_4xx"], &stats["upstream_5xx"]),
        (&2.into(), &2.into(), &2.into())
    );
}

#[test]
fn reading_stats_and_models_waits_for_no_slot() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &spaced(NEVER_MS));
    let _callers = ["a", "b"].map(|tag| ask(&gateway, tag));
    gateway.wait_queued(1);
    for path in ["/admin/stats", "/admin/health", "/v1/models", "/v1/models/m"] {
        assert_eq!(get(gateway.addr(), path).status, 200, "{path}");
    }
}
