//! Where callers connect: a port, a unix socket, or both. Accepts; knows nothing of what is said then.

use std::cell::Cell;
use std::fmt;
use std::fs::{self, Permissions};
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, ready};

use async_io::Async;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::client_address::Peer;
use super::stream::Stream;
use crate::config::{Server, Socket};

/// Connections that the kernel keeps for us until we accept them.
const BACKLOG: i32 = 1024;

/// Everywhere that callers can connect.
#[derive(Debug)]
pub struct Listeners {
    port: Option<Listener>,
    socket: Option<Listener>,
    /// Which of them is asked first the next time, so that a crowd at one does not shut the other.
    turn: Cell<bool>,
}

/// A place to connect to.
#[derive(Debug)]
pub struct Listener {
    inner: Inner,
    place: Place,
    /// Goes with the listener.
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Inner {
    Tcp(Async<TcpListener>),
    Unix(Async<UnixListener>),
}

/// How a place is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// With the port that was chosen for port 0.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Tcp(address) => write!(f, "http://{address}/v1"),
            Place::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// All of them on one line.
pub fn list(places: &[Place]) -> String {
    places.iter().map(Place::to_string).collect::<Vec<_>>().join(" and ")
}

impl Listeners {
    /// Listens wherever `config` says. An error says where it can't and why; it is of kind `AddrInUse` or `PermissionDenied`
    /// for a port only.
    pub fn bind(config: &Server) -> io::Result<Listeners> {
        let port = config.port.map(|port| listen_on_port(&config.host, port)).transpose()?;
        let socket = config.socket.as_ref().map(listen_on_socket).transpose()?;
        Ok(Listeners { port, socket, turn: Cell::new(false) })
    }

    /// Moves to where `after` says, or stays where `before` said if it can't. Returns the listeners that it has left.
    pub fn move_to(&mut self, before: &Server, after: &Server) -> io::Result<Vec<Listener>> {
        let port_moves = (&before.host, before.port) != (&after.host, after.port);
        let path = |server: &Server| server.socket.as_ref().map(|socket| socket.path.clone());
        let socket_moves = path(before) != path(after);
        let port = after.port.filter(|_| port_moves).map(|port| listen_on_port(&after.host, port)).transpose()?;
        let socket = after.socket.as_ref().filter(|_| socket_moves).map(listen_on_socket).transpose()?;
        if let Some(Socket { path, mode }) = after.socket.as_ref().filter(|_| !socket_moves) {
            set_mode(path, *mode)?;
        }
        let mut left = Vec::new();
        if port_moves {
            left.extend(std::mem::replace(&mut self.port, port));
        }
        if socket_moves {
            left.extend(std::mem::replace(&mut self.socket, socket));
        }
        Ok(left)
    }

    /// All places.
    pub fn places(&self) -> Vec<Place> {
        [&self.port, &self.socket].into_iter().flatten().map(|listener| listener.place.clone()).collect()
    }

    /// The next caller, wherever it connects.
    pub async fn accept(&self) -> io::Result<(Stream, Peer)> {
        self.turn.set(!self.turn.get());
        poll_fn(|cx| {
            let mut both = [&self.port, &self.socket];
            if self.turn.get() {
                both.reverse();
            }
            for listener in both.into_iter().flatten() {
                if let Poll::Ready(accepted) = listener.poll_accept(cx) {
                    return Poll::Ready(accepted);
                }
            }
            Poll::Pending
        })
        .await
    }
}

impl Listener {
    /// The next caller who has connected here.
    pub async fn accept(&self) -> io::Result<(Stream, Peer)> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Stream, Peer)>> {
        loop {
            let accepted = match &self.inner {
                Inner::Tcp(listener) => accept_tcp(listener.get_ref()),
                Inner::Unix(listener) => accept_unix(listener.get_ref()),
            };
            match accepted {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                accepted => return Poll::Ready(accepted),
            }
            ready!(match &self.inner {
                Inner::Tcp(listener) => listener.poll_readable(cx),
                Inner::Unix(listener) => listener.poll_readable(cx),
            })?;
        }
    }
}

fn accept_tcp(listener: &TcpListener) -> io::Result<(Stream, Peer)> {
    let (stream, peer) = listener.accept()?;
    let _ = stream.set_nodelay(true);
    Ok((Stream::Tcp(Async::new(stream)?.into()), Peer::new(Some(peer.ip()))))
}

fn accept_unix(listener: &UnixListener) -> io::Result<(Stream, Peer)> {
    let (stream, _) = listener.accept()?;
    Ok((Stream::Unix(Async::new(stream)?.into()), Peer::new(None)))
}

fn listen_on_port(host: &str, port: u16) -> io::Result<Listener> {
    let listen = || {
        let listener = TcpListener::bind((host, port))?;
        // std asks for a backlog of 128; listening again on the same socket only raises it.
        rustix::net::listen(&listener, BACKLOG)?;
        let place = Place::Tcp(listener.local_addr()?);
        Ok(Listener { inner: Inner::Tcp(Async::new(listener)?), place, _file: None })
    };
    listen().map_err(|error: io::Error| io::Error::new(error.kind(), format!("cannot serve on {host}:{port}: {error}")))
}

fn listen_on_socket(socket: &Socket) -> io::Result<Listener> {
    let path = &socket.path;
    let listen = || {
        make_way(path)?;
        let bound = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&bound, &SocketAddrUnix::new(path)?)?;
        let file = SocketFile::at(path)?;
        // Nobody can connect before it listens: it is never open to more than the mode says.
        set_mode(path, socket.mode)?;
        rustix::net::listen(&bound, BACKLOG)?;
        let inner = Inner::Unix(Async::new(UnixListener::from(bound))?);
        Ok(Listener { inner, place: Place::Unix(path.clone()), _file: Some(file) })
    };
    listen().map_err(|error: io::Error| {
        io::Error::other(format!("cannot serve on the socket {} (server.socket): {error}", path.display()))
    })
}

/// Removes a socket that nobody listens on any more: what a killed gateway leaves. Anything else stays.
fn make_way(path: &Path) -> io::Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::other(
            "there is a file of that name, which is no socket; remove it or choose another name",
        ));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        Ok(_) => Err(io::Error::other("another program serves on it; stop that one or choose another name")),
        Err(error) => Err(error),
    }
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// A socket's file, which nothing else would remove. Only if it is still the same: somebody may have taken its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    fn at(path: &Path) -> io::Result<SocketFile> {
        Ok(SocketFile { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}
