//! The wire towards the caller: what the malformed, the slow, the greedy and the vanished get, and that nobody else pays
//! for it.

mod support;

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use support::{
    Client, Ended, Ending, Gate, Gateway, PATIENCE, Reply, Response, UNSHAPED, Upstream, get, post,
    provider_yaml, spaced, sse,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

/// Longer than any test: a slot that is not open at the start does not come.
const NEVER_MS: u64 = 30_000;

fn gateway(upstream: &Upstream, server: &str) -> Gateway {
    Gateway::start_with(server, &provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""), &[])
}

/// A provider that sends each request's body back.
fn echo() -> Upstream {
    Upstream::answering(|request, _| Reply::Json(200, request.text()))
}

fn tagged(tag: impl std::fmt::Display) -> String {
    format!(r#"{{"model":"m","tag":"{tag}"}}"#)
}

/// A POST with a good request line and Host, these header lines, and whatever follows the head.
fn request(lines: &str, rest: &str) -> Vec<u8> {
    format!("POST {CHAT} HTTP/1.1\r\nHost: gateway\r\n{lines}\r\n{rest}").into_bytes()
}

fn whole(body: &str) -> Vec<u8> {
    request(&format!("Content-Length: {}\r\n", body.len()), body)
}

/// Reads a refusal that ends the connection and says so.
#[track_caller]
fn assert_last_word(client: &mut Client, status: u16, code: &str, what: &str) -> Response {
    let response = client.read_response();
    assert_eq!((response.status, response.code().as_str()), (status, code), "{what}: {response:?}");
    assert_eq!(response.header("connection").as_deref(), Some("close"), "{what}: {response:?}");
    assert_eq!(client.read_to_end(), b"", "{what}: nothing follows the last word");
    response
}

/// Most connections, where a test looks for one that was not given back.
const PLACES: usize = 16;
const FEW_PLACES: &str = "max_connections: 16\nmax_connections_per_client: 16";

/// Waits until every place is free, and shows it by taking all of them.
fn assert_all_places_are_free(gateway: &Gateway) -> Vec<Client> {
    let deadline = Instant::now() + PATIENCE;
    let mut taken = Vec::new();
    while taken.len() < PLACES {
        let mut client = Client::connect(gateway.addr());
        client.get("/v1/models");
        match client.read_response().status {
            200 => taken.push(client),
            status => assert!(
                Instant::now() < deadline,
                "{status} with {} of {PLACES} places taken",
                taken.len()
            ),
        }
    }
    taken
}

/// Name, bytes, status and `error.code`.
type Fault = (&'static str, Vec<u8>, u16, &'static str);

fn faults_of_the_request_line() -> Vec<Fault> {
    let line = |line: &str| format!("{line}\r\nHost: x\r\n\r\n").into_bytes();
    vec![
        ("no request line", line("nonsense"), 400, "malformed_request"),
        ("HTTP/0.9", b"GET /v1/models\r\n\r\n".to_vec(), 400, "malformed_request"),
        ("two spaces", line("GET  /v1/models HTTP/1.1"), 400, "malformed_request"),
        ("no path", line("GET v1/models HTTP/1.1"), 400, "malformed_request"),
        ("only empty lines", b"\r\n".repeat(20), 400, "malformed_request"),
        (
            "a TLS handshake",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
            400,
            "malformed_request",
        ),
        (
            "lines that end in LF",
            b"GET /v1/models HTTP/1.1\nHost: x\n\n".to_vec(),
            400,
            "malformed_request",
        ),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), 505, "unsupported_version"),
        ("HTTP/1.2", line("GET /v1/models HTTP/1.2"), 505, "unsupported_version"),
        ("an unknown method", line("BREW /v1/models HTTP/1.1"), 501, "unknown_method"),
        ("a method in lower case", line("get /v1/models HTTP/1.1"), 501, "unknown_method"),
        ("a tunnel", line("CONNECT x:443 HTTP/1.1"), 501, "unknown_method"),
        (
            "an endless request line",
            line(&format!("GET /{} HTTP/1.1", "a".repeat(1 << 20))),
            431,
            "head_too_large",
        ),
    ]
}

