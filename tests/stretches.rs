//! How long one request may keep the serving thread from all others: no large body does so for long.
//!
//! A task that is always ready runs beside the gateway and reads the clock of its thread's processor time: between
//! two of its turns lies whatever else ran. What other processes do does not count on that clock.

#![allow(clippy::unwrap_used)]

mod support;

use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use futures_lite::future;
use limitrate::config;
use limitrate::server::{Server, Stop};
use openssl::ssl::{SslAcceptor, SslConnector, SslMethod};
use rustix::time::{ClockId, clock_gettime};
use support::{
    Client, Ending, Gate, Identity, PATIENCE, Reply, UNSHAPED, Upstream, localhost, provider_at,
    provider_yaml,
};

const CHAT: &str = "/v1/chat/completions";

/// `STRETCH_MIB=32 cargo test --release --test stretches -- --nocapture` measures larger ones, and prints.
fn body_bytes() -> usize {
    std::env::var("STRETCH_MIB").map_or(4, |mib| mib.parse::<usize>().unwrap()) << 20
}

/// Of a debug build, which takes 1 ms. Parsing on the serving thread took 130 ms at best, and 1 s at worst.
const LONGEST: Duration = Duration::from_millis(30);

/// Of the thread that asks.
fn processor_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
}

/// One gateway at a time: its thread never sleeps.
static ALONE: Mutex<()> = Mutex::new(());

/// A gateway whose longest stretch of other work is measured.
struct Measured {
    _alone: MutexGuard<'static, ()>,
    addr: SocketAddr,
    stop: async_channel::Sender<Stop>,
    thread: thread::JoinHandle<Duration>,
}

impl Measured {
    fn start(server: &str, providers: &str) -> Measured {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let server: String = server.lines().map(|line| format!("  {line}\n")).collect();
        let yaml =
            format!("server:\n  host: 127.0.0.1\n  port: 0\n{server}providers:\n{providers}");
        let (started, address) = mpsc::channel();
        let (stop, stopped) = async_channel::unbounded();
        let thread = thread::spawn(move || {
            let config = config::parse(&yaml, Path::new("test.yaml"), &|_| None).unwrap();
            let server = Server::bind(&config).unwrap();
            started.send(server.local_addr().unwrap()).unwrap();
            let longest = Rc::new(Cell::new(Duration::ZERO));
            let watching = watch(longest.clone());
            smol::block_on(server.run_beside(stopped, watching)).unwrap();
            longest.get()
        });
        let addr = address.recv_timeout(PATIENCE).unwrap();
        Measured { _alone: alone, addr, stop, thread }
    }

    #[track_caller]
    fn assert_no_long_stretch(self, what: &str) {
        self.stop.try_send(Stop::Now).unwrap();
        let longest = self.thread.join().unwrap();
        eprintln!("{what}: {longest:?}");
        assert!(longest < LONGEST, "{what}: {longest:?}");
    }
}

async fn watch(longest: Rc<Cell<Duration>>) {
    let mut last = processor_time();
    loop {
        future::yield_now().await;
        let now = processor_time();
        longest.set(longest.get().max(now - last));
        last = now;
    }
}

const KINDS: [&str; 6] = ["text", "lines", "escapes", "unicode", "numbers", "brackets"];

/// A JSON value of this kind and of about so many bytes.
fn value(kind: &str, bytes: usize) -> String {
    let fill = |piece: &str| piece.repeat(bytes / piece.len());
    match kind {
        "text" => format!("\"{}\"", fill("a long line of plain text, ")),
        "lines" => format!("\"{}\"", fill("forty bytes of plain text in each line\\n")),
        "escapes" => format!("\"{}\"", fill("a\\\"b\\n")),
        "unicode" => format!("\"{}\"", fill("日本語のテキスト")),
        "numbers" => format!("[{}0]", fill("0.123,")),
        "brackets" => format!("{}{}", "[".repeat(bytes / 2), "]".repeat(bytes / 2)),
        other => panic!("no kind {other}"),
    }
}

