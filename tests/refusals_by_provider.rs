//! What the provider says: 429s, pauses and failures that the caller never sees, and what it does see when waiting ends.
//!
//! Pauses are measured at the provider, from the arrival of the request it refused to the next one: the gateway can only learn
//! of a pause after that arrival, so a lower bound counted from it is exact. Where the order of several requests matters they
//! are spaced, for the provider reads each connection in a thread of its own.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use support::{
    Client, Ended, Ending, Gate, Gateway, PATIENCE, Recorded, Reply, Response, UNSHAPED, Upstream,
    post, provider_at, provider_yaml, spaced, sse,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m"}"#;
/// As the file has it where it says nothing.
const RETRY: &str = "retry: {}";
/// The first backoff is a second, less up to a quarter.
const FIRST_BACKOFF: Duration = Duration::from_millis(750);

fn gateway(upstream: &Upstream, rate_limit: &str, extras: &str) -> Gateway {
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], rate_limit, extras))
}

fn unpaced(more: &str) -> String {
    format!("{{mode: burst, rpm: 600000, capacity: 1000, {more}}}")
}

fn ask(gateway: &Gateway, tag: &str) -> Client {
    ask_model(gateway, "m", tag)
}

fn ask_model(gateway: &Gateway, model: &str, tag: &str) -> Client {
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, format!(r#"{{"model":"{model}","tag":"{tag}"}}"#));
    client
}

fn tags(requests: &[Recorded]) -> String {
    requests
        .iter()
        .map(|request| request.json()["tag"].as_str().unwrap_or_default().to_owned())
        .collect()
}

/// A 429 that names its pause to the millisecond.
fn pause_ms(ms: u64) -> Reply {
    Reply::TooMany(vec![("retry-after-ms", ms.to_string())])
}

fn retry_after(value: &str) -> Reply {
    Reply::TooMany(vec![("Retry-After", value.to_owned())])
}

/// An answer with these header lines, each with its CRLF.
fn answer(status: u16, lines: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status} Scripted\r\n{lines}Content-Length: {}\r\n\r\n{body}", body.len())
        .into_bytes()
}

fn raw(status: u16, lines: &str, body: &str) -> Reply {
    Reply::Raw(answer(status, lines, body))
}

/// A 429 that goes out when the gate lets it.
fn gated(gate: &Gate, lines: &str) -> Reply {
    Reply::pieces(&[&answer(429, lines, "{}")], gate, Ending::Complete)
}

fn cooldowns(gateway: &Gateway, n: u64) -> Value {
    gateway.wait_stats(|stats| stats["cooldowns"] == n, PATIENCE)
}

fn gaps(requests: &[Recorded]) -> Vec<Duration> {
    requests.windows(2).map(|pair| pair[1].arrived - pair[0].arrived).collect()
}

/// Runs all cases side by side, for each of them waits.
fn at_once<T: Send + 'static, const N: usize>(cases: [T; N], run: fn(T)) {
    let failed = cases
        .map(|case| thread::spawn(move || run(case)))
        .into_iter()
        .filter_map(|case| case.join().err());
    assert_eq!(failed.count(), 0, "each has said above what was wrong");
}

// --- a 429 that the caller never sees

