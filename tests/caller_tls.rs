//! TLS towards callers: who gets a session, what its end means on either side, and that nothing else changes by it.

// Making certificates is all calls that can't fail here and return a Result.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use limitrate::tls::ClientContext;
use openssl::ec::EcKey;
use openssl::pkey::PKey;
use openssl::rsa::Rsa;
use openssl::ssl::{ShutdownState, SslConnector, SslMethod, SslStream, SslVersion};
use rustix::process::Signal;
use support::{
    Client, Ended, Ending, Gate, Gateway, Identity, PATIENCE, Process, Reply, UNSHAPED, Upstream,
    localhost, post, provider_yaml, spaced, sse,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;
const BOTH: [SslVersion; 2] = [SslVersion::TLS1_2, SslVersion::TLS1_3];

/// A session with a server that `authority` vouches for, in this version.
fn session_in(
    version: SslVersion,
    authority: &Identity,
    addr: SocketAddr,
) -> Result<SslStream<TcpStream>, Box<dyn std::error::Error>> {
    let mut connector = SslConnector::builder(SslMethod::tls_client())?;
    connector.cert_store_mut().add_cert(authority.certificate.clone())?;
    connector.set_min_proto_version(Some(version))?;
    connector.set_max_proto_version(Some(version))?;
    // Without this, OpenSSL itself does not speak TLS 1.1.
    connector.set_cipher_list("DEFAULT:@SECLEVEL=0")?;
    let tcp = TcpStream::connect_timeout(&addr, PATIENCE)?;
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    Ok(connector.build().connect("localhost", tcp)?)
}

fn session(authority: &Identity, addr: SocketAddr) -> SslStream<TcpStream> {
    session_in(SslVersion::TLS1_3, authority, addr)
        .unwrap_or_else(|error| panic!("no session: {error}"))
}

fn connect(authority: &Identity, addr: SocketAddr) -> Client {
    Client::over_tls(session(authority, addr))
}

/// A gateway with a certificate of this authority.
fn gateway(authority: &Identity, upstream: &Upstream, server: &str, rate_limit: &str) -> Gateway {
    let tls = authority.issue(&localhost(), 1).tls();
    let provider = provider_yaml("p", upstream.addr(), &["m"], rate_limit, "");
    Gateway::start_with(&format!("{tls}\n{server}"), &provider, &[])
}

/// All that comes until the end, and whether that end was said.
fn to_the_end(session: &mut SslStream<TcpStream>) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    let _ = session.read_to_end(&mut all);
    (all, session.get_shutdown().contains(ShutdownState::RECEIVED))
}

#[test]
fn requests_are_served_in_tls_1_2_and_1_3_and_no_older_one() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let authority = Identity::authority();
    let gateway = gateway(&authority, &upstream, "", UNSHAPED);
    for version in BOTH {
        let mut client =
            Client::over_tls(session_in(version, &authority, gateway.addr()).expect("a session"));
        for _ in 0..3 {
            client.post_json(CHAT, BODY);
            assert_eq!(client.read_response().status, 200, "{version:?}");
        }
    }
    let refused = session_in(SslVersion::TLS1_1, &authority, gateway.addr())
        .expect_err("too old")
        .to_string();
    assert!(refused.contains("protocol version"), "{refused}");
}

#[test]
fn keys_in_every_form_serve_and_the_whole_chain_is_sent() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let (root, provider) =
        (Identity::authority(), provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""));
    let middle = root.delegate();
    let identity = middle.issue(&localhost(), 1);
    let ec: EcKey<_> = identity.key.ec_key().unwrap();
    let rsa = Rsa::generate(2048).unwrap();
    let rsa_key = PKey::from_rsa(rsa.clone()).unwrap();
    let rsa_identity = middle.issue_for(&localhost(), 1, rsa_key.clone());
    for (identity, key) in [
        (&identity, identity.key.private_key_to_pem_pkcs8().unwrap()),
        (&identity, ec.private_key_to_pem().unwrap()),
        (&rsa_identity, rsa_key.private_key_to_pem_pkcs8().unwrap()),
        (&rsa_identity, rsa.private_key_to_pem().unwrap()),
    ] {
        let gateway = Gateway::start_with(&identity.serves(&[&middle], &key), &provider, &[]);
        // It knows the root only.
        let mut client = connect(&root, gateway.addr());
        client.get("/v1/models");
        assert_eq!(client.read_response().status, 200, "{}", String::from_utf8_lossy(&key[..30]));
    }
}

