//! Callers who give up at a time that they tell, and those who try again after they did.

mod support;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{
    Client, Ended, Ending, Gate, Gateway, Line, PATIENCE, Reply, Response, UNSHAPED, Upstream,
    post, post_with, provider_at, provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const PLAIN: &str = r#"{"model":"m"}"#;
const STREAM: &str = r#"{"model":"m","stream":true}"#;

/// What an SDK sends with its first try, and with the next one.
const FIRST: &str = "x-stainless-retry-count: 0\r\n";
const SECOND: &str = "x-stainless-retry-count: 1\r\n";

/// Longer than any test: a slot that is not open at the start does not come.
const NEVER_MS: u64 = 30_000;

/// A gateway whose only slot is taken.
fn taken(server: &str, extras: &str) -> (Upstream, Gateway) {
    let upstream = Upstream::start([Reply::ok()]);
    let provider = provider_yaml("p", upstream.addr(), &["m"], &spaced(NEVER_MS), extras);
    let gateway = Gateway::start_with(server, &provider, &[]);
    assert_eq!(post(gateway.addr(), CHAT, PLAIN).status, 200);
    (upstream, gateway)
}

fn stats(gateway: &Gateway) -> Value {
    gateway.stats()["providers"][0].take()
}

#[track_caller]
fn assert_late(response: &Response, position: u32, patience: &str) -> String {
    assert_eq!(
        (response.status, response.code().as_str()),
        (503, "deadline_exceeded"),
        "{response:?}"
    );
    let message = response.error()["message"].as_str().unwrap_or_default().to_owned();
    for part in ["`p`", &format!("position {position} "), &format!("the caller waits {patience}. ")]
    {
        assert!(message.contains(part), "no {part:?} in {message:?}");
    }
    message
}

fn retry_after(response: &Response) -> u64 {
    response.header("retry-after").and_then(|seconds| seconds.parse().ok()).expect("whole seconds")
}

// --- what the response takes

/// A provider that takes a second for each response, and has shown that once.
fn slow(interval_ms: u64) -> (Upstream, Gateway) {
    let upstream = Upstream::answering(|_, _| {
        std::thread::sleep(Duration::from_secs(1));
        Reply::ok()
    });
    let limit = spaced(interval_ms);
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], &limit, ""));
    assert_eq!(post_with(gateway.addr(), CHAT, "", PLAIN).status, 200);
    (upstream, gateway)
}

#[test]
fn a_deadline_leaves_time_for_the_response() {
    for header in [
        "x-stainless-read-timeout: 3.5",
        "X-Stainless-Timeout: 3.5",
        "X-Limitrate-Deadline-Ms: 3500",
    ] {
        let (upstream, gateway) = slow(1000);
        // Slots come now and in 1, 2 and 3 s. The last one would leave half a second for the response.
        let mut clients: Vec<Client> = (0..4)
            .map(|_| {
                let mut client = Client::connect(gateway.addr());
                client.post_json_with(CHAT, &format!("{header}\r\n"), PLAIN);
                client
            })
            .collect();
        let responses: Vec<Response> = clients.iter_mut().map(Client::read_response).collect();
        let refused: Vec<&Response> =
            responses.iter().filter(|response| response.status == 503).collect();
        assert_eq!((refused.len(), upstream.requests().len()), (1, 4), "{header}: {responses:?}");
        let message = assert_late(refused[0], 4, "3.5 s");
        assert!(message.contains("The response usually takes 1"), "{message}");
    }
}

#[test]
fn a_deadline_of_a_stream_that_is_to_be_sent_in_time_leaves_none() {
    let (upstream, gateway) = slow(1000);
    let mut clients: Vec<Client> = (0..4)
        .map(|_| {
            let mut client = Client::connect(gateway.addr());
            client.post_json_with(CHAT, "X-Limitrate-Deadline-Ms: 3500\r\n", STREAM);
            client
        })
        .collect();
    assert!(clients.iter_mut().all(|client| client.read_response().status == 200));
    assert_eq!(upstream.requests().len(), 5);
}