/// One caller whose request is refused once and then answered: the pause lasted as long as it had to.
fn assert_waited_out(name: &str, refusal: Reply, pause: Duration) {
    for stream in [false, true] {
        let good = match stream {
            false => Reply::ok(),
            true => Reply::stream(sse::words(&["a", "b"]), &Gate::open()),
        };
        let upstream = Upstream::start([refusal.clone(), good]);
        let gateway = gateway(&upstream, UNSHAPED, RETRY);
        let response = post(gateway.addr(), CHAT, format!(r#"{{"model":"m","stream":{stream}}}"#));
        assert_eq!((response.status, response.ended), (200, Ended::Clean), "{name}: {response:?}");
        for header in ["retry-after", "x-should-retry"] {
            assert_eq!(response.header(header), None, "{name}");
        }
        if stream {
            assert_eq!(response.body, sse::words(&["a", "b"]).concat(), "{name}");
        }
        let requests = upstream.requests();
        assert_eq!(requests.len(), 2, "{name}");
        assert_eq!(requests[0].body, requests[1].body, "{name}");
        let gap = gaps(&requests)[0];
        assert!(gap >= pause, "{name}: sent again after {gap:?}");
        assert!(gap < pause + Duration::from_secs(5), "{name}: sent again only after {gap:?}");
        let stats = gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
        assert_eq!((&stats["sent"], &stats["succeeded"]), (&2.into(), &1.into()), "{name}");
        assert_eq!((&stats["cooldowns"], &stats["upstream_4xx"]), (&1.into(), &1.into()), "{name}");
    }
}

#[test]
fn a_pause_in_any_notation_is_waited_out() {
    let date = "Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n";
    let cases: [(&str, String, &str, u64); 11] = [
        ("seconds", "Retry-After: 1\r\n".into(), "", 1000),
        ("a fraction", "Retry-After: 0.2\r\n".into(), "", 200),
        (
            "milliseconds, before seconds",
            "Retry-After: 60\r\nretry-after-ms: 150\r\n".into(),
            "",
            150,
        ),
        ("a date", format!("{date}Retry-After: Sun, 06 Nov 1994 08:49:38 GMT\r\n"), "", 1000),
        (
            "OpenAI",
            "x-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 120ms\r\n".into(),
            "",
            120,
        ),
        (
            "Azure",
            "x-ratelimit-remaining-tokens: 0\r\nx-ratelimit-reset-tokens: 1\r\n".into(),
            "",
            1000,
        ),
        (
            "Groq",
            "Content-Type: application/json\r\n".into(),
            r#"{"error":{"message":"Rate limit reached. Please try again in 0.21s.","code":"rate_limit_exceeded"}}"#,
            210,
        ),
        (
            "Anthropic",
            format!(
                "{date}anthropic-ratelimit-requests-remaining: 0\r\nanthropic-ratelimit-requests-reset: 1994-11-06T08:49:37.3Z\r\n"
            ),
            "",
            300,
        ),
        (
            "OpenRouter",
            date.into(),
            r#"{"error":{"code":429,"metadata":{"headers":{"X-RateLimit-Remaining":"0","X-RateLimit-Reset":"784111777250"}}}}"#,
            250,
        ),
        (
            "Gemini",
            String::new(),
            r#"[{"error":{"code":429,"details":[{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"0.26s"}]}}]"#,
            260,
        ),
        (
            "NVIDIA NIM, which says nothing",
            String::new(),
            r#"{"status":429,"title":"Too Many Requests"}"#,
            FIRST_BACKOFF.as_millis() as u64,
        ),
    ];
    at_once(cases, |(name, lines, body, ms)| {
        assert_waited_out(name, raw(429, &lines, body), Duration::from_millis(ms));
    });
}

#[test]
fn a_date_counts_from_this_machines_clock_where_the_provider_has_none() {
    let upstream = Upstream::answering(|_, nth| match nth {
        0 => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
            retry_headers(now + Duration::from_millis(400))
        }
        _ => Reply::ok(),
    });
    let gateway = gateway(&upstream, UNSHAPED, RETRY);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    // The wall clock is slewed, the monotonic one is not.
    assert!(gaps(&upstream.requests())[0] >= Duration::from_millis(390));
}

/// OpenRouter's: a reset as Unix milliseconds.
fn retry_headers(at: Duration) -> Reply {
    let millis = at.as_millis() + 1;
    raw(429, &format!("X-RateLimit-Remaining: 0\r\nX-RateLimit-Reset: {millis}\r\n"), "{}")
}

#[test]
fn a_503_with_retry_after_is_a_pause_for_everybody_and_one_without_is_not() {
    for (lines, order) in [("Retry-After: 0.3\r\n", "aab"), ("", "aba")] {
        let upstream = Upstream::start([raw(503, lines, "{}"), Reply::ok()]);
        let gateway = gateway(&upstream, &spaced(100), RETRY);
        let mut first = ask(&gateway, "a");
        upstream.wait_requests(1, PATIENCE);
        gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
        let mut second = ask(&gateway, "b");
        assert_eq!((first.read_response().status, second.read_response().status), (200, 200));
        let requests = upstream.requests();
        assert_eq!(tags(&requests), order);
        if !lines.is_empty() {
            assert!(gaps(&requests)[0] >= Duration::from_millis(300));
        }
        assert_eq!(gateway.stats()["providers"][0]["cooldowns"], u64::from(!lines.is_empty()));
    }
}

// --- who pauses, and in which order they go on

#[test]
fn everybody_waits_and_the_refused_one_is_at_the_head_again() {
    let upstream = Upstream::start([pause_ms(600), Reply::ok()]);
    let gateway = gateway(&upstream, &spaced(100), RETRY);
    let _first = ask(&gateway, "a");
    assert_eq!(cooldowns(&gateway, 1)["held_by"], "cooldown");
    let mut callers = Vec::new();
    for (n, tag) in ["b", "c"].into_iter().enumerate() {
        callers.push(ask(&gateway, tag));
        gateway.wait_stats(|stats| stats["sent"] != 1 || stats["queued_ahead"] == n + 2, PATIENCE);
    }
    let requests = upstream.wait_requests(4, PATIENCE);
    assert_eq!(tags(&requests), "aabc");
    assert!(gaps(&requests)[0] >= Duration::from_millis(600));
    assert_eq!(
        callers.iter_mut().map(|caller| caller.read_response().status).collect::<Vec<_>>(),
        [200, 200]
    );
}

#[test]
fn those_who_were_refused_go_on_in_the_order_in_which_they_came() {
    for order in [[0, 1], [1, 0]] {
        let gates = [Gate::closed(), Gate::closed()];
        let replies = gates.each_ref().map(|gate| gated(gate, "retry-after-ms: 500\r\n"));
        let upstream = Upstream::start(replies.into_iter().chain([Reply::ok()]));
        let gateway = gateway(&upstream, &spaced(100), RETRY);
        let mut callers = Vec::new();
        for (n, tag) in ["a", "b"].into_iter().enumerate() {
            callers.push(ask(&gateway, tag));
            upstream.wait_requests(n + 1, PATIENCE);
        }
        for (n, refused) in order.into_iter().enumerate() {
            gates[refused].release(2);
            cooldowns(&gateway, n as u64 + 1);
        }
        callers.push(ask(&gateway, "c"));
        assert_eq!(
            tags(&upstream.wait_requests(5, PATIENCE)),
            "ababc",
            "refused in the order {order:?}"
        );
    }
}

#[test]
fn a_later_pause_never_shortens_a_running_one() {
    let gates = [Gate::closed(), Gate::closed()];
    let replies = [
        gated(&gates[0], "retry-after-ms: 700\r\n"),
        gated(&gates[1], "retry-after-ms: 1\r\n"),
        Reply::ok(),
    ];
    let upstream = Upstream::start(replies);
    let gateway = gateway(&upstream, UNSHAPED, RETRY);
    let _callers = ["a", "b"].map(|tag| ask(&gateway, tag));
    upstream.wait_requests(2, PATIENCE);
    let refused = Instant::now();
    for (n, gate) in gates.iter().enumerate() {
        gate.release(2);
        cooldowns(&gateway, n as u64 + 1);
    }
    for request in &upstream.wait_requests(4, PATIENCE)[2..] {
        assert!(
            request.arrived - refused >= Duration::from_millis(700),
            "after {:?}",
            request.arrived - refused
        );
    }
}

#[test]
fn a_caller_who_leaves_during_a_pause_is_not_sent_again() {
    let upstream = Upstream::start([pause_ms(300), Reply::ok()]);
    let gateway = gateway(&upstream, UNSHAPED, RETRY);
    let first = ask(&gateway, "a");
    cooldowns(&gateway, 1);
    drop(first);
    assert_eq!(gateway.wait_queued(0)["cancelled_in_queue"], 1);
    assert_eq!(ask(&gateway, "b").read_response().status, 200);
    assert_eq!(tags(&upstream.requests()), "ab");
}

const OF_A_MODEL: &str = r#"{"status":429,"title":"Too Many Requests","detail":"Worker local total request limit reached (32/32)"}"#;
const OF_NOBODY: &str =
    r#"{"error":{"message":"Slow down","type":"requests","param":null,"code":null}}"#;

#[test]
fn a_pause_is_the_models_or_the_providers_by_the_body_or_by_the_file() {
    for (cooldown, body, others_go_on) in [
        ("", OF_A_MODEL, true),
        ("", OF_NOBODY, false),
        ("cooldown: model", OF_NOBODY, true),
        ("cooldown: provider", OF_A_MODEL, false),
    ] {
        let upstream = Upstream::start([raw(429, "Retry-After: 60\r\n", body), Reply::ok()]);
        let limit = unpaced(cooldown);
        let gateway =
            Gateway::start(&provider_yaml("p", upstream.addr(), &["a", "b"], &limit, RETRY));
        let _paused = ask_model(&gateway, "a", "a");
        gateway.wait_stats(
            |stats| stats["cooldowns"] == 1 && stats["held_by"] == "cooldown",
            PATIENCE,
        );
        let mut other = ask_model(&gateway, "b", "b");
        if others_go_on {
            assert_eq!(other.read_response().status, 200, "{cooldown} {body}");
        } else {
            gateway.wait_queued(2);
        }
        assert_eq!(
            tags(&upstream.requests()),
            if others_go_on { "ab" } else { "a" },
            "{cooldown} {body}"
        );
    }
}

// --- without a word about time

#[test]
fn refusals_that_name_no_time_back_off_one_after_the_other() {
    let upstream = Upstream::start([raw(429, "", "{}"), raw(429, "", "{}"), Reply::ok()]);
    let gateway = gateway(&upstream, UNSHAPED, RETRY);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let gaps = gaps(&upstream.requests());
    assert!(gaps[0] >= FIRST_BACKOFF && gaps[1] >= FIRST_BACKOFF * 2, "{gaps:?}");
    assert!(gaps[0] + gaps[1] < Duration::from_secs(8), "{gaps:?}");
}

#[test]
fn a_failure_is_repeated_after_a_backoff_of_its_own() {
    let upstream = Upstream::start([Reply::Json(500, "{}".into()), Reply::ok()]);
    let gateway = gateway(&upstream, UNSHAPED, RETRY);
    let mut first = ask(&gateway, "a");
    upstream.wait_requests(1, PATIENCE);
    assert_eq!(ask(&gateway, "b").read_response().status, 200);
    assert_eq!(first.read_response().status, 200);
    let requests = upstream.requests();
    assert_eq!(tags(&requests), "aba");
    assert!(requests[2].arrived - requests[0].arrived >= FIRST_BACKOFF);
    assert_eq!(gateway.stats()["providers"][0]["cooldowns"], 0);
}

// --- what is repeated, and how often

#[test]
fn attempts_bounds_the_sends_of_one_request() {
    for attempts in [1, 3] {
        let upstream = Upstream::start([pause_ms(20)]);
        let gateway = gateway(&upstream, UNSHAPED, &format!("retry: {{attempts: {attempts}}}"));
        let response = post(gateway.addr(), CHAT, BODY);
        assert_eq!((response.status, response.code().as_str()), (429, "rate_limit_exceeded"));
        assert_eq!(upstream.requests().len(), attempts);
    }
}

#[test]
fn five_attempts_are_made_unless_the_file_says_otherwise() {
    let upstream = Upstream::start([pause_ms(20)]);
    let gateway = gateway(&upstream, UNSHAPED, RETRY);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 429);
    assert_eq!(upstream.requests().len(), 5);
}

