//! A caller: a raw HTTP/1.1 client that shows when each byte came and how the answer ended.

use std::fmt;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use openssl::ssl::SslStream;
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};

use super::PATIENCE;
use super::wire::{End, Head, Headers, Wire};

/// A connection of a caller. Dropping it hangs up.
pub struct Client {
    wire: Wire,
    framing: Framing,
    head_request: bool,
}

/// What is left of the body that is being read.
enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
}

/// How a body ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// As its framing promised.
    Clean,
    /// By a close or a reset before that.
    Aborted,
}

/// A piece of a body: one chunk, or where the body is not chunked, what one read brought.
#[derive(Debug, Clone)]
pub struct Chunk {
    pub at: Instant,
    pub bytes: Vec<u8>,
}

/// A whole answer.
#[derive(Clone)]
pub struct Response {
    pub status: u16,
    pub headers: Headers,
    pub body: Vec<u8>,
    pub chunks: Vec<Chunk>,
    pub ended: Ended,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<String> {
        self.headers.get(name)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("no JSON ({e}) in {self:?}"))
    }

    /// The `error` object of a refusal, after a check that it has the shape that the SDKs parse.
    pub fn error(&self) -> serde_json::Value {
        let error = self.json()["error"].clone();
        assert!(
            error["message"].is_string() && error["type"].is_string(),
            "no OpenAI error object: {self:?}"
        );
        for key in ["param", "code"] {
            let value = error.get(key).unwrap_or_else(|| panic!("no {key} in {self:?}"));
            assert!(
                value.is_null() || value.is_string(),
                "{key} is neither null nor a string: {self:?}"
            );
        }
        assert_eq!(self.header("content-type").as_deref(), Some("application/json"), "{self:?}");
        error
    }

    /// `error.code`, checked like [`Response::error`].
    pub fn code(&self) -> String {
        self.error()["code"].as_str().unwrap_or_default().to_owned()
    }
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} {:?} {:?}", self.status, self.headers, self.ended, self.text())
    }
}

impl Client {
    pub fn connect(addr: SocketAddr) -> Client {
        Client::on(TcpStream::connect_timeout(&addr, PATIENCE).expect("connect to the gateway"))
    }

    /// A caller with an address of its own: all of 127.0.0.0/8 is this machine.
    pub fn connect_from(from: Ipv4Addr, addr: SocketAddr) -> Client {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("make a socket");
        bind(&socket, &SocketAddr::from((from, 0))).expect("bind a loopback address");
        connect(&socket, &addr).expect("connect to the gateway");
        Client::on(TcpStream::from(socket))
    }

    /// On a unix socket; std's type for TCP does with any stream socket what is done here.
    pub fn connect_unix(path: &Path) -> Client {
        Client::on(TcpStream::from(OwnedFd::from(
            UnixStream::connect(path).expect("connect to the socket"),
        )))
    }

    /// In a session that stands.
    pub fn over_tls(session: SslStream<TcpStream>) -> Client {
        session.get_ref().set_read_timeout(Some(PATIENCE)).expect("set a read timeout");
        Client { wire: Wire::over_tls(session), framing: Framing::UntilClose, head_request: false }
    }

    /// Says under TLS that nothing more comes.
    pub fn close_notify(&mut self) {
        self.wire.session().shutdown().expect("send a close_notify");
    }

    fn on(stream: TcpStream) -> Client {
        // No matter on a unix socket.
        let _ = stream.set_nodelay(true);
        stream.set_read_timeout(Some(PATIENCE)).expect("set a read timeout");
        Client {
            wire: Wire::new(Arc::new(stream)),
            framing: Framing::UntilClose,
            head_request: false,
        }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        self.head_request = bytes.starts_with(b"HEAD ");
        self.wire.write_all(bytes).expect("send to the gateway");
    }

    pub fn post_json(&mut self, path: &str, body: impl AsRef<[u8]>) {
        self.post_json_with(path, "", body);
    }

