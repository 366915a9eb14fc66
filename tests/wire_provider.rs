//! The wire towards the provider: what is understood of its answers and what is refused, how broken ones end, and when
//! a connection is used again.

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{
    Client, Ended, Ending, Gate, Gateway, Gone, PATIENCE, Process, Reply, Response, UNSHAPED,
    Upstream, get, post, provider_at, provider_yaml, spaced, sse,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

fn gateway(upstream: &Upstream, extras: &str) -> Gateway {
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, extras))
}

fn gateway_to(addr: SocketAddr, extras: &str) -> Gateway {
    Gateway::start(&provider_yaml("p", addr, &["m"], UNSHAPED, extras))
}

#[track_caller]
fn assert_ok(client: &mut Client, body: &str, what: &str) -> Response {
    let response = client.read_response();
    assert_eq!((response.status, response.ended), (200, Ended::Clean), "{what}: {response:?}");
    assert_eq!(response.text(), body, "{what}");
    response
}

/// An answer whose connection could carry another request.
fn kept(head_and_body: &str) -> Reply {
    Reply::Raw(head_and_body.into())
}

/// An answer that ends with the connection.
fn closed(head_and_body: &str) -> Reply {
    Reply::RawThenClose(head_and_body.into())
}

#[test]
fn every_framing_of_an_answer_is_understood() {
    let hello = |head: &str| format!("{head}\r\nContent-Length: 5\r\n\r\nhello");
    let chunked =
        |body: &str| kept(&format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{body}"));
    let interim = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n";
    let answers = [
        ("a length", kept(&hello("HTTP/1.1 200 OK"))),
        ("a length said twice", kept(&hello("HTTP/1.1 200 OK\r\nContent-Length: 5"))),
        ("no reason", kept(&hello("HTTP/1.1 200"))),
        ("lines that end in LF", kept(&hello("HTTP/1.1 200 OK").replace("\r\n", "\n"))),
        ("a space before the colon", kept(&hello("HTTP/1.1 200 OK\r\nX-A : 1"))),
        (
            "a head of 60 KiB",
            kept(&hello(&format!("HTTP/1.1 200 OK\r\nX-A: {}", "a".repeat(60 * 1024)))),
        ),
        ("interim answers first", kept(&format!("{interim}{}", hello("HTTP/1.1 200 OK")))),
        ("chunks", chunked("2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")),
        ("chunk extensions", chunked("5;x=\"y\";z\r\nhello\r\n0;last\r\n\r\n")),
        ("padded sizes", chunked("0005  \r\nhello\r\n000\r\n\r\n")),
        ("trailers", chunked("5\r\nhello\r\n0\r\nX-Trailer: 1\r\nX-Other: 2\r\n\r\n")),
        ("no framing", closed("HTTP/1.1 200 OK\r\n\r\nhello")),
        ("HTTP/1.0", closed(&hello("HTTP/1.0 200 OK"))),
        ("HTTP/1.0 without framing", closed("HTTP/1.0 200 OK\r\n\r\nhello")),
        (
            "HTTP/1.0 that keeps the connection",
            kept(&hello("HTTP/1.0 200 OK\r\nConnection: keep-alive")),
        ),
    ];
    for (what, reply) in answers {
        let reused = matches!(reply, Reply::Raw(_));
        let upstream = Upstream::start([reply, Reply::ok()]);
        let gateway = gateway(&upstream, "");
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        let response = assert_ok(&mut client, "hello", what);
        assert_eq!(response.header("x-trailer"), None, "{what}");
        client.post_json(CHAT, BODY);
        assert_eq!(client.read_response().status, 200, "the next answer after {what}");
        assert_eq!(upstream.connections(), if reused { 1 } else { 2 }, "connections after {what}");
    }
}

#[test]
fn an_answer_that_has_no_body_by_its_status_has_none_whatever_its_head_says() {
    for head in
        ["HTTP/1.1 204 X\r\n", "HTTP/1.1 304 X\r\nContent-Length: 5\r\n", "HTTP/1.1 304 X\r\n"]
    {
        let upstream = Upstream::start([kept(&format!("{head}\r\n")), Reply::ok()]);
        let gateway = gateway(&upstream, "");
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        assert!(matches!(client.read_response().status, 204 | 304));
        client.post_json(CHAT, BODY);
        assert_eq!(client.read_response().status, 200, "after {head:?}");
        assert_eq!(upstream.connections(), 1);
    }
}

#[test]
fn an_answer_that_breaks_http_is_a_502_and_its_connection_is_closed() {
    let field = |line: &str| format!("HTTP/1.1 200 OK\r\n{line}\r\n\r\n");
    let faults = [
        ("both lengths", field("Content-Length: 5\r\nTransfer-Encoding: chunked")),
        ("two lengths", field("Content-Length: 5\r\nContent-Length: 6")),
        ("two lengths in one", field("Content-Length: 5, 6")),
        ("a negative length", field("Content-Length: -5")),
        ("a signed length", field("Content-Length: +5")),
        ("an empty length", field("Content-Length:")),
        ("an unknown coding", field("Transfer-Encoding: gzip, chunked")),
        ("chunked twice", field("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked")),
        ("chunks in HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".into()),
        ("a folded header", field("X-A: 1\r\n 2\r\nContent-Length: 0")),
        ("no colon", field("Nonsense")),
        ("a NUL", field("X-A: \0")),
        ("129 headers", field(&["X-A: 1"; 129].join("\r\n"))),
        ("a head of 65 KiB", field(&format!("X-A: {}", "a".repeat(65 * 1024)))),
        ("an upgrade", field("Upgrade: x").replace("200 OK", "101 Switching Protocols")),
        ("endless interim answers", "HTTP/1.1 100 Continue\r\n\r\n".repeat(100)),
        ("no status", "HTTP/1.1 OK\r\n\r\n".into()),
        ("a status of two digits", "HTTP/1.1 99 X\r\n\r\n".into()),
        ("a status of four digits", "HTTP/1.1 2000 X\r\n\r\n".into()),
        ("another protocol", "ICY 200 OK\r\n\r\n".into()),
        ("HTTP/2", "HTTP/2 200\r\n\r\n".into()),
        ("no head", "<html>hello</html>\r\n\r\n".into()),
    ];
    for (what, bytes) in faults {
        let upstream = Upstream::start([kept(&bytes), Reply::ok()]);
        let gateway = gateway(&upstream, "");
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        let refused = client.read_response();
        assert_eq!(
            (refused.status, refused.code().as_str()),
            (502, "upstream_invalid_response"),
            "{what}"
        );
        assert_ne!(upstream.wait_closed(0, PATIENCE).0, Gone::ByScript, "{what}");
        client.post_json(CHAT, BODY);
        assert_eq!(client.read_response().status, 200, "the next answer after {what}");
        assert_eq!(upstream.requests().len(), 2, "sent once: {what}");
    }
}

/// An answer that breaks off: its framing, its first bytes, and how it goes on once those are with the caller.
struct Broken {
    what: String,
    framing: &'static str,
    first: Vec<u8>,
    then: &'static [u8],
    ending: Ending,
}

/// Every way for an answer to break off behind `data`.
fn broken_answers(data: &[u8]) -> Vec<Broken> {
    let chunk = [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat();
    let framings = [
        ("under a length", "Content-Length: 100000\r\n", data.to_vec()),
        ("between two chunks", "Transfer-Encoding: chunked\r\n", chunk.clone()),
        ("inside a chunk", "Transfer-Encoding: chunked\r\n", [b"fff\r\n", data].concat()),
        ("without framing", "", data.to_vec()),
    ];
    let mut all = Vec::new();
    for (name, framing, first) in framings {
        for ending in [Ending::Close, Ending::Reset, Ending::Stall] {
            if framing.is_empty() && ending == Ending::Close {
                continue; // that is its proper end
            }
            all.push(Broken {
                what: format!("{ending:?} {name}"),
                framing,
                first: first.clone(),
                then: b"",
                ending,
            });
        }
    }
    let framing = "Transfer-Encoding: chunked\r\n";
    for (what, then) in [
        ("nonsense for a chunk", &b"nonsense\r\n"[..]),
        ("a trailer without a colon", b"0\r\nX-A\r\n\r\n"),
        ("a space before a trailer's colon", b"0\r\nX-A : 1\r\n\r\n"),
        ("a folded trailer", b"0\r\nX-A: 1\r\n 2\r\n\r\n"),
    ] {
        let (what, first, ending) = (what.to_owned(), chunk.clone(), Ending::Stall);
        all.push(Broken { what, framing, first, then, ending });
    }
    all
}

/// Lets the caller have `data` of an answer of this type and then breaks it off.
fn break_off(broken: &Broken, media_type: &str, data: &[u8], http: &str) -> Response {
    let gate = Gate::closed();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\n{}\r\n", broken.framing);
    let first = [head.as_bytes(), &broken.first].concat();
    let upstream = Upstream::start([Reply::pieces(&[&first, broken.then], &gate, broken.ending)]);
    let gateway = gateway(&upstream, "idle_timeout_seconds: 0.3");
    let mut client = Client::connect(gateway.addr());
    client.send(format!(
        "POST {CHAT} HTTP/{http}\r\nHost: x\r\nContent-Length: {}\r\n\r\n{BODY}",
        BODY.len()
    ));
    gate.release(1);
    let head = client.read_head();
    let mut chunks = Vec::new();
    while chunks.iter().map(Vec::len).sum::<usize>() < data.len() {
        chunks.push(client.read_chunk().expect("the first bytes come").bytes);
    }
    gate.release(2);
    let ended = loop {
        match client.read_chunk() {
            Ok(chunk) => chunks.push(chunk.bytes),
            Err(ended) => break ended,
        }
    };
    upstream.wait_closed(0, PATIENCE);
    gateway.wait_stats(|stats| stats["upstream_errors"] == 1 && stats["in_flight"] == 0, PATIENCE);
    assert_eq!(gateway.stats()["providers"][0]["succeeded"], 0, "{}", broken.what);
    Response {
        status: 200,
        headers: head.headers,
        body: chunks.concat(),
        chunks: Vec::new(),
        ended,
    }
}

#[test]
fn a_stream_that_breaks_off_ends_in_an_error_event_and_is_aborted() {
    let data = sse::event("one");
    for http in ["1.1", "1.0"] {
        for broken in broken_answers(&data) {
            let what = format!("{} in HTTP/{http}", broken.what);
            let response = break_off(&broken, "text/event-stream; charset=utf-8", &data, http);
            assert_eq!(response.ended, Ended::Aborted, "{what}: {response:?}");
            let rest = response
                .body
                .strip_prefix(&data[..])
                .unwrap_or_else(|| panic!("{what}: {response:?}"));
            let event = std::str::from_utf8(rest).expect("an event is text");
            let event = event
                .trim_start_matches('\n')
                .strip_prefix("data: ")
                .and_then(|e| e.strip_suffix("\n\n"));
            let event = event.unwrap_or_else(|| panic!("{what}: no whole event in {response:?}"));
            let error = serde_json::from_str::<serde_json::Value>(event).expect("an event of JSON")
                ["error"]
                .take();
            assert_eq!(error["code"], "upstream_disconnected", "{what}");
            let message = error["message"].as_str().expect("a message");
            assert!(
                message.contains(&format!("after {} body bytes", data.len())),
                "{what}: {message}"
            );
        }
    }
}

#[test]
fn a_plain_answer_that_breaks_off_is_aborted_behind_what_came() {
    let data = br#"{"half":"#;
    for http in ["1.1", "1.0"] {
        for broken in broken_answers(data) {
            let response = break_off(&broken, "application/json", data, http);
            assert_eq!(
                response.ended,
                Ended::Aborted,
                "{} in HTTP/{http}: {response:?}",
                broken.what
            );
            assert_eq!(response.body, data, "{} in HTTP/{http}", broken.what);
        }
    }
}

#[test]
fn an_error_event_never_completes_a_stream_of_a_known_length() {
    // The event would fill up what is missing, and the caller would take the stream for whole.
    let data = sse::event("one");
    let gate = Gate::closed();
    let length = data.len() + 60;
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: {length}\r\n\r\n"
    );
    let upstream = Upstream::start([Reply::pieces(
        &[&[head.as_bytes(), &data].concat()],
        &gate,
        Ending::Close,
    )]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, BODY);
    gate.release(1);
    client.read_head();
    assert_eq!(client.read_chunk().map(|chunk| chunk.bytes), Ok(data));
    gate.release(1);
    let ended = loop {
        if let Err(ended) = client.read_chunk() {
            break ended;
        }
    };
    assert_eq!(ended, Ended::Aborted);
}

#[test]
fn what_breaks_off_before_the_first_byte_is_a_502_or_504() {
    let partial =
        |ending| Reply::pieces(&[b"HTTP/1.1 200 OK\r\nContent-Le"], &Gate::open(), ending);
    for (reply, status, code) in [
        (Reply::CloseBeforeAnswer, 502, "upstream_disconnected"),
        (Reply::Reset, 502, "upstream_disconnected"),
        (partial(Ending::Close), 502, "upstream_disconnected"),
        (partial(Ending::Reset), 502, "upstream_disconnected"),
        (Reply::Stall, 504, "upstream_timeout"),
        (partial(Ending::Stall), 504, "upstream_timeout"),
    ] {
        let upstream = Upstream::start([reply.clone()]);
        let gateway = gateway(&upstream, "request_timeout_seconds: 0.3");
        let mut client = Client::connect(gateway.addr());
        let start = Instant::now();
        client.post_json(CHAT, BODY);
        let refused = client.read_response();
        assert_eq!((refused.status, refused.code().as_str()), (status, code), "{reply:?}");
        if status == 504 {
            assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
        }
        upstream.wait_closed(0, PATIENCE);
        let stats = gateway.wait_stats(|stats| stats["in_flight"] == 0, PATIENCE);
        assert_eq!(stats["upstream_errors"], 1, "{reply:?}");
        client.get("/v1/models");
        assert_eq!(
            client.read_response().status,
            200,
            "the caller's connection lives on after {reply:?}"
        );
    }
}

#[test]
fn a_slow_stream_outlives_the_idle_timeout_as_long_as_it_flows() {
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::stream(sse::words(&["a"; 8]), &gate)]);
    let gateway = gateway(&upstream, "idle_timeout_seconds: 1");
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, BODY);
    let start = Instant::now();
    for _ in 0..9 {
        thread::sleep(Duration::from_millis(150));
        gate.release(1);
    }
    assert_eq!(client.read_response().ended, Ended::Clean);
    assert!(start.elapsed() > Duration::from_secs(1), "the test is too fast to tell");
}