#[test]
fn only_the_statuses_of_the_list_are_repeated() {
    let cases = [
        ("", 400, false),
        ("", 404, false),
        ("", 501, false),
        ("", 529, true),
        ("", 500, true),
        ("", 502, true),
        ("", 504, true),
        ("statuses: [503]", 429, false),
        ("statuses: [503]", 500, false),
        ("statuses: []", 503, false),
        ("statuses: [418]", 418, true),
    ];
    at_once(cases, |(statuses, status, repeated)| {
        let upstream = Upstream::start([raw(status, "", "{}"), Reply::ok()]);
        let gateway = gateway(&upstream, UNSHAPED, &format!("retry: {{attempts: 2, {statuses}}}"));
        let answered = post(gateway.addr(), CHAT, BODY).status;
        let sent = upstream.requests().len();
        assert_eq!(
            (answered, sent),
            if repeated { (200, 2) } else { (status, 1) },
            "{statuses} {status}"
        );
    });
}

#[test]
fn a_pause_above_max_cooldown_is_passed_on_and_kept_as_long_as_that() {
    let upstream = Upstream::start([retry_after("30"), Reply::ok()]);
    let gateway = gateway(&upstream, UNSHAPED, "retry: {max_cooldown_seconds: 1}");
    let start = Instant::now();
    let refused = post(gateway.addr(), CHAT, BODY);
    assert_refused(&refused, Some("30"), "true");
    assert_eq!(upstream.requests().len(), 1);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn every_attempt_takes_a_slot() {
    let upstream = Upstream::start([pause_ms(1), pause_ms(1), Reply::ok()]);
    let gateway = gateway(&upstream, &spaced(300), RETRY);
    let start = Instant::now();
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let requests = upstream.requests();
    for (n, request) in requests.iter().enumerate() {
        assert!(
            request.arrived - start >= Duration::from_millis(300) * n as u32,
            "attempt {n} was early"
        );
    }
    assert_eq!(gateway.stats()["providers"][0]["sent"], 3);
}

#[test]
fn a_repeat_that_the_day_has_no_room_for_is_the_providers_answer() {
    let upstream = Upstream::start([pause_ms(20), Reply::ok()]);
    let gateway =
        gateway(&upstream, &unpaced("rpd: 1, day_resets_at: rolling, window_margin_ms: 0"), RETRY);
    let refused = post(gateway.addr(), CHAT, BODY);
    assert_eq!((refused.status, refused.code().as_str()), (429, "rate_limit_exceeded"));
    // It would be refused here until tomorrow.
    let retry_after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((86_385..=86_400).contains(&retry_after), "{retry_after}");
    assert_eq!(refused.header("x-should-retry").as_deref(), Some("false"));
    assert_eq!(upstream.requests().len(), 1);
}

#[test]
fn a_refused_request_is_not_in_flight_while_it_waits() {
    let upstream = Upstream::start([pause_ms(100), Reply::ok()]);
    let gateway = gateway(&upstream, &unpaced("max_concurrent: 1"), RETRY);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    assert_eq!(upstream.requests().len(), 2);
}

#[test]
fn a_refused_request_has_used_no_tokens() {
    let upstream = Upstream::start([pause_ms(20), Reply::ok()]);
    let gateway = gateway(&upstream, &unpaced("tpm: 1000"), RETRY);
    let mut caller = Client::connect(gateway.addr());
    caller.post_json(CHAT, r#"{"model":"m","max_tokens":900}"#);
    assert_eq!(caller.read_response().status, 200);
    assert_eq!(upstream.requests().len(), 2);
}

#[test]
fn a_connection_that_cannot_be_made_counts_as_an_attempt() {
    // This provider never says its part of the handshake.
    let upstream = Upstream::start([Reply::Stall]);
    let base_url = format!("https://{}/v1", upstream.addr());
    for (attempts, all) in [(1, 1), (2, 3)] {
        let extras = format!("connect_timeout_seconds: 0.1\nretry: {{attempts: {attempts}}}");
        let gateway = Gateway::start(&provider_at("p", &base_url, &["m"], UNSHAPED, &extras));
        let start = Instant::now();
        let refused = post(gateway.addr(), CHAT, BODY);
        assert_eq!((refused.status, refused.code().as_str()), (502, "upstream_unreachable"));
        assert_eq!(upstream.connections(), all);
        assert!(attempts == 1 || start.elapsed() >= FIRST_BACKOFF);
    }
}

#[test]
fn a_provider_that_is_back_before_the_last_attempt_was_never_away() {
    let (socket, addr) = closed_port();
    let gateway =
        Gateway::start(&provider_at("p", &format!("http://{addr}/v1"), &["m"], UNSHAPED, RETRY));
    let mut caller = ask(&gateway, "a");
    gateway.wait_stats(|stats| stats["upstream_errors"] == 1, PATIENCE);
    rustix::net::listen(&socket, 8).expect("listen on a bound socket");
    let answering = thread::spawn(move || {
        let (mut stream, _) = TcpListener::from(socket).accept().expect("accept on loopback");
        let mut head = Vec::new();
        while !head.ends_with(b"}") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a request");
            head.extend(byte);
        }
        stream.write_all(&answer(200, "", "{}")).expect("answer on loopback");
        stream.shutdown(Shutdown::Write).expect("close on loopback");
    });
    assert_eq!(caller.read_response().status, 200);
    answering.join().expect("the provider answered");
}

/// A port that refuses connections until somebody listens on it.
fn closed_port() -> (rustix::fd::OwnedFd, SocketAddr) {
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).expect("bind a loopback port");
    let addr = getsockname(&socket)
        .expect("the address of a bound socket")
        .try_into()
        .expect("an IP address");
    (socket, addr)
}

