//! What real clients make of a response that begins with a heartbeat.
//!
//! Each client here announces a read timeout of 0.3 s, so that a heartbeat comes every 100 ms.

use serde_json::{Value, json};

use crate::support::{
    Client, ClosedPort, Ended, Ending, Gate, Gateway, Reply, UNSHAPED, Upstream, provider_yaml, sse,
};

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";
const STREAM: &str = r#"{"model":"m","stream":true}"#;
const PLAIN: &str = r#"{"model":"m"}"#;
const IMPATIENT: &str = "x-stainless-read-timeout: 0.3\r\n";

fn gateway(server: &str, addr: std::net::SocketAddr) -> Gateway {
    let server = format!("heartbeat_after_seconds: 0.1\n{server}");
    Gateway::start_with(&server, &provider_yaml("p", addr, &["m"], UNSHAPED, ""), &[])
}

fn ask(gateway: &Gateway, path: &str, fields: &str, body: &str) -> Client {
    let mut client = Client::connect(gateway.addr());
    client.post_json_with(path, &format!("{IMPATIENT}{fields}"), body);
    client
}

/// A whole response that comes when the gate lets it.
fn held(gate: &Gate, media_type: &str, body: &[u8]) -> Reply {
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    Reply::pieces(&[&[head.as_bytes(), body].concat()], gate, Ending::Complete)
}

/// Asks a provider that answers with this body once the client has had a heartbeat; returns all that the client gets.
fn answered_late(path: &str, fields: &str, request: &str, media_type: &str, body: &[u8]) -> String {
    let gate = Gate::closed();
    let upstream = Upstream::start([held(&gate, media_type, body)]);
    let gateway = gateway("heartbeat_json: true", upstream.addr());
    let mut client = ask(&gateway, path, fields, request);
    assert_eq!(client.read_head().word(1), "200");
    let mut text = client.read_chunk().unwrap().bytes;
    gate.release(2);
    loop {
        match client.read_chunk() {
            Ok(chunk) => text.extend(chunk.bytes),
            Err(ended) => {
                assert_eq!(ended, Ended::Clean);
                return String::from_utf8(text).unwrap();
            }
        }
    }
}

#[test]
fn openai_go_gets_comments_without_an_empty_line() {
    let events = [sse::event("one"), sse::done()].concat();
    let stream = "text/event-stream";
    let text = answered_late(CHAT, "X-Stainless-Lang: go\r\n", STREAM, stream, &events);
    let first = text.split("data: ").next().unwrap();
    assert!(first.starts_with(": ") && !first.contains("\n\n"), "{text:?}");
    let text = answered_late(CHAT, "X-Stainless-Lang: python\r\n", STREAM, stream, &events);
    assert!(text.split("data: ").next().unwrap().ends_with("\n\n"), "{text:?}");
}

#[test]
fn a_byte_order_mark_of_the_provider_does_not_come_after_a_comment() {
    let events = [b"\xef\xbb\xbf".to_vec(), sse::event("one"), sse::done()].concat();
    let text = answered_late(CHAT, "", STREAM, "text/event-stream", &events);
    assert!(!text.contains('\u{feff}') && text.contains("\n\ndata: {"), "{text:?}");
    // Without a comment before it, it passes as it came.
    let upstream = Upstream::start([held(&Gate::open(), "text/event-stream", &events)]);
    let gateway = gateway("", upstream.addr());
    let body = ask(&gateway, CHAT, "X-Limitrate-Heartbeat: off\r\n", STREAM).read_response().body;
    assert_eq!(body, events);
}

#[test]
fn a_client_may_be_configured_to_get_no_heartbeats() {
    let gate = Gate::closed();
    let events = [sse::event("one"), sse::done()].concat();
    let upstream = Upstream::start([held(&gate, "text/event-stream", &events)]);
    let server = "clients: [{name: a, token: ta, heartbeat: off}, {name: b, token: tb, heartbeat: false}, {name: c, token: tc}]";
    let gateway = gateway(server, upstream.addr());
    let patient = "x-stainless-read-timeout: 30\r\n";
    let beats = |token: &str, more: &str| {
        let mut client = Client::connect(gateway.addr());
        client.post_json_with(
            CHAT,
            &format!("{patient}Authorization: Bearer {token}\r\n{more}"),
            STREAM,
        );
        client
    };
    let on = "X-Limitrate-Heartbeat: on\r\n";
    // The two that get heartbeats hear one: by then the others would have, too.
    let mut hearing = [beats("tc", ""), beats("ta", on)];
    let mut silent = [beats("ta", ""), beats("tb", "")];
    for client in &mut hearing {
        client.read_head();
        assert!(client.read_chunk().unwrap().bytes.starts_with(b": "));
    }
    gate.release(usize::MAX);
    for client in &mut silent {
        assert_eq!(client.read_response().body, events);
    }
}

