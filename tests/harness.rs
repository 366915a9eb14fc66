//! The harness against itself: the raw client talks to the scripted provider directly.

mod support;

use std::time::Duration;

use support::{Client, Ended, Ending, Gate, Gone, PATIENCE, Reply, Upstream, post, sse};

#[test]
fn requests_are_recorded_as_they_came() {
    let upstream = Upstream::start([Reply::ok()]);
    let mut client = Client::connect(upstream.addr());
    client.post_json_with("/v1/x?y=z", "X-Twice: 1\r\nx-twice: 2\r\n", r#"{"a": 1}"#);
    assert_eq!(client.read_response().status, 200);
    let request = &upstream.wait_requests(1, PATIENCE)[0];
    assert_eq!((request.method.as_str(), request.target.as_str()), ("POST", "/v1/x?y=z"));
    assert_eq!(request.headers.all("X-TWICE"), ["1", "2"]);
    assert_eq!(request.text(), r#"{"a": 1}"#);
}

#[test]
fn the_script_goes_on_over_one_connection_and_its_last_reply_repeats() {
    let upstream = Upstream::start([Reply::Json(529, "{}".into()), Reply::ok()]);
    let mut client = Client::connect(upstream.addr());
    let statuses: Vec<u16> = (0..3)
        .map(|_| {
            client.post_json("/", "{}");
            client.read_response().status
        })
        .collect();
    assert_eq!(statuses, [529, 200, 200]);
    assert_eq!(upstream.connections(), 1);
}

#[test]
fn a_gate_holds_each_chunk_back() {
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::stream(sse::words(&["a"]), &gate)]);
    let mut client = Client::connect(upstream.addr());
    client.post_json("/", "{}");
    client.read_head();
    assert!(!client.is_closed(Duration::from_millis(20)), "the stream waits at the gate");
    gate.release(1);
    assert_eq!(client.read_chunk().map(|chunk| chunk.bytes), Ok(sse::event("a")));
    gate.release(1);
    assert_eq!(client.read_chunk().map(|chunk| chunk.bytes), Ok(sse::done()));
    assert_eq!(client.read_chunk().map(|chunk| chunk.bytes), Err(Ended::Clean));
}

#[test]
fn a_broken_answer_shows_as_aborted_and_a_whole_one_as_clean() {
    let stream = |ending| Reply::Stream {
        chunks: vec![b"data: 1\n\n".to_vec()],
        gate: Gate::open(),
        ending,
    };
    for (reply, ended) in [
        (stream(Ending::Complete), Ended::Clean),
        (stream(Ending::Close), Ended::Aborted),
        (stream(Ending::Reset), Ended::Aborted),
        (Reply::TruncateAt(80, "0123456789".repeat(10)), Ended::Aborted),
        (Reply::CloseDelimited(b"all".to_vec()), Ended::Clean),
    ] {
        let upstream = Upstream::start([reply.clone()]);
        assert_eq!(post(upstream.addr(), "/", "{}").ended, ended, "{reply:?}");
        assert_eq!(
            upstream.wait_closed(0, PATIENCE).0 == Gone::ByScript,
            !matches!(reply, Reply::Stream { ending: Ending::Complete, .. })
        );
    }
}

#[test]
fn an_early_answer_comes_before_the_body() {
    let upstream = Upstream::start([Reply::Early(Box::new(Reply::Json(413, "{}".into())))]);
    let mut client = Client::connect(upstream.addr());
    client.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n");
    assert_eq!(client.read_response().status, 413);
}

#[test]
fn hang_ups_are_seen_while_the_script_stalls() {
    let upstream = Upstream::start([Reply::Stall]);
    for (n, how) in [(0, Gone::Closed), (1, Gone::Reset)] {
        let mut client = Client::connect(upstream.addr());
        client.post_json("/", "{}");
        upstream.wait_requests(n + 1, PATIENCE);
        match how {
            Gone::Reset => client.reset(),
            _ => drop(client),
        }
        assert_eq!(upstream.wait_closed(n, PATIENCE).0, how);
    }
}

#[test]
fn an_answer_may_fail_to_come_in_every_way() {
    for reply in [Reply::Reset, Reply::CloseBeforeAnswer] {
        let upstream = Upstream::start([reply]);
        let mut client = Client::connect(upstream.addr());
        client.post_json("/", "{}");
        assert!(client.is_closed(PATIENCE));
        assert_eq!(upstream.wait_closed(0, PATIENCE).0, Gone::ByScript);
    }
}
