//! What passes between caller and provider, what stops at the gateway, and that it passes as it comes.

mod support;

use std::time::{Duration, Instant};

use support::{
    Client, Ended, Gate, Gateway, Gone, PATIENCE, Recorded, Reply, Response, UNSHAPED, Upstream,
    get, post, provider_yaml, spaced, sse,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

fn gateway(upstream: &Upstream, extras: &str) -> Gateway {
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, extras))
}

/// One request with further header lines; what the provider got, and the answer.
fn exchange(extras: &str, headers: &str, reply: Reply) -> (Recorded, Response) {
    let upstream = Upstream::start([reply]);
    let gateway = gateway(&upstream, extras);
    let mut client = Client::connect(gateway.addr());
    client.post_json_with(CHAT, headers, BODY);
    let response = client.read_response();
    (upstream.wait_requests(1, PATIENCE).remove(0), response)
}

fn answer(reply: Reply) -> Response {
    exchange("", "", reply).1
}

#[test]
fn hop_by_hop_request_headers_stop_here_and_the_others_pass() {
    let sent = "Connection: close, X-Named ,x-also\r\nX-Named: 1\r\nX-Also: 1\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\n\
                Upgrade: h2c\r\nProxy-Authorization: Basic x\r\nProxy-Connection: close\r\nTrailer: X-T\r\n\
                X-Kept: yes\r\nx-kept: twice\r\nAccept-Encoding: gzip\r\nUser-Agent: OpenAI/Python\r\nX-Bytes: \tspaced out \r\n";
    let (request, _) = exchange("", sent, Reply::ok());
    let gone = [
        "x-named",
        "x-also",
        "keep-alive",
        "te",
        "upgrade",
        "proxy-authorization",
        "proxy-connection",
        "trailer",
        "transfer-encoding",
    ];
    for name in gone {
        assert!(request.headers.all(name).is_empty(), "{name} in {:?}", request.headers);
    }
    assert_eq!(request.headers.all("x-kept"), ["yes", "twice"]);
    for (name, value) in [
        ("accept-encoding", "gzip"),
        ("user-agent", "OpenAI/Python"),
        ("content-type", "application/json"),
        ("x-bytes", "spaced out"),
        ("content-length", &BODY.len().to_string()),
    ] {
        assert_eq!(request.header(name).as_deref(), Some(value), "{name}");
    }
    assert_ne!(request.header("connection").as_deref(), Some("close, X-Named ,x-also"));
}

#[test]
fn whatever_identifies_the_caller_stops_here() {
    let sent = "Authorization: Bearer of-the-caller\r\nX-Api-Key: of-the-caller\r\nApi-Key: of-the-caller\r\n\
                x-goog-api-key: of-the-caller\r\nCookie: of-the-caller\r\nx_api_key: of-the-caller\r\n\
                X_Forwarded_For: of-the-caller\r\nX-Limitrate_Priority: of-the-caller\r\n";
    for extras in ["", "api_key: sk-own"] {
        let (request, _) = exchange(extras, sent, Reply::ok());
        assert!(
            !format!("{:?}", request.headers).contains("of-the-caller"),
            "{:?}",
            request.headers
        );
    }
}

#[test]
fn the_providers_own_key_is_sent_and_without_one_no_authorization() {
    let sent = "Authorization: Bearer of-the-caller\r\n";
    let (with_key, _) = exchange("api_key: sk-own", sent, Reply::ok());
    assert_eq!(with_key.header("authorization").as_deref(), Some("Bearer sk-own"));
    let (without, _) = exchange("", sent, Reply::ok());
    assert_eq!(without.header("authorization"), None);
}

#[test]
fn configured_headers_are_sent_in_place_of_the_callers() {
    let extras = "headers: {x-api-key: sk-extra, X-Org: acme}";
    let (request, _) =
        exchange(extras, "x-org: other\r\nX-API-Key: of-the-caller\r\n", Reply::ok());
    assert_eq!(request.headers.all("x-org"), ["acme"]);
    assert_eq!(request.headers.all("x-api-key"), ["sk-extra"]);
}

