//! TLS sessions towards a provider are resumed, and only where that is as safe as a full handshake.

// Making certificates is all calls that can't fail here and return a Result.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use limitrate::tls::ClientContext;
use openssl::ssl::{Ssl, SslOptions, SslStream, SslVersion};

use support::{
    Gateway, Identity, Manners, Process, Response, Then, TlsServer, UNSHAPED, localhost, post,
    provider_at,
};

const CHAT: &str = "/v1/chat/completions";
const BOTH: [SslVersion; 2] = [SslVersion::TLS1_2, SslVersion::TLS1_3];

fn ask(addr: SocketAddr, model: &str) -> Response {
    post(addr, CHAT, format!(r#"{{"model":"{model}","messages":[]}}"#))
}

/// A gateway with one provider `m` on this server.
fn gateway(authority: &Identity, server: &TlsServer) -> Gateway {
    let url = server.at("localhost");
    Gateway::start(&provider_at("m", &url, &["m"], UNSHAPED, &authority.ca_file()))
}

/// For so many requests in turn, each on a connection of its own: whether its session was resumed.
#[track_caller]
fn resumed(gateway: &Gateway, server: &TlsServer, requests: usize) -> Vec<bool> {
    let one = |_| {
        assert_eq!(ask(gateway.addr(), "m").status, 200);
        server.next_is_resumed()
    };
    (0..requests).map(one).collect()
}

#[test]
fn a_session_is_resumed_by_each_connection_after_the_first_in_tls_1_2_and_1_3() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    for newest in BOTH {
        let server = TlsServer::start(&identity, Manners { newest, ..Manners::ONCE });
        let gateway = gateway(&authority, &server);
        assert_eq!(resumed(&gateway, &server, 4), [false, true, true, true], "{newest:?}");
    }
}

#[test]
fn a_session_is_resumed_although_its_connection_ended_without_a_close_notify() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    for newest in BOTH {
        // As servers do that close what has idled: the gateway hears of it while the connection is
        // in its pool.
        let manners = Manners { newest, then: Then::Closes, ..Manners::POLITE };
        let server = TlsServer::start(&identity, manners);
        let gateway = gateway(&authority, &server);
        assert_eq!(resumed(&gateway, &server, 3), [false, true, true], "{newest:?}");
    }
}

#[test]
fn a_server_that_keeps_sessions_itself_hears_that_a_connection_ended_well() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    for newest in BOTH {
        let mut acceptor = TlsServer::acceptor(&identity, newest);
        acceptor.set_options(SslOptions::NO_TICKET);
        acceptor.set_session_id_context(b"test").unwrap();
        let server = TlsServer::with(acceptor.build(), Manners::ONCE);
        let gateway = gateway(&authority, &server);
        assert_eq!(resumed(&gateway, &server, 3), [false, true, true], "{newest:?}");
    }
}

#[test]
fn a_server_that_declines_a_session_gets_a_full_handshake() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    for newest in BOTH {
        let acceptor = || TlsServer::acceptor(&identity, newest).build();
        let server = TlsServer::with(acceptor(), Manners::ONCE);
        let gateway = gateway(&authority, &server);
        assert_eq!(resumed(&gateway, &server, 2), [false, true], "{newest:?}");
        // It restarts: its tickets have another key. In TLS 1.3, some of the old ones may be left
        // to offer.
        server.replace(acceptor());
        let after = resumed(&gateway, &server, 5);
        assert!(!after[0] && after[4], "{newest:?}: {after:?}");
    }
}

#[test]
fn a_failed_handshake_forgets_the_sessions_with_that_server() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    let acceptor = TlsServer::acceptor(&identity, SslVersion::TLS1_2).build();
    let server = TlsServer::with(acceptor.clone(), Manners::ONCE);
    let gateway = gateway(&authority, &server);
    assert_eq!(resumed(&gateway, &server, 2), [false, true]);
    let stranger = Identity::authority().issue(&localhost(), 1);
    server.replace(TlsServer::acceptor(&stranger, SslVersion::TLS1_2).build());
    assert_eq!(ask(gateway.addr(), "m").status, 502);
    server.replace(acceptor);
    assert_eq!(resumed(&gateway, &server, 2), [false, true], "it would be resumed");
}

#[test]
fn a_fatal_alert_forgets_the_sessions_with_that_server() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    for newest in BOTH {
        let manners = Manners { newest, answer: "", then: Then::Breaks };
        let server = TlsServer::start(&identity, manners);
        let gateway = gateway(&authority, &server);
        for _ in 0..3 {
            assert_eq!(ask(gateway.addr(), "m").code(), "upstream_disconnected");
            assert!(!server.next_is_resumed(), "{newest:?}");
        }
    }
}

