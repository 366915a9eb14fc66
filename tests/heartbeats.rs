//! What a caller hears while its request waits, and how an answer ends that began with a heartbeat.
//!
//! A caller that announces a read timeout of 0.3 s gets a beat every 100 ms, the shortest there is.

mod support;

use std::time::{Duration, Instant};

use serde_json::Value;
use support::{
    Client, ClosedPort, Ended, Ending, Gate, Gateway, PATIENCE, Reply, Response, UNSHAPED,
    Upstream, provider_yaml, spaced, sse,
};

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const STREAM: &str = r#"{"model":"m","stream":true}"#;
const PLAIN: &str = r#"{"model":"m"}"#;

/// As an SDK with this read timeout announces itself: beats from 0.2 s on, every 0.1 s.
const IMPATIENT: &str = "x-stainless-read-timeout: 0.3\r\n";
const EAGER: &str = "heartbeat_after_seconds: 0.1";
const EAGER_JSON: &str = "heartbeat_after_seconds: 0.1\nheartbeat_json: true";

/// Longer than any test: a slot that is not open at the start does not come.
const NEVER_MS: u64 = 30_000;

fn gateway(upstream: &Upstream, server: &str, rate_limit: &str) -> Gateway {
    Gateway::start_with(server, &provider_yaml("p", upstream.addr(), &["m"], rate_limit, ""), &[])
}

fn ask(gateway: &Gateway, path: &str, headers: &str, body: &str) -> Client {
    let mut client = Client::connect(gateway.addr());
    client.post_json_with(path, headers, body);
    client
}

/// Answers nothing until the gate lets this go.
fn held(gate: &Gate, answer: &[u8]) -> Reply {
    Reply::Pieces { pieces: vec![answer.to_vec()], gate: gate.clone(), ending: Ending::Complete }
}

fn answer(status: u16, content_type: &str, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status} Scripted\r\nContent-Type: {content_type}\r\nX-Own: kept\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// The next piece of a body, as text.
fn piece(client: &mut Client) -> String {
    let chunk = client.read_chunk().expect("more of a body");
    String::from_utf8(chunk.bytes).expect("text")
}

/// What is left of a body, and how it ended.
fn rest(client: &mut Client) -> (String, Ended) {
    let mut rest = Vec::new();
    loop {
        match client.read_chunk() {
            Ok(chunk) => rest.extend(chunk.bytes),
            Err(ended) => return (String::from_utf8(rest).expect("text"), ended),
        }
    }
}

/// Splits the comments off that an answer to an OpenAI caller begins with.
fn after_comments(text: &str) -> &str {
    let mut text = text;
    while text.starts_with(": ") {
        text = text.split_once("\n\n").expect("a comment ends in an empty line").1;
    }
    text
}

/// The same for an Anthropic caller.
fn after_pings(text: &str) -> &str {
    let mut text = text;
    while text.starts_with(": ") {
        let rest = text.split_once('\n').expect("a comment ends").1;
        text = rest
            .strip_prefix("event: ping\ndata: {\"type\": \"ping\"}\n\n")
            .expect("a comment has its ping");
    }
    text
}

/// The JSON of the only event in `text`.
fn only_event(text: &str) -> Value {
    let data = text.strip_prefix("data: ").and_then(|text| text.strip_suffix("\n\n"));
    let data = data
        .filter(|data| !data.contains('\n'))
        .unwrap_or_else(|| panic!("not one event: {text:?}"));
    serde_json::from_str(data).expect("its data is JSON")
}

/// Asks a provider that answers with `reply` once the caller has had a heartbeat; returns the whole body behind the
/// heartbeats.
fn answered_late(
    path: &str,
    body: &str,
    server: &str,
    reply: impl FnOnce(&Gate) -> Reply,
) -> (String, Ended) {
    let gate = Gate::closed();
    let upstream = Upstream::start([reply(&gate)]);
    let gateway = gateway(&upstream, server, UNSHAPED);
    let mut client = ask(&gateway, path, IMPATIENT, body);
    let head = client.read_head();
    assert_eq!(head.word(1), "200", "{head:?}");
    let first = piece(&mut client);
    gate.release(usize::MAX);
    let (more, ended) = rest(&mut client);
    (first + &more, ended)
}

// --- while a stream waits

