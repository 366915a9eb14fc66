//! What a failed TLS handshake is called: a plain sentence that says what to do, without OpenSSL's
//! source lines.

// Making certificates is all calls that can't fail here and return a Result.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use openssl::ssl::{SniError, SslAcceptorBuilder, SslVerifyMode, SslVersion};

use support::{
    Gateway, Identity, Manner, Manners, Process, Proxy, TlsServer, UNSHAPED, localhost, post,
    provider_at,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;
const UNKNOWN_CA: &str = "no CA that this machine trusts signed its certificate, or it does not \
    send an intermediate certificate (unable to get local issuer certificate)";

/// No source file, line, code or function of OpenSSL.
#[track_caller]
fn assert_plain(words: &str) {
    for part in ["ssl/", ".c:", "error:", "0A0000", "routines"] {
        assert!(!words.contains(part), "{part} in {words:?}");
    }
}

/// The message for a request that a gateway with this provider cannot serve.
#[track_caller]
fn message_of(base_url: &str, extras: &str) -> String {
    let gateway = Gateway::start(&provider_at("p", base_url, &["m"], UNSHAPED, extras));
    let response = post(gateway.addr(), CHAT, BODY);
    assert_eq!(response.status, 502, "{response:?}");
    let message = response.error()["message"].as_str().unwrap().to_owned();
    assert_plain(&message);
    message
}

/// The reason in the message for a handshake that fails.
#[track_caller]
fn reason_of(base_url: &str, extras: &str) -> String {
    let message = message_of(base_url, extras);
    let target = base_url.trim_start_matches("https://").trim_end_matches("/v1");
    let begin =
        format!("The provider `p` cannot be reached: the TLS handshake with {target} failed: ");
    let reason = message.strip_prefix(&begin).and_then(|rest| rest.strip_suffix('.'));
    reason.unwrap_or_else(|| panic!("{message}")).to_owned()
}

/// The reason for a server with this acceptor.
#[track_caller]
fn with_acceptor(
    authority: &Identity,
    newest: SslVersion,
    change: impl FnOnce(&mut SslAcceptorBuilder),
) -> String {
    let mut acceptor = TlsServer::acceptor(&authority.issue(&localhost(), 1), newest);
    change(&mut acceptor);
    let server = TlsServer::with(acceptor.build(), Manners::POLITE);
    reason_of(&server.at("localhost"), &authority.ca_file())
}

/// A server that reads what comes first and says this. Its port.
fn saying(answer: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut vec![0; 64 * 1024]);
            let _ = stream.write_all(answer);
        }
    });
    port
}

#[test]
fn a_certificate_of_an_unknown_ca_names_ca_file() {
    let authority = Identity::authority();
    let server = TlsServer::start(&authority.issue(&localhost(), 1), Manners::POLITE);
    let trust = "name the CA's file with `ca_file`";
    let reason = reason_of(&server.at("localhost"), "");
    assert_eq!(reason, format!("{UNKNOWN_CA}; {trust}"));
    // A CA of the same name with another key.
    let reason = reason_of(&server.at("localhost"), &Identity::authority().ca_file());
    assert_eq!(
        reason,
        format!(
            "{}; {trust}",
            UNKNOWN_CA
                .replace("unable to get local issuer certificate", "certificate signature failure")
        )
    );
}

#[test]
fn a_certificate_that_is_self_signed_names_ca_file() {
    let server = TlsServer::start(&Identity::authority(), Manners::POLITE);
    assert_eq!(
        reason_of(&server.at("localhost"), ""),
        "this machine does not trust its certificate (self-signed certificate); \
         name the CA's file with `ca_file`"
    );
}

#[test]
fn a_missing_intermediate_certificate_is_named_as_a_cause() {
    let root = Identity::authority();
    let identity = root.delegate().issue(&localhost(), 1);
    let server = TlsServer::start(&identity, Manners::POLITE);
    assert_eq!(
        reason_of(&server.at("localhost"), &root.ca_file()),
        format!("{UNKNOWN_CA}; name the CA's file with `ca_file`")
    );
}

