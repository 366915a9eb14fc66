//! A unix socket as the way in: what of it is another program's, and that everything else is as on a port.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use limitrate::config;
use limitrate::server::Server;
use rustix::process::Signal;
use support::{
    Client, Ended, Ending, Gate, Gateway, Line, PATIENCE, Process, Reply, UNSHAPED, Upstream, get,
    provider_yaml, sse,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

/// A path in an empty folder. Relative to the crate, where tests run: the whole path might be too long for a socket.
fn socket() -> PathBuf {
    let file = Process::file("x", "");
    fs::remove_file(&file).expect("it was just made");
    let here = std::env::current_dir().expect("a working directory");
    file.with_file_name("s")
        .strip_prefix(&here)
        .map(Path::to_owned)
        .unwrap_or_else(|_| file.with_file_name("s"))
}

fn setting(path: &Path) -> String {
    format!("socket: {}", path.display())
}

fn gateway(upstream: &Upstream, server: &str) -> Gateway {
    Gateway::start_with(server, &provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""), &[])
}

fn bind(path: &Path) -> std::io::Result<Server> {
    let providers =
        "providers: [{name: p, base_url: 'http://x/v1', models: [m], rate_limit: {rpm: 1}}]";
    let text = format!("server: {{port: null, {}}}\n{providers}", setting(path));
    Server::bind(
        &config::parse(&text, Path::new("test.yaml"), &|_| None).expect("a valid configuration"),
    )
}

fn ask(path: &Path) -> Client {
    let mut client = Client::connect_unix(path);
    client.post_json(CHAT, BODY);
    client
}

fn wait_gone(path: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while path.exists() {
        assert!(Instant::now() < deadline, "the socket stays");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("the socket is there").permissions().mode() & 0o777
}

#[test]
fn both_the_port_and_the_socket_serve() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let path = socket();
    let gateway = gateway(&upstream, &setting(&path));
    let mut client = ask(&path);
    assert_eq!(client.read_response().status, 200);
    client.post_json(CHAT, BODY);
    assert_eq!(client.read_response().status, 200, "the connection is kept");
    assert_eq!(get(gateway.addr(), "/v1/models").status, 200);
    assert_eq!(mode(&path), 0o660);
    gateway.drain();
    assert!(gateway.join(PATIENCE));
    assert!(!path.exists(), "the socket goes with the gateway");
}

#[test]
fn the_socket_alone_serves_with_the_permissions_that_are_set() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let path = socket();
    let _gateway =
        gateway(&upstream, &format!("port: null\n{}\nsocket_mode: \"0600\"", setting(&path)));
    assert_eq!(ask(&path).read_response().status, 200);
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn who_hangs_up_there_leaves_the_line() {
    let path = socket();
    let line = Line::start(&format!("{}\ntrusted_proxies: [unix]", setting(&path)), "");
    let leaver = line.join(Client::connect_unix(&path), "", "leaver");
    let _stays = line.join(Client::connect_unix(&path), "X-Forwarded-For: 192.0.2.1\r\n", "stays");
    let clients =
        line.gateway.queue().iter().map(|row| row["client"].to_string()).collect::<Vec<_>>();
    assert_eq!(clients, ["\"unix\"", "\"192.0.2.1\""]);
    line.leave(leaver);
    assert_eq!(line.order(), "stays");
    assert_eq!(line.gateway.stats()["providers"][0]["cancelled_in_queue"], 1);
}

#[test]
fn who_closes_its_side_inside_an_answer_frees_the_provider() {
    let gate = Gate::closed();
    let held = gate.clone();
    let upstream = Upstream::answering(move |_, _| {
        Reply::stream(vec![sse::event("a"), sse::event("b")], &held)
    });
    let path = socket();
    let _gateway = gateway(&upstream, &setting(&path));
    let mut client = ask(&path);
    gate.release(1);
    client.read_head();
    client.half_close();
    upstream.wait_closed(0, PATIENCE);
}

#[test]
fn a_broken_answer_is_seen_there_to_be_broken() {
    let gate = Gate::open();
    let upstream = Upstream::answering(move |_, _| Reply::Stream {
        chunks: vec![b"half".to_vec()],
        gate: gate.clone(),
        ending: Ending::Close,
    });
    let path = socket();
    let _gateway = gateway(&upstream, &setting(&path));
    assert_eq!(ask(&path).read_response().ended, Ended::Aborted);
}

