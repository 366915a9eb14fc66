//! The provider: one thread that answers every request at once, or with a stream as [`Terms`] says. It has two addresses;
//! of what comes to the second one the kernel's time of arrival is noted, so that it counts no delay of its own.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt::ReceiveTimestampns,
};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::http::{Message, TIME_MARK};
use crate::machine::{Cores, now};

/// Larger bodies are not looked into: they ask for no stream.
const SEEN_BODY_BYTES: usize = 8 * 1024;

/// The timer for paced streams is set no finer than this, so that it costs a small part of what it paces.
const TICK_NANOS: u64 = 200_000;

const READ_BYTES: usize = 256 * 1024;

const LISTENER: u64 = 0;
const NOTED_LISTENER: u64 = 1;
const TIMER: u64 = 2;
const FIRST_CONN: u64 = 3;

/// How the mock answers; it may be changed while it runs, and holds for requests from then on.
pub struct Terms {
    /// Nanoseconds from one event of a stream to the next; 0: as fast as they are taken.
    pub pace: AtomicU64,
    /// Events of a stream.
    pub events: AtomicU32,
    /// Whether a connection to the second address is closed behind each answer.
    pub is_cold: AtomicBool,
    /// When requests came to the second address, in nanoseconds of the system's clock.
    pub arrivals: Mutex<Vec<u64>>,
}

/// The mock's two addresses, and what it goes by. It runs as long as this process.
pub struct Mock {
    pub address: SocketAddr,
    pub noted: SocketAddr,
    pub terms: Arc<Terms>,
}

impl Mock {
    /// Begins to serve on 127.0.0.1: the first address has this port, or any with 0.
    pub fn start(port: u16, cores: &Cores) -> io::Result<Mock> {
        let (listener, noted) =
            (TcpListener::bind(("127.0.0.1", port))?, TcpListener::bind("127.0.0.1:0")?);
        setsockopt(&noted, ReceiveTimestampns, &true)?; // connections inherit it
        let arrivals = Mutex::new(Vec::with_capacity(1 << 16));
        let (pace, events) = (AtomicU64::new(0), AtomicU32::new(100));
        let terms = Arc::new(Terms { pace, events, is_cold: AtomicBool::new(false), arrivals });
        let mock = Mock {
            address: listener.local_addr()?,
            noted: noted.local_addr()?,
            terms: terms.clone(),
        };
        let mut server = Server::new([listener, noted], terms)?;
        cores.pin_mock()?; // a thread is born where its maker runs
        thread::Builder::new().name("mock".to_owned()).spawn(move || {
            if let Err(error) = server.run() {
                eprintln!("the mock ended: {error}");
            }
        })?;
        cores.pin_driver()?;
        Ok(mock)
    }

    /// How streams are sent from now on: so many events, one each `pace` nanoseconds or as fast as they are taken.
    pub fn stream(&self, events: u32, pace: u64) {
        self.terms.events.store(events, Relaxed);
        self.terms.pace.store(pace, Relaxed);
    }

    /// The arrivals at the second address since the last time this was asked, in their order.
    pub fn take_arrivals(&self) -> Vec<u64> {
        let mut arrivals = std::mem::take(
            &mut *self.terms.arrivals.lock().expect("nobody panics while he holds it"),
        );
        arrivals.sort_unstable(); // they were read in the order of epoll
        arrivals
    }
}

struct Server {
    listeners: [TcpListener; 2],
    terms: Arc<Terms>,
    epoll: Epoll,
    timer: TimerFd,
    conns: Vec<Option<Conn>>,
    free: Vec<usize>,
    /// Streams as fast as they are taken, of which none is stuck.
    eager: VecDeque<usize>,
    /// Paced streams, each with when its next event is due and which life of its slot it belongs to. All have one pace, so
    /// that the front is the next one.
    paced: VecDeque<(u64, usize, u64)>,
    lives: u64,
    buf: Vec<u8>,
    event: Event,
    answers: Answers,
}

