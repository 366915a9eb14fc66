//! Idle connections to one provider, kept for the next request.
//!
//! A connection comes here only at the proven end of a response body, and leaves only if the provider has neither closed it
//! nor sent anything on it meanwhile, as far as is known.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use super::stream::Stream;
use super::wire::Wire;
use crate::http1::Reader;

/// How long a connection lives at most, so that a change in DNS is followed.
const MAX_AGE: Duration = Duration::from_secs(300);

/// A fresh connection that stood longer than this before its request may be closed like an idle one.
const REST: Duration = Duration::from_millis(200);

/// A connection between or under requests. It goes from hand to hand as a box.
#[derive(Debug)]
pub struct Connection {
    /// The stream and what was read from it ahead.
    pub reader: Reader<Wire>,
    /// Whether it has carried a request before.
    reused: bool,
    born: Instant,
    /// When it was last used, or made.
    rests_since: Instant,
}

impl Connection {
    /// Wraps a stream that was just connected.
    pub fn fresh(stream: Stream) -> Box<Connection> {
        let now = Instant::now();
        let reader = Reader::new(Wire::new(stream));
        Box::new(Connection { reader, reused: false, born: now, rests_since: now })
    }

    /// Waits until the provider closes this idle connection, or says something nobody asked for: either way it is of
    /// no use any more. An error where it broke.
    pub async fn spoiled(&mut self) -> io::Result<()> {
        self.reader.fill().await.map(|_| ())
    }

    /// Whether it has carried a request before.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// When it was last used, or made.
    pub fn rests_since(&self) -> Instant {
        self.rests_since
    }

    /// Whether the provider has had time to lose patience with it: what fails then may be the connection's end alone.
    pub fn has_rested(&self) -> bool {
        self.reused || self.born.elapsed() > REST
    }

    /// Whether it is of no use any more, as far as is known: what the provider did a moment ago is still to be heard of, as is
    /// what is on its way.
    fn is_spoiled(&mut self) -> bool {
        pin!(self.spoiled()).poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }
}

/// Idle connections, the one that has rested longest first.
///
/// The one used last is taken first, so that those beyond what is needed grow old: the pool holds what the last
/// `pool_idle_seconds` needed at once.
#[derive(Debug)]
pub struct Pool {
    idle: RefCell<VecDeque<Box<Connection>>>,
    limits: Cell<Limits>,
}

/// What a pool keeps.
#[derive(Debug, Clone, Copy)]
struct Limits {
    max_idle: usize,
    max_idle_time: Duration,
}

impl Pool {
    /// Keeps up to `max_idle` connections for up to `max_idle_time` each.
    pub fn new(max_idle: usize, max_idle_time: Duration) -> Pool {
        Pool { idle: RefCell::default(), limits: Cell::new(Limits { max_idle, max_idle_time }) }
    }

    /// From now on keeps so many for so long.
    pub fn set_limits(&self, max_idle: usize, max_idle_time: Duration) {
        self.limits.set(Limits { max_idle, max_idle_time });
        self.sweep();
    }

    /// The connection used last, if it is still good.
    pub fn take(&self) -> Option<Box<Connection>> {
        loop {
            let mut connection = self.idle.borrow_mut().pop_back()?;
            if self.keeps(&connection, Instant::now()) && !connection.is_spoiled() {
                return Some(connection);
            }
        }
    }

    /// The one used last of this connection and the idle ones; this one is kept if it is another.
    pub fn warmest(&self, connection: Box<Connection>) -> Box<Connection> {
        let is_warmer = |idle: &Connection| idle.rests_since > connection.rests_since;
        if !self.idle.borrow().back().is_some_and(|idle| is_warmer(idle)) {
            return connection;
        }
        match self.take() {
            Some(idle) => {
                self.keep(connection);
                idle
            }
            None => connection,
        }
    }

    /// Takes a connection back whose last response is over.
    pub fn put(&self, mut connection: Box<Connection>) {
        connection.reused = true;
        connection.rests_since = Instant::now();
        self.keep(connection);
    }

    fn keep(&self, connection: Box<Connection>) {
        let mut idle = self.idle.borrow_mut();
        let at = idle.partition_point(|other| other.rests_since <= connection.rests_since);
        idle.insert(at, connection);
        if idle.len() > self.limits.get().max_idle {
            idle.pop_front();
        }
    }

    /// Closes what has been idle for too long. To be called now and then.
    pub fn sweep(&self) {
        let now = Instant::now();
        self.idle.borrow_mut().retain(|connection| self.keeps(connection, now));
    }

    /// How many are idle.
    pub fn idle(&self) -> usize {
        self.idle.borrow().len()
    }

    fn keeps(&self, connection: &Connection, now: Instant) -> bool {
        self.keeps_since(connection.rests_since, connection.born, now)
    }

    fn keeps_since(&self, rests_since: Instant, born: Instant, now: Instant) -> bool {
        let passed = |since| now.saturating_duration_since(since);
        passed(rests_since) < self.limits.get().max_idle_time && passed(born) < MAX_AGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_kept_neither_idle_nor_alive_for_too_long() {
        let pool = Pool::new(16, Duration::from_secs(50));
        let seconds = Duration::from_secs;
        let born = Instant::now();
        let keeps = |idle, age| {
            pool.keeps_since(born + seconds(age) - seconds(idle), born, born + seconds(age))
        };
        assert!(keeps(49, 299));
        assert!(!keeps(50, 299));
        assert!(!keeps(0, 300), "its address may be out of date");
    }
}
