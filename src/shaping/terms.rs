//! What is agreed on before anybody waits: a line's rules, and the terms of one request.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::books::Ask;
use super::limiter::Limits;
use crate::config::{Fairness, Priority};

/// What a line keeps to.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The API keys that are counted apart, at least one, and whether each is still to be used.
    pub lanes: Vec<bool>,
    /// The provider's limits, on each lane.
    pub limits: Limits,
    /// Each model's own limits on each lane, by index.
    pub models: Vec<Limits>,
    /// Whether 429s may stretch the cadence.
    pub adaptive: bool,
    /// Longest wait from the first join to the send; `None` waits for ever.
    pub max_wait: Option<Duration>,
    /// Most waiters at once.
    pub max_queue: usize,
    /// How clients share the line.
    pub fairness: Fairness,
}

/// On whose behalf a request waits, and for how long at most: the same for each of its sends.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The client by name: requests of one name take turns with those of others.
    pub client: Rc<str>,
    /// The client's priority among clients.
    pub class: Priority,
    /// The request's priority among its client's.
    pub urgency: Priority,
    /// Most waiters of this client at once.
    pub max_queue: Option<usize>,
    /// When the client gives up: the response has to be there by then.
    pub deadline: Option<Instant>,
    /// After this the request is of no use to be sent.
    pub send_by: Option<Instant>,
    /// What tells the request again when its caller repeats it: its place is kept for that.
    pub fingerprint: Option<u64>,
    /// Whether the caller has tried before.
    pub repeated: bool,
}

/// Who joins, and how.
#[derive(Debug, Clone)]
pub struct Joining {
    /// What for.
    pub ask: Ask,
    /// On which terms.
    pub terms: Rc<Terms>,
    /// When it joined for the first time.
    pub since: Instant,
    /// What the client's deadline has to leave for the response. A request that can go at once goes whatever is left.
    pub response_time: Duration,
    /// Whether it was sent before and comes back to the head.
    pub again: bool,
    /// After which wait another provider could take it: if this line takes longer, it is of no use. With [`Duration::MAX`] it
    /// leaves for a pause of this provider only.
    pub elsewhere: Option<Duration>,
    /// Whether another provider may take it if this one is down.
    pub movable: bool,
    /// How many connections are idle: where one of them is left for it, an open slot is its at once. It holds none while it
    /// waits.
    pub idle: usize,
}

impl Terms {
    /// When the client wants to hear nothing more.
    pub fn end(&self) -> Option<Instant> {
        [self.deadline, self.send_by].into_iter().flatten().min()
    }
}

impl Joining {
    /// When the request has to be sent for its client's sake.
    pub fn send_by(&self) -> Option<Instant> {
        let in_time = |deadline: Instant| deadline.checked_sub(self.response_time);
        let for_response =
            self.terms.deadline.map(|deadline| in_time(deadline).unwrap_or(self.since));
        [for_response, self.terms.send_by].into_iter().flatten().min()
    }
}
