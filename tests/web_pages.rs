//! Pages of strangers in a browser that can reach a gateway without `auth_token`: they spend
//! nothing and read nothing. What a browser really does is in tests/browser.

mod support;

use std::fs;
use std::path::PathBuf;

use support::{
    Client, Gateway, PATIENCE, Process, Reply, Response, UNSHAPED, Upstream, post_with,
    provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;
const STRANGER: &str = "https://evil.example";

/// What a page may try to read, and what is no path at all.
const PATHS: [&str; 9] = [
    "/v1/models",
    "/v1/models/m",
    "/admin/",
    "/admin/health",
    "/admin/stats",
    "/admin/queue",
    "/admin/requests",
    "/metrics",
    "/nowhere",
];

fn gateway(server: &str, upstream: &Upstream) -> Gateway {
    Gateway::start_with(server, &provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""), &[])
}

/// A request without a body, to this Host and with these further lines.
fn ask(gateway: &Gateway, method: &str, path: &str, host: &str, lines: &str) -> Response {
    let mut client = Client::connect(gateway.addr());
    client.send(format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n"));
    client.read_response()
}

#[track_caller]
fn assert_forbidden(response: &Response, code: &str, remedy: &str) {
    assert_eq!((response.status, response.code().as_str()), (403, code), "{response:?}");
    let message = response.error()["message"].as_str().expect("checked by error()").to_owned();
    assert!(message.contains(remedy) && message.contains("server.auth_token"), "{message}");
    for (name, _) in &response.headers.0 {
        assert!(!name.to_lowercase().starts_with("access-control-"), "{response:?}");
    }
}

#[test]
fn a_page_of_another_origin_is_refused_on_every_path() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    for server in ["", "cors_origins: [\"https://chat.example.com\"]"] {
        let gateway = gateway(server, &upstream);
        for origin in [STRANGER, "null", "http://127.0.0.1.evil.example", "http://192.168.1.9:3000"]
        {
            let lines = format!("Origin: {origin}\r\n");
            for path in PATHS {
                let refused = ask(&gateway, "GET", path, "gateway", &lines);
                assert_forbidden(&refused, "origin_not_allowed", "server.cors_origins");
            }
            for content_type in ["text/plain", "application/json"] {
                let mut client = Client::connect(gateway.addr());
                client.send(format!(
                    "POST {CHAT} HTTP/1.1\r\nHost: gateway\r\n{lines}Content-Type: {content_type}\r\n\
                     Content-Length: {}\r\n\r\n{BODY}",
                    BODY.len()
                ));
                let refused = client.read_response();
                assert_forbidden(&refused, "origin_not_allowed", "server.cors_origins");
            }
            let asks = format!("{lines}Access-Control-Request-Method: POST\r\n");
            let refused = ask(&gateway, "OPTIONS", CHAT, "gateway", &asks);
            assert_forbidden(&refused, "origin_not_allowed", "server.cors_origins");
        }
    }
    assert!(upstream.requests().is_empty());
}

#[test]
fn a_name_that_a_stranger_gave_to_this_machine_is_refused_on_every_path() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    for server in ["", "cors_origins: [\"*\"]"] {
        let gateway = gateway(server, &upstream);
        for host in ["evil.example", "EVIL.example.:8080", "127.0.0.1.evil.example"] {
            for lines in [String::new(), format!("Origin: http://{host}\r\n")] {
                for path in PATHS {
                    let refused = ask(&gateway, "GET", path, host, &lines);
                    assert_forbidden(&refused, "host_not_allowed", "server.hosts");
                }
                let absolute = format!("http://{host}/v1/models");
                let refused = ask(&gateway, "GET", &absolute, "gateway", &lines);
                assert_forbidden(&refused, "host_not_allowed", "server.hosts");
            }
        }
    }
    assert!(upstream.requests().is_empty());
}

