//! Accepting connections: who is served, and what becomes of those for whom there is no room.
//!
//! `max_connections` are served, of one client `max_connections_per_client`. Beyond them a few connections have a
//! reserve: each may ask for health or metrics, and is told otherwise that there is no room. Further ones are told so
//! without being heard.

use std::convert::Infallible;
use std::rc::Rc;
use std::time::{Duration, Instant};

use async_channel::Sender;
use async_io::Timer;
use futures_lite::future;

use super::Gateway;
use super::caller::Caller;
use super::client_address::Peer;
use super::connection;
use super::connection_table::{Entry, Full, Limits, Table};
use super::listener::Listeners;
use super::reload::Front;
use super::stream::Stream;
use super::turns::Turns;
use crate::config;
use crate::error::Error;
use crate::log;
use crate::telemetry::Trace;

/// After an accept error (too many open files, above all) the next try waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// So many callers come in before others get a turn.
const ACCEPTS_AT_ONCE: u64 = 16;

/// Connections past the limits that are heard, in all and of one client.
const RESERVE: Limits = Limits { all: 64, each: 16 };

/// How long one of them may take for its TLS handshake, and again for its request head.
pub const RESERVE_PATIENCE: Duration = Duration::from_secs(2);

/// The open connections.
pub struct Doors {
    served: Rc<Table>,
    reserve: Rc<Table>,
    /// Every connection holds one: the last of them is gone when this is the only one left.
    alive: Sender<Infallible>,
}

/// What a connection may do here.
pub struct Admission {
    /// Its place among the others.
    pub entry: Entry,
    /// Set in the reserve: what its request is refused with, unless it asks for health or metrics.
    pub refusal: Option<Box<Error>>,
}

impl Doors {
    /// Nobody is connected.
    pub fn new(alive: Sender<Infallible>) -> Doors {
        Doors { served: Rc::default(), reserve: Rc::default(), alive }
    }

    /// Accepts for ever. A connection past the limits is told so; it never just waits in silence or finds the door shut.
    pub async fn accept<T>(&self, turns: &Turns, listeners: &Listeners, front: &Rc<Front>) -> T {
        let mut complained = false;
        let mut accepted = 0u64;
        loop {
            let (stream, peer) = match listeners.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    if !complained {
                        log::error(format_args!("cannot accept connections, trying on: {error}"));
                    }
                    complained = true;
                    Timer::after(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            complained = false;
            self.admit(turns, front, stream, peer);
            accepted += 1;
            if accepted.is_multiple_of(ACCEPTS_AT_ONCE) {
                // A crowd at the door keeps nobody inside waiting. Not before it is let in: a reload may end this here.
                future::yield_now().await;
            }
        }
    }

    /// Serves a connection, or has it told that there is no room.
    pub fn admit(&self, turns: &Turns, front: &Rc<Front>, stream: Stream, peer: Peer) {
        let gateway = front.gateway();
        let config = &gateway.config;
        let limits =
            Limits { all: config.max_connections, each: config.max_connections_per_client };
        let client = (!peer.is_trusted(&config.trusted_proxies)).then(|| peer.name().clone());
        let (entry, refusal) = match self.served.enter(client.as_ref(), limits) {
            Ok(entry) => (entry, None),
            Err(full) => {
                let refusal = refusal(full, config);
                match self.reserve.enter(client.as_ref(), RESERVE) {
                    Ok(entry) => (entry, Some(Box::new(refusal))),
                    Err(_) => {
                        let alive = self.alive.clone();
                        return turns.spawn(tell_at_once(gateway, stream, peer, refusal, alive));
                    }
                }
            }
        };
        let admission = Admission { entry, refusal };
        turns.spawn(connection::serve(front.clone(), stream, peer, admission, self.alive.clone()));
    }
}

fn refusal(full: Full, config: &config::Server) -> Error {
    match full {
        Full::All => Error::TooManyConnections { max_connections: config.max_connections },
        Full::Share => Error::ClientConnectionsFull { limit: config.max_connections_per_client },
    }
}

/// For a flood there is no time for handshakes, nor to wait until the response has arrived.
async fn tell_at_once(
    gateway: Rc<Gateway>,
    stream: Stream,
    peer: Peer,
    error: Error,
    _alive: Sender<Infallible>,
) {
    if gateway.config.tls.is_some() && matches!(stream, Stream::Tcp(_)) {
        return;
    }
    let trace = Rc::new(Trace::new(peer.name().clone()));
    dismiss(&gateway, stream, &trace, &error, false).await;
}

/// Tells a caller whose request is not read why, and has a record of it; `patient`: with a lingering close.
pub async fn dismiss(
    gateway: &Gateway,
    stream: Stream,
    trace: &Rc<Trace>,
    error: &Error,
    patient: bool,
) {
    let mut caller =
        Caller::new(stream, trace.clone(), gateway.config.write_timeout, gateway.draining.clone());
    caller.expect_request();
    let told = caller.error(error).await;
    if let Some(record) = trace.ends(told.is_err(), Instant::now()) {
        gateway.telemetry.record(record);
    }
    if told.is_ok() && patient {
        caller.linger().await;
    }
}