#[test]
fn what_the_provider_may_have_done_is_not_asked_for_twice() {
    let broken =
        |ending| Reply::Stream { chunks: vec![sse::event("a")], gate: Gate::open(), ending };
    for (reply, status, ended) in [
        (broken(Ending::Close), 200, Ended::Aborted),
        (broken(Ending::Reset), 200, Ended::Aborted),
        (Reply::TruncateAt(90, "x".repeat(100)), 200, Ended::Aborted),
        (Reply::Reset, 502, Ended::Clean),
        (Reply::CloseBeforeAnswer, 502, Ended::Clean),
        (Reply::Stall, 504, Ended::Clean),
    ] {
        let upstream = Upstream::start([reply.clone(), Reply::ok()]);
        let gateway =
            gateway(&upstream, UNSHAPED, &format!("request_timeout_seconds: 0.3\n{RETRY}"));
        let response = post(gateway.addr(), CHAT, BODY);
        assert_eq!((response.status, response.ended), (status, ended), "{reply:?}");
        assert_eq!(upstream.requests().len(), 1, "{reply:?}");
    }
}

// --- max_wait bounds the whole

#[test]
fn a_pause_that_max_wait_does_not_reach_is_passed_on_at_once() {
    for (first, status, come_back) in [
        (retry_after("9"), 429, Some("9")),
        (raw(503, "Retry-After: 9\r\n", "{}"), 503, Some("9")),
        (raw(500, "", "{}"), 500, None),
    ] {
        let upstream = Upstream::start([first, Reply::ok()]);
        let gateway = gateway(&upstream, &unpaced("max_wait_seconds: 0.5"), RETRY);
        let start = Instant::now();
        let refused = post(gateway.addr(), CHAT, BODY);
        assert!(start.elapsed() < Duration::from_secs(5), "only after {:?}", start.elapsed());
        assert_eq!((refused.status, refused.header("retry-after").as_deref()), (status, come_back));
        assert_eq!(upstream.requests().len(), 1);
    }
}