#[test]
fn programs_and_pages_of_the_gateway_and_of_this_machine_may_call() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway("hosts: [gw.example.com]", &upstream);
    for (host, origin) in [
        ("gateway", None),
        ("gateway:8080", Some("http://gateway:8080")),
        ("GW.example.com", Some("https://gw.example.com")),
        ("192.168.1.7", Some("http://localhost:3000")),
        ("[fd00::7]:8080", Some("http://[::1]")),
        ("box.local", Some("app://obsidian.md")),
        ("localhost", Some("file://")),
        ("box.lan", Some("tauri://localhost")),
        ("localhost:8080", Some("vscode-webview://0p8kmf")),
    ] {
        let origin = origin.map_or(String::new(), |origin| format!("Origin: {origin}\r\n"));
        let length = BODY.len();
        let mut client = Client::connect(gateway.addr());
        client.send(format!(
            "POST {CHAT} HTTP/1.1\r\nHost: {host}\r\n{origin}Content-Length: {length}\r\n\r\n{BODY}"
        ));
        assert_eq!(client.read_response().status, 200, "{host} {origin}");
    }
    let mut client = Client::connect(gateway.addr());
    client.send("GET /v1/models HTTP/1.0\r\n\r\n");
    assert_eq!(client.read_response().status, 200, "HTTP/1.0 needs no Host");
}

#[test]
fn with_a_token_neither_origin_nor_host_is_asked() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway("auth_token: t", &upstream);
    let lines = format!("Origin: {STRANGER}\r\n");
    let key = format!("{lines}Authorization: Bearer t\r\n");
    assert_eq!(ask(&gateway, "GET", "/v1/models", "evil.example", &key).status, 200);
    assert_eq!(ask(&gateway, "GET", "/admin/health", "evil.example", &lines).status, 200);
    assert_eq!(
        ask(&gateway, "GET", "/v1/models", "evil.example", &lines).code(),
        "invalid_api_key"
    );
    assert_eq!(post_with(gateway.addr(), CHAT, &key, BODY).status, 200);
}

#[test]
fn a_refused_page_has_no_body_read_and_no_place_in_the_queue() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let provider = provider_yaml("p", upstream.addr(), &["m"], &spaced(3_600_000), "");
    let gateway = Gateway::start_with("", &provider, &[]);
    let mut client = Client::connect(gateway.addr());
    client.send(format!(
        "POST {CHAT} HTTP/1.1\r\nHost: gateway\r\nOrigin: {STRANGER}\r\nContent-Length: 33554432\r\n\r\n"
    ));
    let refused = client.read_response();
    assert_forbidden(&refused, "origin_not_allowed", "server.cors_origins");
    assert_eq!(refused.header("connection").as_deref(), Some("close"));
    assert!(client.is_closed(PATIENCE), "the body is not waited for");
    let stats = gateway.stats()["providers"][0].take();
    assert_eq!((stats["sent"].as_u64(), stats["queued_ahead"].as_u64()), (Some(0), Some(0)));
    // Where nothing follows, the connection goes on.
    let mut client = Client::connect(gateway.addr());
    client.send("GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n");
    assert_eq!(client.read_response().code(), "host_not_allowed");
    client.get("/v1/models");
    assert_eq!(client.read_response().status, 200);
}

#[test]
fn the_rules_hold_on_a_unix_socket_too() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    // Relative to the crate, where tests run: the whole path might be too long for a socket.
    let file = Process::file("x", "");
    let here = std::env::current_dir().expect("a working directory");
    let folder: PathBuf = file.parent().expect("a file has a folder").into();
    let path = folder.strip_prefix(&here).map_or(folder.clone(), PathBuf::from).join("s");
    fs::remove_file(&file).expect("it was just made");
    let server = format!("port: null\nsocket: {}\nhosts: [gw.example.com]", path.display());
    let gateway = gateway(&server, &upstream);
    // A proxy in front passes on the name that it was asked by, or says its own.
    for (host, code) in
        [("gw.example.com", ""), ("localhost", ""), ("evil.example", "host_not_allowed")]
    {
        let mut client = Client::connect_unix(&path);
        client.send(format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        let response = client.read_response();
        assert_eq!(if response.status == 200 { String::new() } else { response.code() }, code);
    }
    drop(gateway);
}

#[test]
fn no_page_of_the_gateway_can_be_framed() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = gateway("", &upstream);
    for path in [
        "/admin",
        "/admin/",
        "/admin/health",
        "/admin/stats",
        "/admin/queue",
        "/admin/requests",
        "/metrics",
    ] {
        let response = ask(&gateway, "GET", path, "gateway", "");
        assert_eq!(response.headers.all("x-frame-options"), ["DENY"], "{path}");
        let policy = response.header("content-security-policy").expect("a policy");
        assert!(policy.contains("frame-ancestors 'none'"), "{path}: {policy}");
    }
}
