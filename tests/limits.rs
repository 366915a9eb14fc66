//! The limits beside the cadence: which of them holds a request back, and that all are kept together.
//!
//! No test waits for a minute or a day to pass: what is held shows in the queue, in `held_by` and in the estimated wait, and
//! what is refused in the answer. The arithmetic of when a limit opens is proved where it is done.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use support::{
    Client, Ended, Ending, Gate, Gateway, PATIENCE, Recorded, Reply, Response, UNSHAPED, Upstream,
    post, provider_yaml, spaced, sse,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m"}"#;
const DAY_SECONDS: u64 = 24 * 60 * 60;

/// A cadence that holds nothing back, for limits beside it.
fn unpaced(more: &str) -> String {
    format!("{{mode: burst, rpm: 600000, capacity: 1000, {more}}}")
}

fn gateway(upstream: &Upstream, rate_limit: &str) -> Gateway {
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], rate_limit, ""))
}

/// A gateway whose models have limits of their own.
fn gateway_of(upstream: &Upstream, models: &[&str], rate_limit: &str) -> Gateway {
    Gateway::start(&provider_yaml("p", upstream.addr(), models, rate_limit, ""))
}

fn ask(gateway: &Gateway, body: &str) -> Client {
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, body);
    client
}

fn ask_model(gateway: &Gateway, model: &str) -> Client {
    ask(gateway, &of_model(model))
}

fn of_model(model: &str) -> String {
    format!(r#"{{"model":"{model}"}}"#)
}

/// A request that reserves `tokens` and less than ten more.
fn costing(tokens: u64) -> String {
    format!(r#"{{"model":"m","max_tokens":{tokens}}}"#)
}

fn answer_using(tokens: u64) -> Reply {
    Reply::Json(200, usage(tokens))
}

fn usage(tokens: u64) -> String {
    format!(
        r#"{{"choices":[],"usage":{{"prompt_tokens":1,"completion_tokens":1,"total_tokens":{tokens}}}}}"#
    )
}

fn models_in(requests: &[Recorded]) -> String {
    requests
        .iter()
        .map(|request| request.json()["model"].as_str().unwrap_or_default().to_owned())
        .collect()
}

#[track_caller]
fn assert_held(gateway: &Gateway, queued: u64, by: &str) -> Value {
    gateway.wait_stats(|stats| stats["queued_ahead"] == queued && stats["held_by"] == by, PATIENCE)
}

#[track_caller]
fn assert_estimate(stats: &Value, least: f64, most: f64) {
    let estimate = stats["estimated_wait_seconds"].as_f64().unwrap();
    assert!((least..=most).contains(&estimate), "{estimate} is not between {least} and {most}");
}

// --- window

#[test]
fn a_window_lets_rpm_go_at_once_and_holds_the_rest_for_a_minute_and_its_margin() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "{mode: window, rpm: 3}");
    let fresh = assert_held(&gateway, 0, "nothing");
    assert_eq!(
        (&fresh["mode"], &fresh["window"], &fresh["capacity"]),
        (&"window".into(), &3.into(), &3.into())
    );
    assert_eq!(fresh["tokens"], 3.0);
    let _callers: Vec<_> = (0..5).map(|_| ask(&gateway, BODY)).collect();
    upstream.wait_requests(3, PATIENCE);
    let held = assert_held(&gateway, 2, "window");
    assert_eq!(held["tokens"], -2.0);
    assert_estimate(&held, 45.0, 60.5);
    assert_eq!(upstream.requests().len(), 3);
}

#[test]
fn a_windows_margin_is_added_to_its_minute() {
    for (margin_ms, least, most) in [(0, 45.0, 60.0), (30_000, 75.0, 90.0)] {
        let upstream = Upstream::start([Reply::ok()]);
        let gateway =
            gateway(&upstream, &format!("{{mode: window, rpm: 1, window_margin_ms: {margin_ms}}}"));
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
        assert_estimate(&assert_held(&gateway, 0, "window"), least, most);
    }
}