#[test]
fn a_session_serves_nobody_who_would_not_trust_the_server() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    for newest in BOTH {
        let server = TlsServer::start(&identity, Manners { newest, ..Manners::ONCE });
        let url = server.at("localhost");
        let entry = |name: &str, authority: &Identity| {
            provider_at(name, &url, &[name], UNSHAPED, &authority.ca_file())
        };
        let providers = entry("m", &authority) + &entry("stranger", &Identity::authority());
        let gateway = Gateway::start(&providers);
        assert_eq!(resumed(&gateway, &server, 2), [false, true]);
        assert_eq!(ask(gateway.addr(), "stranger").code(), "upstream_unreachable");
        assert_eq!(resumed(&gateway, &server, 1), [true]);
    }
}

#[test]
fn a_session_is_resumed_with_its_own_host_and_port_only() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    let pem = String::from_utf8(authority.certificate.to_pem().unwrap()).unwrap();
    let bundle = Process::file("bundle.pem", &pem);
    let variables = [("SSL_CERT_FILE", bundle.to_str().unwrap()), ("SSL_CERT_DIR", "/nowhere")];
    for newest in BOTH {
        // Both would resume what either began.
        let acceptor = TlsServer::acceptor(&identity, newest).build();
        let server = TlsServer::with(acceptor.clone(), Manners::ONCE);
        let other = TlsServer::with(acceptor, Manners::ONCE);
        // All share a context: they trust the same.
        let providers: String = [
            ("m", server.at("localhost")),
            ("twin", server.at("localhost")),
            ("address", server.at("127.0.0.1")),
            ("port", other.at("localhost")),
        ]
        .iter()
        .map(|(name, url)| provider_at(name, url, &[name], UNSHAPED, ""))
        .collect();
        let process = Process::serve_with(&Process::config("", &providers), "", &variables);
        for (model, resumes) in [("m", false), ("m", true), ("twin", true)] {
            assert_eq!(ask(process.addr(), model).status, 200);
            assert_eq!(server.next_is_resumed(), resumes, "{model} {newest:?}");
        }
        let refused = ask(process.addr(), "address");
        assert_eq!((refused.status, refused.code().as_str()), (502, "upstream_unreachable"));
        assert_eq!(ask(process.addr(), "port").status, 200);
        assert!(!other.next_is_resumed(), "{newest:?}");
    }
}

/// A session of this context, to its first answer.
fn exchange(ssl: Ssl, server: &TlsServer) {
    let tcp = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    let mut session = SslStream::new(ssl, tcp).unwrap();
    session.connect().unwrap();
    session.write_all(br#""messages":[]}"#).unwrap();
    assert!(session.read(&mut [0; 1024]).unwrap() > 0);
}

#[test]
fn a_ticket_of_tls_1_3_is_offered_once_and_a_session_of_tls_1_2_again() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    for newest in BOTH {
        let mut acceptor = TlsServer::acceptor(&identity, newest);
        acceptor.set_num_tickets(1).unwrap();
        let server = TlsServer::with(acceptor.build(), Manners::ONCE);
        let context = ClientContext::new(std::slice::from_ref(&authority.certificate)).unwrap();
        let begin = || context.server("localhost", server.port).ssl().unwrap();
        exchange(begin(), &server);
        let offers: Vec<bool> = (0..3).map(|_| begin().session().is_some()).collect();
        assert_eq!(offers, [true, newest == SslVersion::TLS1_2, newest == SslVersion::TLS1_2]);
        assert!(context.server("127.0.0.1", server.port).ssl().unwrap().session().is_none());
    }
}

#[test]
fn so_many_sessions_are_kept_and_no_more() {
    let authority = Identity::authority();
    let identity = authority.issue(&localhost(), 1);
    let mut acceptor = TlsServer::acceptor(&identity, SslVersion::TLS1_3);
    acceptor.set_num_tickets(50).unwrap();
    let server = TlsServer::with(acceptor.build(), Manners::ONCE);
    let context = ClientContext::new(std::slice::from_ref(&authority.certificate)).unwrap();
    let begin = || context.server("localhost", server.port).ssl().unwrap();
    let fresh = [begin(), begin()];
    for ssl in fresh {
        exchange(ssl, &server);
    }
    let kept = (0..200).take_while(|_| begin().session().is_some()).count();
    assert_eq!(kept, 64);
}