#[test]
fn a_request_that_can_go_at_once_goes_whatever_its_deadline_leaves() {
    let (upstream, gateway) = slow(1);
    let mut client = Client::connect(gateway.addr());
    client.post_json_with(CHAT, "x-stainless-read-timeout: 0.5\r\n", PLAIN);
    upstream.wait_requests(2, PATIENCE);
    assert_eq!(client.read_response().status, 200);
}

// --- who gives up

#[test]
fn a_request_that_cannot_be_sent_in_time_is_refused_at_once() {
    let (upstream, gateway) = taken("", "");
    for (n, headers, patience) in [
        (1, "x-stainless-read-timeout: 5\r\n", "5 s"),
        (2, "X-Stainless-Timeout: 5\r\n", "5 s"),
        (3, "x-stainless-read-timeout: 5.5\r\n", "5.5 s"),
        (4, "X-Limitrate-Deadline-Ms: 5000\r\n", "5 s"),
        // The first of several to give up.
        (
            5,
            "X-Limitrate-Deadline-Ms: 20000\r\nx-stainless-read-timeout: 5\r\nX-Stainless-Timeout: 20\r\n",
            "5 s",
        ),
    ] {
        let start = Instant::now();
        let refused = post_with(gateway.addr(), CHAT, headers, PLAIN);
        assert!(start.elapsed() < Duration::from_secs(5), "only after {:?}", start.elapsed());
        let message = assert_late(&refused, 1, patience);
        // 30 s from the first one on, not so long ago.
        assert!(message.contains("would be 30 s") || message.contains("would be 2"), "{message}");
        let retry_after = retry_after(&refused);
        assert!((15..=25).contains(&retry_after), "{retry_after}: {message}");
        let stats = stats(&gateway);
        assert_eq!(
            (&stats["rejected_deadline"], &stats["queued_ahead"]),
            (&n.into(), &0.into()),
            "{headers}"
        );
        assert_eq!(
            (&stats["rejected_wait"], &stats["kept_places"]),
            (&0.into(), &0.into()),
            "{headers}"
        );
    }
    assert_eq!(upstream.requests().len(), 1);
}

#[test]
fn who_waits_long_enough_is_queued() {
    let (_upstream, gateway) = taken("", "");
    let _waiting: Vec<Client> =
        ["x-stainless-read-timeout: 600\r\n", "X-Limitrate-Deadline-Ms: 99999999999999999999\r\n"]
            .iter()
            .zip(1..)
            .map(|(headers, n)| {
                let mut client = Client::connect(gateway.addr());
                client.post_json_with(CHAT, headers, PLAIN);
                gateway.wait_queued(n);
                client
            })
            .collect();
    // The third slot comes in 90 s.
    let refused = post_with(gateway.addr(), CHAT, "x-stainless-read-timeout: 60\r\n", PLAIN);
    assert_late(&refused, 3, "60 s");
    assert!(retry_after(&refused) <= 30, "{refused:?}");
}

#[test]
fn the_shorter_of_max_wait_and_the_callers_patience_counts() {
    let upstream = Upstream::start([Reply::ok()]);
    let limit = "{mode: spaced, interval_seconds: 30, max_wait_seconds: 5}";
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], limit, ""));
    assert_eq!(post(gateway.addr(), CHAT, PLAIN).status, 200);
    for timeout in ["600", "4"] {
        let refused = post_with(
            gateway.addr(),
            CHAT,
            &format!("x-stainless-read-timeout: {timeout}\r\n"),
            PLAIN,
        );
        // Where both are too short the operator's word is the more useful one.
        assert_eq!(refused.code(), "queue_wait_exceeded", "{timeout}");
    }
    let tight = "{mode: spaced, interval_seconds: 30, max_wait_seconds: 600}";
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], tight, ""));
    assert_eq!(post(gateway.addr(), CHAT, PLAIN).status, 200);
    assert_late(
        &post_with(gateway.addr(), CHAT, "x-stainless-read-timeout: 4\r\n", PLAIN),
        1,
        "4 s",
    );
}

