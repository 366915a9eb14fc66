//! Web pages as callers: what a browser is told before and with an answer, and what it is not.

mod support;

use support::{
    Client, Gateway, Reply, Response, UNSHAPED, Upstream, post_with, provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;
const PAGE: &str = "https://chat.example.com";
const LISTED: &str = r#"cors_origins: ["https://chat.example.com", "http://localhost:3000"]"#;

fn gateway(server: &str, upstream: &Upstream, rate_limit: &str) -> Gateway {
    Gateway::start_with(server, &provider_yaml("p", upstream.addr(), &["m"], rate_limit, ""), &[])
}

fn from_page(origin: &str) -> String {
    format!("Origin: {origin}\r\n")
}

/// What a browser sends for openai-node with `dangerouslyAllowBrowser`.
fn preflight(gateway: &Gateway, path: &str, origin: &str, lines: &str) -> Response {
    let mut client = Client::connect(gateway.addr());
    client.send(format!(
        "OPTIONS {path} HTTP/1.1\r\nHost: gateway\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: POST\r\n{lines}\r\n"
    ));
    client.read_response()
}

const SDK_HEADERS: &str = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout";

#[track_caller]
fn assert_granted(response: &Response, origin: &str) {
    assert_eq!(response.headers.all("access-control-allow-origin"), [origin], "{response:?}");
    assert_eq!(response.headers.all("vary"), ["Origin"], "{response:?}");
    let exposed = response.headers.all("access-control-expose-headers");
    assert_eq!(exposed.len(), 1, "{response:?}");
    for name in [
        "x-request-id",
        "request-id",
        "retry-after",
        "x-ratelimit-remaining-requests",
        "x-limitrate-provider",
    ] {
        assert!(exposed[0].split(", ").any(|exposed| exposed == name), "{name} in {exposed:?}");
    }
}

#[track_caller]
fn assert_told_nothing(response: &Response) {
    let told = response
        .headers
        .0
        .iter()
        .find(|(name, _)| name.to_lowercase().starts_with("access-control-"));
    assert_eq!(told, None, "{response:?}");
}

#[test]
fn nobody_without_a_key_has_a_body_read() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway(&format!("{LISTED}\nauth_token: t"), &upstream, UNSHAPED);
    let promised = preflight(&gateway, CHAT, PAGE, "Content-Length: 33554432\r\n");
    assert_eq!(
        (promised.status, promised.header("connection").as_deref()),
        (204, Some("close")),
        "{promised:?}"
    );
    let mut client = Client::connect(gateway.addr());
    client.send("GET /admin/health HTTP/1.1\r\nHost: gateway\r\nContent-Length: 33554432\r\n\r\n");
    assert_eq!(client.read_response().status, 200, "the body is not waited for");
}

#[test]
fn a_preflight_is_answered_before_any_key_is_shown() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway(&format!("{LISTED}\nauth_token: t"), &upstream, UNSHAPED);
    for path in [CHAT, "/v1/messages", "/v1/models", "/admin/stats"] {
        let asked = format!("Access-Control-Request-Headers: {SDK_HEADERS}\r\n");
        let response = preflight(&gateway, path, PAGE, &asked);
        assert_eq!((response.status, response.text().as_str()), (204, ""), "{response:?}");
        assert_granted(&response, PAGE);
        assert_eq!(
            response.header("access-control-allow-methods").as_deref(),
            Some("GET, HEAD, POST")
        );
        let allowed =
            response.header("access-control-allow-headers").expect("all that were asked for");
        assert_eq!(allowed.replace(' ', ""), SDK_HEADERS);
        assert_eq!(response.header("access-control-max-age").as_deref(), Some("7200"));
        assert_eq!(response.header("content-length"), None);
    }
    let bare = preflight(&gateway, CHAT, "http://localhost:3000", "");
    assert_granted(&bare, "http://localhost:3000");
    assert_eq!(bare.header("access-control-allow-headers"), None);
    let odd =
        preflight(&gateway, CHAT, PAGE, "Access-Control-Request-Headers: x-a, b c, , x(y),x-d\r\n");
    assert_eq!(odd.header("access-control-allow-headers").as_deref(), Some("x-a, x-d"));
    assert!(upstream.requests().is_empty());
}

#[test]
fn a_connection_goes_on_behind_its_preflight() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway(LISTED, &upstream, UNSHAPED);
    let mut client = Client::connect(gateway.addr());
    client.send(format!(
        "OPTIONS {CHAT} HTTP/1.1\r\nHost: g\r\nOrigin: {PAGE}\r\nAccess-Control-Request-Method: POST\r\n\r\n"
    ));
    assert_eq!(client.read_response().status, 204);
    client.post_json_with(CHAT, &from_page(PAGE), BODY);
    assert_granted(&client.read_response(), PAGE);
    // The next one on it is no page's.
    client.post_json(CHAT, BODY);
    assert_told_nothing(&client.read_response());
}

