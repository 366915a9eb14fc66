//! Idle connections to one provider, kept for the next request.
//!
//! A connection comes here only at the proven end of a response body, and leaves only if the provider has neither closed it
//! nor sent anything on it meanwhile, as far as is known.

use std::cell::RefCell;
use std::collections::VecDeque;
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
}

impl Connection {
    /// Wraps a stream that was just connected.
    pub fn fresh(stream: Stream) -> Box<Connection> {
        Box::new(Connection {
            reader: Reader::new(Wire::new(stream)),
            reused: false,
            born: Instant::now(),
        })
    }

    /// Waits until the provider closes this idle connection, or says something nobody asked for: either way it is of
    /// no use any more.
    pub async fn spoiled(&mut self) {
        let _ = self.reader.fill().await;
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

/// Idle connections, the oldest first.
#[derive(Debug)]
pub struct Pool {
    idle: RefCell<VecDeque<(Instant, Box<Connection>)>>,
    max_idle: usize,
    max_idle_time: Duration,
}

impl Pool {
    /// Keeps up to `max_idle` connections for up to `max_idle_time` each.
    pub fn new(max_idle: usize, max_idle_time: Duration) -> Pool {
        Pool { idle: RefCell::default(), max_idle, max_idle_time }
    }

    /// The connection used last, if it is still good.
    pub fn take(&self) -> Option<Box<Connection>> {
        loop {
            let (since, mut connection) = self.idle.borrow_mut().pop_back()?;
            if self.keeps(since, connection.born, Instant::now()) && !connection.is_spoiled() {
                return Some(connection);
            }
        }
    }

    /// Takes a connection back whose last response is over.
    pub fn put(&self, mut connection: Box<Connection>) {
        connection.reused = true;
        let mut idle = self.idle.borrow_mut();
        idle.push_back((Instant::now(), connection));
        if idle.len() > self.max_idle {
            idle.pop_front();
        }
    }

    /// Closes what has been idle for too long. To be called now and then.
    pub fn sweep(&self) {
        let now = Instant::now();
        self.idle
            .borrow_mut()
            .retain(|(since, connection)| self.keeps(*since, connection.born, now));
    }

    /// How many are idle.
    pub fn idle(&self) -> usize {
        self.idle.borrow().len()
    }

    fn keeps(&self, idle_since: Instant, born: Instant, now: Instant) -> bool {
        let passed = |since| now.saturating_duration_since(since);
        passed(idle_since) < self.max_idle_time && passed(born) < MAX_AGE
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
        let keeps =
            |idle, age| pool.keeps(born + seconds(age) - seconds(idle), born, born + seconds(age));
        assert!(keeps(49, 299));
        assert!(!keeps(50, 299));
        assert!(!keeps(0, 300), "its address may be out of date");
    }
}