#[test]
fn a_stream_that_waits_gets_200_and_comments_with_its_place_and_then_the_providers_bytes() {
    let gate = Gate::closed();
    let events = sse::words(&["one", "two"]);
    let upstream = Upstream::start([
        held(&gate, &answer(200, "text/plain", "")),
        Reply::stream(events.clone(), &gate),
    ]);
    let limit = "{mode: burst, rpm: 600000, capacity: 1000, max_concurrent: 1}";
    let gateway = gateway(&upstream, EAGER, limit);
    let _first = ask(&gateway, CHAT, "", PLAIN);
    upstream.wait_requests(1, PATIENCE);
    let start = Instant::now();
    let mut client = ask(&gateway, CHAT, IMPATIENT, STREAM);
    let head = client.read_head();
    assert!(start.elapsed() >= Duration::from_millis(100), "after {:?}", start.elapsed());
    assert_eq!(head.word(1), "200");
    for (name, value) in [
        ("content-type", "text/event-stream"),
        ("cache-control", "no-cache"),
        ("x-accel-buffering", "no"),
        ("transfer-encoding", "chunked"),
    ] {
        assert_eq!(head.headers.get(name).as_deref(), Some(value), "{head:?}");
    }
    assert!(head.headers.get("x-request-id").is_some_and(|id| id.starts_with("req_")), "{head:?}");
    for _ in 0..3 {
        let comment = piece(&mut client);
        assert!(
            comment.starts_with(": queued position=1 eta=") && comment.ends_with("s\n\n"),
            "{comment:?}"
        );
    }
    gate.release(usize::MAX);
    let (text, ended) = rest(&mut client);
    assert_eq!(
        (after_comments(&text).as_bytes(), ended),
        (events.concat().as_slice(), Ended::Clean)
    );
}

#[test]
fn the_comments_count_places_and_seconds_down() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, EAGER, &spaced(NEVER_MS));
    let _first = ask(&gateway, CHAT, "", PLAIN);
    upstream.wait_requests(1, PATIENCE);
    let mut second = ask(&gateway, CHAT, "", PLAIN);
    gateway.wait_queued(1);
    let mut third = ask(&gateway, CHAT, IMPATIENT, STREAM);
    third.read_head();
    let eta = |comment: &str, place: u32| -> u64 {
        let eta = comment.strip_prefix(&format!(": queued position={place} eta="));
        let eta = eta.and_then(|eta| eta.strip_suffix("s\n\n")?.parse().ok());
        eta.unwrap_or_else(|| panic!("{comment:?} for place {place}"))
    };
    let far = eta(&piece(&mut third), 2);
    assert!((50..=60).contains(&far), "{far}");
    second.half_close();
    gateway.wait_queued(1);
    assert!(second.is_closed(PATIENCE));
    let near = loop {
        let comment = piece(&mut third);
        if !comment.contains("position=2") {
            break eta(&comment, 1);
        }
    };
    assert!((20..=30).contains(&near), "{near}");
}

#[test]
fn none_comes_after_the_providers_first_byte() {
    let gate = Gate::closed();
    let events = sse::words(&["one", "two"]);
    let upstream = Upstream::start([Reply::stream(events.clone(), &gate)]);
    let gateway = gateway(&upstream, EAGER, UNSHAPED);
    // The head comes at once, and with it the answer has begun.
    let mut client = ask(&gateway, CHAT, IMPATIENT, STREAM);
    gate.release(1);
    client.read_head();
    let first = piece(&mut client);
    std::thread::sleep(Duration::from_millis(500));
    gate.release(2);
    let (more, ended) = rest(&mut client);
    assert_eq!(((first + &more).into_bytes(), ended), (events.concat(), Ended::Clean));
}