#[test]
fn hop_by_hop_response_headers_stop_here_and_the_others_pass() {
    let lines = "Connection: keep-alive, X-Gone\r\nX-Gone: 1\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: x\r\nUpgrade: h2c\r\n\
                 Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nServer: scripted\r\nDate: Tue, 03 Nov 2026 00:00:00 GMT\r\nX-Empty:\r\n";
    let response = answer(Reply::with_headers(lines, "{}"));
    for name in ["x-gone", "keep-alive", "proxy-authenticate", "upgrade", "transfer-encoding"] {
        assert!(response.headers.all(name).is_empty(), "{name} in {response:?}");
    }
    assert_eq!(response.headers.all("set-cookie"), ["a=1", "b=2"]);
    assert_eq!(response.headers.all("date"), ["Tue, 03 Nov 2026 00:00:00 GMT"]);
    assert_eq!(response.headers.all("server"), ["scripted"]);
    assert_eq!(response.headers.all("x-empty"), [""]);
}

#[test]
fn names_that_imitate_framing_or_credentials_pass_in_neither_direction() {
    let sent = "Transfer_Encoding: chunked\r\ncontent_length: 5\r\nx_api_key: k\r\n\
                X_Forwarded_For: 1.2.3.4\r\nuser_id: kept\r\n";
    let lines =
        "Transfer_Encoding: chunked\r\nContent_Length: 5\r\nKeep_Alive: 1\r\nuser_id: kept\r\n";
    let (request, response) = exchange("", sent, Reply::with_headers(lines, "{}"));
    for name in ["transfer_encoding", "content_length", "x_api_key", "x_forwarded_for"] {
        assert!(request.headers.all(name).is_empty(), "{name} in {:?}", request.headers);
    }
    for name in ["transfer_encoding", "content_length", "keep_alive"] {
        assert!(response.headers.all(name).is_empty(), "{name} in {response:?}");
    }
    assert_eq!(request.headers.all("user_id"), ["kept"]);
    assert_eq!(response.headers.all("user_id"), ["kept"]);
}

#[test]
fn what_would_steer_a_proxy_or_a_browser_in_front_stops_here() {
    let lines = "X-Accel-Redirect: /etc/passwd\r\nx-accel-buffering: yes\r\nX_Accel_Expires: 1\r\n\
                 X-Sendfile: /etc/passwd\r\nX-LIGHTTPD-send-file: /etc/passwd\r\nX-Reproxy-URL: http://x/\r\n\
                 X-LiteSpeed-Location: /x\r\nx-envoy-immediate-health-check-fail: 1\r\nAlt-Svc: h3=\":443\"\r\n\
                 Strict-Transport-Security: max-age=9\r\nClear-Site-Data: \"*\"\r\nSurrogate-Control: x\r\n\
                 x-limitrate-provider: another\r\nX-Limitrate-Queued-Ms: 99999\r\nX-Own: kept\r\n";
    let plain = answer(Reply::with_headers(lines, "{}"));
    let mut expected = ["Connection", "Content-Length", "X-Own", "x-limitrate-provider"].to_vec();
    expected.extend(["x-limitrate-queued-ms", "x-request-id"]);
    let mut names: Vec<_> = plain.headers.0.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, expected);
    assert_eq!(plain.headers.all("x-limitrate-provider"), ["p"]);

    let stream =
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Accel-Buffering: yes\r\n\
                   Content-Length: 14\r\n\r\ndata: [DONE]\n\n";
    let stream = answer(Reply::Raw(stream.to_vec()));
    assert_eq!(stream.headers.all("x-accel-buffering"), ["no"], "the gateway's own");
}

#[test]
fn header_values_of_the_provider_pass_as_bytes() {
    let mut bytes =
        b"HTTP/1.1 200 OK\r\nX-Latin: caf\xe9\r\nContent-Length: 2\r\nX-Utf: \xe4\xbd\xa0\r\n\r\n{}".to_vec();
    bytes.extend_from_slice(b"");
    let response = answer(Reply::Raw(bytes));
    let value = |name: &str| {
        response.headers.0.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).unwrap().1.clone()
    };
    assert_eq!((value("x-latin"), value("x-utf")), (b"caf\xe9".to_vec(), "你".into()));
}

