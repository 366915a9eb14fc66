//! A provider that does what a test tells it to, and remembers what it was sent and when.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::wire::{End, Head, Headers, Wire};

/// What the provider does about one request.
#[derive(Debug, Clone)]
pub enum Reply {
    /// An answer with Content-Length; the connection stays open.
    Json(u16, String),
    /// Bytes as they are; the connection stays open.
    Raw(Vec<u8>),
    /// Bytes as they are, then FIN.
    RawThenClose(Vec<u8>),
    /// A chunked SSE answer; each chunk waits for its turn at the gate, the head for none.
    Stream { chunks: Vec<Vec<u8>>, gate: Gate, ending: Ending },
    /// Bytes as they are, in pieces that each wait for their turn at the gate; an empty one holds back the ending.
    Pieces { pieces: Vec<Vec<u8>>, gate: Gate, ending: Ending },
    /// A 200 without any framing, then FIN.
    CloseDelimited(Vec<u8>),
    /// The first bytes of what `Json` would send, then FIN.
    TruncateAt(usize, String),
    /// No answer at all.
    Stall,
    /// A head that promises a body that does not come.
    StallAfterHead,
    /// RST in place of an answer.
    Reset,
    /// FIN in place of an answer.
    CloseBeforeAnswer,
    /// A 429 with these header fields.
    TooMany(Vec<(&'static str, String)>),
    /// The reply inside, sent at the request's head before its body is read; only from a list, not from a closure.
    Early(Box<Reply>),
}

/// What follows a stream's last chunk, or the last piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The empty chunk: a proper end. Of pieces, none.
    Complete,
    /// FIN.
    Close,
    /// RST.
    Reset,
    /// Nothing.
    Stall,
}

impl Reply {
    /// A 200 with a small chat completion.
    pub fn ok() -> Reply {
        Reply::Json(200, r#"{"id":"c-1","object":"chat.completion","choices":[]}"#.to_owned())
    }

    /// A complete stream whose chunks wait for `gate`.
    pub fn stream(chunks: Vec<Vec<u8>>, gate: &Gate) -> Reply {
        Reply::Stream { chunks, gate: gate.clone(), ending: Ending::Complete }
    }

    /// Raw pieces that come one after the other as `gate` lets them, the ending too.
    pub fn pieces(pieces: &[&[u8]], gate: &Gate, ending: Ending) -> Reply {
        let pieces = pieces.iter().map(|piece| piece.to_vec()).chain([Vec::new()]).collect();
        Reply::Pieces { pieces, gate: gate.clone(), ending }
    }

    /// A 200 with these header lines (each with its CRLF) and a body with Content-Length.
    pub fn with_headers(lines: &str, body: impl AsRef<[u8]>) -> Reply {
        let body = body.as_ref();
        let head = format!("HTTP/1.1 200 OK\r\n{lines}Content-Length: {}\r\n\r\n", body.len());
        Reply::Raw([head.as_bytes(), body].concat())
    }
}

/// Holds a stream's chunks back until the test lets them go.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<(Mutex<usize>, Condvar)>);

impl Gate {
    /// A gate that lets nothing pass yet.
    pub fn closed() -> Gate {
        Gate::default()
    }

    /// A gate that never holds anything back.
    pub fn open() -> Gate {
        let gate = Gate::default();
        gate.release(usize::MAX);
        gate
    }

    /// Lets `n` more chunks pass.
    pub fn release(&self, n: usize) {
        let mut passes = lock(&self.0.0);
        *passes = passes.saturating_add(n);
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let passes = lock(&self.0.0);
        let mut passes =
            self.0.1.wait_while(passes, |n| *n == 0).expect("no test thread panics with this lock");
        if *passes < usize::MAX {
            *passes -= 1;
        }
    }
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// When the first byte of its head was read.
    pub arrived: Instant,
    /// Which connection brought it, from 0.
    pub connection: usize,
    pub method: String,
    pub target: String,
    pub headers: Headers,
    /// Empty under `Reply::Early`.
    pub body: Vec<u8>,
}

impl Recorded {
    pub fn header(&self, name: &str) -> Option<String> {
        self.headers.get(name)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("no JSON ({e}): {:?}", self.text()))
    }
}

/// Who ended a connection, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// The gateway sent FIN.
    Closed,
    /// The gateway sent RST.
    Reset,
    /// The script of the test ended it.
    ByScript,
}

type Answer = dyn Fn(&Recorded, usize) -> Reply + Send + Sync;

enum Script {
    List(Vec<Reply>),
    Answer(Box<Answer>),
}

/// The running provider; dropping it closes its port and every connection.
pub struct Upstream {
    addr: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    script: Script,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    requests: Vec<Recorded>,
    connections: Vec<Connection>,
    stopped: bool,
}

struct Connection {
    stream: Weak<TcpStream>,
    gone: Option<(Gone, Instant)>,
}