#[test]
fn none_comes_between_two_events_of_a_stream_that_began_late() {
    let gate = Gate::closed();
    let mut pieces = vec![b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n".to_vec()];
    let events = sse::words(&["one", "two"]);
    pieces.extend(events.clone());
    let upstream =
        Upstream::start([Reply::Pieces { pieces, gate: gate.clone(), ending: Ending::Close }]);
    let gateway = gateway(&upstream, EAGER, UNSHAPED);
    let mut client = ask(&gateway, CHAT, IMPATIENT, STREAM);
    client.read_head();
    assert_eq!(piece(&mut client), ": sent\n\n");
    gate.release(2);
    let first = loop {
        match piece(&mut client) {
            comment if comment.starts_with(':') => {}
            event => break event,
        }
    };
    std::thread::sleep(Duration::from_millis(500));
    gate.release(2);
    // What ends with the connection and had no length has ended well.
    let (more, ended) = rest(&mut client);
    assert_eq!(((first + &more).into_bytes(), ended), (events.concat(), Ended::Clean));
}

#[test]
fn a_stream_that_is_served_in_time_keeps_the_providers_status_and_headers() {
    let upstream = Upstream::start([Reply::Raw(answer(418, "application/json", "{\"error\":{}}"))]);
    let gateway = gateway(&upstream, "", UNSHAPED);
    let mut client = ask(&gateway, CHAT, "", STREAM);
    let response = client.read_response();
    assert_eq!((response.status, response.text().as_str()), (418, "{\"error\":{}}"));
    assert_eq!(response.header("x-own").as_deref(), Some("kept"));
    assert_eq!(response.header("x-limitrate-provider").as_deref(), Some("p"));
    assert_eq!(gateway.stats()["server"]["heartbeat_after_seconds"], 15.0);
}

#[test]
fn a_short_read_timeout_brings_heartbeats_forward() {
    let upstream = Upstream::start([Reply::Stall]);
    // As configured it would be 15 s.
    let gateway = gateway(&upstream, "", UNSHAPED);
    for header in ["x-stainless-read-timeout: 0.9\r\n", "X-Stainless-Timeout: 0.9\r\n"] {
        let start = Instant::now();
        let mut client = ask(&gateway, CHAT, header, STREAM);
        client.read_head();
        assert_eq!(piece(&mut client), ": sent\n\n");
        assert!(
            start.elapsed() >= Duration::from_millis(600),
            "before two thirds of it: {:?}",
            start.elapsed()
        );
        assert_eq!(piece(&mut client), ": sent\n\n");
        assert!(
            start.elapsed() >= Duration::from_millis(900),
            "closer than a third of it: {:?}",
            start.elapsed()
        );
    }
}

#[test]
fn heartbeats_can_be_switched_off_by_the_operator_and_by_the_caller() {
    for (server, headers) in [
        ("heartbeat_after_seconds: null", ""),
        (EAGER, "X-Limitrate-Heartbeat: off\r\n"),
        (EAGER, "x-limitrate-heartbeat: OFF\r\n"),
        // The operator has the last word.
        ("heartbeat_after_seconds: null", "X-Limitrate-Heartbeat: on\r\n"),
    ] {
        let gate = Gate::closed();
        let upstream = Upstream::start([held(&gate, &answer(418, "application/json", "{}"))]);
        let gateway = gateway(&upstream, server, UNSHAPED);
        let mut quiet = ask(&gateway, CHAT, headers, STREAM);
        assert!(!quiet.is_closed(Duration::from_millis(400)));
        gate.release(1);
        assert_eq!(quiet.read_response().status, 418, "{server} {headers}");
    }
}

// --- an answer that is no stream, behind a heartbeat

#[test]
fn a_providers_refusal_becomes_an_error_event_in_its_own_words() {
    let refusal = "{\"error\": {\"message\": \"no such\\ntool\",\n \"type\": \"invalid_request_error\", \"code\": \"c\"}}";
    let (body, ended) = answered_late(CHAT, STREAM, EAGER, |gate| {
        held(gate, &answer(400, "application/json", refusal))
    });
    let want: Value = serde_json::from_str(refusal).expect("JSON");
    assert_eq!((only_event(after_comments(&body)), ended), (want, Ended::Clean));
}

#[test]
fn a_page_in_the_place_of_an_answer_becomes_an_error_event() {
    let page = "<html>\r\nBad\tgateway</html>";
    let (body, ended) =
        answered_late(CHAT, STREAM, EAGER, |gate| held(gate, &answer(500, "text/html", page)));
    let error = only_event(after_comments(&body))["error"].take();
    assert_eq!((&error["code"], ended), (&"upstream_refused".into(), Ended::Clean));
    let message = error["message"].as_str().expect("a message");
    assert!(
        message.contains("`p`") && message.contains("500") && message.contains("gateway"),
        "{message}"
    );
}

#[test]
fn an_empty_refusal_and_one_without_an_error_object_become_error_events_too() {
    for body in ["", "{}", "[]", "{\"error\":\"text\"}"] {
        let (text, _) = answered_late(CHAT, STREAM, EAGER, |gate| {
            held(gate, &answer(404, "application/json", body))
        });
        let event = only_event(after_comments(&text));
        assert_eq!(event["error"]["code"], "upstream_refused", "{body}: {event}");
        assert!(
            event["error"]["message"].as_str().is_some_and(|text| text.contains("404")),
            "{event}"
        );
    }
}

#[test]
fn an_event_stream_with_an_errors_status_does_not_pass_for_a_good_one() {
    let body = "data: {\"choices\":[]}\n\n";
    let (text, _) = answered_late(CHAT, STREAM, EAGER, |gate| {
        held(gate, &answer(500, "text/event-stream", body))
    });
    assert_eq!(only_event(after_comments(&text))["error"]["code"], "upstream_refused", "{text}");
}

#[test]
fn plain_json_in_the_place_of_a_stream_becomes_an_event() {
    let body = "{\"id\":\"c-1\",\n\"choices\":[]}";
    let (text, ended) = answered_late(CHAT, STREAM, EAGER, |gate| {
        held(gate, &answer(200, "application/json", body))
    });
    let want: Value = serde_json::from_str(body).expect("JSON");
    assert_eq!((only_event(after_comments(&text)), ended), (want, Ended::Clean));
}

#[test]
fn a_provider_that_breaks_off_before_its_answer_is_an_error_event() {
    // Nothing but a gate to wait at, and then the end of the connection.
    let broken = |gate: &Gate| Reply::Pieces {
        pieces: vec![Vec::new()],
        gate: gate.clone(),
        ending: Ending::Close,
    };
    let (text, ended) = answered_late(CHAT, STREAM, EAGER, broken);
    let event = only_event(after_comments(&text));
    assert_eq!((&event["error"]["code"], ended), (&"upstream_disconnected".into(), Ended::Clean));
}

#[test]
fn a_provider_that_breaks_off_inside_its_stream_is_an_error_event_and_no_tidy_end() {
    let chunk = "data: {\"choices\":[]}\n\n";
    let broken = |gate: &Gate| {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        let begun = format!("{head}{:x}\r\n{chunk}\r\n", chunk.len());
        Reply::Pieces {
            pieces: vec![begun.into_bytes()],
            gate: gate.clone(),
            ending: Ending::Close,
        }
    };
    for (path, error) in
        [(CHAT, "data: {\"error\":"), (MESSAGES, "event: error\ndata: {\"type\":\"error\"")]
    {
        let (text, ended) = answered_late(path, STREAM, EAGER, broken);
        let text = if path == CHAT { after_comments(&text) } else { after_pings(&text) };
        let event = text.strip_prefix(chunk).unwrap_or_else(|| panic!("{text:?}")).trim_start();
        assert!(event.starts_with(error) && event.ends_with("\n\n"), "{path}: {event:?}");
        assert_eq!(ended, Ended::Aborted, "{path}");
    }
}

#[test]
fn a_provider_that_cannot_be_reached_is_an_error_event() {
    let closed = ClosedPort::new();
    // The second attempt comes after a pause of about a second.
    let provider = provider_yaml("p", closed.addr(), &["m"], UNSHAPED, "retry: {attempts: 2}");
    let gateway = Gateway::start_with(EAGER, &provider, &[]);
    let response = ask(&gateway, CHAT, IMPATIENT, STREAM).read_response();
    assert_eq!((response.status, response.ended), (200, Ended::Clean));
    let text = response.text();
    assert!(text.starts_with(": queued\n\n"), "between two attempts: {text:?}");
    assert_eq!(only_event(after_comments(&text))["error"]["code"], "upstream_unreachable");
}

#[test]
fn who_waits_at_a_shutdown_gets_an_error_event() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, EAGER, &spaced(NEVER_MS));
    let _first = ask(&gateway, CHAT, "", PLAIN).read_response();
    let mut waiting = [CHAT, MESSAGES].map(|path| {
        let mut client = ask(&gateway, path, IMPATIENT, STREAM);
        client.read_head();
        client
    });
    gateway.drain();
    let [(chat, chat_ended), (messages, messages_ended)] = waiting.each_mut().map(rest);
    assert_eq!(only_event(after_comments(&chat))["error"]["code"], "shutting_down");
    let event = after_pings(&messages).strip_prefix("event: error\n").expect("an error event");
    assert_eq!(only_event(event)["error"]["type"], "overloaded_error");
    assert_eq!([chat_ended, messages_ended], [Ended::Clean; 2]);
    assert!(gateway.join(PATIENCE));
}