#[test]
fn a_strict_window_bounds_a_burst_that_would_let_more_through() {
    for (strict, through, by) in [(true, 3, "window"), (false, 5, "cadence")] {
        let upstream = Upstream::start([Reply::ok()]);
        let limit = format!("{{mode: burst, rpm: 3, capacity: 5, strict_window: {strict}}}");
        let gateway = gateway(&upstream, &limit);
        let _callers: Vec<_> = (0..6).map(|_| ask(&gateway, BODY)).collect();
        upstream.wait_requests(through, PATIENCE);
        let stats = assert_held(&gateway, 6 - through as u64, by);
        assert_eq!(stats["window"], if strict { 3.into() } else { Value::Null });
        assert_eq!(upstream.requests().len(), through);
    }
}

#[test]
fn a_strict_window_is_kept_beside_the_spacing() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway =
        gateway(&upstream, "{mode: spaced, rpm: 1, strict_window: true, window_margin_ms: 30000}");
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    // The cadence alone would open after 60 s.
    assert_estimate(&assert_held(&gateway, 0, "window"), 75.0, 90.0);
}

#[test]
fn a_window_does_not_undo_the_spacing() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "{mode: spaced, rpm: 300, strict_window: true}");
    let start = Instant::now();
    let _callers: Vec<_> = (0..3).map(|_| ask(&gateway, BODY)).collect();
    let requests = upstream.wait_requests(3, PATIENCE);
    assert!(requests[2].arrived - start >= Duration::from_millis(400), "{requests:#?}");
}

// --- requests per day

/// What a request gets when the day's only one has been sent, and the seconds to `reset` (a time of day, in seconds) before
/// and after. Once more where the day ended in between.
fn second_of_a_day(rate_limit: &str, reset: u64) -> (Response, u64, u64) {
    loop {
        let upstream = Upstream::start([Reply::ok()]);
        let gateway = gateway(&upstream, rate_limit);
        let before = seconds_until(reset);
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
        let refused = post(gateway.addr(), CHAT, BODY);
        let after = seconds_until(reset);
        if after <= before {
            assert_eq!(upstream.requests().len(), 1);
            let stats = gateway.wait_queued(0);
            assert_eq!(
                (&stats["rpd"], &stats["rejected_day"]),
                (&1.into(), &1.into()),
                "{stats:#}"
            );
            assert_eq!(
                (&stats["held_by"], &stats["rejected_wait"]),
                (&"day".into(), &0.into()),
                "{stats:#}"
            );
            return (refused, before, after);
        }
    }
}

/// From now to that second of a day in UTC, rounded up.
fn seconds_until(second_of_day: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    (second_of_day + DAY_SECONDS - now % DAY_SECONDS - 1) % DAY_SECONDS + 1
}

#[track_caller]
fn assert_daily_limit(refused: &Response, least: u64, most: u64) {
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (503, "daily_limit_reached"),
        "{refused:?}"
    );
    assert_eq!(refused.error()["type"], "rate_limit_error");
    let retry_after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!(
        (least..=most).contains(&retry_after),
        "{retry_after} is not between {least} and {most}"
    );
    // No SDK waits that long, and none may hammer.
    let should_retry = refused.header("x-should-retry");
    assert_eq!(should_retry.as_deref(), (retry_after > 60).then_some("false"));
}

#[test]
fn a_spent_day_is_a_503_at_once_with_the_time_to_midnight_in_utc() {
    let limit = unpaced("rpd: 1, window_margin_ms: 0");
    let (refused, before, after) = second_of_a_day(&limit, 0);
    assert_daily_limit(&refused, after, before);
}

#[test]
fn a_day_ends_where_the_file_says_in_any_zone() {
    // Half a day from now, to the minute.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let reset = (now / 60 * 60 + DAY_SECONDS / 2) % DAY_SECONDS;
    for (zone, offset_minutes) in [("", 0), ("-08:00", -480), ("+05:30", 330)] {
        let minutes = (reset as i64 / 60 + offset_minutes).rem_euclid(24 * 60);
        let clock = format!("{:02}:{:02}{zone}", minutes / 60, minutes % 60);
        let limit = unpaced(&format!("rpd: 1, window_margin_ms: 0, day_resets_at: \"{clock}\""));
        let (refused, before, after) = second_of_a_day(&limit, reset);
        assert_daily_limit(&refused, after, before);
    }
}