fn faults_of_the_headers() -> Vec<Fault> {
    let field = |line: &str| request(&format!("{line}\r\nContent-Length: 0\r\n"), "");
    let latin = b"GET /v1/models HTTP/1.1\r\nHost: caf\xe9\r\n\r\n".to_vec();
    vec![
        ("no Host", b"GET /v1/models HTTP/1.1\r\n\r\n".to_vec(), 400, "malformed_request"),
        ("two Hosts", field("Host: gateway"), 400, "malformed_request"),
        (
            "a Host with a path",
            b"GET /v1/models HTTP/1.1\r\nHost: a/admin?\r\n\r\n".to_vec(),
            400,
            "malformed_request",
        ),
        ("no colon", field("Nonsense"), 400, "malformed_request"),
        ("no name", field(": 1"), 400, "malformed_request"),
        ("a space before the colon", field("X-A : 1"), 400, "malformed_request"),
        ("a folded header", field("X-A: 1\r\n 2"), 400, "malformed_request"),
        ("a control character", field("X-A: \x07"), 400, "malformed_request"),
        ("a NUL", field("X-A: \0"), 400, "malformed_request"),
        ("a CR inside a value", field("X-A: 1\rX-B: 2"), 400, "malformed_request"),
        ("UTF-8 in a name", field("你: 1"), 400, "malformed_request"),
        ("Latin-1 in the Host", latin, 400, "malformed_request"),
        (
            "a head of 33 KiB",
            field(&format!("X-A: {}", "a".repeat(33 * 1024))),
            431,
            "head_too_large",
        ),
        ("129 headers", field(&["X-A: 1"; 127].join("\r\n")), 431, "too_many_headers"),
        ("another expectation", field("Expect: a-miracle"), 400, "malformed_request"),
    ]
}

fn faults_of_the_body() -> Vec<Fault> {
    let chunked = |rest: &str| request("Transfer-Encoding: chunked\r\n", rest);
    let coding = |value: &str| request(&format!("Transfer-Encoding: {value}\r\n"), "0\r\n\r\n");
    let length = |value: &str| request(&format!("Content-Length: {value}\r\n"), "{} ");
    vec![
        ("an unknown coding", coding("gzip, chunked"), 501, "unsupported_transfer_encoding"),
        ("identity", coding("identity"), 501, "unsupported_transfer_encoding"),
        (
            "chunked twice",
            coding("chunked\r\nTransfer-Encoding: chunked"),
            501,
            "unsupported_transfer_encoding",
        ),
        ("both lengths", coding("chunked\r\nContent-Length: 3"), 400, "malformed_request"),
        ("two lengths", length("3\r\nContent-Length: 3"), 400, "malformed_request"),
        ("two lengths in one", length("3, 3"), 400, "malformed_request"),
        ("a signed length", length("+3"), 400, "malformed_request"),
        ("a negative length", length("-3"), 400, "malformed_request"),
        ("a length past 64 bits", length("18446744073709551616"), 400, "malformed_request"),
        ("a length past the limit", length("18446744073709551615"), 413, "body_too_large"),
        ("a chunk size that is none", chunked("xyz\r\n"), 400, "malformed_request"),
        ("a signed chunk size", chunked("+2\r\n{}\r\n"), 400, "malformed_request"),
        ("a chunk size past 64 bits", chunked("fffffffffffffffff\r\n"), 400, "malformed_request"),
        ("a chunk beyond its size", chunked("2\r\n{}}\r\n"), 400, "malformed_request"),
        (
            "an endless chunk extension",
            chunked(&format!("2;{}", "x".repeat(8 * 1024))),
            400,
            "malformed_request",
        ),
        ("a trailer without a colon", chunked("0\r\nX-A\r\n\r\n"), 400, "malformed_request"),
        ("a space before its colon", chunked("0\r\nX-A : 1\r\n\r\n"), 400, "malformed_request"),
        ("a folded trailer", chunked("0\r\nX-A: 1\r\n 2\r\n\r\n"), 400, "malformed_request"),
        (
            "endless trailers",
            chunked(&format!("0\r\n{}", "x: y\r\n".repeat(4096))),
            400,
            "malformed_request",
        ),
    ]
}

