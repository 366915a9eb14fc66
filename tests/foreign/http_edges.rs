//! What clients and proxies in between make of HTTP: paths, upgrades, header bytes, codings.

use crate::support::{Client, Gateway, Reply, Response, UNSHAPED, Upstream, post, provider_yaml};

const BODY: &str = r#"{"model":"m","messages":[]}"#;

fn gateway(upstream: &Upstream) -> Gateway {
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""))
}

/// Requests so far, by the gateway's own count.
fn sent(gateway: &Gateway) -> u64 {
    gateway.stats()["providers"][0]["sent"].as_u64().expect("a number")
}

#[track_caller]
fn assert_refused(response: &Response, status: u16, code: &str, message_parts: &[&str]) {
    assert_eq!((response.status, response.code().as_str()), (status, code), "{response:?}");
    let message = response.error()["message"].as_str().expect("checked by error()").to_owned();
    for part in message_parts {
        assert!(message.contains(part), "no {part:?} in {message:?}");
    }
}

#[test]
fn a_base_url_with_a_slash_or_a_version_too_many_works() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway(&upstream);
    for (path, target) in [
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/v1//chat/completions/", "/v1/chat/completions"),
        ("/v1/chat/completions/?a=//b%2F&c=/", "/v1/chat/completions?a=//b%2F&c=/"),
    ] {
        let response = post(gateway.addr(), path, BODY);
        assert_eq!(response.status, 200, "{path}: {response:?}");
        assert_eq!(upstream.requests().last().expect("it was sent").target, target);
    }
    for path in ["/v1//models", "/v1/v1/models", "/v1/models/", "/v1/models/m/"] {
        let mut client = Client::connect(gateway.addr());
        client.get(path);
        assert_eq!(client.read_response().status, 200, "{path}");
    }
    let refused = post(gateway.addr(), "/v1/v1//messages/", "{}");
    assert_eq!(refused.json()["type"], "error", "Anthropic's shape: {refused:?}");
    let logged = &upstream.requests().len();
    let log = crate::support::get(gateway.addr(), "/admin/requests").json();
    let paths: Vec<_> = log["requests"].as_array().expect("a list").iter().collect();
    assert!(paths.len() > *logged, "{log}");
    for request in paths {
        let path = request["path"].as_str().expect("a text");
        assert!(!path.contains("//") && !path.contains("/v1/v1"), "{path}");
    }
}

#[test]
fn a_base_url_that_ends_in_an_endpoint_is_a_404_that_says_so() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway(&upstream);
    for (method, path, base) in [
        ("POST", "/v1/chat/completions/chat/completions", "/v1/chat/completions"),
        ("GET", "/v1/chat/completions/models", "/v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions//v1/chat/completions/", "/v1/chat/completions"),
        ("POST", "/v1/responses/responses", "/v1/responses"),
    ] {
        let mut client = Client::connect(gateway.addr());
        let length = BODY.len();
        client.send(format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{BODY}"
        ));
        let refused = client.read_response();
        assert_refused(&refused, 404, "doubled_endpoint", &[&format!("ends in `{base}`"), "/v1."]);
    }
    assert_eq!(sent(&gateway), 0);
    // What an API has below an endpoint is none of these.
    for path in ["/v1/messages/count_tokens", "/v1/responses/compact", "/v1/chat/completions/id-1"]
    {
        assert_eq!(post(gateway.addr(), path, BODY).status, 200, "{path}");
    }
}

