//! One provider at work: its scheduler, its connections, its counters.
//!
//! Owns the way from "this request is for that provider" to a response whose body is still to come. Knows nothing of the
//! client's side.
//!
//! | file | owns |
//! |---|---|
//! | [`exchange`] | the attempts of one request: wait, send, decide whether to send again |
//! | [`slot`] | a permit and a connection for one attempt, under one configuration |
//! | [`judge`] | what a response means for its request, and what the scheduler is told of it |
//! | [`answer`] | the response on its way: usage, completeness, its end |
//! | [`setup`] | the configuration in force, which a reload exchanges |
//! | [`availability`] | whether connections can be made at present |
//! | [`response_time`] | what a client's deadline has to leave for the response |
//! | [`progress`] | where a request is, for heartbeats |

mod answer;
mod availability;
mod exchange;
mod judge;
mod progress;
mod response_time;
mod setup;
mod slot;

pub use answer::{Advice, Answer, END_GRACE};
pub use exchange::{Errand, Exchanged, Offer};
pub use progress::{Progress, Whereabouts};
pub use setup::Setup;

use availability::Availability;
use response_time::ResponseTimes;

use std::cell::RefCell;
use std::future::Future;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use async_io::Timer;
use futures_lite::future;

use crate::config::{self, Budget, Fairness, Pace};
use crate::error::{Error, WaitsFor};
use crate::log;
use crate::shaping::books::{Ask, BooksMemory};
use crate::shaping::lane::Past;
use crate::shaping::limiter::Held;
use crate::shaping::line::{Estimate, Refusal, Snapshot, Timing, Waiting};
use crate::shaping::scheduler::Scheduler;
use crate::upstream::Failure;

/// Between two looks for connections that have been idle for too long.
const SWEEP: Duration = Duration::from_secs(5);

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

/// One provider. Lives as long as a configuration names it, and as long as anybody waits for it.
pub struct Provider {
    /// Unique.
    name: Rc<str>,
    setup: RefCell<Rc<Setup>>,
    scheduler: Scheduler,
    counters: RefCell<Counters>,
    availability: Availability,
    response_times: ResponseTimes,
}

impl Provider {
    /// The provider and its task (scheduler and housekeeping), which the caller spawns. `pasts` says how each of its API keys
    /// was used before.
    pub fn new(
        config: &config::Provider,
        fairness: Fairness,
        pasts: &[Past],
    ) -> (Rc<Provider>, impl Future<Output = ()> + use<>) {
        let setup = Setup::new(config, None);
        let (scheduler, schedule) = Scheduler::new(setup.rules(fairness), pasts);
        let provider = Rc::new(Provider {
            name: config.name.as_str().into(),
            setup: RefCell::new(Rc::new(setup)),
            scheduler,
            counters: RefCell::default(),
            availability: Availability::default(),
            response_times: ResponseTimes::default(),
        });
        let task = future::or(schedule, sweep(Rc::downgrade(&provider)));
        (provider, task)
    }

    /// Goes on under another configuration of the same name. Everybody stays in line, and all that was sent counts on.
    pub fn reload(&self, config: &config::Provider, fairness: Fairness) {
        let setup = Setup::new(config, Some(&self.setup()));
        self.scheduler.reload(setup.rules(fairness));
        self.setup.replace(Rc::new(setup));
        self.availability.reached();
    }

    /// As configured at present.
    pub fn setup(&self) -> Rc<Setup> {
        self.setup.borrow().clone()
    }

    /// The name, which no other has.
    pub fn name(&self) -> &Rc<str> {
        &self.name
    }

    /// What has come back so far.
    pub fn counters(&self) -> Counters {
        *self.counters.borrow()
    }