#[test]
fn a_rolling_day_gives_each_send_back_after_24_hours() {
    let limit = unpaced("rpd: 1, window_margin_ms: 0, day_resets_at: rolling");
    let (refused, ..) = second_of_a_day(&limit, 0);
    assert_daily_limit(&refused, DAY_SECONDS - 15, DAY_SECONDS);
}

#[test]
fn a_day_that_max_wait_does_not_reach_is_still_named_with_its_reset() {
    let limit =
        unpaced("rpd: 1, window_margin_ms: 0, day_resets_at: rolling, max_wait_seconds: 60");
    let (refused, ..) = second_of_a_day(&limit, 0);
    assert_daily_limit(&refused, DAY_SECONDS - 15, DAY_SECONDS);
}

#[test]
fn who_may_wait_until_tomorrow_does() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway =
        gateway(&upstream, &unpaced("rpd: 1, day_resets_at: rolling, max_wait_seconds: 90000"));
    let _callers = [ask(&gateway, BODY), ask(&gateway, BODY)];
    let stats = assert_held(&gateway, 1, "day");
    assert_estimate(&stats, DAY_SECONDS as f64, 2.0 * DAY_SECONDS as f64 + 1.0);
}

#[test]
fn the_queue_counts_against_the_day() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway =
        gateway(&upstream, "{mode: spaced, interval_seconds: 30, rpd: 2, day_resets_at: rolling}");
    let _callers = [ask(&gateway, BODY), ask(&gateway, BODY)];
    assert_held(&gateway, 1, "cadence");
    assert_eq!(post(gateway.addr(), CHAT, BODY).code(), "daily_limit_reached");
}

#[test]
fn who_waits_for_the_days_last_slot_is_told_when_a_repeat_has_taken_it() {
    let (gate, too_many) =
        (Gate::closed(), b"HTTP/1.1 429 Slow\r\nretry-after-ms: 50\r\nContent-Length: 0\r\n\r\n");
    let upstream =
        Upstream::start([Reply::pieces(&[too_many], &gate, Ending::Complete), Reply::ok()]);
    let limit = unpaced("max_concurrent: 1, rpd: 2, day_resets_at: rolling, window_margin_ms: 0");
    let gateway = Gateway::start(&provider_yaml(
        "p",
        upstream.addr(),
        &["m"],
        &limit,
        "retry: {attempts: 2}",
    ));
    let mut first = ask(&gateway, BODY);
    upstream.wait_requests(1, PATIENCE);
    let mut second = ask(&gateway, BODY);
    assert_held(&gateway, 1, "concurrency");
    gate.release(2);
    assert_eq!(first.read_response().status, 200);
    assert_daily_limit(&second.read_response(), DAY_SECONDS - 15, DAY_SECONDS);
    assert_eq!(upstream.requests().len(), 2);
}

// --- tokens per minute