struct Conn {
    socket: TcpStream,
    message: Message,
    /// The start of the request's body.
    body: Vec<u8>,
    is_noted: bool,
    /// What the socket did not take yet.
    unsent: Vec<u8>,
    stream: Option<Stream>,
    life: u64,
    closes: bool,
}

struct Stream {
    left: u32,
    pace: u64,
}

impl Server {
    fn new(listeners: [TcpListener; 2], terms: Arc<Terms>) -> io::Result<Server> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        for (listener, token) in listeners.iter().zip([LISTENER, NOTED_LISTENER]) {
            listener.set_nonblocking(true)?;
            epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
        }
        epoll.add(timer.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        Ok(Server {
            listeners,
            terms,
            epoll,
            timer,
            conns: Vec::new(),
            free: Vec::new(),
            eager: VecDeque::new(),
            paced: VecDeque::new(),
            lives: 0,
            buf: vec![0; READ_BYTES],
            event: Event::new(),
            answers: Answers::new(),
        })
    }

    fn run(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        loop {
            let timeout =
                if self.eager.is_empty() { EpollTimeout::NONE } else { EpollTimeout::ZERO };
            let count = match self.epoll.wait(&mut events, timeout) {
                Err(nix::Error::EINTR) => 0,
                count => count?,
            };
            for event in &events[..count] {
                match event.data() {
                    LISTENER | NOTED_LISTENER => self.accept(event.data())?,
                    TIMER => drop(self.timer.wait()),
                    token => self.serve((token - FIRST_CONN) as usize, event.events()),
                }
            }
            for _ in 0..self.eager.len() {
                let Some(at) = self.eager.pop_front() else { break };
                self.send_event(at);
            }
            self.send_due()?;
        }
    }