#[test]
fn plain_http_is_told_in_plain_http_that_this_is_no_place_for_it() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let authority = Identity::authority();
    let gateway = gateway(&authority, &upstream, "", UNSHAPED);
    let response = post(gateway.addr(), CHAT, BODY);
    assert_eq!((response.status, response.code().as_str()), (400, "plain_http"));
    assert!(response.error()["message"].as_str().unwrap().contains("https://"), "{response:?}");
    assert_eq!(
        (response.header("connection").as_deref(), response.ended),
        (Some("close"), Ended::Clean)
    );
    assert!(upstream.requests().is_empty());
}

/// The first provider's figures.
fn stats(authority: &Identity, addr: SocketAddr) -> serde_json::Value {
    let mut client = connect(authority, addr);
    client.get("/admin/stats");
    client.read_response().json()["providers"][0].take()
}

fn wait_stats(authority: &Identity, addr: SocketAddr, name: &str, value: u64) {
    let deadline = Instant::now() + PATIENCE;
    while stats(authority, addr)[name] != value {
        assert!(Instant::now() < deadline, "{name} never is {value}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn request(tag: &str) -> String {
    let body = format!(r#"{{"model":"m","tag":"{tag}"}}"#);
    format!("POST {CHAT} HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

#[test]
fn who_hangs_up_in_line_is_gone_however_it_does_it() {
    type HangUp = fn(&mut SslStream<TcpStream>);
    let ways: [(&str, HangUp); 3] = [
        ("a close_notify and FIN", |session| {
            session.shutdown().unwrap();
            session.get_ref().shutdown(Shutdown::Write).unwrap();
        }),
        ("a close_notify", |session| {
            session.shutdown().unwrap();
        }),
        ("FIN", |session| session.get_ref().shutdown(Shutdown::Write).unwrap()),
    ];
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let authority = Identity::authority();
    let gateway = gateway(&authority, &upstream, "", &spaced(3_600_000));
    let mut first = connect(&authority, gateway.addr());
    first.post_json(CHAT, BODY);
    assert_eq!(first.read_response().status, 200);
    let mut gone = 0;
    for version in BOTH {
        for (name, hang_up) in ways {
            let mut leaver = session_in(version, &authority, gateway.addr()).expect("a session");
            leaver.write_all(request("leaver").as_bytes()).unwrap();
            wait_stats(&authority, gateway.addr(), "queued_ahead", 1);
            hang_up(&mut leaver);
            wait_stats(&authority, gateway.addr(), "queued_ahead", 0);
            gone += 1;
            assert_eq!(
                stats(&authority, gateway.addr())["cancelled_in_queue"],
                gone,
                "{name} in {version:?}"
            );
        }
    }
}

#[test]
fn requests_that_come_ahead_are_kept_and_answered_in_order() {
    let gate = Gate::closed();
    let held = gate.clone();
    let upstream = Upstream::answering(move |request, _| {
        let tag = request.json()["tag"].as_str().unwrap().to_owned();
        Reply::stream(vec![tag.into_bytes()], &held)
    });
    let authority = Identity::authority();
    let gateway = gateway(&authority, &upstream, "", UNSHAPED);
    let mut client = connect(&authority, gateway.addr());
    // One record with a request and a half; the rest while the first is at the provider; then one more.
    let (second, third) = (request("second"), request("third"));
    client.send(format!("{}{}", request("first"), &second[..30]));
    upstream.wait_requests(1, PATIENCE);
    client.send(&second[30..]);
    client.send(&third);
    gate.release(100);
    for tag in ["first", "second", "third"] {
        assert_eq!(client.read_response().text(), tag);
    }
}

#[test]
fn events_come_as_the_provider_sends_them() {
    let gate = Gate::closed();
    let held = gate.clone();
    let events = [sse::event("a"), sse::event("b"), sse::event("c")];
    let script = events.to_vec();
    let upstream = Upstream::answering(move |_, _| Reply::stream(script.clone(), &held));
    let authority = Identity::authority();
    let gateway = gateway(&authority, &upstream, "", UNSHAPED);
    let mut client = connect(&authority, gateway.addr());
    client.post_json(CHAT, BODY);
    for (at, event) in events.iter().enumerate() {
        gate.release(1);
        if at == 0 {
            client.read_head();
        }
        assert_eq!(&client.read_chunk().unwrap().bytes, event, "the next is held back");
    }
}

#[test]
fn long_bodies_arrive_whole_both_ways_however_slowly_they_are_read() {
    let answer: Vec<u8> = (0..8_000_000u32).map(|n| b'a' + (n % 23) as u8).collect();
    let sent = answer.clone();
    let upstream = Upstream::answering(move |_, _| Reply::with_headers("", &sent));
    let authority = Identity::authority();
    let gateway = gateway(&authority, &upstream, "", UNSHAPED);
    let body = format!(r#"{{"model":"m","x":"{}"}}"#, "0123456".repeat(300_000));
    for version in BOTH {
        let mut client =
            Client::over_tls(session_in(version, &authority, gateway.addr()).expect("a session"));
        client.post_json(CHAT, &body);
        upstream.wait_requests(1, PATIENCE);
        assert!(client.read_response().body == answer, "{version:?}");
    }
    assert!(upstream.requests().iter().all(|request| request.body == body.as_bytes()));
}

#[test]
fn a_tidy_end_is_said() {
    let gate = Gate::open();
    let upstream =
        Upstream::answering(move |_, _| Reply::stream(vec![b"all of it".to_vec()], &gate));
    let authority = Identity::authority();
    let gateway = gateway(&authority, &upstream, "keep_alive_seconds: 0.1", UNSHAPED);
    let ask = |text: &str| {
        let mut session = session(&authority, gateway.addr());
        session.write_all(text.as_bytes()).unwrap();
        to_the_end(&mut session)
    };
    let close = "Connection: close\r\nContent-Length: ";
    for (text, end) in [
        // After an answer that closes, after one that ends with the connection, and when it has idled for too long.
        (request("x").replace("Content-Length: ", close), "\r\n0\r\n\r\n"),
        (request("x").replace("HTTP/1.1", "HTTP/1.0"), "all of it"),
        (request("x"), "\r\n0\r\n\r\n"),
        ("nonsense\r\n\r\n".to_owned(), "}"),
    ] {
        let (answer, said) = ask(&text);
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.ends_with(end) && said, "{said} {text:?}: {answer:?}");
    }
}

#[test]
fn the_end_of_a_broken_answer_is_not_said() {
    for ending in [Ending::Close, Ending::Reset] {
        let gate = Gate::open();
        let upstream = Upstream::answering(move |_, _| Reply::Stream {
            chunks: vec![b"half of it".to_vec()],
            gate: gate.clone(),
            ending,
        });
        let authority = Identity::authority();
        let gateway = gateway(&authority, &upstream, "", UNSHAPED);
        for version in BOTH {
            // HTTP/1.0 has nothing but the end to tell a whole answer by.
            for http in ["HTTP/1.1", "HTTP/1.0"] {
                let mut session =
                    session_in(version, &authority, gateway.addr()).expect("a session");
                session.write_all(request("x").replace("HTTP/1.1", http).as_bytes()).unwrap();
                let (answer, said) = to_the_end(&mut session);
                assert!(
                    !said,
                    "{ending:?} {http} {version:?}: {:?}",
                    String::from_utf8_lossy(&answer)
                );
            }
        }
    }
}

#[test]
fn who_does_not_shake_hands_is_closed_and_keeps_nobody_waiting() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let authority = Identity::authority();
    let gateway = gateway(&authority, &upstream, "header_timeout_seconds: 1", UNSHAPED);
    let began = Instant::now();
    // Nothing, a record's beginning, and what is no TLS at all.
    let mut silent: Vec<Client> = (0..20).map(|_| Client::connect(gateway.addr())).collect();
    silent[1..].iter_mut().for_each(|client| client.send(b"\x16\x03\x01"));
    let mut noise = Client::connect(gateway.addr());
    noise.send([0x16, 3, 1, 0, 5, 1, 2, 3, 4, 5]);
    assert!(noise.is_closed(PATIENCE));
    let mut client = connect(&authority, gateway.addr());
    client.post_json(CHAT, BODY);
    assert_eq!(client.read_response().status, 200);
    for mut client in silent {
        assert!(client.is_closed(PATIENCE));
    }
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
}

#[test]
fn who_has_not_shaken_hands_does_not_hold_up_the_end() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let authority = Identity::authority();
    let gateway = gateway(
        &authority,
        &upstream,
        "header_timeout_seconds: 3600\ndrain_seconds: 3600",
        UNSHAPED,
    );
    let _silent = Client::connect(gateway.addr());
    let mut beginning = Client::connect(gateway.addr());
    beginning.send(b"\x16\x03\x01");
    let _idle = connect(&authority, gateway.addr());
    gateway.drain();
    assert!(gateway.join(PATIENCE));
}

#[test]
fn one_connection_too_many_is_told_so() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let authority = Identity::authority();
    let gateway = gateway(&authority, &upstream, "max_connections: 1", UNSHAPED);
    let _first = connect(&authority, gateway.addr());
    assert_eq!(connect(&authority, gateway.addr()).read_response().code(), "too_many_connections");
}

/// `server:` of a file with this port and these certificates; the socket speaks plain HTTP beside it.
fn file_text(tls: &str, upstream: &Upstream) -> String {
    let provider = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, "");
    format!("server:\n  host: 127.0.0.1\n  port: 0\n{tls}providers:\n{provider}")
}

/// Where the files of a `tls:` line are.
fn files(tls: &str) -> [&Path; 2] {
    let path = |key: &str| {
        let rest = tls.split(key).nth(1).expect("the key is there");
        Path::new(rest.split([',', '}']).next().expect("a path").trim())
    };
    [path("cert_file: "), path("key_file: ")]
}

#[test]
fn a_reload_takes_the_new_certificate_though_the_file_is_the_same_and_no_faulty_one() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let (old, new) = (Identity::authority(), Identity::authority());
    let tls = old.issue(&localhost(), 1).tls();
    let file = Process::file("config.yaml", &file_text(&format!("  {tls}\n"), &upstream));
    let process = Process::serve(&file);
    assert!(
        process.said().contains(&format!("at https://{}/v1", process.addr())),
        "{}",
        process.said()
    );
    let mut connected = connect(&old, process.addr());
    let reload = |part: &str| {
        process.signal(Signal::HUP);
        process.wait_log(part)
    };
    reload("reloaded: nothing is different");
    let identity = new.issue(&localhost(), 1);
    let [cert_file, key_file] = files(&tls);
    fs::write(cert_file, identity.certificate.to_pem().unwrap()).unwrap();
    reload("nothing was reloaded");
    process.wait_log("does not belong to the certificate in cert_file");
    connect(&old, process.addr());
    fs::write(key_file, identity.key.private_key_to_pem_pkcs8().unwrap()).unwrap();
    reload("reloaded: server is changed");
    connect(&new, process.addr());
    assert!(session_in(SslVersion::TLS1_3, &old, process.addr()).is_err(), "the old one is gone");
    connected.post_json(CHAT, BODY);
    assert_eq!(connected.read_response().status, 200, "who was connected stays");
    fs::remove_file(key_file).unwrap();
    reload("nothing was reloaded");
    process.wait_log("cannot be read");
    connect(&new, process.addr());
    // TLS itself can come and go, too.
    fs::write(&file, file_text("", &upstream)).unwrap();
    let said = reload("from now on at");
    assert!(said.contains(&format!("now on at http://{}/v1", process.addr())), "{said}");
    process.wait_log("reloaded");
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
}