#[test]
fn tokens_are_reserved_at_the_send_as_max_tokens_and_a_quarter_of_the_bytes() {
    let prompt = format!(r#"{{"model":"m","prompt":"{}"}}"#, "x".repeat(4000));
    let costing_completion = r#"{"model":"m","max_completion_tokens":700}"#.to_owned();
    for (first, second, held) in [
        (costing(600), costing(300), false),
        (costing(600), costing(400), true),
        (costing_completion, costing(300), true),
        (prompt, BODY.to_owned(), true),
    ] {
        let upstream = Upstream::start([Reply::Stall]);
        let gateway = gateway(&upstream, &unpaced("tpm: 1000"));
        let _first = ask(&gateway, &first);
        upstream.wait_requests(1, PATIENCE);
        let _second = ask(&gateway, &second);
        if held {
            assert_eq!(assert_held(&gateway, 1, "tokens")["tpm"], 1000);
            assert_eq!(upstream.requests().len(), 1);
        } else {
            upstream.wait_requests(2, PATIENCE);
        }
    }
}

#[test]
fn a_plain_answers_usage_takes_the_place_of_what_was_reserved() {
    let upstream = Upstream::start([answer_using(10)]);
    let gateway = gateway(&upstream, &unpaced("tpm: 1000"));
    let mut client = Client::connect(gateway.addr());
    for _ in 0..10 {
        client.post_json(CHAT, costing(900));
        assert_eq!(client.read_response().text(), usage(10));
    }
    assert_eq!(upstream.requests().len(), 10);
}

#[test]
fn an_answer_that_used_more_than_was_reserved_holds_the_next() {
    let upstream = Upstream::start([answer_using(1000)]);
    let gateway = gateway(&upstream, &unpaced("tpm: 1000"));
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let _second = ask(&gateway, BODY);
    assert_held(&gateway, 1, "tokens");
}

#[test]
fn an_answer_without_usage_costs_what_was_reserved() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, &unpaced("tpm: 1000"));
    assert_eq!(post(gateway.addr(), CHAT, costing(900)).status, 200);
    let _second = ask(&gateway, &costing(900));
    assert_held(&gateway, 1, "tokens");
}

#[test]
fn a_streams_usage_is_settled_at_its_end_and_not_asked_for() {
    let last = [b"data: ".to_vec(), usage(10).into_bytes(), b"\n\n".to_vec()].concat();
    let chunks = vec![sse::event("a"), last, sse::done()];
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::stream(chunks.clone(), &gate)]);
    let gateway = gateway(&upstream, &unpaced("tpm: 1000"));
    let body = r#"{"stream" : true,  "model":"m","max_tokens":900}"#;
    let mut first = ask(&gateway, body);
    upstream.wait_requests(1, PATIENCE);
    let _second = ask(&gateway, body);
    assert_held(&gateway, 1, "tokens");
    gate.release(3);
    let answer = first.read_response();
    assert_eq!((answer.ended, answer.body), (Ended::Clean, chunks.concat()));
    let requests = upstream.wait_requests(2, PATIENCE);
    assert!(
        requests.iter().all(|request| request.text() == body),
        "a body was rewritten: {requests:#?}"
    );
}

#[test]
fn a_request_above_the_whole_limit_goes_alone() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, &unpaced("tpm: 1000"));
    let _first = ask(&gateway, &costing(5000));
    upstream.wait_requests(1, PATIENCE);
    let _second = ask(&gateway, BODY);
    assert_held(&gateway, 1, "tokens");
}

#[test]
fn a_large_request_is_not_overtaken_by_small_ones() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, &unpaced("tpm: 1000"));
    let _running = ask(&gateway, &costing(600));
    upstream.wait_requests(1, PATIENCE);
    let _large = ask(&gateway, &costing(900));
    assert_held(&gateway, 1, "tokens");
    let _small = ask(&gateway, BODY);
    assert_held(&gateway, 2, "tokens");
    assert_eq!(upstream.requests().len(), 1);
}

// --- requests in flight

#[test]
fn no_more_than_max_concurrent_are_in_flight() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, &unpaced("max_concurrent: 2"));
    let mut running: Vec<_> = (0..2).map(|_| ask(&gateway, BODY)).collect();
    upstream.wait_requests(2, PATIENCE);
    let _waiting: Vec<_> = (0..2).map(|_| ask(&gateway, BODY)).collect();
    let stats = assert_held(&gateway, 2, "concurrency");
    assert_eq!(
        (&stats["in_flight"], &stats["max_concurrent"], &stats["tokens"]),
        (&2.into(), &2.into(), &(-2.0).into())
    );
    assert_eq!(upstream.requests().len(), 2);
    drop(running.pop());
    upstream.wait_requests(3, PATIENCE);
    assert_eq!(assert_held(&gateway, 1, "concurrency")["in_flight"], 2);
}

