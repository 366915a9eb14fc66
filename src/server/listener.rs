//! Where callers connect: a port, a unix socket, or both, or what systemd has opened. Accepts; knows nothing of what is said
//! then.

use std::cell::Cell;
use std::fmt;
use std::fs::{self, Permissions};
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, ready};

use async_io::Async;
use rustix::io::{Errno, FdFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::client_address::Peer;
use super::stream::Stream;
use crate::config::{Server, Socket};
use crate::socket;

/// Connections that the kernel keeps for us until we accept them.
const BACKLOG: i32 = 1024;

/// Everywhere that callers can connect.
#[derive(Debug)]
pub struct Listeners {
    /// Our own: a port and a socket at most.
    all: Vec<Listener>,
    /// Whether they were opened by another program, whose they remain.
    given: bool,
    /// How often they were asked: each begins in turn, so that a crowd at one does not shut the others.
    turn: Cell<usize>,
}

/// A place to connect to.
#[derive(Debug)]
pub struct Listener {
    inner: Inner,
    /// Nobody was waiting at the last look; the reactor knows when somebody is.
    deserted: Cell<bool>,
    place: Place,
    /// Goes with the listener.
    file: Option<SocketFile>,
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
    Http(SocketAddr),
    /// The same under TLS.
    Https(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Http(address) => write!(f, "http://{address}/v1"),
            Place::Https(address) => write!(f, "https://{address}/v1"),
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
        Ok(Listeners {
            all: port.into_iter().chain(socket).collect(),
            given: false,
            turn: Cell::new(0),
        })
    }

    /// Those that another program has opened. An error says which of them is none.
    pub fn adopt(sockets: Vec<OwnedFd>) -> io::Result<Listeners> {
        let adopt = |(at, socket)| {
            adopt(socket).map_err(|error| {
                let advice =
                    "it takes ListenStream= with an address, a port or a path, and Accept=no";
                io::Error::other(format!(
                    "cannot serve on socket {} of those given by systemd: {error}; {advice}",
                    at + 1
                ))
            })
        };
        let all = sockets.into_iter().enumerate().map(adopt).collect::<io::Result<_>>()?;
        Ok(Listeners { all, given: true, turn: Cell::new(0) })
    }

    /// Whether another program has opened them.
    pub fn are_given(&self) -> bool {
        self.given
    }

    /// Moves to where `after` says, or stays where `before` said if it can't. Returns the listeners that it has left. Those
    /// that were given stay.
    pub fn move_to(&mut self, before: &Server, after: &Server) -> io::Result<Vec<Listener>> {
        if self.given {
            return Ok(Vec::new());
        }
        let port_moves = (&before.host, before.port) != (&after.host, after.port);
        let path = |server: &Server| server.socket.as_ref().map(|socket| socket.path.clone());
        // Where somebody has removed the file, nobody reaches the socket any more: it is made anew.
        let is_there =
            |listener: &Listener| listener.file.as_ref().is_none_or(SocketFile::is_there);
        let socket_moves = path(before) != path(after) || !self.all.iter().all(is_there);
        let port = after
            .port
            .filter(|_| port_moves)
            .map(|port| listen_on_port(&after.host, port))
            .transpose()?;
        let socket =
            after.socket.as_ref().filter(|_| socket_moves).map(listen_on_socket).transpose()?;
        if let (Some(old), Some(new)) = (&before.socket, &after.socket)
            && !socket_moves
            && old.mode != new.mode
        {
            set_mode(&new.path, new.mode).map_err(|error| unserved(&new.path, &error))?;
        }
        let moves = |listener: &mut Listener| match listener.place {
            Place::Http(_) | Place::Https(_) => port_moves,
            Place::Unix(_) => socket_moves,
        };
        let left = self.all.extract_if(.., moves).collect();
        self.all.splice(0..0, port);
        self.all.extend(socket);
        Ok(left)
    }

    /// All places, for ports that speak TLS or not.
    pub fn places(&self, tls: bool) -> Vec<Place> {
        let place = |listener: &Listener| match listener.place {
            Place::Http(address) if tls => Place::Https(address),
            ref place => place.clone(),
        };
        self.all.iter().map(place).collect()
    }

    /// The next caller, wherever it connects.
    pub async fn accept(&self) -> io::Result<(Stream, Peer)> {
        let turn = self.turn.replace(self.turn.get().wrapping_add(1));
        poll_fn(|cx| {
            let (later, first) = self.all.split_at(turn % self.all.len());
            for listener in first.iter().chain(later) {
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
    fn new(inner: Inner, place: Place, file: Option<SocketFile>) -> Listener {
        Listener { inner, deserted: Cell::new(false), place, file }
    }

    /// A caller who has connected here already; `WouldBlock` where nobody has.
    pub fn accept_now(&self) -> io::Result<(Stream, Peer)> {
        match &self.inner {
            Inner::Tcp(listener) => accept_tcp(listener.get_ref()),
            Inner::Unix(listener) => accept_unix(listener.get_ref()),
        }
    }

    /// Asked again and again, it costs no system call until somebody comes.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Stream, Peer)>> {
        loop {
            if self.deserted.get() {
                ready!(match &self.inner {
                    Inner::Tcp(listener) => listener.poll_readable(cx),
                    Inner::Unix(listener) => listener.poll_readable(cx),
                })?;
                self.deserted.set(false);
            }
            match self.accept_now() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.deserted.set(true),
                accepted => return Poll::Ready(accepted),
            }
        }
    }
}

fn accept_tcp(listener: &TcpListener) -> io::Result<(Stream, Peer)> {
    let (stream, peer) = listener.accept()?;
    let _ = stream.set_nodelay(true);
    Ok((Stream::Tcp(socket::Socket::new(stream)?), Peer::new(Some(peer.ip()))))
}

fn accept_unix(listener: &UnixListener) -> io::Result<(Stream, Peer)> {
    let (stream, _) = listener.accept()?;
    Ok((Stream::Unix(socket::Socket::new(stream)?), Peer::new(None)))
}

fn listen_on_port(host: &str, port: u16) -> io::Result<Listener> {
    let listen = || {
        let listener = TcpListener::bind((host, port))?;
        // std asks for a backlog of 128; listening again on the same socket only raises it.
        rustix::net::listen(&listener, BACKLOG)?;
        let place = Place::Http(listener.local_addr()?);
        Ok(Listener::new(Inner::Tcp(Async::new(listener)?), place, None))
    };
    listen().map_err(|error: io::Error| {
        io::Error::new(error.kind(), format!("cannot serve on {host}:{port}: {error}"))
    })
}

fn listen_on_socket(socket: &Socket) -> io::Result<Listener> {
    let path = &socket.path;
    let listen = || {
        make_way(path)?;
        let bound = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::bind(&bound, &SocketAddrUnix::new(path)?)?;
        let file = SocketFile::at(path)?;
        // Nobody can connect before it listens: it is never open to more than the mode says.
        set_mode(path, socket.mode)?;
        rustix::net::listen(&bound, BACKLOG)?;
        let inner = Inner::Unix(Async::new(UnixListener::from(bound))?);
        Ok(Listener::new(inner, Place::Unix(path.clone()), Some(file)))
    };
    listen().map_err(|error: io::Error| unserved(path, &error))
}

fn unserved(path: &Path, error: &io::Error) -> io::Error {
    io::Error::other(format!(
        "cannot serve on the socket {} (server.socket): {error}",
        path.display()
    ))
}

/// What the socket is, it says itself.
fn adopt(socket: OwnedFd) -> io::Result<Listener> {
    if sockopt::socket_type(&socket)? != SocketType::STREAM || !sockopt::socket_acceptconn(&socket)?
    {
        return Err(io::Error::other("it is no stream socket that listens"));
    }
    rustix::io::fcntl_setfd(&socket, FdFlags::CLOEXEC)?;
    if sockopt::socket_domain(&socket)? == AddressFamily::UNIX {
        let listener = UnixListener::from(socket);
        let address = listener.local_addr()?;
        let path =
            address.as_pathname().map_or_else(|| PathBuf::from("(without a path)"), Path::to_owned);
        return Ok(Listener::new(Inner::Unix(Async::new(listener)?), Place::Unix(path), None));
    }
    let listener = TcpListener::from(socket);
    let place = Place::Http(listener.local_addr()?);
    Ok(Listener::new(Inner::Tcp(Async::new(listener)?), place, None))
}

/// Removes a socket that nobody listens on any more: what a killed gateway leaves. Anything else stays.
fn make_way(path: &Path) -> io::Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::other(
            "there is a file of that name, which is no socket; remove it or choose another name",
        ));
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path),
        // A full backlog is somebody's, too.
        Ok(()) | Err(Errno::AGAIN) => Err(io::Error::other(
            "another program serves on it; stop that one or choose another name",
        )),
        Err(error) => Err(error.into()),
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

    fn is_there(&self) -> bool {
        identity(&self.path).is_ok_and(|identity| identity == self.identity)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}
