//! One provider at work: its scheduler, its connections, its counters.
//!
//! Owns the way from "this request is for that provider" to an answer whose body is still to come. Knows nothing of
//! the caller's side.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use async_io::Timer;
use futures_lite::future;

use crate::config::{self, Budget, DayReset, Mode, Pace};
use crate::error::Error;
use crate::http1::{RequestHead, ResponseHead};
use crate::log;
use crate::shaping::limiter::{Cadence, Day, Limits, Reset};
use crate::shaping::scheduler::{Permit, Place, Refusal, Rules, Scheduler, Snapshot, Timing};
use crate::upstream::client::{self, Body, Response};
use crate::upstream::connect::Connector;
use crate::upstream::forward::Outgoing;
use crate::upstream::pool::{Connection, Pool};
use crate::upstream::{Failure, client::SendFailure};

/// Sends of one request on connections that turned out to be closed.
const MAX_REPEATS: usize = 3;

/// Fresh connections that the provider may close before the slot, per request.
const MAX_LOST_CONNECTIONS: usize = 5;

/// Before the next connection is made when the last one was lost while waiting.
const RECONNECT_PAUSE: Duration = Duration::from_millis(250);

/// What has come back so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Answers below 400 whose body came whole.
    pub succeeded: u64,
    /// Answers from 400 to 499.
    pub upstream_4xx: u64,
    /// Answers from 500.
    pub upstream_5xx: u64,
    /// No answer, or one that broke off.
    pub upstream_errors: u64,
    /// From the send to the response head.
    pub latency: Timing,
}

/// One provider. Lives as long as the gateway.
pub struct Provider {
    config: config::Provider,
    scheduler: Scheduler,
    connector: Connector,
    pool: Rc<Pool>,
    counters: RefCell<Counters>,
}

impl Provider {
    /// The provider and its task (scheduler and housekeeping), which the caller spawns.
    pub fn new(config: &config::Provider) -> (Rc<Provider>, impl Future<Output = ()> + use<>) {
        let (scheduler, schedule) = Scheduler::new(rules(config));
        let pool = Rc::new(Pool::new(config.pool_max_idle, config.pool_idle));
        let provider = Provider {
            config: config.clone(),
            scheduler,
            connector: Connector::new(config),
            pool: pool.clone(),
            counters: RefCell::default(),
        };
        let every = (config.pool_idle / 2).max(Duration::from_millis(100));
        let sweep = async move {
            loop {
                Timer::after(every).await;
                pool.sweep();
            }
        };
        (Rc::new(provider), future::or(schedule, sweep))
    }

    /// As configured.
    pub fn config(&self) -> &config::Provider {
        &self.config
    }

    /// What has come back so far.
    pub fn counters(&self) -> Counters {
        *self.counters.borrow()
    }

    /// Idle connections.
    pub fn idle_connections(&self) -> usize {
        self.pool.len()
    }

