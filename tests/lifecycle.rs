//! Life and death: going down in order, signals, systemd, the limits of the system.

mod support;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{
    Client, ClosedPort, Ended, Ending, Gate, Gateway, PATIENCE, Process, Reply, Response, UNSHAPED,
    Upstream, get, post, provider_yaml, spaced, sse,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

/// Longer than any test: a slot that is not open at the start does not come.
const NEVER_MS: u64 = 30_000;

fn gateway(upstream: &Upstream, server: &str, rate_limit: &str) -> Gateway {
    Gateway::start_with(server, &provider_yaml("p", upstream.addr(), &["m"], rate_limit, ""), &[])
}

fn ask(addr: SocketAddr) -> Client {
    let mut client = Client::connect(addr);
    client.post_json(CHAT, BODY);
    client
}

#[track_caller]
fn assert_told_to_come_back(response: &Response) {
    assert_eq!((response.status, response.code().as_str()), (503, "shutting_down"), "{response:?}");
    assert!(response.header("retry-after").is_some_and(|seconds| seconds != "0"), "{response:?}");
    assert_eq!(response.header("connection").as_deref(), Some("close"), "{response:?}");
}

/// Waits until nobody is let in any more.
fn wait_refused(addr: SocketAddr) {
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(addr).map_err(|error| error.kind()).err()
        != Some(ErrorKind::ConnectionRefused)
    {
        assert!(Instant::now() < deadline, "still accepting");
        thread::sleep(Duration::from_millis(2));
    }
}

/// One request streams and waits at the gate, one waits in the queue.
fn one_running_one_queued(addr: SocketAddr, upstream: &Upstream, gate: &Gate) -> [Client; 2] {
    let mut running = ask(addr);
    gate.release(1);
    running.read_head();
    assert_eq!(running.read_chunk().map(|chunk| chunk.bytes), Ok(sse::event("a")));
    assert_eq!(upstream.requests().len(), 1);
    let queued = ask(addr);
    let deadline = Instant::now() + PATIENCE;
    while get(addr, "/admin/stats").json()["providers"][0]["queued_ahead"] != 1 {
        assert!(Instant::now() < deadline, "not queued");
    }
    [running, queued]
}

/// What is left of a body, and how it ended.
fn read_rest(client: &mut Client) -> (Vec<u8>, Ended) {
    let mut rest = Vec::new();
    loop {
        match client.read_chunk() {
            Ok(chunk) => rest.extend(chunk.bytes),
            Err(ended) => return (rest, ended),
        }
    }
}

#[test]
fn going_down_refuses_the_queued_at_once_and_lets_the_running_finish() {
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::stream(sse::words(&["a", "b"]), &gate)]);
    let gateway = gateway(&upstream, "", &spaced(NEVER_MS));
    let [mut running, mut queued] = one_running_one_queued(gateway.addr(), &upstream, &gate);
    gateway.drain();
    assert_told_to_come_back(&queued.read_response());
    wait_refused(gateway.addr());
    assert!(!gateway.join(Duration::from_millis(50)), "it ended under a running request");
    gate.release(2);
    assert_eq!(read_rest(&mut running), ([sse::event("b"), sse::done()].concat(), Ended::Clean));
    assert_eq!(running.read_to_end(), b"");
    drop((running, queued));
    assert!(gateway.join(PATIENCE), "everybody has been served");
    assert_eq!(upstream.requests().len(), 1);
}

#[test]
fn with_drain_queue_the_queued_are_still_sent_at_their_pace() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "drain_queue: true", &spaced(200));
    let start = Instant::now();
    let mut callers = [ask(gateway.addr()), ask(gateway.addr()), ask(gateway.addr())];
    upstream.wait_requests(1, PATIENCE);
    gateway.wait_queued(2);
    gateway.drain();
    for caller in &mut callers {
        assert_eq!(caller.read_response().status, 200);
    }
    assert!(gateway.join(PATIENCE));
    assert!(upstream.requests()[2].arrived - start >= Duration::from_millis(400));
}

