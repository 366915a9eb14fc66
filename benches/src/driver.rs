//! The callers: one thread with keep-alive connections that each send the same request, and send it again as soon as it is
//! answered. Nothing is allocated for a request.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::http::{Events, Message};
use crate::machine::now;

/// How long nothing at all may come before it counts as an error.
const PATIENCE_MILLIS: u16 = 20_000;

const READ_BYTES: usize = 256 * 1024;

/// Samples for which there is room without growing.
const ROOM: usize = 1 << 20;

/// Where somebody listens.
#[derive(Clone, Debug)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Address {
        Address::Tcp(address)
    }
}

/// A connection of a caller.
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    pub fn connect(address: &Address) -> io::Result<Socket> {
        match address {
            Address::Unix(path) => Ok(Socket::Unix(UnixStream::connect(path)?)),
            Address::Tcp(address) => {
                let socket = TcpStream::connect(address)?;
                socket.set_nodelay(true)?;
                Ok(Socket::Tcp(socket))
            }
        }
    }

    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        match self {
            Socket::Tcp(socket) => socket.set_nonblocking(nonblocking),
            Socket::Unix(socket) => socket.set_nonblocking(nonblocking),
        }
    }

    pub fn set_read_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Socket::Tcp(socket) => socket.set_read_timeout(Some(timeout)),
            Socket::Unix(socket) => socket.set_read_timeout(Some(timeout)),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => socket.read(buf),
            Socket::Unix(socket) => socket.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => socket.write(buf),
            Socket::Unix(socket) => socket.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket) => socket.as_fd(),
        }
    }
}

/// A chat request with a body of so many bytes, for `{base}/chat/completions`.
pub fn chat(base: &str, model: &str, is_stream: bool, body_bytes: usize) -> Vec<u8> {
    let start = format!(
        "{{\"model\":\"{model}\",\"stream\":{is_stream},\"messages\":[{{\"role\":\"user\",\"content\":\""
    );
    let end = "\"}]}";
    let text = "All work and no play makes a gateway idle. ".bytes().cycle();
    let text = text
        .take(body_bytes.saturating_sub(start.len() + end.len()))
        .map(char::from)
        .collect::<String>();
    let length = start.len() + text.len() + end.len();
    format!(
        "POST {base}/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n\
         Accept: application/json\r\nAuthorization: Bearer bench\r\nUser-Agent: bench\r\n\
         Content-Length: {length}\r\n\r\n{start}{text}{end}"
    )
    .into_bytes()
}

/// How long to go on.
#[derive(Clone, Copy)]
pub enum Until {
    /// Requests are begun for so long, and then all answers waited for; streams are left where they are.
    Elapsed(Duration),
    /// So many requests are answered.
    Answered(u64),
}

/// What was seen of one run. Samples are nanoseconds.
#[derive(Default)]
pub struct Seen {
    pub elapsed: u64,
    pub answers: u64,
    pub events: u64,
    /// From the sending of each request to the end of its answer.
    pub times: Vec<u64>,
    /// From the mock's sending of each event to its receipt.
    pub delays: Vec<u64>,
}

impl Seen {
    pub fn answers_per_second(&self) -> f64 {
        self.answers as f64 * 1e9 / self.elapsed as f64
    }

    pub fn events_per_second(&self) -> f64 {
        self.events as f64 * 1e9 / self.elapsed as f64
    }
}

/// Connections to one address, of which all send one request.
pub struct Driver {
    address: Address,
    request: Vec<u8>,
    is_stream: bool,
    epoll: Epoll,
    conns: Vec<Conn>,
    buf: Vec<u8>,
}

struct Conn {
    socket: Socket,
    message: Message,
    events: Events,
    /// Of the request, while it is sent; all of it: the answer is waited for. None: nothing is asked.
    sent: Option<usize>,
    /// Whether the socket takes no more at the moment.
    is_stuck: bool,
    began: u64,
}

