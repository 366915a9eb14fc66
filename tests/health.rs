//! `limitrate health`: what it says of a gateway that serves, and of everything else; its exit codes.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::Output;
use std::thread;
use std::time::{Duration, Instant};

use support::{PATIENCE, Process, UNSHAPED, provider_at};

/// What it says, on the stream where it belongs, and the exit code.
fn said(output: &Output) -> (Option<i32>, String) {
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let well = output.status.success();
    assert!(if well { err.is_empty() } else { out.is_empty() }, "{output:?}");
    (output.status.code(), if well { out } else { err }.into_owned())
}

fn ask(addr: SocketAddr) -> (Option<i32>, String) {
    said(&Process::run(&["health", "--url", &format!("http://{addr}")]))
}

/// A server that reads a request and says this; the request's head.
fn answering(answer: &'static str) -> (SocketAddr, thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
    let addr = listener.local_addr().expect("the address of a bound listener");
    let asked = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("somebody asks");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a whole head");
            head.extend(byte);
        }
        stream.write_all(answer.as_bytes()).expect("the answer is taken");
        String::from_utf8(head).expect("the head is ASCII")
    });
    (addr, asked)
}

#[test]
fn a_gateway_that_serves_is_well_and_needs_no_token_to_say_so() {
    let providers = provider_at("p", "http://127.0.0.1:1/v1", &["m"], UNSHAPED, "");
    let gateway = Process::serve(&Process::config("auth_token: secret", &providers));
    let (code, words) = ask(gateway.addr());
    let wanted = format!(
        "http://{} is well: limitrate {}, up for ",
        gateway.addr(),
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(code, Some(0), "{words}");
    assert!(
        words.starts_with(&wanted) && words.ends_with(" s\n") && words.lines().count() == 1,
        "{words}"
    );
}

#[test]
fn the_file_says_where_to_ask() {
    let well = "HTTP/1.1 200 OK\r\nContent-Length: 62\r\n\r\n{\"status\":\"ok\",\"version\":\"\\u001b9\\u202e.8\",\"uptime_seconds\":7}";
    for arguments in [&["health", "--config"][..], &["health", "-c"]] {
        let (addr, asked) = answering(well);
        let providers = provider_at("p", "http://127.0.0.1:1/v1", &["m"], UNSHAPED, "");
        let text = format!(
            "server: {{host: 0.0.0.0, port: {}, auth_token: for-callers}}\nproviders:\n{providers}",
            addr.port()
        );
        let file = Process::file("config.yaml", &text);
        let arguments =
            [arguments, &[file.to_str().expect("the build directory is UTF-8")]].concat();
        let outcome = said(&Process::run(&arguments));
        assert_eq!(
            outcome,
            (Some(0), format!("http://{addr} is well: limitrate 9.8, up for 7 s\n"))
        );
        let head = asked.join().expect("it was asked");
        assert_eq!(head, format!("GET /admin/health HTTP/1.1\r\nHost: {addr}\r\n\r\n"));
    }
}

#[test]
fn whatever_else_answers_is_not_well() {
    for (answer, problem) in [
        (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
            "it answers with status 503",
        ),
        (
            "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
            "it answers with status 403; server.hosts may lack this host name",
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "what answers is not limitrate"),
        ("HTTP/1.1 200 OK\r\n\r\n<h1>It works!</h1>", "what answers is not limitrate"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{", "the body ended early"),
        ("SSH-2.0-OpenSSH_9.2\r\n", "not an HTTP/1.x response"),
        ("", "the connection was closed before a response"),
    ] {
        let (addr, asked) = answering(answer);
        let outcome = ask(addr);
        assert_eq!(
            outcome,
            (Some(1), format!("limitrate: http://{addr} is not well: {problem}\n"))
        );
        asked.join().expect("it was asked");
    }
}

#[test]
fn nobody_there_is_not_well_and_neither_is_one_who_says_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
    let addr = listener.local_addr().expect("the address of a bound listener");
    let begin = Instant::now();
    let outcome = ask(addr);
    assert_eq!(
        outcome,
        (Some(1), format!("limitrate: http://{addr} is not well: no answer within 5 s\n"))
    );
    let took = begin.elapsed();
    assert!(took >= Duration::from_secs(5) && took < PATIENCE, "{took:?}");

    drop(listener);
    let (code, words) = ask(addr);
    assert_eq!(code, Some(1));
    assert!(
        words.starts_with(&format!("limitrate: http://{addr} is not well: can't connect: ")),
        "{words}"
    );
}

#[test]
fn a_wrong_url_or_a_faulty_file_exits_with_2() {
    let file = Process::file("config.yaml", "server: {prot: 1}");
    let file = file.to_str().expect("the build directory is UTF-8");
    for (arguments, word) in [
        (&["health", "--url", "ftp://127.0.0.1:8080"][..], "http://127.0.0.1:8080"),
        (&["health", "--url", "127.0.0.1"], "http://127.0.0.1:8080"),
        (&["health", "--config", file], "prot"),
        (&["health", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ] {
        let (code, words) = said(&Process::run(arguments));
        assert_eq!(code, Some(2), "{arguments:?}");
        assert!(words.contains(word), "no {word} in {words}");
    }
}