#[test]
fn dates_of_a_certificate_are_told_apart() {
    let authority = Identity::authority();
    let reason = |days| {
        let server = TlsServer::start(&authority.issue(&localhost(), days), Manners::POLITE);
        reason_of(&server.at("localhost"), &authority.ca_file())
    };
    assert_eq!(reason(-1), "its certificate, or one that signed it, has expired");
    // It begins in two days.
    assert_eq!(reason(4), "its certificate is not yet valid; check the clock of this machine");
}

#[test]
fn a_certificate_for_another_name_names_the_one_that_was_expected() {
    let authority = Identity::authority();
    let server = TlsServer::start(&authority.issue(&localhost(), 1), Manners::POLITE);
    let mut names = localhost();
    names.ip("127.0.0.9");
    let other = TlsServer::start(&authority.issue(&names, 1), Manners::POLITE);
    let ca = authority.ca_file();
    let by_address = reason_of(&server.at("127.0.0.1"), &ca);
    assert_eq!(by_address, "its certificate is not for the IP address 127.0.0.1");
    assert_eq!(reason_of(&other.at("127.0.0.1"), &ca), by_address);
    let mut names = openssl::x509::extension::SubjectAlternativeName::new();
    names.dns("elsewhere.example");
    let elsewhere = TlsServer::start(&authority.issue(&names, 1), Manners::POLITE);
    assert_eq!(
        reason_of(&elsewhere.at("localhost"), &ca),
        "its certificate is not for the host localhost"
    );
}

#[test]
fn a_server_without_a_common_version_or_cipher_is_told_so() {
    let authority = Identity::authority();
    let version = with_acceptor(&authority, SslVersion::TLS1_1, |_| {});
    assert_eq!(version, "it offers no TLS 1.2 or later");
    let cipher = with_acceptor(&authority, SslVersion::TLS1_2, |acceptor| {
        acceptor.set_cipher_list("ADH-AES128-SHA256:@SECLEVEL=0").unwrap();
    });
    assert_eq!(
        cipher,
        "it has no cipher in common with limitrate, or it demands a client certificate \
         (TLS alert handshake_failure)"
    );
}

#[test]
fn an_alert_is_told_by_its_name() {
    let authority = Identity::authority();
    let unknown = with_acceptor(&authority, SslVersion::TLS1_3, |acceptor| {
        acceptor.set_servername_callback(|_, _| Err(SniError::ALERT_FATAL));
    });
    assert_eq!(unknown, "it does not serve the host localhost (TLS alert unrecognized_name)");
    // access_denied, and one that no RFC knows.
    let port = saying(b"\x15\x03\x03\0\x02\x02\x31");
    let url = format!("https://localhost:{port}/v1");
    assert_eq!(reason_of(&url, ""), "TLS alert access_denied");
    let port = saying(b"\x15\x03\x03\0\x02\x02\xc8");
    let url = format!("https://localhost:{port}/v1");
    assert_eq!(reason_of(&url, ""), "TLS alert 200");
}

#[test]
fn a_client_certificate_that_is_demanded_is_told_so() {
    let authority = Identity::authority();
    let reason = with_acceptor(&authority, SslVersion::TLS1_2, |acceptor| {
        acceptor.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
    });
    assert!(reason.contains("or it demands a client certificate"), "{reason}");
    // In TLS 1.3 the server says so after the handshake: before a request is sent, or after it.
    let mut acceptor = TlsServer::acceptor(&authority.issue(&localhost(), 1), SslVersion::TLS1_3);
    acceptor.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
    let server = TlsServer::with(acceptor.build(), Manners::POLITE);
    for rate_limit in [UNSHAPED, "{mode: window, rpm: 30}"] {
        let url = server.at("localhost");
        let gateway =
            Gateway::start(&provider_at("p", &url, &["m"], rate_limit, &authority.ca_file()));
        let response = post(gateway.addr(), CHAT, BODY);
        let message = response.error()["message"].as_str().unwrap().to_owned();
        assert!(
            message.contains("it demands a client certificate, and limitrate has none"),
            "{message}"
        );
    }
}

