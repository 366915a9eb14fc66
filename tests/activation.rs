//! Sockets that systemd has opened (sd_listen_fds(3)): they are served on in the place of those that are configured.

mod support;

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;

use limitrate::config;
use limitrate::server::{Place, Server, Stop};
use rustix::process::Signal;
use support::{Client, Process, Reply, UNSHAPED, Upstream, get, post, provider_yaml};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

/// What systemd does between fork and exec, for one socket that came as standard input.
const ACTIVATE: &str = "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$";

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").expect("bind a loopback port")
}

fn given(socket: impl Into<OwnedFd>) -> Stdio {
    Stdio::from(socket.into())
}

fn config_file(upstream: &Upstream) -> std::path::PathBuf {
    Process::config("", &provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""))
}

fn parse(text: &str) -> config::Config {
    config::parse(text, Path::new("test.yaml"), &|_| None).expect("a valid configuration")
}

#[test]
fn the_given_port_is_served_on_and_a_reload_keeps_it() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let listener = listener();
    let address = listener.local_addr().expect("it is bound");
    let file = config_file(&upstream);
    let ours = listener.try_clone().expect("a second descriptor");
    let mut process = Process::serve_given(&file, ACTIVATE, &[], given(listener));
    assert!(
        process.said().ends_with(&format!(" at http://{address}/v1 (given by systemd)")),
        "{}",
        process.said()
    );
    assert_eq!(post(address, CHAT, BODY).status, 200);
    let moved =
        fs::read_to_string(&file).expect("the configuration").replace("127.0.0.1\n", "127.0.0.2\n");
    fs::write(&file, moved).expect("write the configuration");
    process.signal(Signal::HUP);
    process.wait_log("reloaded: server is changed");
    assert_eq!(post(address, CHAT, BODY).status, 200);
    process.signal(Signal::TERM);
    assert!(process.wait_exit().success());
    // Whose it is keeps it open: who connects between two runs is served by the next one.
    let mut early = Client::connect(address);
    early.post_json(CHAT, BODY);
    let _next = Process::serve_given(&file, ACTIVATE, &[], given(ours));
    assert_eq!(early.read_response().status, 200);
}

#[test]
fn a_given_unix_socket_is_served_on_and_its_file_stays() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let file = config_file(&upstream);
    let folder = file.parent().expect("a folder");
    // Its whole path might be too long for a socket.
    let here = std::env::current_dir().expect("a working directory");
    let path = folder.strip_prefix(&here).unwrap_or(folder).join("given");
    let listener = UnixListener::bind(&path).expect("make a socket");
    let mut process = Process::serve_given(&file, ACTIVATE, &[], given(listener));
    assert!(
        process.said().ends_with(&format!(" at unix:{} (given by systemd)", path.display())),
        "{}",
        process.said()
    );
    let mut client = Client::connect_unix(&path);
    client.post_json(CHAT, BODY);
    assert_eq!(client.read_response().status, 200);
    process.signal(Signal::TERM);
    assert!(process.wait_exit().success());
    assert!(path.exists(), "it is systemd's");
}

#[test]
fn sockets_that_were_given_to_another_process_are_none_of_ours() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let shell = "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=1";
    let listener = listener();
    let address = listener.local_addr().expect("it is bound");
    let process = Process::serve_given(&config_file(&upstream), shell, &[], given(listener));
    assert_ne!(process.addr(), address);
    assert_eq!(get(process.addr(), "/v1/models").status, 200);
}

#[test]
fn several_are_served_on_at_once() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let text = format!(
        "server:\n  port: 1\nproviders:\n{}",
        provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, "")
    );
    let listeners = [listener(), listener(), listener()];
    let addresses =
        listeners.each_ref().map(|listener| listener.local_addr().expect("it is bound"));
    let server =
        Server::adopt(&parse(&text), Vec::from(listeners.map(OwnedFd::from))).expect("listeners");
    assert_eq!(server.places(), addresses.map(Place::Http));
    let (stop, stopped) = async_channel::bounded(1);
    let serving = std::thread::spawn(move || smol::block_on(server.run(stopped)));
    for address in addresses {
        assert_eq!(post(address, CHAT, BODY).status, 200, "{address}");
    }
    stop.try_send(Stop::Now).expect("it runs");
    serving.join().expect("no panic").expect("it ends in order");
}

#[test]
fn what_is_no_listener_is_refused() {
    let providers =
        "providers: [{name: p, base_url: 'http://x/v1', models: [m], rate_limit: {rpm: 1}}]";
    let udp = UdpSocket::bind("127.0.0.1:0").expect("bind a loopback port");
    let listener = listener();
    let connected =
        std::net::TcpStream::connect(listener.local_addr().expect("it is bound")).expect("connect");
    let file = fs::File::open("Cargo.toml").expect("it is there");
    for (socket, words) in [
        (OwnedFd::from(udp), "no stream socket"),
        (connected.into(), "no stream socket"),
        (file.into(), "Socket operation"),
    ] {
        let given = vec![listener.try_clone().expect("a second descriptor").into(), socket];
        let error = Server::adopt(&parse(providers), given).expect_err("no listener").to_string();
        for part in ["cannot serve on socket 2", words, "ListenStream=", "Accept=no"] {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
    }
}
