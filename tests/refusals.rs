//! What the gateway answers where it can't or won't proxy: each an OpenAI error object with its status.

mod support;

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::Instant;

use support::{
    Client, ClosedPort, Gateway, PATIENCE, Reply, Response, UNSHAPED, Upstream, get, post,
    provider_at, provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

fn gateway(upstream: &Upstream, server: &str, extras: &str) -> Gateway {
    Gateway::start_with(server, &provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, extras), &[])
}

/// The answer to a request whose provider is at `base_url`.
fn answer_of(base_url: &str, extras: &str) -> Response {
    let gateway = Gateway::start(&provider_at("the-provider", base_url, &["m"], UNSHAPED, extras));
    post(gateway.addr(), CHAT, BODY)
}

#[track_caller]
fn assert_refused(response: &Response, status: u16, code: &str, message_parts: &[&str]) {
    assert_eq!((response.status, response.code().as_str()), (status, code), "{response:?}");
    let message = response.error()["message"].as_str().expect("checked by error()").to_lowercase();
    for part in message_parts {
        assert!(message.contains(&part.to_lowercase()), "no {part:?} in {message:?}");
    }
}

#[test]
fn a_body_that_is_no_json_object_with_a_model_is_refused_and_the_connection_goes_on() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "", "");
    let mut client = Client::connect(gateway.addr());
    for body in [
        "",
        "{",
        "nonsense",
        "[]",
        "null",
        r#""m""#,
        "{}",
        r#"{"model":null}"#,
        r#"{"model":7}"#,
        r#"{"model":["m"]}"#,
        r#"{"model":"m"} x"#,
        r#"{"model":"m",}"#,
        r#"{"a":{"model":"m"}}"#,
    ] {
        client.post_json(CHAT, body);
        let response = client.read_response();
        assert_eq!(response.status, 400, "{body}: {response:?}");
        assert_eq!(response.error()["type"], "invalid_request_error");
    }
    client.post_json(CHAT, BODY);
    assert_eq!(client.read_response().status, 200);
    assert_eq!(upstream.requests().len(), 1);
}

#[test]
fn an_unknown_path_is_a_404() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "", "");
    for path in [
        "/",
        "/v1",
        "/v2/chat/completions",
        "/admin/nope",
        "/admin/stats/more",
        "/v1chat",
        "/favicon.ico",
    ] {
        for response in [get(gateway.addr(), path), post(gateway.addr(), path, BODY)] {
            assert_eq!(response.status, 404, "{path}: {response:?}");
            assert_eq!(response.error()["type"], "invalid_request_error");
        }
    }
    assert!(upstream.requests().is_empty());
}

#[test]
fn a_wrong_method_is_a_405_that_names_the_right_ones() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "", "");
    for (method, path, allowed) in [
        ("GET", CHAT, "POST"),
        ("PUT", CHAT, "POST"),
        ("DELETE", "/v1/anything", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/m", "GET"),
        ("POST", "/admin/stats", "GET"),
        ("PATCH", "/admin/health", "GET"),
    ] {
        let mut client = Client::connect(gateway.addr());
        client.send(format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"));
        let response = client.read_response();
        assert_eq!(response.status, 405, "{method} {path}");
        let allow = response.header("allow").unwrap();
        assert!(allow.split(", ").any(|name| name == allowed), "{allow}");
        response.error();
    }
    assert!(upstream.requests().is_empty());
}

#[test]
fn a_body_over_the_limit_is_a_413_before_it_has_been_sent() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_body_bytes: 1000", "");
    let mut client = Client::connect(gateway.addr());
    client.send(format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n"));
    let response = client.read_response();
    assert_eq!(response.status, 413);
    assert!(response.error()["message"].as_str().unwrap().contains("1000"), "{response:?}");
    assert!(client.is_closed(PATIENCE), "the body can't be told from a next request");
}

#[test]
fn a_chunked_body_over_the_limit_is_a_413() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_body_bytes: 1000", "");
    let mut client = Client::connect(gateway.addr());
    let chunk = format!("200\r\n{}\r\n", "x".repeat(0x200));
    client.send(format!(
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}{chunk}"
    ));
    assert_eq!(client.read_response().status, 413);
    assert!(upstream.requests().is_empty());
}