#[test]
fn any_status_passes_with_its_body() {
    for status in
        [201, 299, 302, 400, 401, 403, 404, 409, 418, 422, 451, 499, 500, 503, 520, 529, 599]
    {
        let body = format!(r#"{{"status":{status}}}"#);
        let response = answer(Reply::Json(status, body.clone()));
        assert_eq!((response.status, response.text()), (status, body));
        assert_eq!(response.header("x-limitrate-provider").as_deref(), Some("p"));
    }
}

#[test]
fn an_answer_without_a_body_has_none() {
    for status in [204, 304] {
        let upstream = Upstream::start([
            Reply::Raw(format!("HTTP/1.1 {status} X\r\nX-A: 1\r\n\r\n").into()),
            Reply::ok(),
        ]);
        let gateway = gateway(&upstream, "");
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        assert_eq!(client.read_response().status, status);
        client.post_json(CHAT, BODY);
        assert_eq!(client.read_response().status, 200, "the connection is where it should be");
    }
}

#[test]
fn every_answer_has_one_request_id_and_the_providers_comes_first() {
    let theirs = answer(Reply::with_headers("X-Request-ID: req-7\r\n", "{}"));
    assert_eq!(theirs.headers.all("x-request-id"), ["req-7"]);
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    let mut seen = Vec::new();
    for response in [
        post(gateway.addr(), CHAT, BODY),
        post(gateway.addr(), CHAT, BODY),
        post(gateway.addr(), CHAT, "{"),
        post(gateway.addr(), "/nowhere", "{}"),
        get(gateway.addr(), "/v1/models"),
        get(gateway.addr(), "/admin/health"),
    ] {
        seen.push(response.header("x-request-id").unwrap_or_else(|| panic!("no id: {response:?}")));
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 6, "no id twice: {seen:?}");
}

#[test]
fn the_time_in_the_queue_is_told() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], &spaced(200), ""));
    let mut callers: [Client; 2] = std::array::from_fn(|_| {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        client
    });
    let mut queued = callers.each_mut().map(|caller| {
        let response = caller.read_response();
        response.header("x-limitrate-queued-ms").unwrap().parse::<u64>().unwrap()
    });
    queued.sort_unstable();
    assert!(queued[1] >= queued[0] + 100 && queued[1] < 5000, "{queued:?}");
}

#[test]
fn compressed_bodies_pass_untouched() {
    let bytes: Vec<u8> = (0..=255).cycle().take(5000).collect();
    let response = answer(Reply::with_headers("Content-Encoding: gzip\r\n", &bytes));
    assert_eq!(response.header("content-encoding").as_deref(), Some("gzip"));
    assert_eq!(response.header("content-length").as_deref(), Some("5000"));
    assert!(response.body == bytes);
}

#[test]
fn large_bodies_pass_whole_both_ways() {
    let filler = "0123456789abcdef".repeat(100_000);
    let body = format!(r#"{{"model":"m","x":"{filler}"}}"#);
    let upstream = Upstream::answering(|request, _| Reply::Json(200, request.text()));
    let gateway = gateway(&upstream, "");
    let response = post(gateway.addr(), CHAT, &body);
    assert!(upstream.wait_requests(1, PATIENCE)[0].text() == body);
    assert!(response.text() == body && response.ended == Ended::Clean);
}

#[test]
fn a_chunked_request_arrives_whole() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"mod\r\n");
    client.send("6;x=y\r\nel\":\"m\r\n2\r\n\"}\r\n0\r\nX-Trailer: 1\r\n\r\n");
    assert_eq!(client.read_response().status, 200);
    assert_eq!(upstream.wait_requests(1, PATIENCE)[0].text(), r#"{"model":"m"}"#);
}

#[test]
fn a_chunk_is_with_the_caller_before_the_provider_sends_the_next() {
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::stream(sse::words(&["a", "b"]), &gate)]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, r#"{"model":"m","stream":true}"#);
    for want in sse::words(&["a", "b"]) {
        gate.release(1);
        if want == sse::event("a") {
            let head = client.read_head();
            assert_eq!(head.headers.get("content-type").as_deref(), Some("text/event-stream"));
        }
        let mut got = Vec::new();
        while got.len() < want.len() {
            got.extend(client.read_chunk().expect("the stream goes on").bytes);
        }
        assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(&want));
    }
    assert_eq!(client.read_chunk().unwrap_err(), Ended::Clean);
}

#[test]
fn a_streams_head_is_with_the_caller_before_its_first_chunk() {
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::stream(sse::words(&["a"]), &gate)]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, r#"{"model":"m","stream":true}"#);
    assert_eq!(client.read_head().word(1), "200");
    gate.release(2);
}

#[test]
fn pieces_of_a_plain_body_pass_as_they_come_too() {
    let head = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf";
    let upstream = Upstream::start([Reply::Raw(head.to_vec())]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, BODY);
    client.read_head();
    assert_eq!(client.read_chunk().unwrap().bytes, b"half");
}