#[test]
fn limits_and_deadlines_hold_there_too() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let path = socket();
    let server = format!(
        "{}\nmax_connections: 1\nheader_timeout_seconds: 0.3\nmax_head_bytes: 1024",
        setting(&path)
    );
    let gateway = gateway(&upstream, &server);
    let mut first = Client::connect_unix(&path);
    first.send("GET /v1/mod");
    let mut second = Client::connect_unix(&path);
    assert_eq!(second.read_response().code(), "too_many_connections");
    assert_eq!(first.read_response().code(), "request_timeout");
    drop((first, second));
    // Its place is free once it is seen to be gone.
    let deadline = Instant::now() + PATIENCE;
    let refused = loop {
        let mut third = Client::connect_unix(&path);
        third.send(format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(2000)));
        let response = third.read_response();
        if response.code() != "too_many_connections" {
            break response;
        }
        assert!(Instant::now() < deadline, "{response:?}");
        std::thread::sleep(Duration::from_millis(2));
    };
    assert_eq!(refused.code(), "head_too_large");
    drop(gateway);
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced() {
    let path = socket();
    drop(UnixListener::bind(&path).expect("make a socket"));
    assert!(path.exists(), "a listener leaves its file behind");
    let server = bind(&path).expect("it is replaced");
    std::os::unix::net::UnixStream::connect(&path).expect("somebody listens");
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_socket_that_another_program_serves_on_is_left_alone() {
    let path = socket();
    let other = UnixListener::bind(&path).expect("make a socket");
    let error = bind(&path).expect_err("it is taken").to_string();
    for part in ["another program serves on it", "server.socket", path.to_str().expect("ASCII")] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    other.accept().expect("the attempt");
    std::os::unix::net::UnixStream::connect(&path).expect("it is still there");
}

#[test]
fn no_other_file_is_ever_removed() {
    let path = socket();
    fs::write(&path, "precious").expect("write a file");
    let error = bind(&path).expect_err("there is a file").to_string();
    assert!(error.contains("is no socket"), "{error}");
    assert_eq!(fs::read_to_string(&path).expect("it is still there"), "precious");
    fs::remove_file(&path).expect("remove the file");
    // Nor what took its place while it ran.
    let server = bind(&path).expect("a free name");
    fs::remove_file(&path).expect("remove the socket");
    fs::write(&path, "precious").expect("write a file");
    drop(server);
    assert_eq!(fs::read_to_string(&path).expect("it is still there"), "precious");
    let error = bind(&path.join("below-a-file")).expect_err("no such folder").to_string();
    assert!(error.contains("below-a-file") && error.contains("Not a directory"), "{error}");
}

#[test]
fn the_start_names_every_place_and_a_reload_moves_the_socket() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let provider = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, "");
    let (one, other) = (socket(), socket());
    let text = |port: &str, path: &Path, more: &str| {
        format!(
            "server:\n  host: 127.0.0.1\n  port: {port}\n  {}\n{more}providers:\n{provider}",
            setting(path)
        )
    };
    let absolute = |path: &Path| std::path::absolute(path).expect("a path");
    let (one, other) = (absolute(&one), absolute(&other));
    let file = Process::file("config.yaml", &text("0", &one, ""));
    let mut process = Process::serve(&file);
    let places = format!(" at http://{}/v1 and unix:{}", process.addr(), one.display());
    assert!(process.said().ends_with(&places), "{}", process.said());
    let mut connected = Client::connect_unix(&one);
    let reload = |text: String, part: &str| {
        fs::write(&file, text).expect("write the configuration");
        process.signal(Signal::HUP);
        process.wait_log(part)
    };
    reload(text("0", &one, "  socket_mode: \"0600\"\n"), "reloaded: server is changed");
    assert_eq!(mode(&one), 0o600);
    fs::remove_file(&one).expect("somebody tidies up");
    reload(text("0", &one, ""), "reloaded: server is changed");
    assert_eq!(ask(&one).read_response().status, 200, "it is made anew");
    reload(text("0", &other, ""), "from now on at");
    process.wait_log("reloaded");
    wait_gone(&one);
    assert_eq!(ask(&other).read_response().status, 200);
    connected.post_json(CHAT, BODY);
    assert_eq!(connected.read_response().status, 200, "who was connected stays");
    let said = reload(text("null", &other, ""), "from now on at");
    assert!(said.contains(&format!("now on at unix:{}", other.display())), "{said}");
    process.wait_log("reloaded");
    let deadline = Instant::now() + PATIENCE;
    while std::net::TcpStream::connect(process.addr()).is_ok() {
        assert!(Instant::now() < deadline, "the port stays");
    }
    fs::write(&one, "precious").expect("write a file");
    let said = reload(text("0", &one, ""), "nothing was reloaded");
    assert!(said.contains("is no socket"), "{said}");
    assert_eq!(ask(&other).read_response().status, 200);
    assert!(std::net::TcpStream::connect(process.addr()).is_err(), "whole or not at all");
    process.signal(Signal::TERM);
    assert!(process.wait_exit().success());
    assert!(!other.exists());
}