#[test]
fn a_stream_is_in_flight_until_its_end() {
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::stream(sse::words(&["a"]), &gate)]);
    let gateway = gateway(&upstream, &unpaced("max_concurrent: 1"));
    let mut first = ask(&gateway, BODY);
    first.read_head();
    let _second = ask(&gateway, BODY);
    assert_held(&gateway, 1, "concurrency");
    gate.release(1);
    assert!(first.read_chunk().is_ok());
    assert_held(&gateway, 1, "concurrency");
    assert_eq!(upstream.requests().len(), 1);
    gate.release(1);
    upstream.wait_requests(2, PATIENCE);
}

#[test]
fn every_end_of_a_request_makes_room() {
    let broken =
        Reply::Stream { chunks: vec![sse::event("a")], gate: Gate::open(), ending: Ending::Close };
    let replies = [
        Reply::Reset,
        Reply::TruncateAt(80, "x".repeat(100)),
        broken,
        Reply::Json(400, "{}".into()),
        Reply::ok(),
    ];
    let upstream = Upstream::start(replies);
    let gateway = gateway(&upstream, &unpaced("max_concurrent: 1"));
    for _ in 0..5 {
        let _answer = post(gateway.addr(), CHAT, BODY);
    }
    assert_eq!(upstream.requests().len(), 5);
}

// --- all together

#[test]
fn the_limit_that_opens_last_holds() {
    let upstream = Upstream::answering(|_, nth| if nth == 0 { Reply::Stall } else { Reply::ok() });
    let limit = "{mode: spaced, interval_seconds: 30, strict_window: true, rpm: 1, rpd: 2, day_resets_at: rolling, \
                 tpm: 1000, window_margin_ms: 1000, max_concurrent: 1, max_wait_seconds: 90000}";
    let gateway = gateway(&upstream, limit);
    let before = assert_held(&gateway, 0, "nothing");
    let limits = ["window", "rpd", "tpm", "max_concurrent"].map(|name| before[name].as_u64());
    assert_eq!(limits, [Some(1), Some(2), Some(1000), Some(1)]);
    let running = ask(&gateway, BODY);
    upstream.wait_requests(1, PATIENCE);
    // Nobody knows when it ends.
    assert_held(&gateway, 0, "concurrency");
    drop(running);
    // 60 s by the cadence, 61 s by the window.
    assert_held(&gateway, 0, "window");
    let _waiting = ask(&gateway, BODY);
    assert_held(&gateway, 1, "window");
}

#[test]
fn a_file_without_these_limits_shows_none_of_them() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "{mode: spaced, rpm: 60}");
    let stats = assert_held(&gateway, 0, "nothing");
    for name in ["window", "rpd", "tpm", "max_concurrent"] {
        assert_eq!(stats.get(name), Some(&Value::Null), "{name}");
    }
    for name in ["cooldowns", "rejected_day", "observed_rpm"] {
        assert_eq!(stats[name], 0, "{name}");
    }
    assert_eq!(stats["effective_rpm"], 60.0);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    assert_eq!(assert_held(&gateway, 0, "cadence")["observed_rpm"], 1);
}

#[test]
fn the_statistics_show_every_limit_as_it_is_configured() {
    let upstream = Upstream::start([Reply::ok()]);
    let models = [
        "plain",
        "{id: paced, rate_limit: {mode: burst, rpm: 30, capacity: 3, strict_window: true, window_margin_ms: 250, tpm: 800}}",
        "{id: counted, rate_limit: {rpd: 5, day_resets_at: rolling, max_concurrent: 2}}",
    ];
    let limits = "{mode: burst, rpm: 240, capacity: 4, max_wait_seconds: 12.5, strict_window: true, window_margin_ms: 1500, \
                  rpd: 900, day_resets_at: \"00:00-08:00\", tpm: 70000, max_concurrent: 6, cooldown: model, \
                  adaptive: true}";
    let more =
        "max_queue: 77\nretry: {attempts: 5, statuses: [429, 502], max_cooldown_seconds: 45.5}";
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &models, limits, more));
    let stats = gateway.stats()["providers"][0].take();
    let wanted = json!({
        "provider": "p", "mode": "burst", "interval_seconds": 0.25, "capacity": 4, "rpm": 240.0,
        "max_wait_seconds": 12.5, "max_queue": 77, "window": 240, "window_margin_ms": 1500, "rpd": 900,
        "day_resets_at": "08:00", "tpm": 70000, "max_concurrent": 6, "cooldown": "model", "adaptive": true,
        "retry": {"attempts": 5, "statuses": [429, 502], "max_cooldown_seconds": 45.5},
        "effective_rpm": 240.0,
        "model_limits": [
            {
                "model": "paced", "mode": "burst", "interval_seconds": 2.0, "capacity": 3, "rpm": 30.0,
                "window": 30, "window_margin_ms": 250, "rpd": null, "day_resets_at": null, "tpm": 800,
                "max_concurrent": null,
            },
            {
                "model": "counted", "mode": null, "interval_seconds": null, "capacity": null, "rpm": null,
                "window": null, "window_margin_ms": 500, "rpd": 5, "day_resets_at": "rolling", "tpm": null,
                "max_concurrent": 2,
            },
        ],
    });
    for (key, value) in wanted.as_object().expect("an object") {
        assert_eq!(&stats[key], value, "{key}");
    }
}

