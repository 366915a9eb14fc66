//! A port that refuses connections for as long as it is held.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};

/// A bound socket that does not listen: unlike the port of a listener that is gone, nobody else can be given it.
pub struct ClosedPort {
    _socket: OwnedFd,
    addr: SocketAddr,
}

impl ClosedPort {
    pub fn new() -> ClosedPort {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("make a socket");
        bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).expect("bind a loopback port");
        let addr =
            getsockname(&socket).expect("it is bound").try_into().expect("an internet address");
        ClosedPort { _socket: socket, addr }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}