#[test]
fn a_connection_closed_between_two_requests_is_not_used() {
    let upstream = Upstream::start([closed("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    for n in 0..20 {
        client.post_json(CHAT, BODY);
        assert_ok(&mut client, "{}", "a fresh connection");
        upstream.wait_closed(n, PATIENCE);
        assert_eq!(upstream.requests().len(), n + 1);
    }
    assert_eq!(upstream.connections(), 20);
}

/// What comes while it is stopped comes at once when it goes on: the end of the connection, and what there is to use it for, a
/// new caller or an open slot.
#[test]
fn a_connection_closed_while_the_gateway_was_stopped_costs_no_slot() {
    const SLOT: Duration = Duration::from_millis(400);
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
    for in_line in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let limit = if in_line { spaced(SLOT.as_millis() as u64) } else { UNSHAPED.to_owned() };
        let provider = provider_yaml("p", listener.local_addr().unwrap(), &["m"], &limit, "");
        let process = Process::serve(&Process::config("", &provider));
        let mut client = Client::connect(process.addr());
        client.post_json(CHAT, BODY);
        let mut first = listener.accept().unwrap().0;
        read_request(&mut first);
        let slot = Instant::now() + SLOT;
        first.write_all(answer).unwrap();
        assert_ok(&mut client, "{}", "the first answer");

        let ask = || {
            let mut newcomer = Client::connect(process.addr());
            newcomer.post_json(CHAT, BODY);
            newcomer
        };
        let before = in_line.then(ask);
        if in_line {
            process.wait_queued(1);
        }
        process.stop();
        drop(first);
        let mut newcomer = before.unwrap_or_else(ask);
        thread::sleep(slot.saturating_duration_since(Instant::now()));
        process.signal(Signal::CONT);

        let mut second = listener.accept().unwrap().0;
        read_request(&mut second);
        second.write_all(answer).unwrap();
        assert_ok(&mut newcomer, "{}", "the second answer");
        let stats = get(process.addr(), "/admin/stats").json();
        assert_eq!(stats["providers"][0]["sent"], 2, "in line: {in_line}");
    }
}

#[test]
fn a_reused_connection_that_dies_before_the_answer_gives_way_to_a_fresh_one_in_a_new_slot() {
    for death in [Reply::CloseBeforeAnswer, Reply::Reset] {
        let upstream = Upstream::start([Reply::ok(), death, Reply::ok()]);
        let twice = "retry: {attempts: 2}";
        let provider = provider_yaml("p", upstream.addr(), &["m"], &spaced(200), twice);
        let gateway = Gateway::start(&provider);
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
        let start = Instant::now();
        assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
        let requests = upstream.requests();
        assert_eq!(
            requests.iter().map(|request| request.connection).collect::<Vec<_>>(),
            [0, 0, 1]
        );
        // The second left no sooner than `start`, and the third takes a slot of its own.
        assert!(
            requests[2].arrived - start >= Duration::from_millis(200),
            "{:?}",
            requests[2].arrived - start
        );
        assert_eq!(gateway.stats()["providers"][0]["sent"], 3);
    }
}

#[test]
fn a_fresh_connection_that_dies_before_the_answer_is_not_tried_again() {
    let upstream = Upstream::start([Reply::CloseBeforeAnswer, Reply::ok()]);
    let gateway = gateway(&upstream, "retry: {attempts: 3}");
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 502);
    assert_eq!(upstream.requests().len(), 1, "the provider may have done the work");
}

