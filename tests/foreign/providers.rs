//! How real providers break.

use std::net::{SocketAddr, TcpListener};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{
    Client, Ending, Gate, Gateway, PATIENCE, Reply, Response, SilentPort, UNSHAPED, Upstream, post,
    post_with, provider_at, provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

/// Retries at once where the provider names no time, and twice at most.
const RETRIES: &str = "retry: {attempts: 2}";

/// Refusals whose body does not come to an end, by what is wrong with it.
fn endless_refusals(status: &str, fields: &str) -> [(&'static str, Reply); 3] {
    let head =
        |framing: &str| format!("HTTP/1.1 {status}\r\n{fields}{framing}\r\n\r\n{{\"error\":");
    let pieces =
        |pieces: Vec<Vec<u8>>| Reply::Pieces { pieces, gate: Gate::open(), ending: Ending::Stall };
    let endless = format!("{}\r\n", "x".repeat(4096));
    let chunks = vec![format!("1002\r\n{endless}\r\n").into_bytes(); 64];
    [
        ("stalls", Reply::Raw(head("Content-Length: 1000").into())),
        ("breaks off", Reply::RawThenClose(head("Content-Length: 1000").into())),
        (
            "never ends",
            pieces(
                [
                    vec![
                        format!("HTTP/1.1 {status}\r\n{fields}Transfer-Encoding: chunked\r\n\r\n")
                            .into(),
                    ],
                    chunks,
                ]
                .concat(),
            ),
        ),
    ]
}

#[test]
fn a_refusal_whose_body_does_not_end_is_retried_by_its_status_and_headers() {
    for (status, fields, pause) in [
        ("429 Too Many Requests", "Retry-After: 1\r\n", true),
        ("503 Service Unavailable", "Retry-After: 1\r\n", true),
        ("500 Internal Server Error", "", false),
        ("502 Bad Gateway", "", false),
    ] {
        for (what, refusal) in endless_refusals(status, fields) {
            let upstream = Upstream::start([refusal, Reply::ok()]);
            let gateway =
                Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, RETRIES));
            let response = post(gateway.addr(), CHAT, BODY);
            assert_eq!(response.status, 200, "{status} {what}: {response:?}");
            let sent = upstream.requests();
            assert_eq!(sent.len(), 2, "{status} {what}");
            let gap = sent[1].arrived - sent[0].arrived;
            assert!(!pause || gap >= Duration::from_secs(1), "{status} {what}: {gap:?}");
            let stats = gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
            assert_eq!(stats["cooldowns"], u32::from(pause), "{status} {what}");
        }
    }
}

#[test]
fn a_refusal_whose_body_does_not_end_goes_to_the_client_in_time_where_nothing_is_retried() {
    for (what, refusal) in endless_refusals("429 Too Many Requests", "Retry-After: 7\r\n") {
        let upstream = Upstream::start([refusal]);
        let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""));
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        let head = client.read_head();
        assert_eq!(head.word(1), "429", "{what}");
        assert!(head.headers.get("retry-after").is_some(), "{what}");
    }
}

#[test]
fn a_refusal_whose_body_does_not_end_falls_back() {
    for (what, refusal) in endless_refusals("500 Internal Server Error", "") {
        let (broken, other) = (Upstream::start([refusal]), Upstream::start([Reply::ok()]));
        let gateway = fallback(&provider("a", broken.addr(), ""), &provider("b", other.addr(), ""));
        let response = post(gateway.addr(), CHAT, BODY);
        assert_eq!(response.status, 200, "{what}: {response:?}");
        assert_eq!(answered_by(&response), "b", "{what}");
    }
}

fn provider(name: &str, addr: SocketAddr, extras: &str) -> String {
    provider_yaml(name, addr, &["m"], UNSHAPED, extras)
}

fn fallback(a: &str, b: &str) -> Gateway {
    Gateway::start_with("fallback: true", &[a, b].concat(), &[])
}

fn answered_by(response: &Response) -> String {
    response.header("x-limitrate-provider").unwrap_or_default()
}

/// A provider that TCP connections reach and that never says a word of TLS.
fn mute_tls() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").expect("bind a loopback port")
}

