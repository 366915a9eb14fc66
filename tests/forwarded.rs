//! Whom a request behind a trusted proxy counts for, and that nothing of it goes on to the provider.

mod support;

use std::net::Ipv4Addr;

use support::{Client, Line};

/// The proxy's address; `Client::connect` itself comes from 127.0.0.1.
const PROXY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 7);

fn from(line: &Line, peer: Ipv4Addr) -> Client {
    Client::connect_from(peer, line.gateway.addr())
}

fn clients(line: &Line) -> Vec<String> {
    let name = |row: &serde_json::Value| row["client"].as_str().expect("a text").to_owned();
    line.gateway.queue().iter().map(name).collect()
}

#[test]
fn clients_behind_a_trusted_proxy_take_turns_and_keep_their_connection() {
    let line = Line::start("trusted_proxies: [127.0.0.7]", "");
    let said = |address: &str| format!("X-Forwarded-For: 6.6.6.6, {address}\r\n");
    let _waiting = [
        line.join(from(&line, PROXY), &said("192.0.2.1"), "a1"),
        line.join(from(&line, PROXY), &said("192.0.2.1"), "a2"),
        line.join(from(&line, PROXY), &said("192.0.2.1"), "a3"),
        line.join(from(&line, PROXY), &said("192.0.2.2"), "b1"),
        line.join(from(&line, PROXY), "", "proxy"),
    ];
    assert_eq!(clients(&line), ["192.0.2.1", "192.0.2.2", "127.0.0.7", "192.0.2.1", "192.0.2.1"]);
    assert_eq!(line.order(), "a1 b1 proxy a2 a3");
}

#[test]
fn who_is_no_trusted_proxy_counts_for_itself_whatever_it_says() {
    for trusted in ["", "trusted_proxies: [127.0.0.7, unix]"] {
        let line = Line::start(trusted, "");
        let _waiting = [
            line.ask("X-Forwarded-For: 192.0.2.1\r\n", "a1"),
            line.ask("X-Forwarded-For: 192.0.2.2\r\n", "a2"),
            line.join(
                from(&line, Ipv4Addr::new(127, 0, 0, 8)),
                "X-Forwarded-For: 192.0.2.1\r\n",
                "b1",
            ),
        ];
        assert_eq!(clients(&line), ["127.0.0.1", "127.0.0.8", "127.0.0.1"], "{trusted}");
    }
}

#[test]
fn a_clients_token_names_it_behind_a_proxy_too() {
    let line = Line::start("trusted_proxies: [127.0.0.0/8]\nclients: [{name: chat, token: t}]", "");
    let _waiting = line.ask("X-Forwarded-For: 192.0.2.1\r\nAuthorization: Bearer t\r\n", "a");
    assert_eq!(clients(&line), ["chat"]);
}

#[test]
fn the_provider_does_not_learn_who_asked() {
    let said = "X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\nX-FORWARDED-HOST: a\r\nX-Forwarded-Port: 1\r\n\
                Forwarded: for=192.0.2.1\r\nX-Real-IP: 192.0.2.1\r\nX-Forward: passes\r\n";
    for trusted in ["", "trusted_proxies: [127.0.0.0/8]"] {
        let line = Line::start(trusted, "");
        let _waiting = line.ask(said, "a");
        assert_eq!(line.order(), "a");
        let requests = line.upstream.requests();
        let sent = &requests[1];
        assert_eq!(sent.header("x-forward").as_deref(), Some("passes"));
        for name in [
            "x-forwarded-for",
            "x-forwarded-proto",
            "x-forwarded-host",
            "x-forwarded-port",
            "forwarded",
            "x-real-ip",
        ] {
            assert_eq!(sent.header(name), None, "{trusted}");
        }
    }
}