#[test]
fn a_websocket_is_answered_with_a_426_that_names_http() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway(&upstream);
    let upgrade = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AA==\r\n";
    let mut client = Client::connect(gateway.addr());
    for (request, connection) in [
        ("GET /v1/responses", "Connection: Upgrade\r\n"),
        ("GET /v1/realtime?model=m", "Connection: keep-alive, upgrade\r\n"),
        ("POST /v1/responses", ""),
        ("GET /v1/models", "Upgrade: h2c, WebSocket/13\r\n"),
    ] {
        client.send(format!("{request} HTTP/1.1\r\nHost: x\r\n{connection}{upgrade}\r\n"));
        let refused = client.read_response();
        assert_refused(&refused, 426, "websocket_not_supported", &["HTTP", "POST /v1/responses"]);
        assert_eq!(refused.headers.all("upgrade"), ["HTTP/1.1"]);
        assert_eq!(refused.headers.all("connection"), ["keep-alive, upgrade"]);
    }
    assert_eq!(sent(&gateway), 0);
    // The request that follows on the connection is served.
    client.post_json("/v1/responses", BODY);
    assert_eq!(client.read_response().status, 200);
    client.send("GET /admin/health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n");
    assert_eq!(client.read_response().status, 200, "of no matter beside the API");
}

#[test]
fn an_upgrade_to_h2c_goes_on_in_http_1() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway(&upstream);
    let lines =
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n";
    let mut client = Client::connect(gateway.addr());
    client.post_json_with("/v1/chat/completions", lines, BODY);
    assert_eq!(client.read_response().status, 200);
    let requests = upstream.requests();
    for name in ["upgrade", "http2-settings"] {
        assert_eq!(requests[0].header(name), None, "{name}");
    }
}

#[test]
fn header_bytes_over_0x7f_pass_both_ways() {
    let mut reply =
        b"HTTP/1.1 200 OK\r\ncf-region: S\xc3\xa3o Paulo\r\nX-Latin: \xa0caf\xe9\r\n".to_vec();
    reply.extend(b"Content-Length: 2\r\n\r\n{}");
    let upstream = Upstream::start([Reply::Raw(reply)]);
    let gateway = gateway(&upstream);
    let mut client = Client::connect(gateway.addr());
    let mut request =
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\ncf-region: S\xc3\xa3o Paulo\r\n"
            .to_vec();
    request.extend(b"X-Latin: \xa0caf\xe9 \r\nX-All: \x80\xff\r\n");
    request.extend(format!("Content-Length: {}\r\n\r\n{BODY}", BODY.len()).bytes());
    client.send(request);
    let response = client.read_response();
    assert_eq!(response.status, 200, "{response:?}");
    let requests = upstream.requests();
    for headers in [&requests[0].headers, &response.headers] {
        let value = |name: &str| {
            let found = headers.0.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.clone())
        };
        assert_eq!(value("cf-region"), Some("S\u{e3}o Paulo".into()));
        assert_eq!(value("x-latin"), Some(b"\xa0caf\xe9".to_vec()));
    }
    let all = requests[0].headers.0.iter().find(|(name, _)| name == "x-all");
    assert_eq!(all.map(|(_, value)| value.as_slice()), Some(&b"\x80\xff"[..]));
}

#[test]
fn a_compressed_request_is_a_415_that_names_its_coding() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway(&upstream);
    for (lines, coding) in [
        ("Content-Encoding: zstd\r\n", "`zstd`"),
        ("Content-Encoding: gzip\r\nExpect: 100-continue\r\n", "`gzip`"),
        ("content-encoding: identity, Deflate\r\n", "`Deflate`"),
        ("Content-Encoding: identity\r\nContent-Encoding: br\r\n", "`br`"),
    ] {
        let mut client = Client::connect(gateway.addr());
        client.send(format!(
            "POST /v1/responses HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: 33554432\r\n\r\n"
        ));
        // The body is not waited for.
        let refused = client.read_response();
        assert_refused(&refused, 415, "unsupported_content_encoding", &[coding, "uncompressed"]);
        assert_eq!(refused.headers.all("accept-encoding"), ["identity"]);
        assert_eq!(refused.header("connection").as_deref(), Some("close"));
    }
    assert_eq!(sent(&gateway), 0);
    for lines in ["Content-Encoding: identity\r\n", "Content-Encoding: Identity, \r\n"] {
        let mut client = Client::connect(gateway.addr());
        client.post_json_with("/v1/responses", lines, BODY);
        assert_eq!(client.read_response().status, 200, "{lines}");
    }
}
