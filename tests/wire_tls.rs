//! TLS towards the provider: who is trusted, what is refused and in which words, and where a body ends.

// Making certificates is all calls that can't fail here and return a Result.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::mpsc::channel;
use std::thread;

use openssl::ssl::SslVersion;
use openssl::x509::extension::SubjectAlternativeName;

use support::{
    Client, Ended, Gateway, Identity, Manner, Manners, PATIENCE, Process, Proxy, Response, Then,
    TlsServer, UNSHAPED, burst, localhost, post, provider_at,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;
const UNTIL_CLOSE: &str = "HTTP/1.1 200 OK\r\n\r\nhello";

const POLITE: Manners = Manners::POLITE;

fn gateway(base_url: &str, extras: &str) -> Gateway {
    Gateway::start(&provider_at("p", base_url, &["m"], UNSHAPED, extras))
}

/// The answer through a gateway that trusts `authority`, from a server with this identity that goes by `host`.
fn ask(authority: &Identity, identity: &Identity, host: &str, manners: Manners) -> Response {
    let server = TlsServer::start(identity, manners);
    let gateway = gateway(&server.at(host), &authority.ca_file());
    post(gateway.addr(), CHAT, BODY)
}

#[track_caller]
fn assert_refused(response: &Response, words: &[&str]) {
    assert_eq!(
        (response.status, response.code().as_str()),
        (502, "upstream_unreachable"),
        "{response:?}"
    );
    let message = response.error()["message"].as_str().expect("checked by error()").to_lowercase();
    for word in [&["tls"], words].concat() {
        assert!(message.contains(word), "no {word:?} in {message:?}");
    }
}

#[test]
fn a_provider_whose_ca_is_in_ca_file_is_reached_by_name_and_by_address() {
    let authority = Identity::authority();
    let mut names = localhost();
    names.ip(&Ipv4Addr::LOCALHOST.to_string());
    let server = TlsServer::start(&authority.issue(&names, 1), POLITE);
    for (host, name) in [("localhost", Some("localhost")), ("127.0.0.1", None)] {
        let gateway = gateway(&server.at(host), &authority.ca_file());
        let mut client = Client::connect(gateway.addr());
        for _ in 0..3 {
            client.post_json(CHAT, BODY);
            assert_eq!(client.read_response().status, 200, "{host}");
        }
        // RFC 6066 section 3: an address is no server name.
        assert_eq!(server.handshakes.recv_timeout(PATIENCE).unwrap().server_name.as_deref(), name);
        assert!(server.handshakes.try_recv().is_err(), "one handshake for three requests");
    }
}

#[test]
fn the_systems_certificates_are_read_once_for_all_connections() {
    let authority = Identity::authority();
    let manners = Manners { then: Then::ClosesWell, ..POLITE };
    let server = TlsServer::start(&authority.issue(&localhost(), 1), manners);
    let stranger = TlsServer::start(&Identity::authority().issue(&localhost(), 1), POLITE);
    let bundle = Process::file(
        "bundle.pem",
        &String::from_utf8(authority.certificate.to_pem().unwrap()).unwrap(),
    );
    // All three trust the same.
    let models = ["m", "x", "stranger"];
    let addresses = [&server, &server, &stranger].map(|server| server.at("localhost"));
    let entries = models.iter().zip(&addresses);
    let providers: String =
        entries.map(|(model, at)| provider_at(model, at, &[model], UNSHAPED, "")).collect();
    let variables = [("SSL_CERT_FILE", bundle.to_str().unwrap()), ("SSL_CERT_DIR", "/nowhere")];
    let process = Process::serve_with(&Process::config("", &providers), "", &variables);
    let ask =
        |model: &str| post(process.addr(), CHAT, format!(r#"{{"model":"{model}","messages":[]}}"#));

    assert_eq!(ask("m").status, 200);
    fs::remove_file(&bundle).unwrap();
    for model in ["m", "x", "m"] {
        assert_eq!(ask(model).status, 200, "{model}");
    }
    assert_eq!(server.handshakes.try_iter().count(), 4, "a connection for each request");
    assert_refused(&ask("stranger"), &["certificate"]);
}

#[test]
fn a_certificate_is_the_providers_own_behind_a_proxy_too() {
    let authority = Identity::authority();
    let server = TlsServer::start(&authority.issue(&localhost(), 1), POLITE);
    let proxy = Proxy::start(Manner::Tunnels);
    let through = |ca: &str| {
        gateway(&server.at("localhost"), &format!("proxy: http://{}\n{ca}", proxy.addr()))
    };
    assert_eq!(post(through(&authority.ca_file()).addr(), CHAT, BODY).status, 200);
    assert_eq!(
        server.handshakes.recv_timeout(PATIENCE).unwrap().server_name.as_deref(),
        Some("localhost")
    );
    assert!(
        proxy.heads()[0].starts_with(&format!("CONNECT localhost:{} HTTP/1.1\r\n", server.port))
    );
    assert_refused(&post(through("").addr(), CHAT, BODY), &["certificate"]);
}

#[test]
fn a_provider_whose_ca_is_unknown_is_refused() {
    let server = TlsServer::start(&Identity::authority().issue(&localhost(), 1), POLITE);
    let without = gateway(&server.at("localhost"), "");
    assert_refused(&post(without.addr(), CHAT, BODY), &["certificate"]);
    let with_another = gateway(&server.at("localhost"), &Identity::authority().ca_file());
    assert_refused(&post(with_another.addr(), CHAT, BODY), &["certificate"]);
}

#[test]
fn a_certificate_for_another_host_is_refused() {
    let authority = Identity::authority();
    let mut names = SubjectAlternativeName::new();
    names.dns("elsewhere.example");
    let identity = authority.issue(&names, 1);
    assert_refused(
        &ask(&authority, &identity, "localhost", POLITE),
        &["is not for the host localhost"],
    );
    assert_refused(
        &ask(&authority, &identity, "127.0.0.1", POLITE),
        &["is not for the ip address 127.0.0.1"],
    );
}

#[test]
fn an_expired_certificate_is_refused() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), -1);
    assert_refused(
        &ask(&authority, &identity, "localhost", POLITE),
        &["certificate", "has expired"],
    );
}