#[test]
fn what_runs_longer_than_drain_seconds_is_cut_off_with_a_word() {
    let gate = Gate::closed();
    let upstream = Upstream::answering(move |request, _| match request.text().contains("stream") {
        true => Reply::stream(sse::words(&["a", "b"]), &gate),
        false => Reply::Stall,
    });
    let gateway = gateway(&upstream, "drain_seconds: 0.3", UNSHAPED);
    let mut waiting = ask(gateway.addr());
    upstream.wait_requests(1, PATIENCE);
    let mut stream = Client::connect(gateway.addr());
    stream.post_json(CHAT, r#"{"model":"m","stream":true}"#);
    stream.read_head();
    let start = Instant::now();
    gateway.drain();
    let (event, ended) = read_rest(&mut stream);
    assert!(start.elapsed() >= Duration::from_millis(300), "cut off after {:?}", start.elapsed());
    assert_eq!(ended, Ended::Aborted);
    let event = String::from_utf8(event).unwrap();
    let error =
        event.trim_start().strip_prefix("data: ").and_then(|event| event.strip_suffix("\n\n"));
    let error: serde_json::Value = serde_json::from_str(error.expect("an event")).unwrap();
    assert_eq!(error["error"]["code"], "shutting_down", "{event}");
    assert_told_to_come_back(&waiting.read_response());
    drop((stream, waiting));
    assert!(gateway.join(PATIENCE));
    for connection in 0..2 {
        upstream.wait_closed(connection, PATIENCE);
    }
}

#[test]
fn going_down_ends_idle_connections_and_answers_what_is_on_its_way() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = gateway(&upstream, "", UNSHAPED);
    let mut idle = Client::connect(gateway.addr());
    let mut asking = Client::connect(gateway.addr());
    for client in [&mut idle, &mut asking] {
        client.get("/v1/models");
        assert_eq!(client.read_response().status, 200);
    }
    asking.send("POST /v1/chat/completions HTTP/1.1\r\n");
    gateway.drain();
    assert_eq!(idle.read_to_end(), b"");
    assert!(
        !gateway.join(Duration::from_millis(50)),
        "it ended under a request that is being sent"
    );
    asking.send(format!("Host: x\r\nContent-Length: {}\r\n\r\n{BODY}", BODY.len()));
    assert_told_to_come_back(&asking.read_response());
    drop(asking);
    assert!(gateway.join(PATIENCE));
    assert!(upstream.requests().is_empty());
}

#[test]
fn being_told_twice_ends_at_once() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway = gateway(&upstream, "drain_seconds: 600", UNSHAPED);
    let mut running = ask(gateway.addr());
    upstream.wait_requests(1, PATIENCE);
    gateway.drain();
    wait_refused(gateway.addr());
    gateway.drain();
    assert!(gateway.join(PATIENCE));
    assert!(running.is_closed(PATIENCE));
}

fn config(upstream: &Upstream, server: &str, rate_limit: &str) -> std::path::PathBuf {
    Process::config(server, &provider_yaml("p", upstream.addr(), &["m"], rate_limit, ""))
}

#[test]
fn both_signals_go_down_in_order_and_exit_with_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let gate = Gate::closed();
        let upstream = Upstream::start([Reply::stream(sse::words(&["a"]), &gate)]);
        let mut process = Process::serve(&config(&upstream, "", &spaced(NEVER_MS)));
        let [mut running, mut queued] = one_running_one_queued(process.addr(), &upstream, &gate);
        process.signal(signal);
        assert_told_to_come_back(&queued.read_response());
        wait_refused(process.addr());
        gate.release(1);
        assert_eq!(read_rest(&mut running), (sse::done(), Ended::Clean));
        drop((running, queued));
        assert_eq!(process.wait_exit().code(), Some(0), "{signal:?}");
    }
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let upstream = Upstream::start([Reply::Stall]);
    let mut process = Process::serve(&config(&upstream, "drain_seconds: 600", UNSHAPED));
    let _running = ask(process.addr());
    upstream.wait_requests(1, PATIENCE);
    process.signal(Signal::TERM);
    wait_refused(process.addr());
    process.signal(Signal::INT);
    assert!(process.wait_exit().code().is_some(), "it ended by itself");
}

