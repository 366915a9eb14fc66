//! A port on which connections are never made, as behind a firewall that drops packets.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use rustix::net::listen;

/// A listener whose backlog is full: the kernel drops every further SYN.
pub struct SilentPort {
    listener: TcpListener,
    _filled: Vec<TcpStream>,
}

impl SilentPort {
    pub fn new() -> SilentPort {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
        listen(&listener, 0).expect("shorten the backlog");
        let addr = listener.local_addr().expect("the address of a bound listener");
        let fill = || TcpStream::connect_timeout(&addr, Duration::from_millis(200)).ok();
        let filled = std::iter::from_fn(fill).collect();
        SilentPort { listener, _filled: filled }
    }

    pub fn addr(&self) -> SocketAddr {
        self.listener.local_addr().expect("the address of a bound listener")
    }
}
