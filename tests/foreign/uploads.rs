//! Clients that go on sending after the gateway has refused: the refusal reaches them.
//!
//! `tests/sdk/test_uploads.py` and `uploads.test.mjs` hold the same with the real clients.

use std::net::{SocketAddr, TcpStream};

use openssl::ssl::{SslConnector, SslMethod};

use crate::support::{
    Client, Gateway, Identity, Process, Reply, UNSHAPED, Upstream, localhost, provider_yaml,
};

const UPLOAD_BYTES: usize = 40_000_000;

/// Larger than any of these buffers together: the client's, the kernel's, the gateway's limit.
fn upload() -> Vec<u8> {
    vec![b'x'; UPLOAD_BYTES]
}

fn chunked(body: &[u8]) -> Vec<u8> {
    let chunk = |data: &[u8]| [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat();
    body.chunks(64 * 1024).map(chunk).collect::<Vec<_>>().concat()
}

/// A head, the body behind it, and the refusal.
fn refusals() -> Vec<(String, Vec<u8>, u16, &'static str)> {
    let head = |path: &str, lines: &str| format!("POST {path} HTTP/1.1\r\nHost: g\r\n{lines}\r\n");
    let token = "Authorization: Bearer secret\r\n";
    let length = format!("{token}Content-Length: {UPLOAD_BYTES}\r\n");
    let chunks = format!("{token}Transfer-Encoding: chunked\r\n");
    let chat = "/v1/chat/completions";
    let mut broken = chunked(&upload()[..500_000]);
    broken.extend(b"no chunk");
    broken.extend(upload());
    vec![
        (head(chat, &length), upload(), 413, "body_too_large"),
        (head(chat, &chunks), chunked(&upload()), 413, "body_too_large"),
        (head(chat, &length.replace(token, "")), upload(), 401, "invalid_api_key"),
        (head("/nowhere", &length), upload(), 404, "unknown_path"),
        (head("/v1/models", &length), upload(), 405, "method_not_allowed"),
        (
            head(chat, &format!("X: {}\r\n{length}", "y".repeat(40_000))),
            upload(),
            431,
            "head_too_large",
        ),
        (head(chat, &chunks), broken, 400, "malformed_request"),
    ]
}

fn gateway(upstream: &Upstream, server: &str) -> Gateway {
    let server = format!("auth_token: secret\nmax_body_bytes: 1000000\n{server}");
    Gateway::start_with(&server, &provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""), &[])
}

/// The client writes all of its body before it reads, and a failed write is final: `send` panics.
#[track_caller]
fn assert_told(connect: impl Fn() -> Client) {
    for (head, body, status, code) in refusals() {
        let mut client = connect();
        client.send(&head);
        client.send(&body);
        let response = client.read_response();
        assert_eq!((response.status, response.code().as_str()), (status, code), "{response:?}");
        assert_eq!(response.header("connection").as_deref(), Some("close"), "{response:?}");
        assert_eq!(client.read_to_end(), b"");
    }
}

#[test]
fn a_refusal_reaches_a_client_that_uploads_on_whatever_it_is() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "");
    let address: SocketAddr = gateway.addr();
    assert_told(|| Client::connect(address));
    assert!(upstream.requests().is_empty());
}

#[test]
fn a_refusal_reaches_a_client_that_uploads_on_under_tls() {
    let upstream = Upstream::start([Reply::ok()]);
    let authority = Identity::authority();
    let gateway = gateway(&upstream, &authority.issue(&localhost(), 1).tls());
    assert_told(|| over_tls(&authority, gateway.addr()));
}

#[test]
fn a_refusal_reaches_a_client_that_uploads_on_over_a_unix_socket() {
    let upstream = Upstream::start([Reply::ok()]);
    let file = Process::file("x", "");
    // Relative to the crate, where tests run: the whole path may be too long for a socket.
    let here = std::env::current_dir().unwrap();
    let path = file.with_file_name("s");
    let path = path.strip_prefix(&here).unwrap_or(&path);
    let _gateway = gateway(&upstream, &format!("socket: {}", path.display()));
    assert_told(|| Client::connect_unix(path));
}

fn over_tls(authority: &Identity, addr: SocketAddr) -> Client {
    let mut connector = SslConnector::builder(SslMethod::tls_client()).unwrap();
    connector.cert_store_mut().add_cert(authority.certificate.clone()).unwrap();
    let tcp = TcpStream::connect(addr).unwrap();
    Client::over_tls(connector.build().connect("localhost", tcp).unwrap())
}
