//! What real clients do with a response, and when they close.

use std::time::Duration;

use serde_json::Value;

use crate::support::{
    Client, Ended, Ending, Gate, Gateway, PATIENCE, Reply, UNSHAPED, Upstream, get, post,
    provider_yaml, sse,
};

const CHAT: &str = "/v1/chat/completions";
const STREAM: &str = r#"{"model":"m","stream":true,"messages":[]}"#;

/// The events that end a stream, with the path of their API.
const LAST_EVENTS: [(&str, &str); 5] = [
    (CHAT, "data: [DONE]\n\n"),
    ("/v1/messages", "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"),
    (
        "/v1/responses",
        "event: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{}}\n\n",
    ),
    (
        "/v1/responses",
        "event: response.failed\ndata: {\"type\":\"response.failed\",\"response\":{}}\n\n",
    ),
    ("/v1/responses", "data: {\"type\":\"response.incomplete\",\"response\":{}}\n\n"),
];

fn gateway(upstream: &Upstream, rate_limit: &str) -> Gateway {
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], rate_limit, ""))
}

fn chunk(payload: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", payload.len()).as_bytes(), payload, b"\r\n"].concat()
}

/// The head and the body so far of a chunked response.
fn begun(media_type: &str, payload: &[u8]) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
    );
    [head.as_bytes(), &chunk(payload)].concat()
}

/// Reads until the body so far contains `text`.
fn read_until(client: &mut Client, text: &str) {
    assert_eq!(client.read_head().word(1), "200");
    let mut body = Vec::new();
    while !String::from_utf8_lossy(&body).contains(text) {
        body.extend(client.read_chunk().expect("the body goes on").bytes);
    }
}

/// Closes the connection, and returns once the gateway must have noticed: it has answered others since.
fn hang_up(client: Client, gateway: &Gateway) {
    drop(client);
    for _ in 0..2 {
        assert_eq!(get(gateway.addr(), "/admin/health").status, 200);
    }
}

/// The latest record of `/admin/requests` once there are `count` of them.
fn record(gateway: &Gateway, count: usize) -> Value {
    gateway.wait_stats(|_| records(gateway).len() == count, PATIENCE);
    records(gateway)[0].clone()
}

fn records(gateway: &Gateway) -> Vec<Value> {
    get(gateway.addr(), "/admin/requests").json()["requests"].as_array().unwrap().clone()
}

#[track_caller]
fn assert_succeeded(record: &Value, what: &str) {
    assert_eq!(
        (&record["status"], &record["error"]),
        (&200.into(), &Value::Null),
        "{what}: {record}"
    );
}

#[test]
fn a_client_that_closes_after_the_last_event_has_its_response() {
    for (path, last) in LAST_EVENTS {
        let gate = Gate::closed();
        let upstream = Upstream::answering({
            let (gate, begun) = (gate.clone(), begun("text/event-stream", last.as_bytes()));
            move |_, _| Reply::pieces(&[&begun, b"0\r\n\r\n"], &gate, Ending::Complete)
        });
        let gateway = gateway(&upstream, UNSHAPED);
        for round in 1..=3 {
            let mut client = Client::connect(gateway.addr());
            client.post_json(path, STREAM);
            gate.release(1);
            read_until(&mut client, last.trim_end());
            hang_up(client, &gateway);
            gate.release(2);
            gateway.wait_stats(|stats| stats["succeeded"] == round, PATIENCE);
            assert_succeeded(&record(&gateway, round), last);
        }
        assert_eq!(upstream.connections(), 1, "{last}");
        assert_eq!(gateway.stats()["providers"][0]["upstream_errors"], 0, "{last}");
    }
}

#[test]
fn a_client_that_closes_after_a_whole_json_body_has_its_response() {
    let gate = Gate::closed();
    let body = br#"{"choices":[],"usage":{"total_tokens":9}}"#;
    let begun = begun("application/json", body);
    let upstream =
        Upstream::start([Reply::pieces(&[&begun, b"0\r\n\r\n"], &gate, Ending::Complete)]);
    let gateway = gateway(&upstream, UNSHAPED);
    for round in 1..=2 {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, r#"{"model":"m","messages":[]}"#);
        gate.release(1);
        read_until(&mut client, "9}}");
        hang_up(client, &gateway);
        gate.release(2);
        gateway.wait_stats(|stats| stats["succeeded"] == round, PATIENCE);
        assert_succeeded(&record(&gateway, round), "JSON");
    }
    assert_eq!(upstream.connections(), 1);
}