#[test]
fn bodies_that_wait_take_no_more_memory_together_than_is_set_aside() {
    let upstream = Upstream::start([Reply::ok()]);
    let limits =
        "max_body_bytes: 100000\nmax_buffered_bytes: 150000\nmax_buffered_bytes_per_client: 150000";
    let slow = provider_yaml("p", upstream.addr(), &["m"], &spaced(3_600_000), "");
    let gateway = Gateway::start_with(limits, &slow, &[]);
    let body = format!("{BODY}{}", " ".repeat(80_000));
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200, "takes the hour's slot");
    let mut waiting = Client::connect(gateway.addr());
    waiting.post_json(CHAT, &body);
    gateway.wait_queued(1);
    let refused = post(gateway.addr(), CHAT, &body);
    assert_refused(&refused, 503, "buffers_full", &["max_buffered_bytes"]);
    assert_eq!(refused.header("retry-after").as_deref(), Some("1"));
    waiting.reset();
    gateway.wait_queued(0);
    let mut next = Client::connect(gateway.addr());
    next.post_json(CHAT, &body);
    gateway.wait_queued(1);
}

#[test]
fn who_announces_a_long_body_and_sends_a_byte_of_it_takes_little_of_that_memory() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_body_bytes: 1000000\nmax_buffered_bytes: 1000000", "");
    let announcing: Vec<_> = (0..32)
        .map(|_| {
            let mut client = Client::connect(gateway.addr());
            let head =
                format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1000000\r\n\r\n");
            client.send(head);
            assert_eq!(client.read_response().status, 100, "it waits for the body now");
            client.send("{");
            client
        })
        .collect();
    let body = format!("{BODY}{}", " ".repeat(100_000));
    assert_eq!(post(gateway.addr(), CHAT, &body).status, 200, "beside {}", announcing.len());
}

#[test]
fn a_body_at_the_limit_passes() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_body_bytes: 1000", "");
    let body = format!("{BODY}{}", " ".repeat(1000 - BODY.len()));
    assert_eq!(post(gateway.addr(), CHAT, body).status, 200);
}

#[test]
fn with_an_auth_token_set_everything_but_health_needs_it() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "auth_token: gate-token", "");
    let ask = |request: &str, credentials: &str| {
        let mut client = Client::connect(gateway.addr());
        client.send(format!(
            "{request} HTTP/1.1\r\nHost: x\r\n{credentials}Content-Length: {}\r\n\r\n{BODY}",
            BODY.len()
        ));
        client.read_response()
    };
    let chat = format!("POST {CHAT}");
    for request in [&chat, "GET /v1/models", "GET /v1/models/m", "GET /admin/stats"] {
        for wrong in [
            "",
            "gate-token",
            "Bearer",
            "Bearer gate-toke",
            "Bearer gate-tokens",
            "Bearer Gate-token",
            "Basic gate-token",
        ] {
            let credentials = if wrong.is_empty() {
                String::new()
            } else {
                format!("Authorization: {wrong}\r\n")
            };
            let response = ask(request, &credentials);
            assert_refused(&response, 401, "invalid_api_key", &[]);
            assert!(
                response.header("www-authenticate").unwrap().starts_with("Bearer"),
                "{response:?}"
            );
        }
        for wrong in ["", "gate-toke", "gate-tokens", "Gate-token", "Bearer gate-token"] {
            for name in ["x-api-key", "api-key", "x-goog-api-key"] {
                let response = ask(request, &format!("{name}: {wrong}\r\n"));
                assert_refused(&response, 401, "invalid_api_key", &["x-api-key"]);
            }
        }
        assert_eq!(ask(request, "Authorization: Bearer gate-token\r\n").status, 200, "{request}");
        assert_eq!(ask(request, "authorization: bearer gate-token\r\n").status, 200, "{request}");
        // Anthropic's clients send theirs like this, and may send both.
        for right in [
            "X-Api-Key: gate-token\r\n",
            "Authorization: Bearer other\r\nx-api-key: gate-token\r\n",
            "Authorization: Bearer gate-token\r\nx-api-key: other\r\n",
            "api-key: gate-token\r\n",
            "X-Goog-Api-Key: gate-token\r\n",
        ] {
            assert_eq!(ask(request, right).status, 200, "{request} {right}");
        }
    }
    assert_eq!(ask("GET /admin/health", "").status, 200);
    assert_eq!(upstream.requests().len(), 7);
    assert!(!format!("{:?}", upstream.requests()).contains("gate-token"));
}