#[test]
fn every_malformed_request_is_answered_and_ends_no_connection_but_its_own() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    let faults =
        [faults_of_the_request_line(), faults_of_the_headers(), faults_of_the_body()].concat();
    for (n, (what, bytes, status, code)) in faults.into_iter().enumerate() {
        let mut client = Client::connect(gateway.addr());
        client.send(&bytes);
        assert_last_word(&mut client, status, code, what);
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200, "the next caller after {what}");
        assert_eq!(upstream.requests().len(), n + 1, "{what} went on to the provider");
    }
}

#[test]
fn garbage_behind_a_good_request_leaves_that_requests_answer_whole() {
    let upstream = echo();
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    client.send([whole(BODY), b"garbage\r\n\r\n".to_vec()].concat());
    let response = client.read_response();
    assert_eq!((response.status, response.text().as_str()), (200, BODY));
    assert_last_word(&mut client, 400, "malformed_request", "garbage");
}

#[test]
fn a_body_shorter_than_promised_is_refused_where_the_caller_still_reads() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    for bytes in [
        request("Content-Length: 50\r\n", BODY),
        request("Transfer-Encoding: chunked\r\n", "50\r\n{}"),
    ] {
        let mut client = Client::connect(gateway.addr());
        client.send(bytes);
        client.half_close();
        assert_last_word(&mut client, 400, "malformed_request", "a short body");
    }
    assert!(upstream.requests().is_empty());
}

#[test]
fn a_head_as_large_as_agents_send_passes() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    let (long, many) = ("t".repeat(24 * 1024), "X-Many: 1\r\n".repeat(100));
    client.post_json_with(CHAT, &format!("X-Token: {long}\r\n{many}"), BODY);
    assert_eq!(client.read_response().status, 200);
    let request = upstream.wait_requests(1, PATIENCE).remove(0);
    assert!(request.header("x-token").is_some_and(|token| token == long));
    assert_eq!(request.headers.all("x-many").len(), 100);
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let upstream = echo();
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    for byte in [
        whole(BODY),
        request("Transfer-Encoding: chunked\r\n", "5;x\r\n{\"mod\r\n8\r\nel\":\"m\"}\r\n0\r\n\r\n"),
    ]
    .concat()
    {
        client.send([byte]);
    }
    assert_eq!(client.read_response().text(), BODY);
    assert_eq!(client.read_response().text(), r#"{"model":"m"}"#);
}

#[test]
fn http_1_0_is_answered_in_its_own_way() {
    let gate = Gate::open();
    let stream =
        |ending| Reply::Stream { chunks: vec![sse::event("a")], gate: gate.clone(), ending };
    let upstream = Upstream::start([
        Reply::ok(),
        Reply::ok(),
        stream(Ending::Complete),
        stream(Ending::Close),
    ]);
    let gateway = gateway(&upstream, "");
    let ask = |lines: &str| {
        let mut client = Client::connect(gateway.addr());
        let length = BODY.len();
        client
            .send(format!("POST {CHAT} HTTP/1.0\r\n{lines}Content-Length: {length}\r\n\r\n{BODY}"));
        let response = client.read_response();
        (client, response)
    };
    let (mut client, response) = ask("");
    assert_eq!((response.status, response.header("connection").as_deref()), (200, Some("close")));
    assert_eq!(client.read_to_end(), b"");

    let (mut client, response) = ask("Connection: keep-alive\r\n");
    assert_eq!(
        (response.status, response.header("connection").as_deref()),
        (200, Some("keep-alive"))
    );
    client.send("GET /v1/models HTTP/1.0\r\n\r\n");
    assert_eq!(client.read_response().status, 200);
    assert_eq!(client.read_to_end(), b"");

    let (_, response) = ask("Connection: keep-alive\r\n");
    assert_eq!(
        (response.header("transfer-encoding"), response.header("content-length")),
        (None, None)
    );
    assert_eq!((response.body, response.ended), (sse::event("a"), Ended::Clean));

    let (_, response) = ask("");
    assert!(
        response.status == 502 || response.ended == Ended::Aborted,
        "a broken stream ended cleanly: {response:?}"
    );
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let upstream = echo();
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    client.send([whole(&tagged("a")), whole(&tagged("b")), whole(&tagged("c"))].concat());
    for tag in ["a", "b", "c"] {
        assert_eq!(client.read_response().text(), tagged(tag));
    }
}