#[test]
fn a_connection_with_bytes_behind_the_answer_is_not_used_again() {
    let poison = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\n\r\n",
    ] {
        let upstream = Upstream::start([kept(&format!("{answer}{poison}")), Reply::ok()]);
        let gateway = gateway(&upstream, "");
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        client.read_response();
        client.post_json(CHAT, BODY);
        assert!(!client.read_response().text().contains("poison"), "behind {answer:?}");
        assert_eq!(upstream.connections(), 2, "behind {answer:?}");
    }
}

#[test]
fn a_connection_on_which_something_comes_while_it_idles_is_not_used_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let gateway = gateway_to(listener.local_addr().unwrap(), "");
    let mut client = Client::connect(gateway.addr());
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
    client.post_json(CHAT, BODY);
    let mut first = listener.accept().unwrap().0;
    read_request(&mut first);
    first.write_all(answer).unwrap();
    assert_ok(&mut client, "{}", "the first answer");
    first.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison").unwrap();

    client.post_json(CHAT, BODY);
    let mut second = listener.accept().unwrap().0;
    read_request(&mut second);
    second.write_all(answer).unwrap();
    assert_ok(&mut client, "{}", "the second answer");
}

#[test]
fn a_connection_that_is_to_be_closed_is_not_used_again() {
    let upstream = Upstream::start([
        kept("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"),
        kept("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
        Reply::ok(),
    ]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    for n in 0..2 {
        client.post_json(CHAT, BODY);
        assert_ok(&mut client, "{}", "an answer");
        assert_eq!(upstream.wait_closed(n, PATIENCE).0, Gone::Closed);
    }
    client.post_json(CHAT, BODY);
    assert_eq!(client.read_response().status, 200);
    assert_eq!(upstream.connections(), 3);
}

#[test]
fn the_pool_is_bounded() {
    // Nobody is answered before all four have asked, so that it takes four connections.
    let together = Barrier::new(4);
    let upstream = Upstream::answering(move |_, nth| {
        if nth < 4 {
            together.wait();
        }
        Reply::ok()
    });
    let gateway = gateway(&upstream, "pool_max_idle: 2");
    let mut callers: [Client; 4] = std::array::from_fn(|_| {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        client
    });
    for caller in &mut callers {
        assert_eq!(caller.read_response().status, 200);
    }
    assert_eq!(upstream.connections(), 4);
    upstream.wait_open(2, PATIENCE);
    gateway.wait_stats(|stats| stats["idle_connections"] == 2, PATIENCE);
    for caller in &mut callers {
        caller.post_json(CHAT, BODY);
        assert_eq!(caller.read_response().status, 200);
    }
    assert_eq!(upstream.connections(), 4, "those two are used");
}

#[test]
fn an_idle_connection_is_closed_in_time() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "pool_idle_seconds: 0.3");
    let start = Instant::now();
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let (how, at) = upstream.wait_closed(0, PATIENCE);
    assert_eq!(how, Gone::Closed);
    assert!(at - start >= Duration::from_millis(300), "{:?}", at - start);
    gateway.wait_stats(|stats| stats["idle_connections"] == 0, PATIENCE);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
}