#[test]
fn a_refusal_by_the_gateway_is_an_error_event() {
    let upstream = Upstream::start([Reply::Stall]);
    // The slot is open, but the handshake does not come to an end.
    let base_url = format!("https://{}/v1", upstream.addr());
    let limit = "{mode: burst, rpm: 600000, max_wait_seconds: 1.5}";
    let provider =
        support::provider_at("p", &base_url, &["m"], limit, "connect_timeout_seconds: 60");
    let gateway = Gateway::start_with(EAGER, &provider, &[]);
    let response = ask(&gateway, CHAT, IMPATIENT, STREAM).read_response();
    let event = only_event(after_comments(&response.text()));
    assert_eq!((response.status, &event["error"]["code"]), (200, &"queue_wait_exceeded".into()));
}

// --- Anthropic's callers

#[test]
fn anthropics_callers_get_pings_and_then_the_providers_bytes() {
    let stream = "event: message_start\ndata: {\"type\":\"message_start\"}\n\n";
    let (text, ended) = answered_late(MESSAGES, STREAM, EAGER, |gate| {
        held(gate, &answer(200, "text/event-stream; charset=utf-8", stream))
    });
    assert!(text.starts_with(": sent\nevent: ping\ndata: {\"type\": \"ping\"}\n\n"), "{text:?}");
    assert_eq!((after_pings(&text), ended), (stream, Ended::Clean));
}