#[test]
fn a_clients_session_is_resumed_after_a_reload_that_keeps_the_certificate() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let authority = Identity::authority();
    let tls = authority.issue(&localhost(), 1).tls();
    let process =
        Process::serve(&Process::file("config.yaml", &file_text(&format!("  {tls}\n"), &upstream)));
    let context = ClientContext::new(std::slice::from_ref(&authority.certificate)).unwrap();
    let resumes = || {
        let ssl = context.server("localhost", process.addr().port()).ssl().unwrap();
        let mut session = SslStream::new(ssl, TcpStream::connect(process.addr()).unwrap()).unwrap();
        session.connect().unwrap();
        let resumed = session.ssl().session_reused();
        // The tickets come before the answer.
        let mut client = Client::over_tls(session);
        client.post_json(CHAT, BODY);
        assert_eq!(client.read_response().status, 200);
        resumed
    };
    let reload = |part: &str| {
        process.signal(Signal::HUP);
        process.wait_log(part);
    };
    assert_eq!([resumes(), resumes()], [false, true]);
    reload("reloaded: nothing is different");
    assert!(resumes(), "the keys of its tickets are gone");
    let identity = authority.issue(&localhost(), 1);
    let [cert_file, key_file] = files(&tls);
    fs::write(cert_file, identity.certificate.to_pem().unwrap()).unwrap();
    fs::write(key_file, identity.key.private_key_to_pem_pkcs8().unwrap()).unwrap();
    reload("reloaded: server is changed");
    assert!(!resumes(), "a session is resumed that another certificate began");
}