// --- limits of a model

#[test]
fn a_model_that_is_held_by_its_own_limit_lets_the_others_go() {
    for (own, by) in [
        ("interval_seconds: 30", "cadence"),
        ("mode: window, rpm: 1", "window"),
        ("tpm: 1", "tokens"),
        ("max_concurrent: 1", "concurrency"),
    ] {
        let upstream = Upstream::start([Reply::Stall]);
        let models = [&format!("{{id: a, rate_limit: {{{own}}}}}"), "b"];
        let gateway = gateway_of(&upstream, &models, UNSHAPED);
        let _first = ask_model(&gateway, "a");
        upstream.wait_requests(1, PATIENCE);
        let _held = ask_model(&gateway, "a");
        assert_held(&gateway, 1, by);
        let _others = ["b", "b"].map(|model| ask_model(&gateway, model));
        assert_eq!(models_of(&upstream, 3), "abb", "{own}");
        assert_held(&gateway, 1, by);
    }
}

fn models_of(upstream: &Upstream, n: usize) -> String {
    models_in(&upstream.wait_requests(n, PATIENCE))
}

#[test]
fn a_models_day_ends_for_that_model_alone() {
    let upstream = Upstream::start([Reply::ok()]);
    let models =
        ["{id: a, rate_limit: {rpd: 1, day_resets_at: rolling, window_margin_ms: 0}}", "b"];
    let gateway = gateway_of(&upstream, &models, UNSHAPED);
    assert_eq!(post(gateway.addr(), CHAT, of_model("a")).status, 200);
    assert_daily_limit(&post(gateway.addr(), CHAT, of_model("a")), DAY_SECONDS - 15, DAY_SECONDS);
    assert_eq!(post(gateway.addr(), CHAT, of_model("b")).status, 200);
    assert_eq!(gateway.wait_queued(0)["rejected_day"], 1);
}

#[test]
fn a_models_tokens_are_settled_too() {
    let upstream = Upstream::start([answer_using(10)]);
    let gateway = gateway_of(&upstream, &["{id: m, rate_limit: {tpm: 1000}}"], UNSHAPED);
    for _ in 0..3 {
        assert_eq!(post(gateway.addr(), CHAT, costing(900)).status, 200);
    }
}

#[test]
fn the_providers_limits_hold_beside_the_models() {
    let upstream = Upstream::start([Reply::ok()]);
    let models = [
        "{id: a, rate_limit: {interval_seconds: 0.01}}",
        "{id: b, rate_limit: {interval_seconds: 0.01}}",
    ];
    let gateway = gateway_of(&upstream, &models, &spaced(150));
    let start = Instant::now();
    let _callers = ["a", "b", "a"].map(|model| ask_model(&gateway, model));
    let requests = upstream.wait_requests(3, PATIENCE);
    assert!(requests[2].arrived - start >= Duration::from_millis(300), "{requests:#?}");
}