/// With a model that has another name at the provider.
fn body(kind: &str) -> String {
    format!(r#"{{"model":"alias","messages":{}}}"#, value(kind, body_bytes()))
}

const MODELS: [&str; 1] = ["{id: alias, upstream: a-longer-name}"];
const LARGE: &str = "max_body_bytes: 67108864";
/// An SDK's request gets a fingerprint, which every byte goes into.
const FROM_SDK: &str = "x-stainless-retry-count: 0\r\n";

#[test]
fn a_large_body_leaves_others_their_turns_whatever_is_in_it() {
    for kind in KINDS {
        let upstream = Upstream::answering(|request, _| {
            Reply::Json(200, format!(r#"{{"length":{}}}"#, request.body.len()))
        });
        let provider = provider_yaml("p", upstream.addr(), &MODELS, UNSHAPED, "");
        let gateway = Measured::start(LARGE, &provider);
        let mut client = Client::connect(gateway.addr);
        let body = body(kind);
        client.post_json_with(CHAT, FROM_SDK, &body);
        let response = client.read_response();
        assert_eq!(response.status, 200, "{response:?}");
        let renamed = body.len() - "alias".len() + "a-longer-name".len();
        assert_eq!(response.json()["length"], renamed);
        gateway.assert_no_long_stretch(kind);
    }
}

#[test]
fn a_large_chunked_body_leaves_others_their_turns() {
    let upstream = Upstream::start([Reply::ok()]);
    let provider = provider_yaml("p", upstream.addr(), &MODELS, UNSHAPED, "");
    let gateway = Measured::start(LARGE, &provider);
    let mut client = Client::connect(gateway.addr);
    client.send(format!("POST {CHAT} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n"));
    for piece in body("text").as_bytes().chunks(1000) {
        client.send([format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat());
    }
    client.send("0\r\n\r\n");
    assert_eq!(client.read_response().status, 200);
    gateway.assert_no_long_stretch("chunked");
}

#[test]
fn a_large_body_leaves_others_their_turns_under_tls_on_both_sides() {
    let authority = Identity::authority();
    let provider = TlsProvider::start(&authority);
    let base = format!("https://localhost:{}/v1", provider.port());
    let provider = provider_at("p", &base, &MODELS, UNSHAPED, &authority.ca_file());
    let tls = authority.issue(&localhost(), 1).tls();
    let gateway = Measured::start(&format!("{LARGE}\n{tls}"), &provider);
    let mut connector = SslConnector::builder(SslMethod::tls_client()).unwrap();
    connector.cert_store_mut().add_cert(authority.certificate.clone()).unwrap();
    let tcp = TcpStream::connect(gateway.addr).unwrap();
    let mut client = Client::over_tls(connector.build().connect("localhost", tcp).unwrap());
    client.post_json_with(CHAT, FROM_SDK, body("text"));
    assert_eq!(client.read_response().status, 200);
    gateway.assert_no_long_stretch("TLS");
}

#[test]
fn a_large_upload_that_was_refused_leaves_others_their_turns() {
    let upstream = Upstream::start([Reply::ok()]);
    let provider = provider_yaml("p", upstream.addr(), &MODELS, UNSHAPED, "");
    let gateway = Measured::start("max_body_bytes: 1000", &provider);
    let mut client = Client::connect(gateway.addr);
    client.post_json(CHAT, body("text"));
    assert_eq!(client.read_response().status, 413);
    gateway.assert_no_long_stretch("discarded");
}

#[test]
fn a_large_response_leaves_others_their_turns_as_an_event_and_where_its_usage_is_looked_for() {
    for kind in KINDS {
        let gate = Gate::closed();
        let large = format!(r#"{{"choices":{},"x":"usage"}}"#, value(kind, 1_000_000));
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", large.len());
        let pieces = [head.as_bytes(), large.as_bytes()].concat();
        let late = Reply::pieces(&[&pieces], &gate, Ending::Complete);
        let upstream = Upstream::start([late]);
        let metered = "{mode: burst, rpm: 600000, capacity: 1000, tpm: 1000000000}";
        let provider = provider_yaml("p", upstream.addr(), &MODELS, metered, "");
        let gateway = Measured::start("heartbeat_after_seconds: 0.05", &provider);
        let mut client = Client::connect(gateway.addr);
        client.post_json(CHAT, r#"{"model":"alias","stream":true}"#);
        assert_eq!(client.read_head().word(1), "200", "a heartbeat has begun the response");
        gate.release(2);
        let mut told = Vec::new();
        while let Ok(chunk) = client.read_chunk() {
            told.extend(chunk.bytes);
        }
        assert!(told.windows(5).any(|bytes| bytes == b"data:"), "{kind}: {} bytes", told.len());
        gateway.assert_no_long_stretch(&format!("a late response of {kind}"));
    }
}

/// A provider behind TLS that reads a request and answers it, once.
struct TlsProvider(TcpListener);

impl TlsProvider {
    fn start(authority: &Identity) -> TlsProvider {
        let identity = authority.issue(&localhost(), 1);
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).unwrap();
        acceptor.set_private_key(&identity.key).unwrap();
        acceptor.set_certificate(&identity.certificate).unwrap();
        let acceptor = acceptor.build();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let accepting = listener.try_clone().unwrap();
        thread::spawn(move || {
            let mut session = acceptor.accept(accepting.accept().unwrap().0).unwrap();
            let mut read = Vec::new();
            let mut piece = vec![0; 64 * 1024];
            while !read.ends_with(b"\"}") {
                let bytes = session.read(&mut piece).unwrap();
                read.extend_from_slice(&piece[..bytes]);
            }
            session.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").unwrap();
            // Until the gateway closes.
            let _ = session.read(&mut piece);
        });
        TlsProvider(listener)
    }

    fn port(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }
}