#[test]
fn without_an_auth_token_any_key_or_none_is_accepted() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "", "");
    for headers in ["", "Authorization: Bearer any-value\r\n", "Authorization: Basic x\r\n"] {
        let mut client = Client::connect(gateway.addr());
        client.post_json_with(CHAT, headers, BODY);
        assert_eq!(client.read_response().status, 200);
    }
}

#[test]
fn a_provider_whose_port_is_closed_is_unreachable() {
    let closed = ClosedPort::new();
    let refused = answer_of(&format!("http://{}/v1", closed.addr()), "api_key: sk-own");
    assert_refused(&refused, 502, "upstream_unreachable", &["the-provider", "refused"]);
}

#[test]
fn a_provider_whose_name_is_unknown_is_unreachable() {
    // A label of 64 letters is none (RFC 1035 section 2.3.4), so that no resolver has to be asked.
    let host = format!("{}.invalid", "a".repeat(64));
    let refused = answer_of(&format!("http://{host}/v1"), "");
    assert_refused(&refused, 502, "upstream_unreachable", &["the-provider", "DNS"]);
}

#[test]
fn a_provider_that_speaks_no_tls_is_unreachable() {
    let refused = answer_of(&format!("https://{}/v1", server_without_tls()), "");
    assert_refused(&refused, 502, "upstream_unreachable", &["the-provider", "TLS"]);
}

#[test]
fn a_provider_that_does_not_finish_the_handshake_in_time_is_unreachable() {
    let upstream = Upstream::start([Reply::Stall]);
    let refused =
        answer_of(&format!("https://{}/v1", upstream.addr()), "connect_timeout_seconds: 0.2");
    assert_refused(&refused, 502, "upstream_unreachable", &["the-provider"]);
}

#[test]
fn a_provider_that_does_not_answer_in_time_is_a_504() {
    let upstream = Upstream::start([Reply::Stall]);
    let refused =
        answer_of(&format!("http://{}/v1", upstream.addr()), "request_timeout_seconds: 0.2");
    assert_refused(&refused, 504, "upstream_timeout", &["the-provider"]);
    upstream.wait_closed(0, PATIENCE);
}

#[test]
fn a_provider_that_breaks_off_before_its_answer_is_a_502() {
    for reply in
        [Reply::CloseBeforeAnswer, Reply::Reset, Reply::RawThenClose(b"HTTP/1.1 200 O".to_vec())]
    {
        let upstream = Upstream::start([reply.clone()]);
        let refused = answer_of(&format!("http://{}/v1", upstream.addr()), "");
        assert_refused(&refused, 502, "upstream_disconnected", &["the-provider"]);
        assert_eq!(upstream.requests().len(), 1, "sent once: {reply:?}");
    }
}

#[test]
fn an_answer_that_is_no_http_is_a_502() {
    for bytes in [
        "hello\r\n\r\n",
        "HTTP/1.1 99 X\r\n\r\n",
        "HTTP/1.1 200 OK\r\nNo colon\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ] {
        let upstream = Upstream::start([Reply::Raw(bytes.into())]);
        let refused = answer_of(&format!("http://{}/v1", upstream.addr()), "");
        assert_eq!(refused.status, 502, "{bytes:?}: {refused:?}");
        refused.error();
    }
}

/// A server that answers whatever it is sent in plain text.
fn server_without_tls() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
    let addr = listener.local_addr().expect("the address of a bound listener");
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            // Fails where the other side has left already.
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
    });
    addr
}

#[test]
fn a_client_that_leaves_while_its_large_body_is_parsed_takes_no_memory_with_it() {
    let upstream = Upstream::start([Reply::ok()]);
    let limits = "max_body_bytes: 1000000\nmax_buffered_bytes: 1000000";
    let gateway = gateway(&upstream, limits, "");
    let body = format!(r#"{{"model":"m","x":{}{}}}"#, "[".repeat(400_000), "]".repeat(400_000));
    for _ in 0..4 {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, &body);
        client.reset();
    }
    let deadline = Instant::now() + PATIENCE;
    while post(gateway.addr(), CHAT, &body).status != 200 {
        assert!(Instant::now() < deadline, "its memory is not given back");
    }
}
