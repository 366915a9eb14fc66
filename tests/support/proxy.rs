//! An HTTP proxy that opens tunnels, or does not.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

/// What it does with a CONNECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Opens the tunnel.
    Tunnels,
    /// Wants this Proxy-Authorization first.
    Wants(&'static str),
    /// Answers with these bytes and closes.
    Says(&'static str),
    /// Reads and says nothing.
    Stalls,
}

/// Serves for as long as the test runs.
pub struct Proxy {
    addr: SocketAddr,
    heads: Receiver<String>,
}

impl Proxy {
    pub fn start(manner: Manner) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
        let addr = listener.local_addr().expect("the address of a bound listener");
        let (head, heads) = channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let head = head.clone();
                thread::spawn(move || serve(stream.expect("a caller"), manner, &head));
            }
        });
        Proxy { addr, heads }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The heads of all requests so far.
    pub fn heads(&self) -> Vec<String> {
        self.heads.try_iter().collect()
    }
}

fn serve(mut caller: TcpStream, manner: Manner, heads: &Sender<String>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        let Ok(1) = caller.read(&mut byte) else { return };
        head.extend(byte);
    }
    let head = String::from_utf8(head).expect("an ASCII head");
    // The test is over where this fails.
    let _ = heads.send(head.clone());
    let target = head
        .strip_prefix("CONNECT ")
        .and_then(|rest| rest.split(' ').next())
        .expect("a CONNECT")
        .to_owned();
    let answer = match manner {
        Manner::Tunnels => Ok("HTTP/1.1 200 Connection established\r\n\r\n"),
        Manner::Wants(credential)
            if head.contains(&format!("\r\nProxy-Authorization: {credential}\r\n")) =>
        {
            Ok("HTTP/1.1 200 OK\r\n\r\n")
        }
        Manner::Wants(_) => Err("HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n"),
        Manner::Says(words) => Err(words),
        Manner::Stalls => {
            let _ = caller.read(&mut [0]);
            return;
        }
    };
    match answer {
        Err(words) => drop(caller.write_all(words.as_bytes())),
        Ok(words) => {
            let provider = TcpStream::connect(&target).expect("the provider is there");
            caller.write_all(words.as_bytes()).expect("the caller is there");
            let back =
                (provider.try_clone().expect("a handle"), caller.try_clone().expect("a handle"));
            thread::spawn(move || pump(back.0, back.1));
            pump(caller, provider);
        }
    }
}

/// Carries bytes until either side ends, and ends the other.
fn pump(mut from: TcpStream, mut to: TcpStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}