#[test]
fn anthropics_callers_get_the_queue_in_a_ping_and_their_own_id_header() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, EAGER, &spaced(NEVER_MS));
    let _first = ask(&gateway, CHAT, "", PLAIN).read_response();
    let mut client = ask(&gateway, MESSAGES, IMPATIENT, STREAM);
    let head = client.read_head();
    assert!(head.headers.get("request-id").is_some_and(|id| id.starts_with("req_")), "{head:?}");
    assert_eq!(head.headers.get("x-request-id"), None);
    let ping = piece(&mut client);
    assert!(ping.starts_with(": queued position=1 eta="), "{ping:?}");
    assert_eq!(after_pings(&ping), "");
}

#[test]
fn anthropics_callers_get_errors_as_events_named_so() {
    let refusal = r#"{"type":"error","error":{"type":"invalid_request_error","message":"no"}}"#;
    for (status, content_type, body, kind) in [
        (400, "application/json", refusal, "invalid_request_error"),
        (500, "text/html", "<html>", "api_error"),
    ] {
        let (text, ended) = answered_late(MESSAGES, STREAM, EAGER, |gate| {
            held(gate, &answer(status, content_type, body))
        });
        let event =
            after_pings(&text).strip_prefix("event: error\n").unwrap_or_else(|| panic!("{text:?}"));
        let event = only_event(event);
        assert_eq!(
            (&event["type"], &event["error"]["type"]),
            (&"error".into(), &kind.into()),
            "{event}"
        );
        assert_eq!(ended, Ended::Clean);
    }
}

#[test]
fn anthropics_callers_get_an_error_for_a_whole_message_in_the_place_of_a_stream() {
    let body = r#"{"type":"message","content":[]}"#;
    let (text, _) = answered_late(MESSAGES, STREAM, EAGER, |gate| {
        held(gate, &answer(200, "application/json", body))
    });
    let event =
        after_pings(&text).strip_prefix("event: error\n").unwrap_or_else(|| panic!("{text:?}"));
    let error = only_event(event)["error"].take();
    assert_eq!(error["type"], "api_error");
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|text| text.contains("200") && text.contains("message")),
        "{error}"
    );
}

// --- plain callers