#[test]
fn anthropics_callers_are_refused_in_their_own_words() {
    let (_upstream, gateway) = taken("", "");
    let refused =
        post_with(gateway.addr(), "/v1/messages", "x-stainless-read-timeout: 5\r\n", PLAIN);
    assert_eq!(
        (refused.status, &refused.json()["error"]["type"]),
        (503, &"overloaded_error".into())
    );
    assert!(refused.text().contains("the caller waits 5 s"), "{refused:?}");
}

#[test]
fn a_cooldown_counts_for_those_who_come_later() {
    let pause = Reply::TooMany(vec![("Retry-After", "100".to_owned())]);
    let upstream = Upstream::start([pause]);
    let gateway = Gateway::start(&provider_yaml(
        "p",
        upstream.addr(),
        &["m"],
        UNSHAPED,
        "retry: {attempts: 3}",
    ));
    let mut first = Client::connect(gateway.addr());
    first.post_json(CHAT, PLAIN);
    gateway.wait_stats(|stats| stats["cooldowns"] == 1 && stats["queued_ahead"] == 1, PATIENCE);
    let start = Instant::now();
    let refused = post_with(gateway.addr(), CHAT, "X-Limitrate-Deadline-Ms: 8000\r\n", PLAIN);
    assert!(start.elapsed() < Duration::from_secs(8), "only after {:?}", start.elapsed());
    assert_late(&refused, 2, "8 s");
    assert!(retry_after(&refused) > 60, "{refused:?}");
    assert_eq!(refused.header("x-should-retry").as_deref(), Some("false"));
}

#[test]
fn a_queued_request_is_dropped_at_its_deadline() {
    let line = Line::start("", "");
    let start = Instant::now();
    // While no response of the model has been seen, a quarter of the time is left for it.
    let mut waiting = line.ask("X-Limitrate-Deadline-Ms: 2000\r\n", "a");
    let dropped = waiting.read_response();
    assert!(start.elapsed() >= Duration::from_millis(1500), "after {:?}", start.elapsed());
    assert_late(&dropped, 1, "2 s");
    let stats = line.gateway.wait_queued(0);
    assert_eq!((&stats["rejected_deadline"], &stats["cancelled_in_queue"]), (&1.into(), &0.into()));
    assert_eq!(stats["in_flight"], 1);
}

#[test]
fn when_a_cooldown_moves_its_slot_a_request_waits_to_its_deadline_and_no_longer() {
    let gate = Gate::closed();
    let pause =
        b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 100\r\nContent-Length: 2\r\n\r\n{}";
    let upstream = Upstream::start([Reply::pieces(&[pause], &gate, Ending::Complete)]);
    let provider =
        provider_yaml("p", upstream.addr(), &["m"], &spaced(3_000), "retry: {attempts: 3}");
    let gateway = Gateway::start(&provider);
    let mut first = Client::connect(gateway.addr());
    first.post_json(CHAT, PLAIN);
    upstream.wait_requests(1, PATIENCE);
    let start = Instant::now();
    let mut second = Client::connect(gateway.addr());
    second.post_json_with(CHAT, "X-Limitrate-Deadline-Ms: 4500\r\n", PLAIN);
    gateway.wait_queued(1);
    gate.release(usize::MAX);
    gateway.wait_queued(2);
    let dropped = second.read_response();
    // A second is left for the response.
    assert!(start.elapsed() >= Duration::from_millis(3_500), "after {:?}", start.elapsed());
    // Behind the one that came back.
    assert_late(&dropped, 2, "4.5 s");
    assert!(retry_after(&dropped) >= 60, "the pause is not over: {dropped:?}");
    assert_eq!(upstream.requests().len(), 1);
}

