//! One provider at work: its scheduler, its connections, its counters.
//!
//! Owns the way from "this request is for that provider" to an answer whose body is still to come: [`exchange`] waits,
//! sends and repeats, [`answer`] is what comes back. Knows nothing of the caller's side.

mod answer;
mod exchange;
mod progress;

pub use answer::{Advice, Answer};
pub use exchange::{Errand, Exchanged, Offer};
pub use progress::{Progress, Whereabouts};

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant};

use async_io::Timer;
use futures_lite::future;

use crate::config::{self, Budget, DayReset, Fairness, Mode, Pace};
use crate::error::Error;
use crate::log;
use crate::shaping::books::{Ask, BooksMemory};
use crate::shaping::limiter::{Cadence, Day, Limits, Reset};
use crate::shaping::line::{Estimate, Past, Refusal, Rules, Snapshot, Terms, Timing, Waiting};
use crate::shaping::scheduler::Scheduler;
use crate::upstream::Failure;
use crate::upstream::connect::Connector;
use crate::upstream::pool::Pool;

/// A shorter key is shown by its place alone.
const SHOWN_KEY_BYTES: usize = 12;

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
    /// No connection could be made; until then others are asked first.
    down_until: Cell<Option<Instant>>,
}

impl Provider {
    /// The provider and its task (scheduler and housekeeping), which the caller spawns.
    /// `pasts` says how each of its API keys was used before.
    pub fn new(
        config: &config::Provider,
        fairness: Fairness,
        pasts: &[Past],
    ) -> (Rc<Provider>, impl Future<Output = ()> + use<>) {
        let (scheduler, schedule) = Scheduler::new(rules(config, fairness), pasts);
        let pool = Rc::new(Pool::new(config.pool_max_idle, config.pool_idle));
        let provider = Provider {
            config: config.clone(),
            scheduler,
            connector: Connector::new(config),
            pool: pool.clone(),
            counters: RefCell::default(),
            down_until: Cell::default(),
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
        self.pool.idle()
    }

    /// The queue as it stands; `None` only while the gateway goes down.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        self.scheduler.snapshot().await
    }

    /// How often something happened that has to be remembered; `None` only while the gateway goes down.
    pub async fn changes(&self) -> Option<u64> {
        self.scheduler.changes().await
    }

    /// What is to be remembered of each API key; the last word after [`Provider::close`]. `None` only while the gateway goes
    /// down.
    pub async fn memory(&self) -> Option<Vec<BooksMemory>> {
        self.scheduler.memory().await
    }

    /// Everybody in line, head first; `None` only while the gateway goes down.
    pub async fn waiting(&self) -> Option<Vec<Waiting>> {
        self.scheduler.waiting().await
    }

    /// When the slot of a newcomer would come; `None` where it would be refused.
    pub async fn estimate(&self, ask: Ask, terms: &Rc<Terms>) -> Option<Estimate> {
        self.scheduler.estimate(ask, terms).await
    }

    /// Whether no connection could be made a moment ago.
    pub fn is_down(&self) -> bool {
        self.down_until.get().is_some_and(|until| Instant::now() < until)
    }

    /// How an API key is called where people read: by its place, or by its end where that gives nothing away.
    pub fn key_label(&self, lane: usize) -> String {
        match self.config.api_keys.get(lane).map(|key| key.reveal()) {
            Some(key) if key.len() > SHOWN_KEY_BYTES => format!("...{}", &key[key.len() - 4..]),
            _ => format!("#{}", lane + 1),
        }
    }

    /// The name, with the key where there are several.
    fn with_key(&self, lane: usize) -> String {
        match self.config.api_keys.len() {
            0 | 1 => self.config.name.clone(),
            _ => format!("{} (key {})", self.config.name, self.key_label(lane)),
        }
    }

    /// Refuses everybody who waits for this provider and everybody who comes.
    pub fn close(&self) {
        self.scheduler.close();
    }

    /// Whether a limit on tokens has to know what a request of this model used.
    fn is_metered(&self, model: usize) -> bool {
        let of_model = self.config.models[model].rate_limit.as_ref().map(|limit| &limit.budget);
        let budgets = [Some(&self.config.rate_limit.budget), of_model];
        budgets.into_iter().flatten().any(|budget| budget.tokens_per_minute.is_some())
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
            Refusal::Deadline { position, expected_wait, patience, retry_after } => {
                Error::DeadlineExceeded { provider, position, expected_wait, patience, retry_after }
            }
            Refusal::ClientFull { client, max_queue, retry_after } => {
                Error::ClientQueueFull { provider, client: client.to_string(), max_queue, retry_after }
            }
            Refusal::Day { resets_in } => Error::DailyLimit { provider, resets_in },
            Refusal::Closed => Error::ShuttingDown,
        }
    }
}

fn rules(config: &config::Provider, fairness: Fairness) -> Rules {
    let rate = &config.rate_limit;
    let of_model = |model: &config::Model| match &model.rate_limit {
        Some(limit) => limits(limit.pace.as_ref(), &limit.budget),
        None => Limits::default(),
    };
    Rules {
        lanes: config.api_keys.len().max(1),
        limits: limits(Some(&rate.pace), &rate.budget),
        models: config.models.iter().map(of_model).collect(),
        adaptive: rate.adaptive,
        max_wait: rate.max_wait,
        max_queue: config.max_queue,
        fairness,
    }
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