    /// `extra` holds header lines, each with its CRLF.
    pub fn post_json_with(&mut self, path: &str, extra: &str, body: impl AsRef<[u8]>) {
        let body = body.as_ref();
        let mut request = format!(
            "POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n{extra}Content-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        self.send(request);
    }

    pub fn get(&mut self, path: &str) {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: gateway\r\n\r\n"));
    }

    /// The next answer's head; its body is then read by [`Client::read_chunk`].
    pub fn read_head(&mut self) -> Head {
        let head = self.wire.head().unwrap_or_else(|end| self.fail("a response head", end));
        self.framing = framing(&head, self.head_request);
        head
    }

    /// The next piece of the body, or how the body ended.
    pub fn read_chunk(&mut self) -> Result<Chunk, Ended> {
        let (read, end_is_clean) = match self.framing {
            Framing::Length(0) => return Err(Ended::Clean),
            Framing::Length(left) => (self.wire.piece(left), false),
            Framing::Chunked => (self.wire.chunk(), false),
            Framing::UntilClose => (self.wire.piece(usize::MAX), true),
        };
        match read {
            Ok((_, bytes)) if bytes.is_empty() => {
                self.framing = Framing::Length(0);
                Err(Ended::Clean)
            }
            Ok((at, bytes)) => {
                if let Framing::Length(left) = &mut self.framing {
                    *left -= bytes.len();
                }
                Ok(Chunk { at, bytes })
            }
            Err(End::Closed) if end_is_clean => Err(Ended::Clean),
            Err(End::TimedOut) => self.fail("more of a body", End::TimedOut),
            Err(_) => Err(Ended::Aborted),
        }
    }

    /// A head and its whole body.
    pub fn read_response(&mut self) -> Response {
        let head = self.read_head();
        let mut chunks: Vec<Chunk> = Vec::new();
        let deadline = Instant::now() + PATIENCE * 6;
        let ended = loop {
            // Something comes again and again where a heartbeat does.
            assert!(
                Instant::now() < deadline,
                "a body without an end: {:?}",
                String::from_utf8_lossy(&self.wire.log)
            );
            match self.read_chunk() {
                Ok(chunk) => chunks.push(chunk),
                Err(ended) => break ended,
            }
        };
        let body = chunks.iter().flat_map(|chunk| chunk.bytes.clone()).collect();
        let status =
            head.word(1).parse().unwrap_or_else(|_| panic!("status line {:?}", head.start));
        Response { status, headers: head.headers, body, chunks, ended }
    }

    /// Every byte until the connection ends, as it comes.
    pub fn read_to_end(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match self.wire.piece(usize::MAX) {
                Ok((_, bytes)) => all.extend(bytes),
                Err(End::TimedOut) => self.fail("the end of the connection", End::TimedOut),
                Err(_) => return all,
            }
        }
    }

    /// Sends FIN and goes on reading.
    pub fn half_close(&self) {
        self.wire.stream().shutdown(Shutdown::Write).expect("half-close");
    }

    /// Hangs up with RST.
    pub fn reset(self) {
        rustix::net::sockopt::set_socket_linger(self.wire.stream(), Some(Duration::ZERO))
            .expect("set SO_LINGER");
    }

    /// Whether the gateway closes the connection within `timeout`; bytes that come before are kept.
    pub fn is_closed(&mut self, timeout: Duration) -> bool {
        self.wire.stream().set_read_timeout(Some(timeout)).expect("set a read timeout");
        let end = loop {
            if let Err(end) = self.wire.fill() {
                break end;
            }
        };
        self.wire.stream().set_read_timeout(Some(PATIENCE)).expect("set a read timeout");
        end != End::TimedOut
    }

    fn fail(&self, wanted: &str, end: End) -> ! {
        panic!(
            "{end:?} while waiting for {wanted}; read so far: {:?}",
            String::from_utf8_lossy(&self.wire.log)
        )
    }
}

/// One POST on a connection of its own.
pub fn post(addr: SocketAddr, path: &str, body: impl AsRef<[u8]>) -> Response {
    let mut client = Client::connect(addr);
    client.post_json(path, body);
    client.read_response()
}

/// One POST with further header lines, each with its CRLF.
pub fn post_with(addr: SocketAddr, path: &str, extra: &str, body: impl AsRef<[u8]>) -> Response {
    let mut client = Client::connect(addr);
    client.post_json_with(path, extra, body);
    client.read_response()
}

/// One GET on a connection of its own.
pub fn get(addr: SocketAddr, path: &str) -> Response {
    let mut client = Client::connect(addr);
    client.get(path);
    client.read_response()
}

/// RFC 9112 section 6.3.
fn framing(head: &Head, head_request: bool) -> Framing {
    let status = head.word(1);
    if head_request || status.starts_with('1') || status == "204" || status == "304" {
        return Framing::Length(0);
    }
    let (coding, length) =
        (head.headers.get("transfer-encoding"), head.headers.get("content-length"));
    match (coding, length) {
        (Some(_), Some(_)) => panic!("both Transfer-Encoding and Content-Length: {head:?}"),
        (Some(coding), None) => {
            assert_eq!(coding, "chunked", "{head:?}");
            Framing::Chunked
        }
        (None, Some(length)) => {
            Framing::Length(length.parse().unwrap_or_else(|_| panic!("Content-Length {length:?}")))
        }
        (None, None) => Framing::UntilClose,
    }
}