#[test]
fn a_body_that_ends_with_the_connection_is_relayed_whole() {
    // Head, body and FIN come together as often as not: many rounds.
    for size in [0, 1, 100, 100_000].repeat(10) {
        let body = vec![b'x'; size];
        let response = answer(Reply::CloseDelimited(body.clone()));
        assert_eq!(response.status, 200);
        assert!(response.body == body, "{} of {size} bytes", response.body.len());
        assert_eq!(response.ended, Ended::Clean);
    }
}

#[test]
fn a_whole_answer_counts_although_the_provider_closes_right_behind_it() {
    let bytes = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nwhole";
    let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n0\r\n\r\n";
    for _ in 0..20 {
        for bytes in [&bytes[..], &chunked[..]] {
            let response = answer(Reply::RawThenClose(bytes.to_vec()));
            assert_eq!(
                (response.status, response.text().as_str(), response.ended),
                (200, "whole", Ended::Clean)
            );
        }
    }
}

#[test]
fn a_cut_off_answer_never_ends_cleanly() {
    let long = "0123456789".repeat(100);
    let response = answer(Reply::TruncateAt(500, long));
    assert!(response.status == 502 || response.ended == Ended::Aborted, "{response:?}");
    let gate = Gate::open();
    for ending in [support::Ending::Close, support::Ending::Reset] {
        let response =
            answer(Reply::Stream { chunks: vec![sse::event("a")], gate: gate.clone(), ending });
        assert!(response.status == 502 || response.ended == Ended::Aborted, "{response:?}");
    }
}

#[test]
fn a_caller_who_hangs_up_stops_the_provider() {
    let gate = Gate::closed();
    let upstream = Upstream::start([
        Reply::Stall,
        Reply::StallAfterHead,
        Reply::stream(sse::words(&["a"]), &gate),
    ]);
    let gateway = gateway(&upstream, "");
    for n in 0..3 {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        upstream.wait_requests(n + 1, PATIENCE);
        if n > 0 {
            client.read_head();
        }
        drop(client);
        let (how, _) = upstream.wait_closed(n, PATIENCE);
        assert_ne!(how, Gone::ByScript);
    }
}

#[test]
fn connections_are_kept_on_both_sides() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    for _ in 0..20 {
        client.post_json(CHAT, BODY);
        assert_eq!(client.read_response().status, 200);
    }
    assert_eq!((upstream.requests().len(), upstream.connections()), (20, 1));
}

/// Nagle's algorithm against a delayed ACK holds small writes up for 40 ms each, but for the first few of a connection.
#[track_caller]
fn assert_no_stall(mut each: Vec<Duration>) {
    each.sort_unstable();
    assert!(each[each.len() / 2] < Duration::from_millis(30), "{each:?}");
}

#[test]
fn no_chunk_waits_for_the_callers_delayed_acknowledgement() {
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::stream(sse::words(&["a"]), &gate)]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    // Only where both sides talk in turn does Linux delay acknowledgements: one stream after the other.
    let one = |_| {
        let start = Instant::now();
        client.post_json(CHAT, BODY);
        client.read_head();
        for _ in sse::words(&["a"]) {
            gate.release(1);
            client.read_chunk().expect("the stream goes on");
        }
        assert_eq!(client.read_chunk().map(|chunk| chunk.bytes), Err(Ended::Clean));
        start.elapsed()
    };
    assert_no_stall((0..60).map(one).collect());
}

#[test]
fn no_request_waits_for_the_providers_delayed_acknowledgement() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    let body = format!(r#"{{"model":"m","x":"{}"}}"#, "x".repeat(20_000));
    let one = |_| {
        let start = Instant::now();
        client.post_json(CHAT, &body);
        assert_eq!(client.read_response().status, 200);
        start.elapsed()
    };
    assert_no_stall((0..60).map(one).collect());
}

#[test]
fn head_answers_like_get_without_the_body() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    let mut client = Client::connect(gateway.addr());
    for path in ["/v1/models", "/v1/models/m", "/admin/health"] {
        client.send(format!("HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        let head = client.read_response();
        assert_eq!((head.status, head.body.len()), (200, 0));
        client.get(path);
        let whole = client.read_response();
        assert_eq!(head.header("content-length"), whole.header("content-length"), "{path}");
        assert_eq!(head.header("content-type"), whole.header("content-type"), "{path}");
    }
}