/// Providers `a` to which no connection can be made before `max_wait_seconds` is over.
fn hanging(max_wait: &str) -> [(&'static str, String, Box<dyn std::any::Any>); 2] {
    let limit = format!("{{mode: burst, rpm: 600000, capacity: 1000{max_wait}}}");
    let (silent, mute) = (SilentPort::new(), mute_tls());
    let no_tcp = provider_at("a", &format!("http://{}/v1", silent.addr()), &["m"], &limit, "");
    let https = format!("https://{}/v1", mute.local_addr().unwrap());
    let no_tls = provider_at("a", &https, &["m"], &limit, "");
    [("no TCP", no_tcp, Box::new(silent)), ("no TLS", no_tls, Box::new(mute))]
}

#[test]
fn a_provider_that_cannot_be_connected_to_gives_way_to_another_in_time() {
    for setting in ["fallback: true", "routing: earliest"] {
        for (what, a, _held) in hanging(", max_wait_seconds: 6") {
            let other = Upstream::answering(|_, _| Reply::ok());
            let limit = "{mode: burst, rpm: 600000, capacity: 1000, max_wait_seconds: 6}";
            let b = provider_yaml("b", other.addr(), &["m"], limit, "");
            let gateway = Gateway::start_with(setting, &[a, b].concat(), &[]);
            let first = post(gateway.addr(), CHAT, BODY);
            assert_eq!(
                (first.status, &*answered_by(&first)),
                (200, "b"),
                "{setting}, {what}: {first:?}"
            );
            // The second request goes there at once: half of its time would be 3 s.
            let asked = Instant::now();
            let second = post(gateway.addr(), CHAT, BODY);
            assert_eq!(
                (second.status, &*answered_by(&second)),
                (200, "b"),
                "{setting}, {what}: {second:?}"
            );
            assert!(
                asked.elapsed() < Duration::from_millis(2500),
                "{setting}, {what}: {:?}",
                asked.elapsed()
            );
        }
    }
}

#[test]
fn queued_requests_leave_a_provider_that_turns_out_to_be_down() {
    let (silent, other) = (SilentPort::new(), Upstream::answering(|_, _| Reply::ok()));
    // Only the first three of these are near their slot while the first one connects.
    let slow = "{mode: spaced, interval_seconds: 1, max_wait_seconds: 8}";
    let a = provider_yaml("a", silent.addr(), &["m"], slow, "");
    let gateway = fallback(&a, &provider("b", other.addr(), ""));
    let mut clients: Vec<Client> = (0..8)
        .map(|_| {
            let mut client = Client::connect(gateway.addr());
            client.post_json(CHAT, BODY);
            client
        })
        .collect();
    for client in &mut clients {
        let response = client.read_response();
        assert_eq!((response.status, &*answered_by(&response)), (200, "b"), "{response:?}");
    }
}

#[test]
fn a_connection_that_cannot_be_made_in_time_is_named_as_the_cause() {
    const CAUSE: &str = "No connection to the provider `a` stands yet";
    for (what, a, _held) in hanging(", max_wait_seconds: 0.7") {
        let gateway = Gateway::start(&a);
        let response = post(gateway.addr(), CHAT, BODY);
        assert_eq!(&*response.code(), "queue_wait_exceeded", "{what}: {response:?}");
        assert!(response.text().contains(CAUSE), "{what}: {response:?}");
    }
    for (what, a, _held) in hanging("") {
        let gateway = Gateway::start(&a);
        let response = post_with(gateway.addr(), CHAT, "X-Limitrate-Deadline-Ms: 700\r\n", BODY);
        assert_eq!(&*response.code(), "deadline_exceeded", "{what}: {response:?}");
        assert!(response.text().contains(CAUSE), "{what}: {response:?}");
    }
}

#[test]
fn a_pause_that_takes_too_long_is_named_as_the_cause() {
    let upstream = Upstream::start([Reply::TooMany(vec![("Retry-After", "30".into())])]);
    let limit = "{mode: burst, rpm: 600000, capacity: 1000, max_wait_seconds: 1}";
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], limit, ""));
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 429);
    let response = post(gateway.addr(), CHAT, BODY);
    assert_eq!(response.code(), "queue_wait_exceeded");
    assert!(response.text().contains("The provider `p` has asked for a pause: "), "{response:?}");
}

#[test]
fn a_post_is_not_sent_again_after_the_provider_has_worked_on_it() {
    let gate = Gate::closed();
    let upstream = Upstream::start([
        Reply::ok(),
        Reply::Pieces { pieces: vec![Vec::new()], gate: gate.clone(), ending: Ending::Close },
        Reply::ok(),
    ]);
    let extras = "retry: {attempts: 5}";
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, extras));
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, BODY);
    upstream.wait_requests(2, PATIENCE);
    // The provider works for a while, on a connection that was used before, and closes it without a byte.
    thread::sleep(Duration::from_millis(1300));
    gate.release(1);
    assert_eq!(client.read_response().code(), "upstream_disconnected");
    assert_eq!(upstream.requests().len(), 2);
    assert_eq!(upstream.requests()[1].connection, 0, "the connection was used before");
}