#[test]
fn far_more_pipelined_requests_than_are_read_ahead_are_answered_too() {
    let upstream = echo();
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    let filler = "x".repeat(1000);
    let tag = |n: usize| tagged(format_args!("{n}{filler}"));
    client.send((0..200).flat_map(|n| whole(&tag(n))).collect::<Vec<u8>>());
    for n in 0..200 {
        assert!(client.read_response().text() == tag(n), "answer {n}");
    }
}

#[test]
fn nothing_is_answered_behind_a_request_that_closes() {
    let upstream = echo();
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    let closing =
        request(&format!("Connection: close\r\nContent-Length: {}\r\n", BODY.len()), BODY);
    client.send([closing, whole(&tagged("never"))].concat());
    let response = client.read_response();
    assert_eq!(
        (response.text().as_str(), response.header("connection").as_deref()),
        (BODY, Some("close"))
    );
    assert_eq!(client.read_to_end(), b"");
    assert_eq!(upstream.requests().len(), 1);
}

#[test]
fn an_upload_of_ten_megabytes_waits_for_the_100() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    let body = format!(r#"{{"model":"m","x":"{}"}}"#, "x".repeat(10_000_000));
    let mut client = Client::connect(gateway.addr());
    client
        .send(request(&format!("Expect: 100-Continue\r\nContent-Length: {}\r\n", body.len()), ""));
    assert_eq!(client.read_head().start, "HTTP/1.1 100 Continue");
    client.send(&body);
    assert_eq!(client.read_response().status, 200);
    let request = upstream.wait_requests(1, PATIENCE).remove(0);
    assert!(request.text() == body, "{} of {} bytes", request.body.len(), body.len());
    assert_eq!(request.header("expect"), None);
}

#[test]
fn no_100_is_sent_where_nobody_waits_for_it_or_nothing_is_wanted() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_body_bytes: 1000");
    let lines = |length: usize| format!("Expect: 100-continue\r\nContent-Length: {length}\r\n");
    let mut client = Client::connect(gateway.addr());
    client.send(request(&lines(BODY.len()), BODY));
    assert_eq!(client.read_response().status, 200, "the body is here already");
    client.send(request(&lines(1001), ""));
    assert_last_word(&mut client, 413, "body_too_large", "an upload that is too large");
    let mut client = Client::connect(gateway.addr());
    client.send(format!("POST /nowhere HTTP/1.1\r\nHost: x\r\n{}\r\n", lines(10)));
    assert_last_word(&mut client, 404, "unknown_path", "an upload to nowhere");
}

#[test]
fn a_refusal_of_head_has_no_body_and_the_connection_goes_on() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    for (path, status) in
        [("/nowhere", 404), (CHAT, 405), ("/v1/models/unknown", 404), ("/v1/models", 200)]
    {
        client.send(format!("HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        let response = client.read_response();
        assert_eq!((response.status, response.body.len()), (status, 0), "{path}");
        assert!(
            response.header("content-length").is_some_and(|length| length != "0"),
            "{response:?}"
        );
    }
    client.get("/admin/health");
    assert_eq!(client.read_response().status, 200);
}

#[test]
fn one_connection_on_either_side_carries_five_thousand_requests() {
    let upstream = echo();
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    for n in 0..5000 {
        client.post_json(CHAT, tagged(n));
        assert_eq!(client.read_response().text(), tagged(n));
    }
    assert_eq!((upstream.requests().len(), upstream.connections()), (5000, 1));
}

#[test]
fn a_head_that_does_not_come_to_an_end_is_a_408() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "header_timeout_seconds: 0.2");
    let mut client = Client::connect(gateway.addr());
    let start = Instant::now();
    client.send("GET /v1/models HTTP/1.1\r\n");
    // A byte now and then gains no time.
    for byte in "X-Slow: loris".bytes() {
        client.send([byte]);
        thread::sleep(Duration::from_millis(20));
    }
    assert_last_word(&mut client, 408, "request_timeout", "a slow head");
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
    assert_eq!(get(gateway.addr(), "/v1/models").status, 200);
}

#[test]
fn a_connection_on_which_nothing_comes_is_closed() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "header_timeout_seconds: 0.2");
    let start = Instant::now();
    let mut client = Client::connect(gateway.addr());
    assert_eq!(client.read_to_end(), b"", "there is no request that could be answered");
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
}

