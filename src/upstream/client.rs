//! One exchange: a request out, a response back, on one connection.
//!
//! The permit is consumed here, so that a send without one does not compile. A connection returns to the pool only at
//! the proven end of the response body.

use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Duration;

use super::Failure;
use super::forward::Outgoing;
use super::pool::{Connection, Pool};
use super::wire::Sent;
use crate::deadline::within;
use crate::http1::{self, BodyDecoder, ReadFault, ResponseHead};
use crate::shaping::scheduler::{InFlight, Permit};

/// A send that brought no response.
#[derive(Debug)]
pub struct SendFailure {
    /// What went wrong.
    pub failure: Failure,
    /// Whether the provider may have got the request.
    pub reached: Reached,
}

/// What a provider may have got of a request that brought no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// Its head was not written whole, and the permit has gone back.
    Unwritten,
    /// Nothing: a connection that had carried a request before was closed at once, without a byte of a response. The
    /// provider had closed it before the request came (RFC 9112 section 9.3.1).
    Stale,
    /// All of it: the provider may have worked on it.
    Perhaps,
}

/// A provider that had closed a reused connection says so within a round trip. What ends later may have been worked on.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// A response whose body is still to come.
#[derive(Debug)]
pub struct Response {
    /// Status and headers.
    pub head: ResponseHead,
    /// The rest.
    pub body: Body,
    /// Counts the request as in flight.
    pub in_flight: InFlight,
    /// From the send to the head.
    pub latency: Duration,
}

/// Sends a request and waits for the response head for up to `timeout`. The connection and the pool that it returns to
/// travel on with the [`Body`].
pub async fn send(
    permit: Permit,
    mut connection: Box<Connection>,
    pool: &Rc<Pool>,
    request: Outgoing,
    timeout: Duration,
) -> Result<Response, SendFailure> {
    let reused = connection.is_reused();
    connection.reader.get_mut().send(permit, request);
    let head = within(timeout, http1::read_response_head(&mut connection.reader, false)).await;
    let head = head.map_or(Err(Ending::Late), |read| read.map_err(Ending::Fault));
    let sent = connection.reader.get_mut().take_sent();
    let (head, sent) = match (head, sent) {
        (Ok(head), Some(sent)) => (head, sent),
        (Ok(_), None) => {
            let failure = Failure::Invalid("it answered before it was asked".into());
            return Err(SendFailure { failure, reached: Reached::Unwritten });
        }
        (Err(ending), sent) => {
            let at_once = |sent: &Sent| sent.at.elapsed() < STALE_WITHIN;
            let reached = match sent {
                None => Reached::Unwritten,
                Some(sent) if reused && ending.is_silent_close() && at_once(&sent) => {
                    Reached::Stale
                }
                Some(_) => Reached::Perhaps,
            };
            return Err(SendFailure { reached, failure: ending.into_failure(timeout) });
        }
    };
    let body = Body {
        decoder: BodyDecoder::new(head.framing),
        connection: Some(connection),
        pool: head.keep_alive.then(|| pool.clone()),
    };
    Ok(Response { head, body, in_flight: sent.in_flight, latency: sent.at.elapsed() })
}

enum Ending {
    Late,
    Fault(ReadFault),
}

impl Ending {
    /// Whether the connection closed without a byte.
    fn is_silent_close(&self) -> bool {
        const CLOSES: [ErrorKind; 4] = [
            ErrorKind::BrokenPipe,
            ErrorKind::ConnectionAborted,
            ErrorKind::ConnectionReset,
            ErrorKind::UnexpectedEof,
        ];
        match self {
            Ending::Fault(ReadFault::Eof { received: 0 }) => true,
            Ending::Fault(ReadFault::Io { received: 0, error }) => CLOSES.contains(&error.kind()),
            _ => false,
        }
    }

    fn into_failure(self, timeout: Duration) -> Failure {
        match self {
            Ending::Late => Failure::Timeout(timeout),
            Ending::Fault(ReadFault::Invalid(detail)) => Failure::Invalid(detail),
            Ending::Fault(fault) => Failure::Disconnected(fault.to_string()),
        }
    }
}

/// A response body as it comes. Dropping it before its end closes the connection, which stops the provider.
#[derive(Debug)]
pub struct Body {
    connection: Option<Box<Connection>>,
    decoder: BodyDecoder,
    /// Where the connection goes afterwards; `None` closes it.
    pool: Option<Rc<Pool>>,
}

impl Body {
    /// Appends what has come already to `out`, without waiting. Says whether the body is over.
    pub fn take_buffered(&mut self, out: &mut Vec<u8>) -> Result<bool, Failure> {
        let Some(connection) = &mut self.connection else { return Ok(true) };
        match self.decoder.drain(&mut connection.reader, out) {
            Ok(true) => {
                self.finish();
                Ok(true)
            }
            Ok(false) => Ok(false),
            Err(fault) => Err(self.broken(&fault)),
        }
    }

    /// Ends a body that nobody waits for any more. Its connection is closed unless it has gone back to the pool.
    pub fn close(&mut self) {
        self.connection = None;
    }

    /// Waits for more bytes, for up to `idle`. Cancel-safe.
    pub async fn wait(&mut self, idle: Duration) -> Result<(), Failure> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        match within(idle, connection.reader.fill()).await {
            Some(Ok(0)) => match self.decoder.at_eof() {
                Ok(()) => {
                    self.pool = None;
                    self.finish();
                    Ok(())
                }
                Err(fault) => Err(self.broken(&fault)),
            },
            Some(Ok(_)) => Ok(()),
            Some(Err(error)) => Err(self.broken(&error)),
            None => Err(self.broken(&format_args!("it sent nothing for {} s", idle.as_secs_f64()))),
        }
    }

    fn broken(&self, how: &dyn std::fmt::Display) -> Failure {
        Failure::Disconnected(format!("{how}, after {} body bytes", self.decoder.payload_so_far()))
    }

    fn finish(&mut self) {
        if let Some(mut connection) = self.connection.take()
            && let Some(pool) = self.pool.take()
            && connection.reader.buffered().is_empty()
            && connection.reader.get_mut().finish_sending()
        {
            connection.reader.release();
            pool.put(connection);
        }
    }
}
