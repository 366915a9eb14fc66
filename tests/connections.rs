//! Connections and memory are shared: no client can shut the others out, and the operator always gets in.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use support::{
    Client, Ended, Gateway, PATIENCE, Process, Reply, Response, UNSHAPED, Upstream, get, post,
    provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

/// Another machine than 127.0.0.1.
const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const THIRD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

fn gateway(upstream: &Upstream, server: &str) -> Gateway {
    Gateway::start_with(server, &provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""), &[])
}

fn ask(client: &mut Client) -> Response {
    client.get("/v1/models");
    client.read_response()
}

/// One that has been served and waits for its next request.
fn idle(from: Ipv4Addr, addr: SocketAddr) -> Client {
    let mut client = Client::connect_from(from, addr);
    assert_eq!(ask(&mut client).status, 200);
    client
}

/// One whose request is at the provider, which does not answer.
fn busy(from: Ipv4Addr, gateway: &Gateway, upstream: &Upstream) -> Client {
    let mut client = Client::connect_from(from, gateway.addr());
    let before = upstream.requests().len();
    client.post_json(CHAT, BODY);
    upstream.wait_requests(before + 1, PATIENCE);
    client
}

#[track_caller]
fn assert_refused(mut client: Client, code: &str, key: &str) {
    let response = ask(&mut client);
    assert_eq!((response.status, response.code().as_str()), (503, code), "{response:?}");
    assert!(response.text().contains(key), "{response:?}");
    assert_eq!(response.header("retry-after").as_deref(), Some("1"));
    assert_eq!(response.header("connection").as_deref(), Some("close"), "{response:?}");
    assert_eq!(client.read_to_end(), b"");
}

const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

#[test]
fn a_client_that_holds_slow_connections_keeps_nobody_else_out() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_connections: 4");
    for bytes in
        ["", "POST /v1/cha", "POST /v1/x HTTP/1.1\r\nHost: g\r\nContent-Length: 9\r\n\r\n{"]
    {
        let slow: Vec<Client> = (0..2)
            .map(|_| {
                let mut client = Client::connect_from(OTHER, gateway.addr());
                client.send(bytes);
                client
            })
            .collect();
        let key = "max_connections_per_client";
        assert_refused(Client::connect_from(OTHER, gateway.addr()), "client_connections_full", key);
        let mut inside = [idle(LOCALHOST, gateway.addr()), idle(LOCALHOST, gateway.addr())];
        assert!(inside.iter_mut().all(|client| ask(client).status == 200));
        drop((slow, inside));
        wait_served(OTHER, &gateway);
    }
}

/// Waits until a connection of this client is served.
fn wait_served(from: Ipv4Addr, gateway: &Gateway) {
    let deadline = Instant::now() + PATIENCE;
    while ask(&mut Client::connect_from(from, gateway.addr())).status != 200 {
        assert!(Instant::now() < deadline, "still refused");
    }
}

#[test]
fn an_idle_connection_makes_room_for_a_newcomer_the_longest_idle_one_first() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, "max_connections: 3\nmax_connections_per_client: 3");
    let _busy = busy(OTHER, &gateway, &upstream);
    let mut first = idle(OTHER, gateway.addr());
    let mut second = idle(OTHER, gateway.addr());
    assert_eq!(ask(&mut first).status, 200, "now the second one has been idle for longer");
    let newcomer = idle(LOCALHOST, gateway.addr());
    assert!(second.is_closed(PATIENCE));
    assert_eq!(second.read_to_end(), b"");
    assert_eq!(ask(&mut first).status, 200, "the other one stays");
    drop(newcomer);
}

#[test]
fn a_clients_own_idle_connection_makes_room_where_its_share_is_full() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_connections: 4");
    let mut others = idle(LOCALHOST, gateway.addr());
    let [mut longest, mut later] = [idle(OTHER, gateway.addr()), idle(OTHER, gateway.addr())];
    let _newcomer = idle(OTHER, gateway.addr());
    assert!(longest.is_closed(PATIENCE));
    assert_eq!((ask(&mut later).status, ask(&mut others).status), (200, 200));
}