#[test]
fn a_connection_that_idles_between_two_requests_is_closed() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "keep_alive_seconds: 0.2");
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, BODY);
    let start = Instant::now();
    assert_eq!(client.read_response().status, 200);
    assert_eq!(client.read_to_end(), b"");
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
}

#[test]
fn a_body_that_stops_coming_is_a_408() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "body_timeout_seconds: 0.2");
    for bytes in [
        request("Content-Length: 50\r\n", BODY),
        request("Transfer-Encoding: chunked\r\n", "50\r\n{}"),
    ] {
        let mut client = Client::connect(gateway.addr());
        let start = Instant::now();
        client.send(bytes);
        assert_last_word(&mut client, 408, "request_timeout", "a slow body");
        assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
    }
    assert!(upstream.requests().is_empty());
}

#[test]
fn a_body_may_take_long_as_long_as_it_comes() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "body_timeout_seconds: 1");
    let mut client = Client::connect(gateway.addr());
    let start = Instant::now();
    client.send(request(&format!("Content-Length: {}\r\n", BODY.len()), ""));
    for piece in BODY.as_bytes().chunks(4) {
        client.send(piece);
        thread::sleep(Duration::from_millis(150));
    }
    assert_eq!(client.read_response().status, 200);
    assert!(start.elapsed() > Duration::from_secs(1), "the test is too fast to tell");
}

#[test]
fn a_caller_who_does_not_read_is_let_go_and_holds_nobody_up() {
    let huge = Reply::with_headers("", vec![b'x'; 64 << 20]);
    let upstream = Upstream::start([huge, Reply::ok()]);
    let gateway = gateway(&upstream, "write_timeout_seconds: 0.3");
    let mut deaf = Client::connect(gateway.addr());
    let start = Instant::now();
    deaf.post_json(CHAT, BODY);
    upstream.wait_requests(1, PATIENCE);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let (_, at) = upstream.wait_closed(0, PATIENCE);
    assert!(at - start >= Duration::from_millis(300), "{:?}", at - start);
    gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
    assert_eq!(deaf.read_response().ended, Ended::Aborted);
}

#[test]
fn hundreds_past_the_limit_are_told_so_too() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, FEW_PLACES);
    let mut inside: Vec<Client> = (0..PLACES).map(|_| Client::connect(gateway.addr())).collect();
    inside.iter_mut().for_each(|client| client.post_json(CHAT, BODY));
    upstream.wait_requests(PLACES, PATIENCE);
    let outside: Vec<Client> = (0..200).map(|_| Client::connect(gateway.addr())).collect();
    for mut client in outside {
        assert_eq!(client.read_response().status, 503);
    }
    drop(inside);
    assert_all_places_are_free(&gateway);
}

#[test]
fn requests_past_max_queue_are_told_so_and_room_is_used_again() {
    let upstream = Upstream::start([Reply::Stall]);
    let provider = provider_yaml("p", upstream.addr(), &["m"], &spaced(NEVER_MS), "max_queue: 1");
    let gateway = Gateway::start(&provider);
    let ask = || {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        client
    };
    let _sent = ask();
    upstream.wait_requests(1, PATIENCE);
    let queued = ask();
    gateway.wait_queued(1);
    let refused = ask().read_response();
    assert_eq!((refused.status, refused.code().as_str()), (503, "queue_full"));
    let retry_after: u64 =
        refused.header("retry-after").expect("says when to come back").parse().expect("seconds");
    assert!((1..=30).contains(&retry_after), "{retry_after}");
    let stats = gateway.wait_queued(1);
    assert_eq!((&stats["rejected_full"], &stats["rejected_wait"]), (&1.into(), &0.into()));
    drop(queued);
    gateway.wait_queued(0);
    let _queued = ask();
    gateway.wait_queued(1);
}

/// Leaves; what is left of the caller's side.
type Leave = fn(Client) -> Option<Client>;

/// How a caller leaves.
const MANNERS: [(&str, Leave); 3] = [
    ("hangs up", |client| {
        drop(client);
        None
    }),
    ("resets", |client| {
        client.reset();
        None
    }),
    ("half-closes", |client| {
        client.half_close();
        Some(client)
    }),
];

#[test]
fn a_caller_who_leaves_while_the_provider_thinks_frees_everything() {
    for (manner, leave) in MANNERS {
        let upstream = Upstream::start([Reply::Stall]);
        let gateway = gateway(&upstream, FEW_PLACES);
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        upstream.wait_requests(1, PATIENCE);
        assert_everything_is_free(&gateway, &upstream, leave(client), manner);
    }
}