    /// Idle connections.
    pub fn idle_connections(&self) -> usize {
        self.setup().pool.idle()
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
    pub async fn estimate(&self, ask: Ask, errand: &Errand<'_>) -> Option<Estimate> {
        let response_time = self.response_time(errand, ask.model);
        self.scheduler.estimate(ask, &errand.terms, response_time).await
    }

    /// What a request's deadline has to leave for the response; nothing where it has none.
    fn response_time(&self, errand: &Errand<'_>, model: usize) -> Duration {
        let Some(deadline) = errand.terms.deadline else { return Duration::ZERO };
        let patience = deadline.saturating_duration_since(errand.since);
        self.response_times.usual(model, errand.stream, patience)
    }

    /// Whether no connection could be made a moment ago.
    pub fn is_down(&self) -> bool {
        self.availability.is_down(Instant::now())
    }

    /// A request comes here. If the provider was down, it is the one that tries whether it is back.
    pub fn is_chosen(&self) {
        self.availability.is_probed(Instant::now(), self.setup().config.connect_timeout);
    }

    /// The name, with the key where there are several.
    fn with_key(&self, lane: usize) -> String {
        let setup = self.setup();
        match setup.has_several_keys() {
            false => self.name.to_string(),
            true => format!("{} (key {})", self.name, setup.key_label(lane)),
        }
    }

    /// Refuses everybody who waits for this provider and everybody who comes.
    pub fn close(&self) {
        self.scheduler.close();
    }

    /// Counts and logs a failure and makes the caller's error of it.
    fn failed(&self, failure: Failure) -> Error {
        self.counters.borrow_mut().upstream_errors += 1;
        let provider = self.name.to_string();
        let error = match failure {
            Failure::Unreachable(reason) => Error::UpstreamUnreachable { provider, reason },
            Failure::Timeout(waited) => Error::UpstreamTimeout { provider, waited },
            Failure::Disconnected(detail) => Error::UpstreamDisconnected { provider, detail },
            Failure::Invalid(detail) => Error::UpstreamInvalidResponse { provider, detail },
        };
        log::warn(format_args!("{error}"));
        error
    }

    fn refused(&self, refusal: Refusal) -> Error {
        let provider = self.name.to_string();
        match refusal {
            Refusal::WaitExceeded { position, expected_wait, max_wait, held_by, retry_after } => {
                let waits_for = waits_for(held_by);
                Error::QueueWaitExceeded {
                    provider,
                    position,
                    expected_wait,
                    max_wait,
                    waits_for,
                    retry_after,
                }
            }
            Refusal::Full { max_queue, retry_after } => {
                Error::QueueFull { provider, max_queue, retry_after }
            }
            Refusal::Deadline {
                position,
                expected_wait,
                patience,
                response_time,
                held_by,
                retry_after,
            } => {
                let waits_for = waits_for(held_by);
                Error::DeadlineExceeded {
                    provider,
                    position,
                    expected_wait,
                    patience,
                    response_time,
                    waits_for,
                    retry_after,
                }
            }
            Refusal::ClientFull { client, max_queue, retry_after } => Error::ClientQueueFull {
                provider,
                client: client.to_string(),
                max_queue,
                retry_after,
            },
            Refusal::Day { resets_in } => Error::DailyLimit { provider, resets_in },
            Refusal::Closed => Error::ShuttingDown,
        }
    }
}

fn waits_for(held_by: Held) -> WaitsFor {
    match held_by {
        Held::Nothing => WaitsFor::Connection,
        Held::Cooldown => WaitsFor::Cooldown,
        Held::Cadence | Held::Window => WaitsFor::Limit("rpm"),
        Held::Day => WaitsFor::Limit("rpd"),
        Held::Tokens => WaitsFor::Limit("tpm"),
        Held::Concurrency => WaitsFor::Limit("max_concurrent"),
    }
}

/// Closes what has been idle for too long, for as long as the provider lives.
async fn sweep(provider: Weak<Provider>) {
    loop {
        Timer::after(SWEEP).await;
        let Some(provider) = provider.upgrade() else { return };
        provider.setup().pool.sweep();
    }
}

/// The most sends that can fall in any 60 s; `None` where nothing counts sends.
pub fn worst_case_per_minute(pace: Option<&Pace>, budget: &Budget) -> Option<u64> {
    setup::limits(pace, budget).worst_case_per_minute()
}