#[test]
fn attempts_end_when_max_wait_is_over() {
    let upstream = Upstream::start([pause_ms(200)]);
    let gateway = gateway(&upstream, &unpaced("max_wait_seconds: 1"), "retry: {attempts: 100}");
    let refused = post(gateway.addr(), CHAT, BODY);
    assert_refused(&refused, Some("1"), "true");
    let requests = upstream.requests();
    assert!((2..=5).contains(&requests.len()), "{}", requests.len());
    assert!(requests[requests.len() - 1].arrived - requests[0].arrived < Duration::from_secs(3));
}

#[test]
fn a_pause_that_got_longer_meanwhile_is_the_one_that_is_told() {
    let gates = [Gate::closed(), Gate::closed()];
    let replies =
        [gated(&gates[0], "retry-after-ms: 300\r\n"), gated(&gates[1], "Retry-After: 40\r\n")];
    let upstream = Upstream::start(replies);
    let gateway = gateway(&upstream, &unpaced("max_wait_seconds: 1"), RETRY);
    let mut first = ask(&gateway, "a");
    upstream.wait_requests(1, PATIENCE);
    let mut second = ask(&gateway, "b");
    upstream.wait_requests(2, PATIENCE);
    gates[0].release(2);
    cooldowns(&gateway, 1);
    gates[1].release(2);
    assert_refused(&second.read_response(), Some("40"), "true");
    let refused = first.read_response();
    let retry_after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((25..=39).contains(&retry_after), "{retry_after}");
    assert_eq!(upstream.requests().len(), 2);
}