    /// The queue as it stands; `None` only while the gateway goes down.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        self.scheduler.snapshot().await
    }

    /// Refuses everybody who waits for this provider and everybody who comes.
    pub fn close(&self) {
        self.scheduler.close();
    }

    /// Waits for a slot, sends, and returns the answer once its head is there. Dropping the future at any moment leaves
    /// the queue or ends the provider's work.
    pub async fn exchange(self: &Rc<Self>, request: &RequestHead, body: Vec<u8>) -> Result<Answer, Error> {
        let outgoing = Rc::new(Outgoing::new(&self.config, request, body));
        let mut place = self.scheduler.join();
        let since = place.since();
        for repeat in 0.. {
            let (permit, connection) = self.slot(place, repeat > 0).await?;
            let timeout = self.config.request_timeout;
            match client::send(permit, connection, &self.pool, outgoing.clone(), timeout).await {
                Ok(response) => return Ok(self.answer(response)),
                Err(SendFailure { repeatable: true, .. }) if repeat < MAX_REPEATS => {
                    place = self.scheduler.rejoin(since);
                }
                Err(SendFailure { failure, .. }) => return Err(self.failed(failure)),
            }
        }
        unreachable!("the last repeat returns")
    }

    /// A permit and a connection to use it on.
    async fn slot(&self, mut place: Place, fresh: bool) -> Result<(Permit, Connection), Error> {
        place.near().await.map_err(|refusal| self.refused(refusal))?;
        for _ in 0..MAX_LOST_CONNECTIONS {
            let connected =
                future::or(async { Ok(self.connection(fresh).await) }, async { Err(place.refused().await) });
            let connected = connected.await.map_err(|refusal| self.refused(refusal))?;
            let mut connection = connected.map_err(|failure| self.failed(failure))?;
            let granted = future::or(async { Some(place.granted().await) }, async {
                connection.spoiled().await;
                None
            });
            if let Some(permit) = granted.await {
                return Ok((permit.map_err(|refusal| self.refused(refusal))?, connection));
            }
            place = place.lost_connection(&self.scheduler).map_err(|refusal| self.refused(refusal))?;
            if !connection.reused {
                Timer::after(RECONNECT_PAUSE).await;
            }
        }
        Err(self.failed(Failure::Disconnected("closes every connection before a request is sent on it".into())))
    }

    async fn connection(&self, fresh: bool) -> Result<Connection, Failure> {
        if !fresh && let Some(connection) = self.pool.take().await {
            return Ok(connection);
        }
        self.connector.connect().await.map(Connection::fresh)
    }

    fn answer(self: &Rc<Self>, response: Response) -> Answer {
        let mut counters = self.counters.borrow_mut();
        counters.latency.add(response.latency);
        match response.head.status {
            400..=499 => counters.upstream_4xx += 1,
            500.. => counters.upstream_5xx += 1,
            _ => {}
        }
        Answer { head: response.head, body: response.body, provider: self.clone() }
    }

    /// Counts and logs a failure and makes the caller's error of it.
    fn failed(&self, failure: Failure) -> Error {
        self.counters.borrow_mut().upstream_errors += 1;
        let provider = self.config.name.clone();
        let error = match failure {
            Failure::Unreachable(reason) => Error::UpstreamUnreachable { provider, reason },
            Failure::Timeout(waited) => Error::UpstreamTimeout { provider, waited },
            Failure::Disconnected(detail) => Error::UpstreamDisconnected { provider, detail },
            Failure::Invalid(detail) => Error::UpstreamInvalidResponse { provider, detail },
        };
        log::line(format_args!("{error}"));
        error
    }

    fn refused(&self, refusal: Refusal) -> Error {
        let provider = self.config.name.clone();
        match refusal {
            Refusal::WaitExceeded { position, expected_wait, max_wait, retry_after } => {
                Error::QueueWaitExceeded { provider, position, expected_wait, max_wait, retry_after }
            }
            Refusal::Full { retry_after } => {
                Error::QueueFull { provider, max_queue: self.config.max_queue, retry_after }
            }
            Refusal::Closed => Error::ShuttingDown,
        }
    }
}

/// A provider's answer: its head, and its body as it comes.
pub struct Answer {
    /// Status and headers.
    pub head: ResponseHead,
    body: Body,
    provider: Rc<Provider>,
}

impl Answer {
    /// The provider's name.
    pub fn provider(&self) -> &str {
        &self.provider.config.name
    }

    /// How long the request waited for its slot.
    pub fn waited(&self) -> Duration {
        self.body.waited()
    }

    /// Appends the body bytes that are there to `out`, without waiting. True when the body is over.
    pub fn take_buffered(&mut self, out: &mut Vec<u8>) -> Result<bool, Error> {
        let over = self.body.take_buffered(out).map_err(|failure| self.provider.failed(failure))?;
        if over && self.head.status < 400 {
            self.provider.counters.borrow_mut().succeeded += 1;
        }
        Ok(over)
    }

    /// Waits for more of the body, for up to `idle_timeout_seconds`.
    pub async fn wait(&mut self) -> Result<(), Error> {
        let idle = self.provider.config.idle_timeout;
        self.body.wait(idle).await.map_err(|failure| self.provider.failed(failure))
    }
}

fn rules(config: &config::Provider) -> Rules {
    let rate = &config.rate_limit;
    Rules { limits: limits(Some(&rate.pace), &rate.budget), max_wait: rate.max_wait, max_queue: config.max_queue }
}

fn limits(pace: Option<&Pace>, budget: &Budget) -> Limits {
    let cadence = |pace: &Pace| Cadence { interval: pace.interval, capacity: pace.capacity };
    let reset = |reset| match reset {
        DayReset::At(time) => Reset::At(time),
        DayReset::Rolling => Reset::Rolling,
    };
    Limits {
        cadence: pace.filter(|pace| pace.mode != Mode::Window).map(cadence),
        window: budget.window,
        day: budget.day.map(|day| Day { max: day.max, reset: reset(day.reset) }),
        tokens: budget.tokens_per_minute,
        concurrent: budget.max_concurrent,
        margin: budget.window_margin,
    }
}

/// The most sends that can fall in any 60 s; `None` where nothing counts sends.
pub fn worst_case_per_minute(pace: Option<&Pace>, budget: &Budget) -> Option<u64> {
    limits(pace, budget).worst_case_per_minute()
}