#[test]
fn systemd_is_told_when_it_serves_and_when_it_stops() {
    let upstream = Upstream::start([Reply::ok()]);
    let abstract_name = format!("limitrate-test-{}", std::process::id());
    let path = std::env::temp_dir().join(&abstract_name);
    let by_path = UnixDatagram::bind(&path).unwrap();
    let by_name =
        UnixDatagram::bind_addr(&UnixAddr::from_abstract_name(&abstract_name).unwrap()).unwrap();
    for (socket, name) in
        [(by_path, path.display().to_string()), (by_name, format!("@{abstract_name}"))]
    {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let hears = || {
            let mut told = [0; 64];
            let n = socket.recv(&mut told).expect("systemd is told");
            String::from_utf8_lossy(&told[..n]).into_owned()
        };
        let mut process =
            Process::serve_with(&config(&upstream, "", UNSHAPED), "", &[("NOTIFY_SOCKET", &name)]);
        assert_eq!(hears(), "READY=1", "{name}");
        assert_eq!(get(process.addr(), "/admin/health").status, 200);
        process.signal(Signal::TERM);
        assert_eq!(hears(), "STOPPING=1", "{name}");
        assert_eq!(process.wait_exit().code(), Some(0));
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
fn the_limit_on_open_files_is_raised_to_what_the_system_allows() {
    let upstream = Upstream::start([Reply::ok()]);
    let process = Process::serve_with(
        &config(&upstream, "max_connections: 16", UNSHAPED),
        "ulimit -Sn 64",
        &[],
    );
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", process.id())).unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let [soft, hard] = [0, 1].map(|n| files.split_whitespace().nth(n).unwrap());
    assert_eq!(soft, hard, "{files}");
    assert_ne!(soft, "64");
}

#[test]
fn running_out_of_files_is_said_and_survived() {
    let upstream = Upstream::start([Reply::ok()]);
    let process = Process::serve_with(&config(&upstream, "", UNSHAPED), "ulimit -n 40", &[]);
    process.wait_log("max_connections: 1024 may need");
    let crowd: Vec<Client> = (0..60).map(|_| Client::connect(process.addr())).collect();
    process.wait_log("cannot accept connections");
    drop(crowd);
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
}

#[test]
fn a_broken_answer_is_logged_with_what_was_received() {
    let upstream = Upstream::start([Reply::RawThenClose(
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n12345".into(),
    )]);
    let process = Process::serve(&config(&upstream, "", UNSHAPED));
    post(process.addr(), CHAT, BODY);
    let line = process.wait_log("`p`");
    assert!(line.contains("after 5 body bytes"), "{line}");
}

#[test]
fn an_answer_that_begins_while_going_down_says_that_it_is_the_last() {
    let gate = Gate::closed();
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
    let upstream = Upstream::start([Reply::pieces(&[answer], &gate, Ending::Complete)]);
    let gateway = gateway(&upstream, "", UNSHAPED);
    let mut running = ask(gateway.addr());
    upstream.wait_requests(1, PATIENCE);
    gateway.drain();
    wait_refused(gateway.addr());
    gate.release(1);
    let response = running.read_response();
    assert_eq!(
        (response.status, response.header("connection").as_deref()),
        (200, Some("close")),
        "{response:?}"
    );
}

#[test]
fn who_backs_off_when_the_gateway_goes_down_is_answered_at_once() {
    let upstream = Upstream::start([Reply::Json(500, "{}".into())]);
    let extras = "retry: {attempts: 100}";
    let providers = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, extras);
    let gateway = Gateway::start_with("", &providers, &[]);
    let mut running = ask(gateway.addr());
    // The third pause is of 3 s at least.
    upstream.wait_requests(3, PATIENCE);
    let asked = Instant::now();
    gateway.drain();
    assert_eq!(running.read_response().status, 500, "the provider's last answer");
    assert!(
        asked.elapsed() < Duration::from_secs(2),
        "it waited for the end of the pause: {:?}",
        asked.elapsed()
    );
}

/// A pipe holds 64 KiB; what is logged here is more.
#[test]
fn a_standard_error_that_nobody_reads_stops_nobody() {
    let closed = ClosedPort::new();
    let config = Process::config("", &provider_yaml("p", closed.addr(), &["m"], UNSHAPED, ""));
    let gateway = Process::serve_unread(&config);
    let mut client = Client::connect(gateway.addr());
    for _ in 0..1000 {
        client.post_json(CHAT, BODY);
        assert_eq!(client.read_response().status, 502);
    }
    assert_eq!(get(gateway.addr(), "/admin/health").status, 200);
}