/// More than the buffers of both sockets take together.
fn long_upload() -> String {
    format!(r#"{{"model":"m","x":"{}"}}"#, "x".repeat(30_000_000))
}

#[test]
fn an_answer_before_the_end_of_the_upload_is_relayed() {
    let early = br#"{"error":{"message":"too large","type":"x","param":null,"code":null}}"#;
    for (status, then) in [(413, "reads no further"), (401, "closes"), (413, "ends its side")] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let gateway = gateway_to(listener.local_addr().unwrap(), "");
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, long_upload());
        let mut provider = listener.accept().unwrap().0;
        read_head(&mut provider);
        let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n", early.len());
        provider.write_all(&[head.as_bytes(), early].concat()).unwrap();
        let provider = match then {
            "closes" => None,
            "ends its side" => {
                provider.shutdown(Shutdown::Write).unwrap();
                Some(provider)
            }
            _ => Some(provider),
        };
        let response = client.read_response();
        assert_eq!(
            (response.status, response.body.as_slice()),
            (status, &early[..]),
            "a provider that {then}"
        );
        // Half a request is on that connection: it can carry no other.
        gateway.wait_stats(
            |stats| stats["in_flight"] == 0 && stats["idle_connections"] == 0,
            PATIENCE,
        );
        if let Some(mut provider) = provider {
            provider.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut sink = vec![0; 1 << 20];
            let uploaded = std::iter::from_fn(|| provider.read(&mut sink).ok().filter(|n| *n > 0))
                .sum::<usize>();
            assert!(
                uploaded < 30_000_000,
                "the upload went on behind the answer of a provider that {then}"
            );
        }
    }
}