#[test]
fn white_space_comes_only_in_front_of_what_is_json() {
    // Speech is audio: the client waits without heartbeats.
    let gate = Gate::closed();
    let audio = b"ID3\x03 an MP3 file";
    let upstream =
        Upstream::start([held(&gate, "audio/mpeg", audio), held(&gate, "audio/mpeg", audio)]);
    let gateway = gateway("heartbeat_json: true", upstream.addr());
    let mut speech = Client::connect(gateway.addr());
    speech.post_json("/v1/audio/speech", PLAIN);
    let mut chat = ask(&gateway, CHAT, "", PLAIN);
    chat.read_head();
    assert_eq!(chat.read_chunk().unwrap().bytes, b"\n");
    gate.release(usize::MAX);
    let response = speech.read_response();
    assert_eq!(
        (&*response.body, response.header("content-type").as_deref()),
        (&audio[..], Some("audio/mpeg"))
    );
    // What turns out to be no JSON after white space is quoted in an error.
    let text = answered_late(CHAT, "", PLAIN, "text/html", b"<html>busy</html>");
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["error"]["code"], "upstream_refused");
    assert!(value["error"]["message"].as_str().unwrap().contains("<html>busy</html>"), "{value}");
    let text = answered_late(CHAT, "", PLAIN, "application/json; charset=utf-8", b"{\"ok\":1}");
    assert_eq!(text.trim(), "{\"ok\":1}");
}

/// The data of the two events that end a stream of Responses with an error.
fn failure(text: &str) -> (Value, Value) {
    let events: Vec<&str> =
        text.split("\n\n").filter(|event| !event.is_empty() && !event.starts_with(':')).collect();
    let [.., error, failed] = events[..] else { panic!("two events: {text:?}") };
    let data = |event: &str, name: &str| {
        let data = event
            .strip_prefix(&format!("event: {name}\ndata: "))
            .unwrap_or_else(|| panic!("{name}: {event:?}"));
        serde_json::from_str(data).unwrap()
    };
    (data(error, "error"), data(failed, "response.failed"))
}

fn assert_failure(text: &str, code: &str, part: &str) {
    let (error, failed) = failure(text);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(part), "{message}");
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!(code)));
    assert_eq!(error["error"]["message"], message);
    assert_eq!(failed["type"], "response.failed");
    assert_eq!(failed["response"]["status"], "failed");
    assert_eq!(failed["response"]["error"], json!({"code": "invalid_prompt", "message": message}));
}

#[test]
fn an_error_behind_a_heartbeat_on_responses_has_the_shape_that_its_clients_understand() {
    let closed = ClosedPort::new();
    let providers = provider_yaml("p", closed.addr(), &["m"], UNSHAPED, "retry: {attempts: 2}");
    let gateway = Gateway::start_with("heartbeat_after_seconds: 0.1", &providers, &[]);
    let response = ask(&gateway, RESPONSES, "", STREAM).read_response();
    assert_eq!((response.status, response.ended), (200, Ended::Clean));
    assert_failure(&response.text(), "upstream_unreachable", "cannot be reached");
    // A provider's own error keeps its words.
    let own =
        r#"{"error":{"message":"no credit","type":"t","code":"insufficient_quota","param":null}}"#;
    let head = format!(
        "HTTP/1.1 402 Payment Required\r\nContent-Type: application/json\r\nContent-Length: {}",
        own.len()
    );
    let gate = Gate::closed();
    let answer = format!("{head}\r\n\r\n{own}").into_bytes();
    let upstream = Upstream::start([Reply::pieces(&[&answer], &gate, Ending::Complete)]);
    let gateway = self::gateway("", upstream.addr());
    let mut client = ask(&gateway, RESPONSES, "", STREAM);
    client.read_head();
    client.read_chunk().unwrap();
    gate.release(2);
    let mut text = Vec::new();
    while let Ok(chunk) = client.read_chunk() {
        text.extend(chunk.bytes);
    }
    assert_failure(&String::from_utf8(text).unwrap(), "insufficient_quota", "no credit");
}

#[test]
fn an_error_in_mid_stream_on_responses_has_the_shape_that_its_clients_understand() {
    let gate = Gate::closed();
    let created =
        b"event: response.created\ndata: {\"type\":\"response.created\",\"response\":{}}\n\n"
            .to_vec();
    let upstream = Upstream::start([Reply::Stream {
        chunks: vec![created],
        gate: gate.clone(),
        ending: Ending::Reset,
    }]);
    let gateway = gateway("", upstream.addr());
    let mut client = Client::connect(gateway.addr());
    client.post_json(RESPONSES, STREAM);
    gate.release(1);
    let response = client.read_response();
    assert_eq!(response.ended, Ended::Clean, "response.failed is a last event");
    assert_failure(
        &response.text(),
        "upstream_disconnected",
        "broke before the answer was complete",
    );
}