#[test]
fn a_request_that_is_on_its_way_is_answered_although_its_connection_has_to_make_room() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_connections: 1\nmax_connections_per_client: 1");
    let mut last = idle(LOCALHOST, gateway.addr());
    for _ in 0..50 {
        // It is in the gateway's socket before the newcomer connects.
        last.post_json(CHAT, BODY);
        let mut newcomer = Client::connect(gateway.addr());
        newcomer.get("/v1/models");
        assert_eq!(last.read_response().status, 200);
        // Where the request came first, its connection was none that could make room.
        if newcomer.read_response().status == 200 {
            last = newcomer;
        }
    }
}

#[test]
fn connections_past_the_limit_are_told_so_and_room_is_used_again() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, "max_connections: 2");
    let inside = [busy(OTHER, &gateway, &upstream), busy(THIRD, &gateway, &upstream)];
    assert_refused(Client::connect(gateway.addr()), "too_many_connections", "max_connections)");
    let mut silent = Client::connect(gateway.addr());
    let response = silent.read_response();
    assert_eq!(response.code(), "too_many_connections", "it is told although it says nothing");
    drop(inside);
    wait_served(LOCALHOST, &gateway);
}

#[test]
fn health_and_metrics_answer_while_everything_is_full() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, "max_connections: 1\nauth_token: secret");
    let mut inside = Client::connect_from(OTHER, gateway.addr());
    inside.post_json_with(CHAT, "Authorization: Bearer secret\r\n", BODY);
    upstream.wait_requests(1, PATIENCE);
    let ask = |request: &str| {
        let mut client = Client::connect(gateway.addr());
        client.send(format!("{request} HTTP/1.1\r\nHost: g\r\n\r\n"));
        let response = client.read_response();
        assert_eq!(response.header("connection").as_deref(), Some("close"), "{response:?}");
        response.status
    };
    let token = "HTTP/1.1\r\nAuthorization: Bearer secret\r\nX: ";
    for _ in 0..3 {
        assert_eq!(ask("GET /admin/health"), 200);
        assert_eq!(ask("HEAD /admin/health"), 200);
        assert_eq!(ask("GET /metrics"), 401, "with its authorization as usual");
        assert_eq!(ask(&format!("GET /metrics {token}")), 200);
        for other in ["GET /admin/stats", "GET /v1/models", "POST /admin/health", "GET /nothing"] {
            assert_eq!(ask(&format!("{other} {token}")), 503, "{other}");
        }
    }
    drop(inside);
}

#[test]
fn one_client_does_not_use_up_the_reserve() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, "max_connections: 1");
    let _inside = busy(OTHER, &gateway, &upstream);
    let flood: Vec<Client> = (0..200)
        .map(|_| {
            let mut client = Client::connect_from(OTHER, gateway.addr());
            client.send("GET /admin/hea");
            client
        })
        .collect();
    assert_eq!(get(gateway.addr(), "/admin/health").status, 200);
    for mut client in flood {
        assert_eq!(client.read_response().status, 503);
    }
}

#[test]
fn refused_connections_do_not_count() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, "max_connections: 2\nmax_connections_per_client: 2");
    let inside = [busy(OTHER, &gateway, &upstream), busy(OTHER, &gateway, &upstream)];
    // They are read from for a while after their refusal.
    let _refused: Vec<Client> = (0..10)
        .map(|_| {
            let mut client = Client::connect(gateway.addr());
            assert_eq!(ask(&mut client).status, 503);
            client
        })
        .collect();
    drop(inside);
    wait_served(LOCALHOST, &gateway);
    let _both = [idle(LOCALHOST, gateway.addr()), idle(LOCALHOST, gateway.addr())];
}

#[test]
fn a_client_that_uploads_on_after_its_refusal_makes_room() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_connections: 1\nmax_body_bytes: 1000");
    let mut uploading = Client::connect_from(OTHER, gateway.addr());
    uploading.send(format!("POST {CHAT} HTTP/1.1\r\nHost: g\r\nContent-Length: 1000000\r\n\r\n"));
    assert_eq!(uploading.read_response().status, 413);
    uploading.send([b'x'; 1000]);
    wait_served(LOCALHOST, &gateway);
    wait_served(LOCALHOST, &gateway);
}