#[test]
fn one_attempt_means_one_send_on_a_stale_connection_too() {
    for (attempts, status, sends) in [(1, 502, 2), (2, 200, 3)] {
        let upstream = Upstream::start([Reply::ok(), Reply::CloseBeforeAnswer, Reply::ok()]);
        let extras = format!("retry: {{attempts: {attempts}}}");
        let gateway =
            Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, &extras));
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, status, "{attempts} attempts");
        assert_eq!(upstream.requests().len(), sends, "{attempts} attempts");
    }
}

/// Sends `rounds` times as many requests at once as there are clients.
fn bursts(gateway: SocketAddr, at_once: usize, rounds: usize) {
    let barrier = Barrier::new(at_once);
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                let mut client = Client::connect(gateway);
                for _ in 0..rounds {
                    barrier.wait();
                    client.post_json(CHAT, BODY);
                    assert_eq!(client.read_response().status, 200);
                }
            });
        }
    });
}

#[test]
fn bursts_use_as_many_connections_as_there_are_requests_at_once() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = Gateway::start(&provider("p", upstream.addr(), ""));
    bursts(gateway.addr(), 64, 8);
    assert_eq!(upstream.requests().len(), 512);
    assert!(upstream.connections() <= 64, "{} connections", upstream.connections());
}

#[test]
fn a_steady_load_uses_as_many_connections_as_there_are_requests_at_once() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = Gateway::start(&provider("p", upstream.addr(), ""));
    let addr = gateway.addr();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = Client::connect(addr);
                for _ in 0..50 {
                    client.post_json(CHAT, BODY);
                    assert_eq!(client.read_response().status, 200);
                }
            });
        }
    });
    assert!(upstream.connections() <= 4, "{} connections", upstream.connections());
    let sequential = Upstream::answering(|_, _| Reply::ok());
    let gateway = Gateway::start(&provider_yaml("p", sequential.addr(), &["m"], &spaced(20), ""));
    let mut client = Client::connect(gateway.addr());
    for _ in 0..20 {
        client.post_json(CHAT, BODY);
        assert_eq!(client.read_response().status, 200);
    }
    assert_eq!(sequential.connections(), 1);
}

/// A provider with one request in flight at most, which holds the first for as long as the gate is closed.
fn held(gate: &Gate, ending: Ending) -> (Upstream, Gateway) {
    let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
    let upstream = Upstream::start([
        Reply::Pieces { pieces: vec![whole.to_vec()], gate: gate.clone(), ending },
        Reply::ok(),
    ]);
    let limit = "{mode: burst, rpm: 600000, capacity: 1000, max_concurrent: 1}";
    let extras = "pool_idle_seconds: 1";
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], limit, extras));
    (upstream, gateway)
}

#[test]
fn a_request_that_waits_uses_the_warmest_connection() {
    let gate = Gate::closed();
    let (upstream, gateway) = held(&gate, Ending::Complete);
    let [mut first, mut second] = [(); 2].map(|()| Client::connect(gateway.addr()));
    first.post_json(CHAT, BODY);
    upstream.wait_requests(1, PATIENCE);
    second.post_json(CHAT, BODY);
    // The second request holds a connection of its own while it waits.
    upstream.wait_connections(2, PATIENCE);
    // The gateway has answered others since: it knows that the connection stands.
    (0..3).for_each(|_| drop(gateway.stats()));
    gate.release(1);
    assert_eq!((first.read_response().status, second.read_response().status), (200, 200));
    assert_eq!(upstream.requests()[1].connection, 0, "the one that was just given back");
}

#[test]
fn a_connection_that_rests_for_too_long_before_its_slot_is_replaced() {
    let gate = Gate::closed();
    let (upstream, gateway) = held(&gate, Ending::Close);
    let [mut first, mut second] = [(); 2].map(|()| Client::connect(gateway.addr()));
    first.post_json(CHAT, BODY);
    upstream.wait_requests(1, PATIENCE);
    second.post_json(CHAT, BODY);
    // Two connections have grown old while the second request waited.
    upstream.wait_connections(4, PATIENCE);
    gate.release(1);
    assert_eq!((first.read_response().status, second.read_response().status), (200, 200));
    assert!(upstream.requests()[1].connection >= 3, "{}", upstream.requests()[1].connection);
}