    fn accept(&mut self, listener: u64) -> io::Result<()> {
        loop {
            let socket = match self.listeners[listener as usize].accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            let at = self.free.pop().unwrap_or_else(|| {
                self.conns.push(None);
                self.conns.len() - 1
            });
            self.epoll
                .add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, FIRST_CONN + at as u64))?;
            self.lives += 1;
            self.conns[at] = Some(Conn {
                socket,
                message: Message::default(),
                body: Vec::new(),
                is_noted: listener == NOTED_LISTENER,
                unsent: Vec::new(),
                stream: None,
                life: self.lives,
                closes: false,
            });
        }
    }

    /// Whatever goes wrong on a connection ends it: the other side reports what it misses.
    fn serve(&mut self, at: usize, events: EpollFlags) {
        let Some(conn) = self.conns[at].as_mut() else { return };
        if events.contains(EpollFlags::EPOLLOUT) {
            match conn.send_unsent() {
                Err(_) => return self.close(at),
                Ok(false) => {}
                Ok(true) => {
                    let _ = self.epoll.modify(&conn.socket, &mut interest(EpollFlags::EPOLLIN, at));
                    match conn.stream.as_ref().map(|stream| stream.pace) {
                        Some(0) => self.eager.push_back(at),
                        None if conn.closes => return self.close(at),
                        _ => {}
                    }
                }
            }
        }
        if events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            match self.read(at) {
                Ok(false) => {}
                Ok(true) => self.answer(at),
                Err(_) => self.close(at),
            }
        }
    }

    /// True when the request is whole.
    fn read(&mut self, at: usize) -> io::Result<bool> {
        let Some(conn) = self.conns[at].as_mut() else { return Ok(false) };
        let is_first = conn.is_noted && !conn.message.is_begun();
        let (count, arrived) = match is_first {
            true => read_noted(&conn.socket, &mut self.buf)?,
            false => (conn.socket.read(&mut self.buf)?, None),
        };
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if let Some(arrived) = arrived {
            self.terms.arrivals.lock().expect("nobody panics while he holds it").push(arrived);
        }
        let Conn { message, body, .. } = conn;
        message.take(&self.buf[..count], |part| {
            if body.len() + part.len() <= SEEN_BODY_BYTES {
                body.extend_from_slice(part);
            }
        })
    }

    fn answer(&mut self, at: usize) {
        let Some(conn) = self.conns[at].as_mut() else { return };
        let asks_for_stream = asks_for_stream(&conn.body);
        conn.body.clear();
        conn.closes = conn.is_noted && self.terms.is_cold.load(Relaxed);
        if !asks_for_stream {
            let answer = match (conn.message.is_get(), conn.closes) {
                (true, _) => &self.answers.models,
                (false, true) => &self.answers.closing,
                (false, false) => &self.answers.plain,
            };
            return match conn.send(answer) {
                Err(_) => self.close(at),
                Ok(false) => self.wait_for_room(at),
                Ok(true) if conn.closes => self.close(at),
                Ok(true) => {}
            };
        }
        let (left, pace) = (self.terms.events.load(Relaxed), self.terms.pace.load(Relaxed));
        conn.stream = Some(Stream { left, pace });
        let life = conn.life;
        match conn.send(STREAM_HEAD) {
            Err(_) => return self.close(at),
            Ok(false) => self.wait_for_room(at),
            Ok(true) if pace == 0 => self.eager.push_back(at),
            Ok(true) => {}
        }
        if pace > 0 {
            // Spread over the interval, whenever they were asked for. A new one may be due before those that wait.
            let due = now() + (at as u64 * 7_919_000) % pace;
            let behind = self.paced.partition_point(|(other, ..)| *other <= due);
            self.paced.insert(behind, (due, at, life));
        }
    }

    /// Sends a stream's next event, or its end. True if more is to come.
    fn send_event(&mut self, at: usize) -> bool {
        let Some(conn) = self.conns[at].as_mut() else { return false };
        let Some(stream) = conn.stream.as_mut() else { return false };
        if !conn.unsent.is_empty() {
            return true; // a paced one that is not read: its event is left out
        }
        let pace = stream.pace;
        let is_last = stream.left == 0;
        stream.left = stream.left.saturating_sub(1);
        if is_last {
            conn.stream = None;
        }
        let bytes = if is_last { STREAM_END } else { self.event.at(now()) };
        match conn.send(bytes) {
            Err(_) => {
                self.close(at);
                return false;
            }
            Ok(false) => self.wait_for_room(at),
            Ok(true) if pace == 0 && !is_last => self.eager.push_back(at),
            Ok(true) => {}
        }
        !is_last
    }

    /// Sends what is due of the paced streams, and sets the timer for the next.
    fn send_due(&mut self) -> io::Result<()> {
        let Some((first, ..)) = self.paced.front() else { return Ok(()) };
        let mut time = now();
        if *first <= time {
            while let Some((due, at, life)) =
                self.paced.front().copied().filter(|(due, ..)| *due <= time)
            {
                self.paced.pop_front();
                let conn = self.conns[at].as_ref().filter(|conn| conn.life == life);
                let Some(pace) = conn.and_then(|conn| Some(conn.stream.as_ref()?.pace)) else {
                    continue;
                };
                if self.send_event(at) {
                    self.paced.push_back((due + pace, at, life));
                }
            }
            time = now();
        }
        if let Some((next, ..)) = self.paced.front() {
            let wait = next.saturating_sub(time).max(TICK_NANOS);
            let wait = TimeSpec::new((wait / 1_000_000_000) as i64, (wait % 1_000_000_000) as i64);
            self.timer.set(Expiration::OneShot(wait), TimerSetTimeFlags::empty())?;
        }
        Ok(())
    }

    fn wait_for_room(&mut self, at: usize) {
        let Some(conn) = &self.conns[at] else { return };
        let _ = self
            .epoll
            .modify(&conn.socket, &mut interest(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT, at));
    }

    fn close(&mut self, at: usize) {
        self.conns[at] = None; // closing takes it out of the epoll
        self.eager.retain(|other| *other != at);
        self.free.push(at);
    }
}