#[test]
fn a_client_that_closes_before_the_last_event_is_a_disconnect() {
    let gate = Gate::closed();
    let chunks = [sse::event("one"), sse::event("two"), sse::done()].to_vec();
    let upstream = Upstream::start([Reply::stream(chunks, &gate)]);
    let gateway = gateway(&upstream, UNSHAPED);
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, STREAM);
    gate.release(1);
    read_until(&mut client, "one");
    drop(client);
    upstream.wait_closed(0, PATIENCE);
    assert_eq!(record(&gateway, 1)["error"], "caller_gone");
    assert_eq!(gateway.stats()["providers"][0]["succeeded"], 0);
}

#[test]
fn the_tokens_of_a_stream_that_its_client_closes_after_done_are_settled() {
    let usage = b"data: {\"choices\":[],\"usage\":{\"total_tokens\":9}}\n\ndata: [DONE]\n\n";
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::Pieces {
        pieces: vec![begun("text/event-stream", usage)],
        gate: gate.clone(),
        ending: Ending::Stall,
    }]);
    let gateway = gateway(
        &upstream,
        "{mode: burst, rpm: 60000, capacity: 100, tpm: 2000, max_wait_seconds: 5}",
    );
    // Each reserves 1,500 of 2,000 tokens a minute: the second would wait for 60 s if the first kept them.
    for round in 1..=4 {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, r#"{"model":"m","stream":true,"max_tokens":1500,"messages":[]}"#);
        gate.release(1);
        read_until(&mut client, "[DONE]");
        drop(client);
        record(&gateway, round);
    }
}

#[test]
fn the_tokens_of_a_stream_that_is_stopped_after_its_usage_are_settled() {
    let usage =
        b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":2,\"completion_tokens\":7}}\n\n";
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::Pieces {
        pieces: vec![begun("text/event-stream", usage)],
        gate: gate.clone(),
        ending: Ending::Stall,
    }]);
    let gateway = gateway(
        &upstream,
        "{mode: burst, rpm: 60000, capacity: 100, tpm: 2000, max_wait_seconds: 5}",
    );
    for round in 1..=3 {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, r#"{"model":"m","stream":true,"max_tokens":1500,"messages":[]}"#);
        gate.release(1);
        read_until(&mut client, "completion_tokens");
        drop(client);
        let record = record(&gateway, round);
        assert_eq!(
            (&record["error"], &record["output_tokens"]),
            (&"caller_gone".into(), &7.into())
        );
    }
}

#[test]
fn a_stream_that_stays_open_after_its_last_event_gives_its_slot_back() {
    for (path, last) in LAST_EVENTS {
        let upstream =
            Upstream::start([Reply::Raw(begun("text/event-stream", last.as_bytes())), Reply::ok()]);
        let gateway =
            gateway(&upstream, "{mode: burst, rpm: 60000, capacity: 100, max_concurrent: 1}");
        let mut first = Client::connect(gateway.addr());
        first.post_json(path, STREAM);
        read_until(&mut first, last.trim_end());
        // The first client does not close. Its response ends all the same.
        assert_eq!(post(gateway.addr(), CHAT, r#"{"model":"m"}"#).status, 200, "{last}");
        assert_eq!(first.read_chunk().unwrap_err(), Ended::Clean, "{last}");
        let stats = gateway.wait_stats(|stats| stats["succeeded"] == 2, PATIENCE);
        assert_eq!(stats["upstream_errors"], 0, "{last}");
    }
}

#[test]
fn a_stream_that_breaks_after_its_last_event_is_complete() {
    for ending in [Ending::Close, Ending::Reset] {
        let gate = Gate::closed();
        let begun = begun("text/event-stream", b"data: [DONE]\n\n");
        let upstream = Upstream::start([Reply::pieces(&[&begun], &gate, ending)]);
        let gateway = gateway(&upstream, UNSHAPED);
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, STREAM);
        gate.release(1);
        read_until(&mut client, "[DONE]");
        gate.release(1);
        assert_eq!(client.read_chunk().unwrap_err(), Ended::Clean, "{ending:?}");
        let stats = gateway.wait_stats(|stats| stats["succeeded"] == 1, PATIENCE);
        assert_eq!(stats["upstream_errors"], 0, "{ending:?}");
        assert_succeeded(&record(&gateway, 1), "a break");
    }
}

#[test]
fn a_provider_that_sends_on_after_its_last_event_is_cut_off() {
    let upstream = Upstream::start([Reply::Pieces {
        pieces: vec![
            begun("text/event-stream", b"data: [DONE]\n\n"),
            chunk(&vec![b'x'; 200 * 1024]),
        ],
        gate: Gate::open(),
        ending: Ending::Stall,
    }]);
    let gateway = gateway(&upstream, UNSHAPED);
    let response = post(gateway.addr(), CHAT, STREAM);
    assert_eq!((response.status, response.ended), (200, Ended::Clean));
    assert_eq!(upstream.wait_closed(0, Duration::from_secs(5)).0, crate::support::Gone::Reset);
}