#[test]
fn plain_callers_get_white_space_and_then_the_providers_json() {
    let body = "{\"id\": \"c-1\", \"choices\": []}";
    for status in [200, 400] {
        let (text, ended) = answered_late(CHAT, PLAIN, EAGER_JSON, |gate| {
            held(gate, &answer(status, "application/json", body))
        });
        assert!(text.starts_with('\n') && text.trim_start_matches('\n') == body, "{text:?}");
        assert!(serde_json::from_str::<Value>(&text).is_ok(), "{text:?}");
        assert_eq!(ended, Ended::Clean);
    }
}

#[test]
fn a_plain_callers_answer_that_begins_with_white_space_says_that_it_is_json() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, EAGER_JSON, UNSHAPED);
    let mut client = ask(&gateway, CHAT, IMPATIENT, PLAIN);
    let head = client.read_head();
    assert_eq!(head.word(1), "200");
    assert_eq!(head.headers.get("content-type").as_deref(), Some("application/json"));
    assert_eq!([piece(&mut client), piece(&mut client)], ["\n", "\n"]);
}

#[test]
fn a_plain_callers_error_behind_white_space_is_json_in_its_dialect() {
    let broken = |gate: &Gate| Reply::Pieces {
        pieces: vec![Vec::new()],
        gate: gate.clone(),
        ending: Ending::Close,
    };
    let (text, ended) = answered_late(CHAT, PLAIN, EAGER_JSON, broken);
    let error: Value = serde_json::from_str(&text).expect("JSON as a whole");
    assert_eq!((&error["error"]["code"], ended), (&"upstream_disconnected".into(), Ended::Clean));
    let (text, ended) = answered_late(MESSAGES, PLAIN, EAGER_JSON, broken);
    let error: Value = serde_json::from_str(&text).expect("JSON as a whole");
    assert_eq!((&error["type"], ended), (&"error".into(), Ended::Clean));
}

#[test]
fn a_plain_answer_that_breaks_off_behind_white_space_has_no_tidy_end() {
    let head =
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"id\":";
    let broken = |gate: &Gate| Reply::Pieces {
        pieces: vec![head.as_bytes().to_vec()],
        gate: gate.clone(),
        ending: Ending::Close,
    };
    let (text, ended) = answered_late(CHAT, PLAIN, EAGER_JSON, broken);
    assert_eq!((text.trim_start_matches('\n'), ended), ("{\"id\":", Ended::Aborted));
}

/// What a plain caller gets once a streaming one beside it has had so many heartbeats.
fn plain_beside_a_stream(server: &str, headers: &str, beats: usize) -> Response {
    let gate = Gate::closed();
    let upstream = Upstream::start([held(&gate, &answer(418, "application/json", "{}"))]);
    let gateway = gateway(&upstream, server, UNSHAPED);
    let mut plain = ask(&gateway, CHAT, headers, PLAIN);
    upstream.wait_requests(1, PATIENCE);
    let mut stream = ask(&gateway, CHAT, "x-stainless-read-timeout: 3\r\n", STREAM);
    stream.read_head();
    for _ in 0..beats {
        piece(&mut stream);
    }
    gate.release(usize::MAX);
    plain.read_response()
}

#[test]
fn white_space_comes_later_than_comments() {
    // 1.5 s against 6 s.
    let response =
        plain_beside_a_stream("heartbeat_after_seconds: 1.5\nheartbeat_json: true", "", 1);
    assert_eq!(
        (response.status, response.header("x-own").as_deref()),
        (418, Some("kept")),
        "{response:?}"
    );
}

#[test]
fn plain_callers_get_white_space_only_where_it_is_switched_on_and_wanted() {
    // The first comment after 0.1 s, one a second from there on: white space would have come after 0.4 s.
    for (server, headers) in [(EAGER, ""), (EAGER_JSON, "X-Limitrate-Heartbeat: off\r\n")] {
        let response = plain_beside_a_stream(server, headers, 2);
        assert_eq!(
            (response.status, response.header("x-own").as_deref()),
            (418, Some("kept")),
            "{response:?}"
        );
    }
}

// --- on the wire