impl Upstream {
    /// Answers requests with these replies in order of their completion; the last one repeats.
    pub fn start(script: impl IntoIterator<Item = Reply>) -> Upstream {
        let script: Vec<Reply> = script.into_iter().collect();
        assert!(!script.is_empty(), "a script needs a reply");
        Upstream::run(Script::List(script))
    }

    /// Answers each request with what `answer` makes of it; the number counts requests from 0.
    pub fn answering(
        answer: impl Fn(&Recorded, usize) -> Reply + Send + Sync + 'static,
    ) -> Upstream {
        Upstream::run(Script::Answer(Box::new(answer)))
    }

    fn run(script: Script) -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
        let addr = listener.local_addr().expect("the address of a bound listener");
        let shared = Arc::new(Shared { script, state: Mutex::default(), changed: Condvar::new() });
        let accepting = shared.clone();
        thread::spawn(move || accept(&listener, &accepting));
        Upstream { addr, shared }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What has come so far.
    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.lock().requests.clone()
    }

    /// How many connections were ever made.
    pub fn connections(&self) -> usize {
        self.shared.lock().connections.len()
    }

    /// Waits until at least `n` whole requests have come.
    pub fn wait_requests(&self, n: usize, timeout: Duration) -> Vec<Recorded> {
        let state = self.shared.wait(timeout, |state| state.requests.len() >= n);
        assert!(
            state.requests.len() >= n,
            "{} of {n} requests: {:#?}",
            state.requests.len(),
            state.requests
        );
        state.requests.clone()
    }

    /// Waits until at least `n` connections were made.
    pub fn wait_connections(&self, n: usize, timeout: Duration) {
        let state = self.shared.wait(timeout, |state| state.connections.len() >= n);
        assert!(state.connections.len() >= n, "{} of {n} connections", state.connections.len());
    }

    /// Waits until exactly `n` connections are open.
    pub fn wait_open(&self, n: usize, timeout: Duration) {
        let open = |state: &State| {
            state.connections.iter().filter(|connection| connection.gone.is_none()).count()
        };
        let state = self.shared.wait(timeout, |state| open(state) == n);
        assert_eq!(open(&state), n, "open connections after {timeout:?}");
    }

    /// Waits until a connection is gone, and says how and since when.
    pub fn wait_closed(&self, connection: usize, timeout: Duration) -> (Gone, Instant) {
        let gone = |state: &State| state.connections.get(connection).and_then(|c| c.gone);
        let state = self.shared.wait(timeout, |state| gone(state).is_some());
        gone(&state)
            .unwrap_or_else(|| panic!("connection {connection} is still open after {timeout:?}"))
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stopped = true;
        for stream in state.connections.iter().filter_map(|connection| connection.stream.upgrade())
        {
            // Fails where the other side was faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(state);
        // Wakes `accept`, which then drops the listener.
        let _ = TcpStream::connect(self.addr);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn wait(&self, timeout: Duration, done: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, |state| !done(state));
        waited.expect("no test thread panics with this lock").0
    }

    fn record(&self, request: Recorded) -> usize {
        let mut state = self.lock();
        state.requests.push(request);
        self.changed.notify_all();
        state.requests.len() - 1
    }

    fn gone(&self, connection: usize, how: Gone) {
        let mut state = self.lock();
        state.connections[connection].gone.get_or_insert((how, Instant::now()));
        self.changed.notify_all();
    }

    fn reply(&self, request: &Recorded, nth: usize) -> Reply {
        match &self.script {
            Script::List(replies) => replies[nth.min(replies.len() - 1)].clone(),
            Script::Answer(answer) => answer(request, nth),
        }
    }

    /// The reply to the next request, if it is to go out before that request's body is read.
    fn early_reply(&self) -> Option<Reply> {
        let Script::List(replies) = &self.script else {
            return None;
        };
        let nth = self.lock().requests.len();
        match &replies[nth.min(replies.len() - 1)] {
            Reply::Early(reply) => Some((**reply).clone()),
            _ => None,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test thread panics with this lock")
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        let stream = Arc::new(stream.expect("accept on loopback"));
        stream.set_nodelay(true).expect("set TCP_NODELAY");
        let mut state = shared.lock();
        if state.stopped {
            return;
        }
        let number = state.connections.len();
        state.connections.push(Connection { stream: Arc::downgrade(&stream), gone: None });
        shared.changed.notify_all();
        drop(state);
        let shared = shared.clone();
        thread::spawn(move || serve(stream, number, &shared));
    }
}

/// Reads a connection to its end. The answers go out from a thread of their own, so that a hang-up is seen at once
/// whatever the script is waiting for.
fn serve(stream: Arc<TcpStream>, number: usize, shared: &Arc<Shared>) {
    let (replies, queue) = channel();
    let ended_by_script = Arc::new(AtomicBool::new(false));
    let writer = Writer { stream: stream.clone(), ended: ended_by_script.clone() };
    thread::spawn(move || writer.run(&queue));
    let end = read_requests(Wire::new(stream), number, shared, &replies);
    let how = match end {
        _ if ended_by_script.load(Ordering::SeqCst) => Gone::ByScript,
        End::Reset => Gone::Reset,
        End::Closed | End::TimedOut => Gone::Closed,
    };
    shared.gone(number, how);
}

fn read_requests(
    mut wire: Wire,
    connection: usize,
    shared: &Shared,
    replies: &Sender<Reply>,
) -> End {
    loop {
        let head = match wire.head() {
            Ok(head) => head,
            Err(end) => return end,
        };
        let early = shared.early_reply();
        let mut request = Recorded {
            arrived: head.arrived,
            connection,
            method: head.word(0).to_owned(),
            target: head.word(1).to_owned(),
            headers: head.headers.clone(),
            body: Vec::new(),
        };
        if let Some(reply) = early.clone() {
            shared.record(request.clone());
            // The writer has left where the script closed the connection.
            let _ = replies.send(reply);
        }
        match read_body(&mut wire, &head) {
            Ok(body) => request.body = body,
            Err(end) => return end,
        }
        if early.is_none() {
            let nth = shared.record(request.clone());
            let _ = replies.send(shared.reply(&request, nth));
        }
    }
}

fn read_body(wire: &mut Wire, head: &Head) -> Result<Vec<u8>, End> {
    if head.headers.get("transfer-encoding").is_some() {
        let mut body = Vec::new();
        loop {
            match wire.chunk()?.1 {
                data if data.is_empty() => return Ok(body),
                data => body.extend(data),
            }
        }
    }
    let length = head.headers.get("content-length").unwrap_or_else(|| "0".to_owned());
    wire.exactly(length.parse().unwrap_or_else(|_| panic!("Content-Length {length:?}")))
}

struct Writer {
    stream: Arc<TcpStream>,
    ended: Arc<AtomicBool>,
}

impl Writer {
    fn run(&self, queue: &Receiver<Reply>) {
        // A failed write means that the gateway hung up, which the reader records.
        while let Ok(reply) = queue.recv() {
            if self.answer(reply).is_err() {
                return;
            }
        }
    }

    fn answer(&self, reply: Reply) -> std::io::Result<()> {
        let mut out = &*self.stream;
        match reply {
            Reply::Json(status, body) => out.write_all(&json(status, &[], &body))?,
            Reply::TooMany(fields) => {
                let body = r#"{"error":{"message":"Slow down","type":"requests","param":null,"code":"rate_limit_exceeded"}}"#;
                out.write_all(&json(429, &fields, body))?;
            }
            Reply::Raw(bytes) => out.write_all(&bytes)?,
            Reply::RawThenClose(bytes) => {
                out.write_all(&bytes)?;
                self.close();
            }
            Reply::CloseDelimited(body) => {
                out.write_all(
                    &[b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n", &body[..]].concat(),
                )?;
                self.close();
            }
            Reply::TruncateAt(n, body) => {
                out.write_all(&json(200, &[], &body)[..n])?;
                self.close();
            }
            Reply::Stream { chunks, gate, ending } => self.stream(&chunks, &gate, ending)?,
            Reply::Pieces { pieces, gate, ending } => {
                for piece in pieces {
                    gate.pass();
                    out.write_all(&piece)?;
                }
                self.end(ending);
            }
            Reply::Stall => {}
            Reply::StallAfterHead => {
                out.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")?
            }
            Reply::CloseBeforeAnswer => self.close(),
            Reply::Reset => self.reset(),
            Reply::Early(reply) => self.answer(*reply)?,
        }
        Ok(())
    }

    fn stream(&self, chunks: &[Vec<u8>], gate: &Gate, ending: Ending) -> std::io::Result<()> {
        let mut out = &*self.stream;
        out.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        for chunk in chunks {
            gate.pass();
            out.write_all(&[format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat())?;
        }
        if ending == Ending::Complete {
            out.write_all(b"0\r\n\r\n")?;
        }
        self.end(ending);
        Ok(())
    }

    fn end(&self, ending: Ending) {
        match ending {
            Ending::Complete | Ending::Stall => {}
            Ending::Close => self.close(),
            Ending::Reset => self.reset(),
        }
    }

    fn close(&self) {
        self.ended.store(true, Ordering::SeqCst);
        // Fails where the gateway was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// SO_LINGER 0 turns the close into a RST; the close comes when both threads of the connection have let go, and
    /// shutting the reading side down, which sends nothing, makes the other one do so.
    fn reset(&self) {
        self.ended.store(true, Ordering::SeqCst);
        rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO))
            .expect("set SO_LINGER");
        let _ = self.stream.shutdown(Shutdown::Read);
    }
}

fn json(status: u16, fields: &[(&str, String)], body: &str) -> Vec<u8> {
    let fields: String =
        fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    format!(
        "HTTP/1.1 {status} Scripted\r\nContent-Type: application/json\r\n{fields}Content-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}
