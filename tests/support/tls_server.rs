//! A provider behind TLS, by OpenSSL itself: who comes, whether the session is resumed, what is
//! asked.

// Certificates and keys of the tests are good: these calls can't fail here and return a Result.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use openssl::ssl::{
    NameType, ShutdownState, SslAcceptor, SslAcceptorBuilder, SslMethod, SslStream, SslVersion,
};

use super::{Identity, PATIENCE};

const BODY_END: &[u8] = br#""messages":[]}"#;

/// How a server speaks.
#[derive(Clone, Copy)]
pub struct Manners {
    pub newest: SslVersion,
    pub answer: &'static str,
    pub then: Then,
}

/// What a server does behind its answer.
#[derive(Clone, Copy)]
pub enum Then {
    Reads,
    Closes,
    /// With a close_notify.
    ClosesWell,
    /// Sends a record that cannot be decrypted.
    Breaks,
}

impl Manners {
    /// Answers `{}` and keeps the connection.
    pub const POLITE: Manners = Manners {
        newest: SslVersion::TLS1_3,
        answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        then: Then::Reads,
    };

    /// Answers `{}` and wants the gateway to close the connection.
    pub const ONCE: Manners = Manners {
        answer: "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        ..Manners::POLITE
    };
}

/// A handshake that succeeded.
#[derive(Debug, PartialEq, Eq)]
pub struct Handshake {
    pub server_name: Option<String>,
    pub resumed: bool,
}

/// Serves on 127.0.0.1. Its threads end with the connections; the listener lives as long as the
/// test.
pub struct TlsServer {
    pub port: u16,
    pub handshakes: Receiver<Handshake>,
    /// Each request, head and body.
    pub requests: Receiver<Vec<u8>>,
    acceptor: Arc<Mutex<SslAcceptor>>,
}

impl TlsServer {
    pub fn start(identity: &Identity, manners: Manners) -> TlsServer {
        TlsServer::with(TlsServer::acceptor(identity, manners.newest).build(), manners)
    }

    /// Speaks every version from TLS 1.0 on, up to this one.
    pub fn acceptor(identity: &Identity, newest: SslVersion) -> SslAcceptorBuilder {
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).unwrap();
        acceptor.set_private_key(&identity.key).unwrap();
        acceptor.set_certificate(&identity.certificate).unwrap();
        acceptor.set_min_proto_version(Some(SslVersion::TLS1)).unwrap();
        acceptor.set_max_proto_version(Some(newest)).unwrap();
        // Without this, OpenSSL itself refuses to serve TLS 1.1.
        acceptor.set_cipher_list("DEFAULT:@SECLEVEL=0").unwrap();
        acceptor
    }

    pub fn with(acceptor: SslAcceptor, manners: Manners) -> TlsServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let ((handshake, handshakes), (request, requests)) = (channel(), channel());
        let acceptor = Arc::new(Mutex::new(acceptor));
        let current = acceptor.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let acceptor = current.lock().unwrap().clone();
                let (handshake, request) = (handshake.clone(), request.clone());
                thread::spawn(move || {
                    // Fails where the gateway refuses the certificate, which the test sees there.
                    let Ok(mut tls) = acceptor.accept(stream.unwrap()) else { return };
                    let server_name = tls.ssl().servername(NameType::HOST_NAME).map(str::to_owned);
                    // The test is over where this fails.
                    let _ = handshake
                        .send(Handshake { server_name, resumed: tls.ssl().session_reused() });
                    serve(&mut tls, manners, &request);
                });
            }
        });
        TlsServer { port, handshakes, requests, acceptor }
    }

    /// Serves new connections with another certificate, or other keys for its tickets.
    pub fn replace(&self, acceptor: SslAcceptor) {
        *self.acceptor.lock().unwrap() = acceptor;
    }

    pub fn at(&self, host: &str) -> String {
        format!("https://{host}:{}/v1", self.port)
    }

    /// Whether the next session was resumed.
    #[track_caller]
    pub fn next_is_resumed(&self) -> bool {
        self.handshakes.recv_timeout(PATIENCE).expect("a handshake").resumed
    }
}

fn serve(tls: &mut SslStream<TcpStream>, manners: Manners, requests: &Sender<Vec<u8>>) {
    let (mut request, mut piece) = (Vec::new(), vec![0; 16 * 1024]);
    while let Ok(n) = tls.read(&mut piece) {
        if n == 0 {
            // OpenSSL keeps a session only if this is sent; a server sends it where it got one.
            if tls.get_shutdown().contains(ShutdownState::RECEIVED) {
                let _ = tls.shutdown();
            }
            return;
        }
        request.extend_from_slice(&piece[..n]);
        if !request.ends_with(BODY_END) {
            continue;
        }
        // The test is over where this fails.
        let _ = requests.send(std::mem::take(&mut request));
        tls.write_all(manners.answer.as_bytes()).unwrap();
        match manners.then {
            Then::Reads => {}
            Then::Closes => return,
            Then::ClosesWell => {
                tls.shutdown().unwrap();
                return;
            }
            Then::Breaks => {
                let record = [&b"\x17\x03\x03\0\x20"[..], &[0; 32]].concat();
                tls.get_mut().write_all(&record).unwrap();
            }
        }
    }
}