#[test]
fn health_and_top_ask_in_tls_where_the_file_says_so() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let tls = Identity::authority().issue(&localhost(), 1).tls();
    let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = probe.local_addr().unwrap().port();
    drop(probe);
    let text =
        file_text(&format!("  {tls}\n"), &upstream).replace("port: 0", &format!("port: {port}"));
    let file = Process::file("config.yaml", &text);
    let _process = Process::serve(&file);
    let said = |command: &str, place: &str, value: &str| {
        let output = Process::run(&[command, place, value]);
        (
            output.status.code(),
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        )
    };
    let (code, words) = said("health", "--config", file.to_str().unwrap());
    assert!(
        code == Some(0) && words.starts_with(&format!("https://127.0.0.1:{port} is well")),
        "{words}"
    );
    let (code, screen) = said("top", "--config", file.to_str().unwrap());
    assert!(code == Some(0) && screen.contains("\np "), "{screen}");
    // A URL may lead anywhere: there the certificate counts.
    let (code, words) = said("health", "--url", &format!("https://localhost:{port}"));
    assert!(code == Some(1) && words.contains("certificate"), "{words}");
}

#[test]
fn an_expired_certificate_is_warned_of() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let authority = Identity::authority();
    for (days, warned) in [(1, false), (-1, true)] {
        let tls = authority.issue(&localhost(), days).tls();
        let file = Process::file("config.yaml", &file_text(&format!("  {tls}\n"), &upstream));
        let output = Process::run(&["check", "--config", file.to_str().unwrap()]);
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && said.contains("tls        1.2 and 1.3, certificate until "),
            "{said}"
        );
        assert_eq!(
            said.contains("warning: the certificate in server.tls is not valid"),
            warned,
            "{said}"
        );
    }
}

#[test]
fn the_socket_beside_it_speaks_plain_http() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let authority = Identity::authority();
    let file = Process::file("x", "");
    let here = std::env::current_dir().unwrap();
    // Its whole path might be too long for a socket.
    let path = file.with_file_name("s");
    let path = path.strip_prefix(&here).unwrap_or(&path);
    let gateway = gateway(&authority, &upstream, &format!("socket: {}", path.display()), UNSHAPED);
    let mut client = Client::connect_unix(path);
    client.post_json(CHAT, BODY);
    assert_eq!(client.read_response().status, 200);
    drop(gateway);
}