#[test]
fn tls_1_2_is_spoken_and_tls_1_1_is_not() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    let newest = |newest| ask(&authority, &identity, "localhost", Manners { newest, ..POLITE });
    assert_eq!(newest(SslVersion::TLS1_2).status, 200);
    assert_refused(&newest(SslVersion::TLS1_1), &["offers no tls 1.2 or later"]);
}

#[test]
fn a_body_that_ends_with_the_connection_is_whole_only_behind_a_close_notify() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    for newest in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let ask = |then| {
            let manners = Manners { newest, answer: UNTIL_CLOSE, then };
            ask(&authority, &identity, "localhost", manners)
        };
        let whole = ask(Then::ClosesWell);
        assert_eq!(
            (whole.status, whole.text().as_str(), whole.ended),
            (200, "hello", Ended::Clean)
        );
        let cut = ask(Then::Closes);
        // Anybody on the way can send a FIN: the gateway can't know whether that was all.
        assert!(cut.status == 502 || cut.ended == Ended::Aborted, "{cut:?}");
    }
}

#[test]
fn a_body_whose_end_is_known_needs_no_close_notify() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    let manners = Manners { then: Then::Closes, ..POLITE };
    let response = ask(&authority, &identity, "localhost", manners);
    assert_eq!(
        (response.status, response.text().as_str(), response.ended),
        (200, "{}", Ended::Clean)
    );
}

#[test]
fn a_long_upload_arrives_whole() {
    let authority = Identity::authority();
    let server = TlsServer::start(&authority.issue(&localhost(), 1), POLITE);
    let gateway = gateway(&server.at("localhost"), &authority.ca_file());
    let digits: String = (0..1_000_000).map(|n| char::from(b'0' + (n % 7) as u8)).collect();
    let body = format!(r#"{{"model":"m","x":"{digits}","messages":[]}}"#);
    assert_eq!(post(gateway.addr(), CHAT, &body).status, 200);
    let request = server.requests.recv_timeout(PATIENCE).unwrap();
    assert!(
        request.ends_with(body.as_bytes()),
        "{} bytes for a body of {}",
        request.len(),
        body.len()
    );
}

#[test]
fn a_burst_begins_all_its_handshakes_at_once() {
    const BURST: u32 = 64;
    // Nobody answers, so a handshake that waits for another one would wait for ever.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/v1", listener.local_addr().unwrap());
    let provider = provider_at("p", &url, &["m"], &burst(1, BURST), "connect_timeout_seconds: 60");
    let gateway = Gateway::start(&provider);
    let ask = |_| {
        let mut client = Client::connect(gateway.addr());
        client.post_json(CHAT, BODY);
        client
    };
    let _clients: Vec<Client> = (0..BURST).map(ask).collect();
    let (begun, hellos) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, mut first) = (stream.unwrap(), [0]);
            stream.read_exact(&mut first).unwrap();
            // The test is over where this fails.
            let _ = begun.send((first, stream));
        }
    });
    let next = |_| hellos.recv_timeout(PATIENCE).expect("a handshake that has begun");
    let all: Vec<_> = (0..BURST).map(next).collect();
    assert!(all.iter().all(|(first, _)| *first == [22]), "RFC 8446 section 5.1: a handshake");
}