#[test]
fn a_proxy_that_speaks_for_many_clients_has_no_share_of_its_own() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_connections: 4\ntrusted_proxies: [127.0.0.2]");
    let _all: Vec<Client> = (0..4)
        .map(|_| {
            let mut client = Client::connect_from(OTHER, gateway.addr());
            client.send("GET /v1/mod");
            client
        })
        .collect();
    assert_refused(Client::connect(gateway.addr()), "too_many_connections", "max_connections)");
}

#[test]
fn the_unix_socket_counts_as_one_client_unless_it_is_trusted() {
    for (trusted, taken, code) in
        [("[]", 2, "client_connections_full"), ("[unix]", 4, "too_many_connections")]
    {
        let upstream = Upstream::start([Reply::ok()]);
        let file = Process::file("x", "");
        // Relative to the crate, where tests run: the whole path may be too long for a socket.
        let here = std::env::current_dir().unwrap();
        let path = file.with_file_name("s");
        let path = path.strip_prefix(&here).unwrap_or(&path);
        let server =
            format!("max_connections: 4\ntrusted_proxies: {trusted}\nsocket: {}", path.display());
        let _gateway = gateway(&upstream, &server);
        let connect = || {
            let mut client = Client::connect_unix(path);
            client.send("GET /v1/mod");
            client
        };
        let _inside: Vec<Client> = (0..taken).map(|_| connect()).collect();
        let mut refused = Client::connect_unix(path);
        assert_eq!(ask(&mut refused).code(), code);
    }
}

// --- memory for bodies

/// A gateway with a queue that does not move, and a body that takes more than half of a client's share.
fn full_of_bodies(upstream: &Upstream, server: &str) -> (Gateway, String) {
    let slow = provider_yaml("p", upstream.addr(), &["m"], &spaced(3_600_000), "");
    let limits = format!("max_body_bytes: 100000\nmax_buffered_bytes: 300000\n{server}");
    let gateway = Gateway::start_with(&limits, &slow, &[]);
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200, "takes the hour's slot");
    (gateway, format!("{BODY}{}", " ".repeat(90_000)))
}

#[test]
fn a_client_whose_bodies_fill_its_share_keeps_nobody_elses_out() {
    let upstream = Upstream::start([Reply::ok()]);
    let (gateway, body) = full_of_bodies(&upstream, "");
    let ask = |from| {
        let mut client = Client::connect_from(from, gateway.addr());
        client.post_json(CHAT, &body);
        client
    };
    let waiting = ask(OTHER);
    gateway.wait_queued(1);
    let refused = ask(OTHER).read_response();
    assert_eq!((refused.status, refused.code().as_str()), (503, "client_buffers_full"));
    assert!(refused.text().contains("max_buffered_bytes_per_client"), "{refused:?}");
    assert_eq!(refused.header("retry-after").as_deref(), Some("1"));
    let _other = ask(LOCALHOST);
    gateway.wait_queued(2);
    waiting.reset();
    gateway.wait_queued(1);
    let _again = ask(OTHER);
    gateway.wait_queued(2);
}

#[test]
fn a_client_with_a_token_has_one_share_wherever_it_comes_from() {
    let upstream = Upstream::start([Reply::ok()]);
    let clients = "clients: [{name: a, token: ta}, {name: b, token: tb}]";
    let (gateway, body) = full_of_bodies(&upstream, clients);
    let ask = |from, token| {
        let mut client = Client::connect_from(from, gateway.addr());
        client.post_json_with(CHAT, &format!("Authorization: Bearer {token}\r\n"), &body);
        client
    };
    let _first = ask(LOCALHOST, "ta");
    gateway.wait_queued(1);
    assert_eq!(ask(OTHER, "ta").read_response().code(), "client_buffers_full");
    let _second = ask(LOCALHOST, "tb");
    gateway.wait_queued(2);
}

#[test]
fn one_body_of_the_largest_size_always_fits() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "max_body_bytes: 1000000\nmax_buffered_bytes: 1000000");
    let body = format!("{BODY}{}", " ".repeat(1_000_000 - BODY.len()));
    assert_eq!(post(gateway.addr(), CHAT, &body).status, 200);
    let mut client = Client::connect(gateway.addr());
    client.send(format!("POST {CHAT} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n"));
    for piece in body.as_bytes().chunks(7000) {
        client.send([format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat());
    }
    client.send("0\r\n\r\n");
    let response = client.read_response();
    assert_eq!((response.status, response.ended), (200, Ended::Clean), "{response:?}");
}