// --- what remains at the end

/// The provider's own 429, as far as `Reply::TooMany` is its words.
#[track_caller]
fn assert_refused(response: &Response, retry_after: Option<&str>, should_retry: &str) {
    assert_eq!(response.status, 429, "{response:?}");
    assert_eq!(response.header("retry-after").as_deref(), retry_after, "{response:?}");
    assert_eq!(response.header("retry-after-ms"), None, "{response:?}");
    assert_eq!(response.header("x-should-retry").as_deref(), Some(should_retry), "{response:?}");
}

#[test]
fn the_last_answer_is_the_providers_with_a_retry_after_that_every_sdk_takes() {
    let date = "Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n";
    for (lines, retry_after, should_retry) in [
        ("Retry-After: 7\r\n".to_owned(), Some("7"), "true"),
        ("Retry-After: 60\r\n".to_owned(), Some("60"), "true"),
        ("Retry-After: 61\r\n".to_owned(), Some("61"), "false"),
        (
            "retry-after-ms: 6500\r\nRetry-After: 30\r\nx-should-retry: true\r\n".to_owned(),
            Some("7"),
            "true",
        ),
        (format!("{date}Retry-After: Sun, 06 Nov 1994 08:49:47 GMT\r\n"), Some("10"), "true"),
        (
            "x-ratelimit-remaining-tokens: 0\r\nx-ratelimit-reset-tokens: 1m9.5s\r\n".to_owned(),
            Some("70"),
            "false",
        ),
        (String::new(), None, "true"),
    ] {
        let body = "  {\"error\": {\"message\":\"own words\"}} ";
        let upstream = Upstream::start([raw(429, &format!("X-Own: kept\r\n{lines}"), body)]);
        let gateway = gateway(&upstream, UNSHAPED, "retry: {attempts: 1}");
        let refused = post(gateway.addr(), CHAT, BODY);
        assert_refused(&refused, retry_after, should_retry);
        assert_eq!(
            (refused.text().as_str(), refused.header("x-own").as_deref()),
            (body, Some("kept"))
        );
    }
}