#[test]
fn a_page_that_is_not_listed_is_told_nothing() {
    let own = "Access-Control-Allow-Origin: *\r\naccess-control-expose-headers: x\r\n";
    let upstream = Upstream::answering(move |_, _| Reply::with_headers(own, "{}"));
    let gateway = gateway(&format!("{LISTED}\nauth_token: t"), &upstream, UNSHAPED);
    let key = "Authorization: Bearer t\r\n";
    for origin in [
        "https://evil.example",
        "http://chat.example.com",
        "https://chat.example.com:8443",
        "null",
        "HTTPS://chat.example.com",
    ] {
        let asked = preflight(&gateway, CHAT, origin, "");
        assert_eq!(asked.status, 401, "{origin}");
        assert_told_nothing(&asked);
        let answered =
            post_with(gateway.addr(), CHAT, &format!("{}{key}", from_page(origin)), BODY);
        assert_eq!(answered.status, 200);
        assert_told_nothing(&answered);
        // A cache must not hand it to a page that may have it.
        assert_eq!(answered.headers.all("vary"), ["Origin"]);
    }
    // Who says no origin is no page.
    assert_told_nothing(&post_with(gateway.addr(), CHAT, key, BODY));
}

#[test]
fn a_relayed_answer_carries_the_gateways_word_and_not_the_providers() {
    let own = "Access-Control-Allow-Origin: https://elsewhere.example\r\nAccess-Control-Allow-Credentials: true\r\n\
               Access-Control-Expose-Headers: x-own\r\nX-Own: kept\r\n";
    let upstream = Upstream::answering(move |_, _| Reply::with_headers(own, "{}"));
    let gateway = gateway(LISTED, &upstream, UNSHAPED);
    let response = post_with(gateway.addr(), CHAT, &from_page(PAGE), BODY);
    assert_granted(&response, PAGE);
    assert_eq!(response.header("access-control-allow-credentials"), None);
    assert_eq!(response.header("x-own").as_deref(), Some("kept"));
    // Some providers refuse pages that they do not know.
    assert_eq!(upstream.requests()[0].header("origin"), None);
}

#[test]
fn refusals_can_be_read_by_a_page() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway =
        gateway(&format!("{LISTED}\nauth_token: t\nmax_body_bytes: 1000"), &upstream, UNSHAPED);
    let key = format!("{}Authorization: Bearer t\r\n", from_page(PAGE));
    let large = "x".repeat(2000);
    for (path, headers, body, code) in [
        (CHAT, from_page(PAGE), BODY, "invalid_api_key"),
        (CHAT, key.clone(), r#"{"model":"n"}"#, "model_not_found"),
        (CHAT, key.clone(), "{", "invalid_json"),
        (CHAT, key.clone(), &large, "body_too_large"),
        ("/elsewhere", key.clone(), BODY, "unknown_path"),
    ] {
        let refused = post_with(gateway.addr(), path, &headers, body);
        assert_eq!(refused.code(), code);
        assert_granted(&refused, PAGE);
    }
}

#[test]
fn an_answer_that_begins_with_a_heartbeat_can_be_read_by_a_page() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway =
        gateway(&format!("{LISTED}\nheartbeat_after_seconds: 0.1"), &upstream, &spaced(30_000));
    assert_eq!(post_with(gateway.addr(), CHAT, "", BODY).status, 200);
    let mut client = Client::connect(gateway.addr());
    client.post_json_with(CHAT, &from_page(PAGE), r#"{"model":"m","stream":true}"#);
    let head = client.read_head();
    assert_eq!(head.headers.all("access-control-allow-origin"), [PAGE]);
    assert_eq!(head.headers.all("access-control-expose-headers").len(), 1);
}

#[test]
fn with_a_star_every_page_may() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway("cors_origins: [\"*\"]", &upstream, UNSHAPED);
    for origin in [PAGE, "null", "app://obsidian.md"] {
        let asked =
            preflight(&gateway, CHAT, origin, "Access-Control-Request-Headers: authorization\r\n");
        assert_eq!(
            (asked.status, asked.header("access-control-allow-headers").as_deref()),
            (204, Some("authorization"))
        );
        assert_granted(&asked, "*");
        assert_granted(&post_with(gateway.addr(), CHAT, &from_page(origin), BODY), "*");
    }
}

#[test]
fn without_the_setting_no_page_is_told_anything() {
    let own = "Access-Control-Allow-Origin: *\r\naccess-control-allow-credentials: true\r\n\
               Access_Control_Allow_Origin: *\r\nTiming-Allow-Origin: *\r\nX-Own: kept\r\n";
    let upstream = Upstream::answering(move |_, _| Reply::with_headers(own, "{}"));
    for (server, headers) in [
        ("", "Origin: http://localhost:3000\r\n"),
        ("auth_token: t", "Origin: https://evil.example\r\nAuthorization: Bearer t\r\n"),
    ] {
        let gateway = gateway(server, &upstream, UNSHAPED);
        let response = post_with(gateway.addr(), CHAT, headers, BODY);
        assert_eq!((response.status, response.header("x-own").as_deref()), (200, Some("kept")));
        assert_told_nothing(&response);
        for name in ["vary", "timing-allow-origin", "access_control_allow_origin"] {
            assert_eq!(response.header(name), None, "{response:?}");
        }
    }
    assert_eq!(upstream.requests()[0].header("origin").as_deref(), Some("http://localhost:3000"));
}