#[test]
fn an_early_answer_comes_although_the_provider_reads_on() {
    let upstream =
        Upstream::start([Reply::Early(Box::new(Reply::Json(413, "{}".into()))), Reply::ok()]);
    let gateway = gateway(&upstream, "");
    assert_eq!(post(gateway.addr(), CHAT, long_upload()).status, 413);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
}

#[test]
fn an_address_that_does_not_answer_is_given_up_in_time() {
    // With its backlog full, the kernel drops every further SYN to this port.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let fill = || TcpStream::connect_timeout(&addr, Duration::from_millis(200)).ok();
    let _filled: Vec<TcpStream> = std::iter::from_fn(fill).collect();

    let gateway = gateway_to(addr, "connect_timeout_seconds: 0.3");
    let start = Instant::now();
    let refused = post(gateway.addr(), CHAT, BODY);
    assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
    assert_eq!((refused.status, refused.code().as_str()), (502, "upstream_unreachable"));
    let message = refused.error()["message"].as_str().unwrap().to_owned();
    assert!(message.contains("within 0.3 s"), "{message}");
    assert_eq!(gateway.stats()["providers"][0]["sent"], 0, "no slot was spent");
}

#[test]
fn a_name_with_several_addresses_is_reached_at_the_one_that_answers() {
    // `localhost` is ::1 and 127.0.0.1 on most machines, and the provider listens on the latter alone.
    let upstream = Upstream::start([Reply::ok()]);
    let base_url = format!("http://localhost:{}/v1", upstream.addr().port());
    let gateway = Gateway::start(&provider_at("p", &base_url, &["m"], UNSHAPED, ""));
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let host = format!("localhost:{}", upstream.addr().port());
    assert_eq!(upstream.requests()[0].header("host"), Some(host));
}