#[test]
fn the_last_of_several_answers_remains() {
    let upstream =
        Upstream::start([raw(500, "", "the first"), pause_ms(20), raw(503, "", "the last")]);
    let gateway = gateway(&upstream, UNSHAPED, "retry: {attempts: 3}");
    let response = post(gateway.addr(), CHAT, BODY);
    assert_eq!((response.status, response.text().as_str()), (503, "the last"));
    assert_eq!(response.header("x-should-retry"), None);
    assert_eq!(upstream.requests().len(), 3);
}

#[test]
fn a_spent_quota_is_passed_on_at_once_and_pauses_nobody() {
    for body in [
        r#"{"error":{"message":"You exceeded your current quota","type":"insufficient_quota","param":null,"code":"insufficient_quota"}}"#,
        r#"[{"error":{"code":429,"details":[{"@type":"type.googleapis.com/google.rpc.QuotaFailure","violations":[{"quotaId":"GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]},{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"3s"}]}}]"#,
    ] {
        let upstream = Upstream::start([raw(429, "Retry-After: 3\r\n", body), Reply::ok()]);
        let gateway = gateway(&upstream, UNSHAPED, RETRY);
        let refused = post(gateway.addr(), CHAT, BODY);
        assert_refused(&refused, None, "false");
        assert_eq!(refused.text(), body);
        assert_eq!(upstream.requests().len(), 1);
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
        let stats = &gateway.stats()["providers"][0];
        assert_eq!((&stats["cooldowns"], &stats["held_by"]), (&0.into(), &"nothing".into()));
    }
}

// --- learning

#[test]
fn repeated_refusals_stretch_the_cadence_where_it_may_adapt() {
    for (adaptive, effective, least_ms) in [(true, 600.0 / 2.25, 220), (false, 600.0, 100)] {
        // Each pause is longer than an interval: a refusal within one was under way already and teaches nothing.
        let upstream = Upstream::start([pause_ms(250), pause_ms(250), pause_ms(250), Reply::ok()]);
        let limit = format!("{{mode: spaced, interval_seconds: 0.1, adaptive: {adaptive}}}");
        let gateway = gateway(&upstream, &limit, RETRY);
        for _ in 0..3 {
            assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
        }
        let stats = gateway.wait_stats(|stats| stats["sent"] == 6, PATIENCE);
        assert_eq!((&stats["interval_seconds"], &stats["cooldowns"]), (&0.1.into(), &3.into()));
        assert_eq!(stats["observed_rpm"], 6);
        // The first refusal teaches nothing, the second and the third stretch by half; quiet time brings a part back.
        let now = stats["effective_rpm"].as_f64().unwrap();
        assert!((effective..effective + 5.0).contains(&now), "{now}");
        let requests = upstream.requests();
        let since_the_last_refusal = requests[5].arrived - requests[2].arrived;
        // What was late may be followed a millisecond too soon.
        assert!(
            since_the_last_refusal >= Duration::from_millis(250 + 2 * (least_ms - 1)),
            "{since_the_last_refusal:?}"
        );
    }
}