impl Conn {
    /// Sends all or keeps the rest: false means that EPOLLOUT has to be waited for.
    fn send(&mut self, bytes: &[u8]) -> io::Result<bool> {
        let sent = match self.socket.write(bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            sent => sent?,
        };
        self.unsent.extend_from_slice(&bytes[sent..]);
        Ok(sent == bytes.len())
    }

    fn send_unsent(&mut self) -> io::Result<bool> {
        let unsent = std::mem::take(&mut self.unsent);
        self.send(&unsent)
    }
}

fn interest(flags: EpollFlags, at: usize) -> EpollEvent {
    EpollEvent::new(flags, FIRST_CONN + at as u64)
}

/// Whether a chat request has `"stream": true`, however it is spaced.
fn asks_for_stream(body: &[u8]) -> bool {
    let Some(at) = memchr::memmem::find(body, b"\"stream\"") else { return false };
    let rest = body[at + 8..].trim_ascii_start();
    rest.strip_prefix(b":").is_some_and(|rest| rest.trim_ascii_start().starts_with(b"true"))
}

/// Reads as `Read` does, with the kernel's time of arrival in nanoseconds of the system's clock.
fn read_noted(socket: &TcpStream, buf: &mut [u8]) -> io::Result<(usize, Option<u64>)> {
    let mut control = nix::cmsg_space!(TimeSpec);
    let mut parts = [IoSliceMut::new(buf)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let arrived = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmTimestampns(at) => {
            Some(at.tv_sec() as u64 * 1_000_000_000 + at.tv_nsec() as u64)
        }
        _ => None,
    });
    Ok((message.bytes, arrived))
}

const STREAM_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n";
const STREAM_END: &[u8] = b"E\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

/// An event of a stream in its chunk, with a place for the time it is sent at.
struct Event {
    bytes: Vec<u8>,
    time_at: usize,
}

const TIME_DIGITS: usize = 19;

impl Event {
    fn new() -> Event {
        let mark = char::from(TIME_MARK);
        let event = format!(
            "data: {{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\
             \"model\":\"fast\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{mark}{:0TIME_DIGITS$}{mark}\"}},\
             \"finish_reason\":null}}]}}\n\n",
            0
        );
        let bytes = format!("{:x}\r\n{event}\r\n", event.len()).into_bytes();
        let time_at = memchr::memchr(TIME_MARK, &bytes).expect("it was just written") + 1;
        Event { bytes, time_at }
    }

    fn at(&mut self, mut time: u64) -> &[u8] {
        for place in self.bytes[self.time_at..][..TIME_DIGITS].iter_mut().rev() {
            *place = b'0' + (time % 10) as u8;
            time /= 10;
        }
        &self.bytes
    }
}

/// The answers that are no streams, with their heads.
struct Answers {
    plain: Vec<u8>,
    closing: Vec<u8>,
    models: Vec<u8>,
}

impl Answers {
    fn new() -> Answers {
        let chat = "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"fast\",\
            \"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"Nothing is as fast as no \
            answer at all, but this one comes close to it.\"},\"finish_reason\":\"stop\"}],\
            \"usage\":{\"prompt_tokens\":256,\"completion_tokens\":17,\"total_tokens\":273}}";
        let models = "{\"object\":\"list\",\"data\":[{\"id\":\"fast\",\"object\":\"model\",\"owned_by\":\"bench\"}]}";
        let whole = |body: &str, extra: &str| {
            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
            format!("{head}{extra}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
        };
        Answers {
            plain: whole(chat, ""),
            closing: whole(chat, "Connection: close\r\n"),
            models: whole(models, ""),
        }
    }
}