#[test]
fn a_server_that_closes_in_the_handshake_is_told_so() {
    let url = format!("https://localhost:{}/v1", saying(b""));
    assert_eq!(reason_of(&url, ""), "it closed the connection during the handshake");
}

#[test]
fn https_to_a_port_without_tls_is_told_to_try_http() {
    let advice = "it does not speak TLS on that port; try http:// in base_url";
    for answer in [
        &b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"[..],
        b"<!DOCTYPE HTML>\n<html><head><title>Error response</title>",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"-ERR unknown command\r\n",
    ] {
        let url = format!("https://localhost:{}/v1", saying(answer));
        assert_eq!(reason_of(&url, ""), advice);
    }
    // The proxy leads there, too.
    let proxy = Proxy::start(Manner::Tunnels);
    let url = format!("https://localhost:{}/v1", saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
    assert_eq!(reason_of(&url, &format!("proxy: http://{}", proxy.addr())), advice);
}

#[test]
fn http_to_a_port_with_tls_is_told_to_try_https() {
    let authority = Identity::authority();
    // OpenSSL closes the connection, others send an alert: decode_error, unexpected_message.
    let server = TlsServer::start(&authority.issue(&localhost(), 1), Manners::POLITE);
    let ports =
        [server.port, saying(b"\x15\x03\x03\0\x02\x02\x32"), saying(b"\x15\x03\x01\0\x02\x02\x0a")];
    for port in ports {
        let message = message_of(&format!("http://localhost:{port}/v1"), "");
        assert!(message.contains("try https:// in base_url."), "{message}");
    }
}

#[test]
fn a_server_that_has_answered_without_tls_is_not_told_to_try_https() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    thread::spawn(move || {
        let answers =
            [&b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"[..], b""];
        for (stream, answer) in listener.incoming().zip(answers) {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut vec![0; 64 * 1024]);
            stream.write_all(answer).unwrap();
        }
    });
    let gateway = Gateway::start(&provider_at("p", &url, &["m"], UNSHAPED, ""));
    assert_eq!(post(gateway.addr(), CHAT, BODY).status, 200);
    let broken = post(gateway.addr(), CHAT, BODY);
    assert_eq!(broken.code(), "upstream_disconnected", "{broken:?}");
    assert!(!broken.text().contains("https://"), "{broken:?}");
}

/// What `limitrate health` says of a URL, after the URL.
#[track_caller]
fn health(url: &str) -> String {
    let output = Process::run(&["health", "--url", url]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    assert_plain(&words);
    let begin = format!("limitrate: {url} is not well: ");
    words.strip_prefix(&begin).unwrap_or_else(|| panic!("{words}")).trim_end().to_owned()
}

#[test]
fn health_uses_the_same_words() {
    let authority = Identity::authority();
    let at = |identity: &Identity| {
        let server = TlsServer::start(identity, Manners::POLITE);
        format!("https://localhost:{}", server.port)
    };
    let trust = "name the CA's file in the variable SSL_CERT_FILE";
    assert_eq!(
        health(&at(&authority.issue(&localhost(), 1))),
        format!("can't connect: {UNKNOWN_CA}; {trust}")
    );
    assert_eq!(
        health(&format!("https://localhost:{}", saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"))),
        "can't connect: it does not speak TLS on that port; try http:// in the URL"
    );
    assert_eq!(
        health(&format!("https://localhost:{}", saying(b""))),
        "can't connect: it closed the connection during the handshake"
    );
    assert_eq!(
        health(&format!("http://localhost:{}", saying(b"\x15\x03\x03\0\x02\x02\x32"))),
        "not an HTTP/1.x response but a TLS alert: that port speaks TLS"
    );
    // As this gateway itself answers under `server.tls`.
    let upstream = Identity::authority();
    let provider = provider_at("p", "http://127.0.0.1:1/v1", &["m"], UNSHAPED, "");
    let gateway = Gateway::start_with(&upstream.issue(&localhost(), 1).tls(), &provider, &[]);
    assert_eq!(
        health(&format!("http://{}", gateway.addr())),
        "it answers with status 400; if it serves TLS, try https:// in the URL"
    );
}