#[test]
fn a_caller_that_knows_no_chunks_gets_heartbeats_until_the_close() {
    let gate = Gate::closed();
    let events = sse::words(&["one"]).concat();
    let upstream = Upstream::start([held(
        &gate,
        &answer(200, "text/event-stream", &String::from_utf8_lossy(&events)),
    )]);
    let gateway = gateway(&upstream, EAGER, UNSHAPED);
    let mut client = Client::connect(gateway.addr());
    client.send(format!(
        "POST {CHAT} HTTP/1.0\r\n{IMPATIENT}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{STREAM}",
        STREAM.len()
    ));
    let head = client.read_head();
    assert_eq!(
        (head.headers.get("transfer-encoding"), head.headers.get("content-length")),
        (None, None),
        "{head:?}"
    );
    assert_eq!(head.headers.get("connection").as_deref(), Some("close"), "{head:?}");
    let first = piece(&mut client);
    gate.release(1);
    let (more, _) = rest(&mut client);
    assert_eq!(after_comments(&(first + &more)).as_bytes(), events);
}

#[test]
fn a_connection_goes_on_after_an_answer_that_began_with_a_heartbeat() {
    let gate = Gate::closed();
    let upstream = Upstream::start([
        held(&gate, &answer(400, "application/json", "{\"error\":{}}")),
        Reply::ok(),
    ]);
    let gateway = gateway(&upstream, EAGER, UNSHAPED);
    let mut client = ask(&gateway, CHAT, IMPATIENT, STREAM);
    client.read_head();
    piece(&mut client);
    gate.release(1);
    assert_eq!(rest(&mut client).1, Ended::Clean);
    client.post_json(CHAT, PLAIN);
    let second = client.read_response();
    assert_eq!((second.status, second.header("x-limitrate-provider").as_deref()), (200, Some("p")));
}

#[test]
fn no_compression_is_asked_for_where_the_gateway_has_something_to_say() {
    let upstream = Upstream::start([Reply::ok()]);
    let coding = "Accept-Encoding: gzip\r\n";
    for (server, headers, body, passed) in [
        ("", "", STREAM, false),
        ("", "", PLAIN, true),
        ("heartbeat_json: true", "", PLAIN, false),
        ("heartbeat_after_seconds: null", "", STREAM, true),
        ("", "X-Limitrate-Heartbeat: off\r\n", STREAM, true),
    ] {
        let gateway = gateway(&upstream, server, UNSHAPED);
        let answer = ask(&gateway, CHAT, &format!("{coding}{headers}"), body).read_response();
        assert_eq!(answer.status, 200);
        let request = upstream.requests().pop().expect("it came");
        assert_eq!(
            request.header("accept-encoding").is_some(),
            passed,
            "{server} {headers} {body}"
        );
    }
}

/// The second heartbeat is due 15 s after the first.
#[test]
fn who_hangs_up_between_two_heartbeats_leaves_the_line_and_who_resets_too() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, EAGER, &spaced(NEVER_MS));
    let _first = ask(&gateway, CHAT, "", PLAIN).read_response();
    for (n, leave) in [(1, drop as fn(Client)), (2, Client::reset)] {
        let mut client = ask(&gateway, CHAT, "", STREAM);
        client.read_head();
        piece(&mut client);
        gateway.wait_queued(1);
        leave(client);
        let stats = gateway.wait_queued(0);
        assert_eq!(
            (&stats["cancelled_in_queue"], &stats["sent"]),
            (&n.into(), &1.into()),
            "{stats:#}"
        );
    }
}

#[test]
fn who_hangs_up_between_heartbeats_ends_the_providers_work() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, EAGER, UNSHAPED);
    let mut client = ask(&gateway, CHAT, "", STREAM);
    client.read_head();
    assert_eq!(piece(&mut client), ": sent\n\n");
    drop(client);
    upstream.wait_closed(0, PATIENCE);
    gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
}

#[test]
fn many_who_wait_hear_of_their_own_places() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, EAGER, &spaced(NEVER_MS));
    let _first = ask(&gateway, CHAT, "", PLAIN).read_response();
    let mut waiting: Vec<Client> = (1..=40)
        .map(|place| {
            let client = ask(&gateway, CHAT, IMPATIENT, STREAM);
            gateway.wait_queued(place);
            client
        })
        .collect();
    for (client, place) in waiting.iter_mut().zip(1..) {
        client.read_head();
        let comment = piece(client);
        assert!(
            comment.starts_with(&format!(": queued position={place} eta=")),
            "{comment:?} at {place}"
        );
    }
}