#[test]
fn both_ends_speak_ipv6_where_the_addresses_are_of_it() {
    let listener = match TcpListener::bind("[::1]:0") {
        Ok(listener) => listener,
        Err(error) => return eprintln!("not tested, ::1 can't be bound here: {error}"),
    };
    let addr = listener.local_addr().unwrap();
    let provider = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let head = read_head(&mut stream);
        stream.read_exact(&mut [0; BODY.len()]).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").unwrap();
        String::from_utf8(head).unwrap().to_ascii_lowercase()
    });
    let providers = provider_yaml("p", addr, &["m"], UNSHAPED, "");
    let text = format!("server: {{host: \"::1\", port: 0}}\nproviders:\n{providers}");
    let gateway = Process::serve(&Process::file("config.yaml", &text));
    assert!(gateway.addr().is_ipv6(), "{}", gateway.addr());
    let answer = post(gateway.addr(), CHAT, BODY);
    assert_eq!((answer.status, answer.text().as_str()), (200, "hello"), "{answer:?}");
    let head = provider.join().unwrap();
    assert!(head.contains(&format!("\r\nhost: {addr}\r\n")), "{head}");
}

fn read_head(stream: &mut TcpStream) -> Vec<u8> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).expect("a request head comes");
        head.extend(byte);
    }
    head
}

/// A head and [`BODY`].
fn read_request(stream: &mut TcpStream) {
    read_head(stream);
    stream.read_exact(&mut [0; BODY.len()]).expect("a request body comes");
}