#[test]
fn a_model_slower_than_its_provider_keeps_its_own_pace_and_takes_no_slot_while_it_waits() {
    let upstream = Upstream::start([Reply::ok()]);
    let models = ["{id: a, rate_limit: {interval_seconds: 1.2}}", "b"];
    let gateway = gateway_of(&upstream, &models, &spaced(50));
    let start = Instant::now();
    let mut callers = vec![ask_model(&gateway, "a")];
    upstream.wait_requests(1, PATIENCE);
    callers.push(ask_model(&gateway, "a"));
    gateway.wait_queued(1);
    callers.extend(["b", "b", "b"].map(|model| ask_model(&gateway, model)));
    let requests = upstream.wait_requests(5, PATIENCE);
    assert_eq!(models_in(&requests), "abbba");
    assert!(requests[4].arrived - start >= Duration::from_millis(1200));
    for caller in &mut callers {
        assert_eq!(caller.read_response().status, 200);
    }
}

#[test]
fn max_wait_counts_what_the_model_waits_for() {
    let upstream = Upstream::start([Reply::ok()]);
    let models = ["{id: a, rate_limit: {interval_seconds: 30}}", "b"];
    let limit = "{mode: burst, rpm: 600000, capacity: 1000, max_wait_seconds: 5}";
    let gateway = gateway_of(&upstream, &models, limit);
    assert_eq!(post(gateway.addr(), CHAT, of_model("a")).status, 200);
    let refused = post(gateway.addr(), CHAT, of_model("a"));
    assert_eq!((refused.status, refused.code().as_str()), (503, "queue_wait_exceeded"));
    let retry_after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((15..=25).contains(&retry_after), "{retry_after}");
    assert_eq!(post(gateway.addr(), CHAT, of_model("b")).status, 200);
}

/// A provider that closes a connection after 300 ms without a request and takes its time to answer one.
fn impatient_provider() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("it is bound");
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            thread::spawn(move || {
                stream
                    .set_read_timeout(Some(Duration::from_millis(300)))
                    .expect("set a read timeout");
                if matches!(stream.read(&mut [0; 4096]), Ok(1..)) {
                    thread::sleep(Duration::from_millis(2500));
                    let _ = stream.write_all(
                        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
                    );
                }
            });
        }
    });
    addr
}

#[test]
fn a_provider_that_closes_resting_connections_is_not_given_up_while_a_limit_holds() {
    let limits = "{mode: burst, rpm: 6000, capacity: 10, max_concurrent: 1}";
    let gateway = Gateway::start(&provider_yaml("p", impatient_provider(), &["m"], limits, ""));
    let mut callers = [ask(&gateway, BODY), ask(&gateway, BODY)];
    assert_eq!(callers.each_mut().map(|caller| caller.read_response().status), [200, 200]);
}

#[test]
fn a_compressed_answer_is_not_asked_for_where_its_usage_counts() {
    let upstream = Upstream::start([Reply::ok()]);
    for (rate_limit, passed) in
        [(unpaced("tpm: 1000"), None), (unpaced("max_concurrent: 9"), Some("gzip"))]
    {
        let gateway = gateway(&upstream, &rate_limit);
        let mut client = Client::connect(gateway.addr());
        client.post_json_with(CHAT, "Accept-Encoding: gzip\r\n", BODY);
        assert_eq!(client.read_response().status, 200);
        let request = upstream.requests().pop().expect("it was sent");
        assert_eq!(request.header("accept-encoding").as_deref(), passed);
    }
}

#[test]
fn a_queue_that_waits_for_an_end_holds_no_more_connections_than_it_can_use() {
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::pieces(
        &[b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"],
        &gate,
        Ending::Complete,
    )]);
    let gateway = gateway(&upstream, &unpaced("max_concurrent: 2"));
    let mut callers: Vec<_> = (0..20).map(|_| ask(&gateway, BODY)).collect();
    upstream.wait_requests(2, PATIENCE);
    gateway.wait_queued(18);
    gate.release(1000);
    for caller in &mut callers {
        assert_eq!(caller.read_response().status, 200);
    }
    assert!(
        upstream.connections() <= 4,
        "{} connections for 2 requests at a time",
        upstream.connections()
    );
}