#[test]
fn a_caller_who_leaves_in_mid_stream_frees_everything() {
    for (manner, leave) in MANNERS {
        let gate = Gate::closed();
        let upstream = Upstream::start([Reply::stream(sse::words(&["a", "b"]), &gate)]);
        let gateway = gateway(&upstream, FEW_PLACES);
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        gate.release(1);
        client.read_head();
        assert_eq!(client.read_chunk().map(|chunk| chunk.bytes), Ok(sse::event("a")));
        assert_everything_is_free(&gateway, &upstream, leave(client), manner);
    }
}

/// The provider's side of the only connection is closed, nothing is in flight, and every place is there for others.
#[track_caller]
fn assert_everything_is_free(
    gateway: &Gateway,
    upstream: &Upstream,
    rest: Option<Client>,
    manner: &str,
) {
    upstream.wait_closed(0, PATIENCE);
    let stats =
        gateway.wait_stats(|stats| stats["in_flight"] == 0 && stats["queued_ahead"] == 0, PATIENCE);
    assert_eq!(stats["idle_connections"], 0, "a caller who {manner}");
    if let Some(mut client) = rest {
        client.read_to_end();
    }
    assert_all_places_are_free(gateway);
}

#[test]
fn a_caller_who_leaves_the_queue_frees_everything() {
    for (manner, leave) in MANNERS {
        let upstream = Upstream::start([Reply::ok()]);
        let provider = provider_yaml("p", upstream.addr(), &["m"], &spaced(NEVER_MS), "");
        let gateway = Gateway::start_with(FEW_PLACES, &provider, &[]);
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        gateway.wait_queued(1);
        let rest = leave(client);
        let stats = gateway.wait_queued(0);
        assert_eq!(
            (&stats["cancelled_in_queue"], &stats["sent"]),
            (&1.into(), &1.into()),
            "a caller who {manner}"
        );
        drop(rest);
        assert_all_places_are_free(&gateway);
    }
}

#[test]
fn a_caller_who_leaves_in_the_middle_of_a_head_or_body_frees_its_place() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, FEW_PLACES);
    for (_, leave) in MANNERS {
        for bytes in [&b"POST /v1/cha"[..], &request("Content-Length: 50\r\n", BODY)] {
            let mut client = Client::connect(gateway.addr());
            client.send(bytes);
            drop(leave(client));
            assert_all_places_are_free(&gateway);
        }
    }
    assert!(upstream.requests().is_empty());
}

#[test]
fn a_storm_of_garbage_and_hang_ups_leaves_nothing_behind() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, FEW_PLACES);
    for round in 0..200 {
        let mut stream = TcpStream::connect(gateway.addr()).expect("the gateway accepts");
        let bytes: Vec<u8> = (0..300).map(|n| ((n * 7 + round * 13) % 256) as u8).collect();
        // Fails where the gateway has refused the first bytes and closed already.
        let _ = std::io::Write::write_all(&mut stream, &bytes);
    }
    let mut client = assert_all_places_are_free(&gateway).remove(0);
    client.post_json(CHAT, BODY);
    assert_eq!(client.read_response().status, 200);
    assert_eq!(upstream.requests().len(), 1);
}

#[test]
fn a_100_is_no_beginning_of_the_answer() {
    let upstream = Upstream::start([Reply::Raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n".to_vec(),
    )]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    client
        .send(request(&format!("Expect: 100-continue\r\nContent-Length: {}\r\n", BODY.len()), ""));
    assert_eq!(client.read_head().start, "HTTP/1.1 100 Continue");
    client.send(BODY);
    let response = client.read_response();
    assert_eq!(
        (response.status, response.code().as_str()),
        (502, "upstream_disconnected"),
        "{response:?}"
    );
}

#[test]
fn an_empty_line_behind_a_request_is_no_late_request() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "header_timeout_seconds: 0.1");
    let mut client = Client::connect(gateway.addr());
    for _ in 0..2 {
        client.post_json(CHAT, BODY);
        client.send("\r\n");
        assert_eq!(client.read_response().status, 200);
        assert!(!client.is_closed(Duration::from_millis(300)), "it waits for the next request");
    }
}