#[test]
fn no_deadline_ends_what_has_been_sent() {
    let line = Line::start("", "");
    let mut client = line.ask("X-Limitrate-Deadline-Ms: 2000\r\n", "a");
    line.answer(1);
    line.upstream.wait_requests(2, PATIENCE);
    std::thread::sleep(Duration::from_millis(2_100));
    line.answer(1);
    assert_eq!(client.read_response().status, 200);
}

#[test]
fn a_deadline_ends_the_attempts_too() {
    let upstream = Upstream::start([Reply::Json(503, r#"{"own":true}"#.to_owned())]);
    let provider = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, "retry: {attempts: 5}");
    let gateway = Gateway::start(&provider);
    // Before the fourth attempt it would be 5.25 s at the least, before the third at most 3.
    let start = Instant::now();
    let refused = post_with(gateway.addr(), CHAT, "x-stainless-read-timeout: 5\r\n", PLAIN);
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "when its caller was gone: {:?}",
        start.elapsed()
    );
    assert_eq!((refused.status, refused.text().as_str()), (503, r#"{"own":true}"#));
    assert_eq!(upstream.requests().len(), 3);
}

#[test]
fn nonsense_of_an_sdk_is_passed_over() {
    let (_upstream, gateway) = taken("", "");
    let mut waiting = Vec::new();
    for (value, n) in
        ["", "soon", "-1", "0", "0.0", "NaN", "inf", "-inf", "1e999", "5s", "1,5"].iter().zip(1..)
    {
        let mut client = Client::connect(gateway.addr());
        let headers =
            format!("x-stainless-read-timeout: {value}\r\nX-Stainless-Timeout: {value}\r\n");
        client.post_json_with(
            CHAT,
            &format!("{headers}x-stainless-retry-count: {value}\r\n"),
            PLAIN,
        );
        gateway.wait_queued(n);
        waiting.push(client);
    }
}

// --- deadlines and heartbeats

#[test]
fn heartbeats_keep_a_stream_alive_past_the_sdks_timeout_but_not_past_a_deadline_in_ms() {
    let (_upstream, gateway) = taken("", "");
    let mut stream = Client::connect(gateway.addr());
    stream.post_json_with(CHAT, "x-stainless-read-timeout: 0.3\r\n", STREAM);
    stream.read_head();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(600) {
        let beat = stream.read_chunk().expect("another beat").bytes;
        assert!(beat.starts_with(b": queued position=1 "), "{:?}", String::from_utf8_lossy(&beat));
    }
    let refused = post_with(gateway.addr(), CHAT, "X-Limitrate-Deadline-Ms: 600\r\n", STREAM);
    assert_late(&refused, 2, "0.6 s");

    for (server, headers, body) in [
        ("", "", PLAIN),
        ("", "X-Limitrate-Heartbeat: off\r\n", STREAM),
        ("heartbeat_after_seconds: null", "", STREAM),
    ] {
        let (_upstream, gateway) = taken(server, "");
        let headers = format!("x-stainless-read-timeout: 0.3\r\n{headers}");
        assert_late(&post_with(gateway.addr(), CHAT, &headers, body), 1, "0.3 s");
    }
}

#[test]
fn white_space_keeps_a_plain_caller_alive_past_the_sdks_timeout() {
    let (_upstream, gateway) = taken("heartbeat_json: true", "");
    let mut client = Client::connect(gateway.addr());
    client.post_json_with(CHAT, "x-stainless-read-timeout: 0.3\r\n", PLAIN);
    client.read_head();
    for _ in 0..5 {
        assert_eq!(client.read_chunk().expect("another beat").bytes, b"\n");
    }
}

#[test]
fn white_space_does_not_help_a_caller_who_wants_the_whole_answer_in_time() {
    // Node's SDK ends a plain call at its timeout, whatever comes meanwhile.
    let (_upstream, gateway) = taken("heartbeat_json: true", "");
    let refused = post_with(gateway.addr(), CHAT, "X-Stainless-Timeout: 5\r\n", PLAIN);
    assert_late(&refused, 1, "5 s");
}

#[test]
fn a_stream_that_is_dropped_at_its_deadline_ends_in_an_error_event() {
    let line = Line::start("", "");
    let mut client = Client::connect(line.gateway.addr());
    let headers = "x-stainless-read-timeout: 0.3\r\nX-Limitrate-Deadline-Ms: 2000\r\n";
    client.post_json_with(CHAT, headers, STREAM);
    let response = client.read_response();
    let event = response.text();
    let event = event
        .rsplit("\n\n")
        .nth(1)
        .and_then(|event| event.strip_prefix("data: "))
        .expect("an event");
    let error: Value = serde_json::from_str(event).expect("JSON");
    assert_eq!((response.status, response.ended), (200, Ended::Clean));
    assert_eq!(error["error"]["code"], "deadline_exceeded");
}

// --- who tries again

#[test]
fn a_retry_takes_back_the_place_of_the_try_that_was_given_up() {
    for fairness in ["client", "fifo"] {
        let line = Line::start(&format!("fairness: {fairness}"), "");
        let mut callers = vec![line.ask(FIRST, "a"), line.ask(FIRST, "b"), line.ask(FIRST, "c")];
        line.leave(callers.remove(0));
        let gone = stats(&line.gateway);
        assert_eq!(
            (&gone["kept_places"], &gone["cancelled_in_queue"]),
            (&1.into(), &1.into()),
            "{fairness}"
        );
        let _retry = line.ask(SECOND, "a");
        let back = stats(&line.gateway);
        assert_eq!(
            (&back["kept_places"], &back["returned_to_place"]),
            (&0.into(), &1.into()),
            "{fairness}"
        );
        assert_eq!(line.order(), "a b c", "{fairness}");
    }
}

#[test]
fn a_retry_may_itself_be_given_up_and_tried_again() {
    let line = Line::start("", "");
    let mut callers = vec![line.ask(FIRST, "a"), line.ask(FIRST, "b")];
    for n in 1..=3 {
        line.leave(callers.remove(0));
        callers.insert(0, line.ask(&format!("x-stainless-retry-count: {n}\r\n"), "a"));
        assert_eq!(stats(&line.gateway)["returned_to_place"], n);
    }
    assert_eq!(line.order(), "a b");
}

#[test]
fn a_place_is_kept_for_the_same_body_of_the_same_client_on_the_same_path_alone() {
    let clients = "fairness: fifo\nclients: [{name: other, token: other-token}]";
    let line = Line::start(clients, "");
    let mut callers = vec![line.ask(FIRST, "a"), line.ask(FIRST, "b")];
    line.leave(callers.remove(0));
    let other_address = Client::connect_from(Ipv4Addr::new(127, 0, 0, 2), line.gateway.addr());
    let other_path = {
        let mut client = Client::connect(line.gateway.addr());
        let (queued, body) = (line.queued(), r#"{"model":"m","tag":"a"}"#);
        client.post_json_with("/v1/messages", SECOND, body);
        line.gateway.wait_queued(queued + 1);
        client
    };
    let _strangers = [
        other_path,
        line.ask(SECOND, "A"),
        line.ask(&format!("{SECOND}Authorization: Bearer other-token\r\n"), "a"),
        line.join(other_address, SECOND, "a"),
        // The same, but for the first time, and without a word about it.
        line.ask(FIRST, "a"),
        line.ask("", "a"),
    ];
    let still = stats(&line.gateway);
    assert_eq!((&still["kept_places"], &still["returned_to_place"]), (&1.into(), &0.into()));
    let _retry = line.ask(SECOND, "a");
    assert_eq!(stats(&line.gateway)["returned_to_place"], 1);
    let rows = line.gateway.queue();
    assert_eq!((rows.len(), &rows[0]["client"]), (8, &"127.0.0.1".into()));
    assert_eq!(line.order(), "a b a A a a a a");
}

#[test]
fn a_kept_place_is_nobodys_obstacle() {
    let line = Line::start("", "");
    let mut callers = vec![line.ask(FIRST, "a"), line.ask(FIRST, "b")];
    line.leave(callers.remove(0));
    assert_eq!(line.gateway.queue().len(), 1);
    assert_eq!(line.order(), "b");
    assert_eq!(stats(&line.gateway)["kept_places"], 1);
}

#[test]
fn no_place_is_kept_for_a_caller_who_counts_no_retries() {
    let line = Line::start("", "");
    let mut callers = vec![line.ask("", "a"), line.ask("", "b")];
    line.leave(callers.remove(0));
    assert_eq!(stats(&line.gateway)["kept_places"], 0);
    let _retry = line.ask(SECOND, "a");
    assert_eq!(line.order(), "b a");
}

#[test]
fn a_place_is_kept_for_who_was_dropped_at_its_deadline() {
    let line = Line::start("", "");
    let timeout = "x-stainless-read-timeout: 1\r\n";
    let mut first = line.ask(&format!("{FIRST}{timeout}"), "a");
    let _second = line.ask("", "b");
    assert_eq!(first.read_response().code(), "deadline_exceeded");
    assert_eq!(stats(&line.gateway)["kept_places"], 1);
    let _retry = line.ask(SECOND, "a");
    assert_eq!(line.order(), "a b");
}

#[test]
fn a_kept_place_is_given_up_after_a_while() {
    let line = Line::start("", "");
    for n in 1..=3 {
        line.leave(line.ask(FIRST, "a"));
        assert_eq!(stats(&line.gateway)["kept_places"], n);
    }
    // A look in between would make the scheduler get up.
    std::thread::sleep(Duration::from_secs(16));
    assert_eq!(stats(&line.gateway)["kept_places"], 0);
    let _waiting = line.ask("", "b");
    let _late = line.ask(SECOND, "a");
    assert_eq!(stats(&line.gateway)["returned_to_place"], 0);
    assert_eq!(line.order(), "b a");
}

#[test]
fn no_more_places_are_kept_than_may_wait() {
    let line = Line::start("", "max_queue: 2");
    for _ in 0..4 {
        line.leave(line.ask(FIRST, "a"));
    }
    assert_eq!(stats(&line.gateway)["kept_places"], 2);
    // Nor do they take anybody's room.
    let _waiting = [line.ask("", "b"), line.ask("", "c")];
    assert_eq!(post_with(line.gateway.addr(), CHAT, "", PLAIN).code(), "queue_full");
}

#[test]
fn who_gives_up_while_a_connection_is_made_leaves_nothing_behind() {
    // This provider never says its part of the handshake.
    let upstream = Upstream::start([Reply::Stall]);
    let base_url = format!("https://{}/v1", upstream.addr());
    let gateway = Gateway::start(&provider_at(
        "p",
        &base_url,
        &["m"],
        UNSHAPED,
        "connect_timeout_seconds: 60",
    ));
    let mut client = Client::connect(gateway.addr());
    client.post_json_with(CHAT, "", PLAIN);
    upstream.wait_connections(1, PATIENCE);
    drop(client);
    upstream.wait_open(0, PATIENCE);
    let refused = post_with(gateway.addr(), CHAT, "x-stainless-read-timeout: 0.5\r\n", PLAIN);
    assert_late(&refused, 1, "0.5 s");
    upstream.wait_open(0, PATIENCE);
    let stats = gateway.wait_queued(0);
    assert_eq!(
        (&stats["sent"], &stats["kept_places"], &stats["waiting_in_acquire"]),
        (&0.into(), &0.into(), &0.into())
    );
}
