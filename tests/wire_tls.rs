//! TLS towards the provider: who is trusted, what is refused and in which words, and where a body ends.

// Making certificates is all calls that can't fail here and return a Result.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use openssl::ssl::{NameType, SslAcceptor, SslMethod, SslStream, SslVersion};
use openssl::x509::extension::SubjectAlternativeName;

use support::{
    Client, Ended, Gateway, Identity, Manner, PATIENCE, Process, Proxy, Response, UNSHAPED,
    localhost, post, provider_at,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;
const BODY_END: &[u8] = br#""messages":[]}"#;
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
const UNTIL_CLOSE: &str = "HTTP/1.1 200 OK\r\n\r\nhello";

/// How a server speaks.
#[derive(Clone, Copy)]
struct Manners {
    newest: SslVersion,
    answer: &'static str,
    /// Whether it closes the connection behind the answer, and whether with a close_notify.
    closes: Option<bool>,
}

const POLITE: Manners = Manners { newest: SslVersion::TLS1_3, answer: OK, closes: None };

/// A provider behind TLS on 127.0.0.1. Its threads end with the connections; the listener lives as long as the test.
struct TlsServer {
    port: u16,
    /// The server name of each handshake that succeeded.
    names: Receiver<Option<String>>,
    /// Each request, head and body.
    requests: Receiver<Vec<u8>>,
}

impl TlsServer {
    fn start(identity: &Identity, manners: Manners) -> TlsServer {
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).unwrap();
        acceptor.set_private_key(&identity.key).unwrap();
        acceptor.set_certificate(&identity.certificate).unwrap();
        acceptor.set_min_proto_version(Some(SslVersion::TLS1)).unwrap();
        acceptor.set_max_proto_version(Some(manners.newest)).unwrap();
        // Without this, OpenSSL itself refuses to serve TLS 1.1.
        acceptor.set_cipher_list("DEFAULT:@SECLEVEL=0").unwrap();
        let acceptor = acceptor.build();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let ((name, names), (request, requests)) = (channel(), channel());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (acceptor, name, request) = (acceptor.clone(), name.clone(), request.clone());
                thread::spawn(move || {
                    // Fails where the gateway refuses the certificate: that is for the test to see on the other side.
                    let Ok(mut tls) = acceptor.accept(stream.unwrap()) else { return };
                    // The test is over where this fails.
                    let _ = name.send(tls.ssl().servername(NameType::HOST_NAME).map(str::to_owned));
                    serve(&mut tls, manners, &request);
                });
            }
        });
        TlsServer { port, names, requests }
    }

    fn at(&self, host: &str) -> String {
        format!("https://{host}:{}/v1", self.port)
    }
}

fn serve(tls: &mut SslStream<TcpStream>, manners: Manners, requests: &Sender<Vec<u8>>) {
    let (mut request, mut piece) = (Vec::new(), vec![0; 16 * 1024]);
    while let Ok(n @ 1..) = tls.read(&mut piece) {
        request.extend_from_slice(&piece[..n]);
        if !request.ends_with(BODY_END) {
            continue;
        }
        // The test is over where this fails.
        let _ = requests.send(std::mem::take(&mut request));
        tls.write_all(manners.answer.as_bytes()).unwrap();
        match manners.closes {
            None => {}
            Some(notifies) => {
                if notifies {
                    tls.shutdown().unwrap();
                }
                return;
            }
        }
    }
}

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
        assert_eq!(server.names.recv_timeout(PATIENCE).unwrap().as_deref(), name);
        assert!(server.names.try_recv().is_err(), "one handshake for three requests");
    }
}

#[test]
fn the_systems_certificates_are_read_once_for_all_connections() {
    let authority = Identity::authority();
    let manners = Manners { closes: Some(true), ..POLITE };
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
    assert_eq!(server.names.try_iter().count(), 4, "a connection for each request");
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
    assert_eq!(server.names.recv_timeout(PATIENCE).unwrap().as_deref(), Some("localhost"));
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
    assert_refused(&ask(&authority, &identity, "localhost", POLITE), &["hostname mismatch"]);
    assert_refused(&ask(&authority, &identity, "127.0.0.1", POLITE), &["ip address mismatch"]);
}

#[test]
fn an_expired_certificate_is_refused() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), -1);
    assert_refused(&ask(&authority, &identity, "localhost", POLITE), &["certificate has expired"]);
}

#[test]
fn tls_1_2_is_spoken_and_tls_1_1_is_not() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    let newest = |newest| ask(&authority, &identity, "localhost", Manners { newest, ..POLITE });
    assert_eq!(newest(SslVersion::TLS1_2).status, 200);
    assert_refused(&newest(SslVersion::TLS1_1), &["version"]);
}

#[test]
fn a_body_that_ends_with_the_connection_is_whole_only_behind_a_close_notify() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    for newest in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let ask = |notifies| {
            let manners = Manners { newest, answer: UNTIL_CLOSE, closes: Some(notifies) };
            ask(&authority, &identity, "localhost", manners)
        };
        let whole = ask(true);
        assert_eq!(
            (whole.status, whole.text().as_str(), whole.ended),
            (200, "hello", Ended::Clean)
        );
        let cut = ask(false);
        // Anybody on the way can send a FIN: the gateway can't know whether that was all.
        assert!(cut.status == 502 || cut.ended == Ended::Aborted, "{cut:?}");
    }
}

#[test]
fn a_body_whose_end_is_known_needs_no_close_notify() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    let manners = Manners { closes: Some(false), ..POLITE };
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