impl Driver {
    pub fn new(address: &Address, connections: usize, request: Vec<u8>) -> io::Result<Driver> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let is_stream = memchr::memmem::find(&request, b"\"stream\":true").is_some();
        let (address, buf) = (address.clone(), vec![0; READ_BYTES]);
        let mut driver = Driver { address, request, is_stream, epoll, conns: Vec::new(), buf };
        for at in 0..connections {
            let conn = driver.connect(at)?;
            driver.conns.push(conn);
        }
        Ok(driver)
    }

    fn connect(&self, at: usize) -> io::Result<Conn> {
        let socket = Socket::connect(&self.address)?;
        socket.set_nonblocking(true)?;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, at as u64))?;
        let (message, events) = (Message::default(), Events::default());
        Ok(Conn { socket, message, events, sent: None, is_stuck: false, began: 0 })
    }

    /// One request on each connection, all at once.
    pub fn once(&mut self) -> io::Result<Seen> {
        self.run(Until::Answered(self.conns.len() as u64))
    }

    /// Goes on where the last run ended. An error is a status other than 200, a broken answer, or that nothing comes.
    pub fn run(&mut self, until: Until) -> io::Result<Seen> {
        let mut seen = Seen {
            times: Vec::with_capacity(ROOM),
            delays: Vec::with_capacity(ROOM),
            ..Seen::default()
        };
        let start = now();
        let (deadline, limit) = match until {
            Until::Elapsed(time) => (start + time.as_nanos() as u64, u64::MAX),
            Until::Answered(count) => (u64::MAX, count),
        };
        let mut begun = self.conns.iter().filter(|conn| conn.sent.is_some()).count() as u64;
        for at in 0..self.conns.len() {
            if self.conns[at].sent.is_none() && begun < limit {
                begun += 1;
                self.begin(at)?;
            }
        }
        let mut events = [EpollEvent::empty(); 256];
        let mut time = now();
        let is_over = |time: u64, seen: &Seen, begun: u64| match until {
            Until::Answered(count) => seen.answers >= count,
            Until::Elapsed(_) => time >= deadline && (seen.events > 0 || seen.answers == begun),
        };
        while !is_over(time, &seen, begun) {
            let count = match self.epoll.wait(&mut events, EpollTimeout::from(PATIENCE_MILLIS)) {
                Err(nix::Error::EINTR) => continue,
                count => count?,
            };
            if count == 0 {
                return Err(io::Error::new(ErrorKind::TimedOut, "no answer for 20 s"));
            }
            for event in &events[..count] {
                let at = event.data() as usize;
                if event.events().contains(EpollFlags::EPOLLOUT) {
                    self.send(at)?;
                }
                if !event
                    .events()
                    .intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR)
                {
                    continue;
                }
                let is_answered = self.read(at, &mut seen, &mut time)?;
                if is_answered && begun < limit && time < deadline {
                    begun += 1;
                    self.begin(at)?;
                }
            }
        }
        seen.elapsed = time - start;
        Ok(seen)
    }

    fn begin(&mut self, at: usize) -> io::Result<()> {
        self.conns[at].sent = Some(0);
        self.conns[at].began = now();
        self.send(at)
    }

    /// Sends on; where the socket takes no more, EPOLLOUT is waited for.
    fn send(&mut self, at: usize) -> io::Result<()> {
        let conn = &mut self.conns[at];
        let Some(sent) = conn.sent.as_mut() else { return Ok(()) };
        match conn.socket.write(&self.request[*sent..]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            count => *sent += count?,
        }
        let is_stuck = *sent < self.request.len();
        if is_stuck != conn.is_stuck {
            conn.is_stuck = is_stuck;
            let out = if is_stuck { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
            self.epoll
                .modify(&conn.socket, &mut EpollEvent::new(EpollFlags::EPOLLIN | out, at as u64))?;
        }
        Ok(())
    }

    /// True when the answer is whole.
    fn read(&mut self, at: usize, seen: &mut Seen, time: &mut u64) -> io::Result<bool> {
        let conn = &mut self.conns[at];
        let read = match conn.socket.read(&mut self.buf) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            read => read?,
        };
        *time = now();
        if read == 0 && conn.sent.is_none() {
            self.conns[at] = self.connect(at)?; // it was idle for too long
            return Ok(false);
        }
        if read == 0 {
            return Err(io::Error::new(
                ErrorKind::UnexpectedEof,
                "closed before the answer was whole",
            ));
        }
        let Conn { message, events, .. } = conn;
        let mut event = |sent_at: u64| {
            seen.events += 1;
            if sent_at > 0 {
                seen.delays.push(time.saturating_sub(sent_at));
            }
        };
        let is_whole = match self.is_stream {
            true => message.take(&self.buf[..read], |part| events.take(part, &mut event))?,
            false => message.take(&self.buf[..read], |_| {})?,
        };
        if message.status() != 200 && message.status() != 0 {
            let read = String::from_utf8_lossy(&self.buf[..read.min(400)]).into_owned();
            return Err(io::Error::other(format!("not answered with 200: {read}")));
        }
        if is_whole {
            seen.answers += 1;
            seen.times.push(*time - conn.began);
            conn.sent = None;
            if conn.message.closes {
                self.conns[at] = self.connect(at)?;
            }
        }
        Ok(is_whole)
    }
}

/// The body of the answer to one request on a connection of its own.
pub fn ask(address: &Address, request: &[u8]) -> io::Result<Vec<u8>> {
    ask_on(&mut Socket::connect(address)?, request)
}

/// The body of the answer to a request, which has to be a 200.
pub fn ask_on(socket: &mut Socket, request: &[u8]) -> io::Result<Vec<u8>> {
    socket.set_read_timeout(Duration::from_millis(PATIENCE_MILLIS.into()))?;
    socket.write_all(request)?;
    let (mut message, mut body, mut buf) = (Message::default(), Vec::new(), [0; 16 * 1024]);
    loop {
        let read = socket.read(&mut buf)?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if message.take(&buf[..read], |part| body.extend_from_slice(part))? {
            break;
        }
    }
    match message.status() {
        200 => Ok(body),
        status => Err(io::Error::other(format!("{status}: {}", String::from_utf8_lossy(&body)))),
    }
}
