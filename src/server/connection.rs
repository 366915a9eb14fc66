//! One caller's connection: requests one after the other, each within its deadlines, until either side has enough.
//!
//! What counts as gone: a caller whose side of the connection has ended, half-close included, as in nginx. While a
//! request is queued or answered, the reading side is watched; the moment it ends, the work is dropped, and with it the place
//! in the queue or the provider's connection. Bytes of a next request (pipelining) are kept and answered in order; a
//! caller who has sent more than a head's worth of those ahead is watched by our writes alone.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::time::{Duration, Instant};

use async_channel::Sender;
use futures_lite::FutureExt;
use futures_lite::future;

use super::accept::{Admission, RESERVE_PATIENCE};
use super::caller::{Caller, Gone};
use super::client_address::Peer;
use super::cors::Cors;
use super::lifecycle::Watch;
use super::reload::Front;
use super::request_body::{self, Body, Stopped};
use super::stream::Stream;
use super::{Gateway, routes, target, terms, tls, web_guard};
use crate::deadline::{after, within};
use crate::error::Error;
use crate::http1::{self, Framing, ReadError, Reader, RequestHead};
use crate::log;
use crate::provider::END_GRACE;
use crate::telemetry::Trace;

/// Serves until the connection ends. `_alive` counts it as open.
pub async fn serve(
    front: Rc<Front>,
    stream: Stream,
    peer: Peer,
    admission: Admission,
    _alive: Sender<Infallible>,
) {
    let gateway = front.gateway();
    let trace = Rc::new(Trace::new(peer.name().clone()));
    let secured = within(patience(&gateway, &admission), tls::secure(&gateway, stream, &trace));
    let Some(Some(stream)) = secured.await else { return };
    let caller =
        Caller::new(stream.clone(), trace, gateway.config.write_timeout, gateway.draining.clone());
    let mut connection = Connection {
        reader: Reader::new(stream),
        caller,
        draining: gateway.draining.watch(),
        aborting: gateway.aborting.watch(),
        front,
        gateway,
        peer,
        admission,
        first: true,
    };
    let ending = loop {
        // A panic stays inside the request that caused it.
        let next = AssertUnwindSafe(connection.one_request()).catch_unwind().await.ok();
        let next = match next {
            Some(next) => next,
            None => connection.after_panic().await,
        };
        connection.is_over(next);
        match next {
            Next::Request => connection.first = false,
            ending => break ending,
        }
    };
    match ending {
        Next::Linger => {
            let Connection { caller, admission: Admission { entry, .. }, .. } = connection;
            if entry.is_leaving() {
                return caller.linger().await;
            }
            entry.lingers();
            future::or(caller.linger(), entry.is_asked_to_leave()).await;
        }
        Next::Part => connection.caller.part().await,
        Next::Request | Next::Close => {}
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Another request may follow.
    Request,
    /// Our last word is on its way.
    Linger,
    /// Nothing is under way.
    Part,
    /// Nobody is there, or the answer was broken off.
    Close,
}

struct Connection {
    reader: Reader<Stream>,
    caller: Caller,
    draining: Watch,
    aborting: Watch,
    front: Rc<Front>,
    /// As it was when the current request came.
    gateway: Rc<Gateway>,
    /// Where the caller comes from.
    peer: Peer,
    admission: Admission,
    first: bool,
}

impl Connection {
    async fn one_request(&mut self) -> Next {
        self.caller.expect_request();
        if !self.something_comes().await {
            return match self.admission.refusal.take() {
                Some(refusal) => self.refuse(&refusal).await,
                None => Next::Part,
            };
        }
        self.caller.trace().arrives(Instant::now());
        self.gateway = self.front.gateway();
        let mut head = match self.head().await {
            Ok(Some(head)) => head,
            Ok(None) => return Next::Close,
            Err(error) => {
                let is_late = matches!(error, Error::RequestTimeout { .. });
                let refusal = self.admission.refusal.take().filter(|_| is_late);
                return self.refuse(refusal.as_deref().unwrap_or(&error)).await;
            }
        };
        target::tidy(&mut head.target);
        let refusal = self.admission.refusal.take();
        let admitted = web_guard::check(&self.gateway.config, &head);
        let cors = match admitted {
            Ok(()) => Cors::of(&self.gateway.config.cors_origins, &head.headers),
            Err(_) => Cors::Off,
        };
        self.caller.answer_to(&head, cors);
        let client = self.peer.client(&self.gateway.config.trusted_proxies, &head.headers);
        self.caller.trace().comes_from(&client);
        if refusal.is_some() || self.admission.entry.is_leaving() {
            self.caller.close_after();
        }
        if let Some(refusal) = refusal
            && !routes::is_for_the_operator(&head)
        {
            return self.refuse(&refusal).await;
        }
        let route = admitted.and_then(|()| routes::route(&self.gateway, &head, self.caller.cors()));
        let route = match route {
            Ok(route) => route,
            Err(error) => {
                if head.framing != Framing::Empty {
                    // The body is of no interest any more, and skipping it would be a favour to nobody.
                    self.caller.close_after();
                }
                return self.refuse(&error).await;
            }
        };
        if matches!(self.caller.cors(), Cors::Granted(_)) {
            // Some servers (Ollama) refuse pages that they do not know themselves.
            head.headers.remove("origin");
        }
        let body = match route {
            routes::Route::Forward => {
                let owner = terms::accountable(&self.gateway, &client, &head);
                request_body::read(&self.gateway, &head, &owner, &mut self.reader, &mut self.caller)
                    .await
            }
            _ => Ok(self.no_body(&client, &head)),
        };
        let body = match body {
            Ok(body) => body,
            Err(Stopped::Refuse(error)) => return self.refuse(&error).await,
            Err(Stopped::Gone) => return Next::Close,
        };
        self.reader.release();
        match self.answer(route, &client, &head, body).await {
            Ok(()) => self.next(),
            Err(Gone) => Next::Close,
        }
    }

    /// Waits for the first byte of a request: briefly on a new connection, longer between two requests.
    async fn something_comes(&mut self) -> bool {
        self.reader.release();
        let entry = &self.admission.entry;
        let patience = if self.first {
            patience(&self.gateway, &self.admission)
        } else {
            entry.idles();
            self.gateway.config.keep_alive
        };
        let filled = async {
            // An empty line before a request is none yet (RFC 9112 section 2.2).
            while matches!(self.reader.buffered(), b"" | b"\r" | b"\r\n") {
                if !matches!(self.reader.fill_little().await, Ok(1..)) {
                    return false;
                }
            }
            true
        };
        let going_down = async {
            (&mut self.draining).await;
            false
        };
        let makes_room = async {
            entry.is_asked_to_leave().await;
            false
        };
        let ends = future::or(going_down, makes_room);
        let came = within(patience, future::or(filled, ends)).await == Some(true);
        entry.works();
        if came {
            return true;
        }
        // What has come by now is still answered, known of or not.
        self.reader.get_mut().look_first();
        matches!(future::poll_once(self.reader.fill_little()).await, Some(Ok(1..)))
    }

    async fn head(&mut self) -> Result<Option<RequestHead>, Error> {
        let patience = patience(&self.gateway, &self.admission);
        let read = http1::read_request_head(&mut self.reader, self.gateway.config.max_head_bytes);
        match within(patience, read).await {
            Some(Ok(head)) => Ok(head),
            Some(Err(ReadError::Refused(error))) => Err(error),
            Some(Err(ReadError::Eof)) => Err(Error::MalformedRequest {
                detail: "the connection ended inside the request head".into(),
            }),
            Some(Err(ReadError::Io(_))) => Ok(None),
            None => Err(Error::RequestTimeout { part: "head", waited: patience }),
        }
    }

    /// Where none is of interest: nobody without a key may fill the memory with one.
    fn no_body(&mut self, client: &Rc<str>, head: &RequestHead) -> Body {
        if head.framing != Framing::Empty {
            self.caller.close_after();
        }
        Body::none(self.gateway.budget.reserve(client))
    }

    /// Does the work, but for no longer than the caller is there. A caller that has its whole response may close: the
    /// provider then gets a moment to end it, so that its connection can be used again.
    async fn answer(
        &mut self,
        route: routes::Route,
        client: &Rc<str>,
        head: &RequestHead,
        body: Body,
    ) -> Result<(), Gone> {
        let surplus = self.gateway.config.max_head_bytes;
        let trace = self.caller.trace().clone();
        let work = routes::answer(
            &self.gateway,
            route,
            client,
            head,
            body,
            &mut self.caller,
            &mut self.aborting,
        );
        let gone = async {
            hang_up(&mut self.reader, surplus).await;
            if trace.is_delivered() {
                after(END_GRACE).await;
            }
            Err(Gone)
        };
        let answered = future::or(work, gone).await;
        answered.map_err(|Gone| self.caller.abort())
    }

    /// The caller still gets an answer, if it has not got part of one.
    async fn after_panic(&mut self) -> Next {
        log::error(format_args!(
            "a request's code panicked (see above); its caller got an error, nobody else was touched"
        ));
        if self.caller.began() {
            self.caller.trace().failed(Error::Internal.code());
            self.caller.abort();
            return Next::Close;
        }
        self.caller.take_back();
        self.refuse(&Error::Internal).await
    }

    async fn refuse(&mut self, error: &Error) -> Next {
        match self.caller.error(error).await {
            Ok(()) => self.next(),
            Err(Gone) => Next::Close,
        }
    }

    /// Keeps what there is to tell of the request, if there was one.
    fn is_over(&self, next: Next) {
        if let Some(record) = self.caller.trace().ends(next == Next::Close, Instant::now()) {
            self.gateway.telemetry.record(record);
        }
    }

    fn next(&self) -> Next {
        if self.caller.keeps_alive() { Next::Request } else { Next::Linger }
    }
}

/// How long a handshake and a head may take.
fn patience(gateway: &Gateway, admission: &Admission) -> Duration {
    match &admission.refusal {
        None => gateway.config.header_timeout,
        Some(_) => gateway.config.header_timeout.min(RESERVE_PATIENCE),
    }
}

/// Ends when the caller's side of the connection does. What it sends meanwhile is kept, up to `surplus` bytes.
async fn hang_up(reader: &mut Reader<Stream>, surplus: usize) {
    while reader.buffered().len() < surplus {
        if !matches!(reader.fill_little().await, Ok(1..)) {
            return;
        }
    }
    future::pending().await
}

#[cfg(test)]
mod tests {
    use std::hash::RandomState;
    use std::io::{Read, Write};
    use std::path::Path;
    use std::time::SystemTime;

    use super::*;
    use crate::config;
    use crate::registry::Registry;
    use crate::server::budget::{self, Budget};
    use crate::server::connection_table::{Limits, Table};
    use crate::server::lifecycle::Lifecycle;
    use crate::socket::{Socket, with_watched_sockets};

    /// A gateway that knows a model and has no provider for it: asking for that model panics.
    fn broken_gateway() -> (Rc<Front>, Lifecycle) {
        let text =
            "providers: [{name: p, base_url: 'http://x/v1', models: [m], rate_limit: {rpm: 1}}]";
        let config = config::parse(text, Path::new("config.yaml"), &|_| None).unwrap();
        let (lifecycle, draining, aborting) = Lifecycle::new();
        let gateway = Gateway {
            registry: Registry::new(&config.providers),
            client_names: Vec::new(),
            fingerprints: RandomState::new(),
            budget: Budget::new(budget::limits(&config.server)),
            telemetry: Rc::default(),
            config: config.server,
            providers: Vec::new(),
            started: Instant::now(),
            created: SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs(),
            draining,
            aborting,
        };
        (Rc::new(Front::new(Vec::new(), gateway)), lifecycle)
    }

    fn answer_of(front: &Rc<Front>, request: String) -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut caller = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let stream = Stream::Tcp(Socket::new(listener.accept().unwrap().0).unwrap());
        let asking = std::thread::spawn(move || {
            caller.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            caller.read_to_string(&mut answer).unwrap();
            answer
        });
        let (alive, _open) = async_channel::bounded(1);
        let limits = Limits { all: 1, each: 1 };
        let entry = Rc::new(Table::default()).enter(None, limits).unwrap();
        let admission = Admission { entry, refusal: None };
        let served = serve(front.clone(), stream, Peer::new(None), admission, alive);
        smol::block_on(with_watched_sockets(served)).unwrap();
        asking.join().unwrap()
    }

    #[test]
    fn a_panic_is_a_500_for_its_caller_and_nothing_to_anybody_else() {
        let (front, _lifecycle) = broken_gateway();
        let body = r#"{"model":"m"}"#;
        let chat = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = answer_of(&front, chat);
        assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
        assert!(
            answer.contains("internal_error") && answer.contains("Connection: close"),
            "{answer}"
        );
        let health =
            "GET /admin/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_owned();
        assert!(answer_of(&front, health).starts_with("HTTP/1.1 200 "));
    }
}
