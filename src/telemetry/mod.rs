//! What was asked and how it was answered: one record a request, and what adds up over all of them.
//!
//! A [`Trace`] goes with a request and is written by whoever knows something of it; at its end it becomes a [`Record`],
//! which [`Telemetry::record`] adds to the counters, keeps for a while, and tells the log. Pages are `admin`'s; how a
//! provider's line stands is `shaping`'s.

mod histogram;
mod record;
mod trace;

pub use histogram::{BOUNDS, Histogram};
pub use record::Record;
pub use trace::Trace;

use std::cell::{Ref, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// Requests that are kept to be shown.
const RECENT: usize = 200;

/// All that was ever counted, and the latest requests.
#[derive(Default)]
pub struct Telemetry(RefCell<Totals>);

/// What adds up.
#[derive(Default)]
pub struct Totals {
    /// The latest requests, oldest first.
    pub recent: VecDeque<Record>,
    /// Requests so far.
    pub count: u64,
    /// By provider: those that came to be answered, or refused, there.
    pub providers: BTreeMap<Rc<str>, ProviderTotals>,
    /// Those that came to no provider, by status.
    pub unrouted: BTreeMap<u16, u64>,
    /// By the `code` of the error that its caller got, or `caller_gone`.
    pub errors: BTreeMap<&'static str, u64>,
    /// By client of the configuration.
    pub clients: BTreeMap<Rc<str>, u64>,
    /// Of all others together: addresses would be without bound.
    pub unnamed: u64,
}

/// One provider's part.
#[derive(Default)]
pub struct ProviderTotals {
    /// From a request to its last send, of those that were sent.
    pub queued: Histogram,
    /// From a request to the beginning of its answer, of those that were answered by the provider.
    pub first_byte: Histogram,
    /// From a request to the end of its answer, likewise.
    pub total: Histogram,
    /// By model (as configured).
    pub models: BTreeMap<Rc<str>, ModelTotals>,
}

/// One model's part.
#[derive(Default)]
pub struct ModelTotals {
    /// Requests by the status that the caller got.
    pub statuses: BTreeMap<u16, u64>,
    /// Tokens that answers said they read.
    pub input_tokens: u64,
    /// Tokens that answers said they wrote.
    pub output_tokens: u64,
}

impl Telemetry {
    /// Takes a request that is over.
    pub fn record(&self, record: Record) {
        record.log();
        if !record.is_operators() {
            self.0.borrow_mut().add(record);
        }
    }

    /// So far.
    pub fn totals(&self) -> Ref<'_, Totals> {
        self.0.borrow()
    }
}

impl Totals {
    fn add(&mut self, record: Record) {
        self.count += 1;
        match &record.route {
            Some((provider, model)) => {
                let provider = entry(&mut self.providers, provider);
                if let Some(queued) = record.queued.filter(|_| record.reached) {
                    provider.queued.add(queued);
                }
                if record.reached && record.error.is_none() {
                    provider.first_byte.add(record.first_byte);
                    provider.total.add(record.total);
                }
                let model = entry(&mut provider.models, model);
                *model.statuses.entry(record.status).or_default() += 1;
                model.input_tokens += record.usage.input().unwrap_or(0);
                model.output_tokens += record.usage.output().unwrap_or(0);
            }
            None => *self.unrouted.entry(record.status).or_default() += 1,
        }
        if let Some(error) = record.error {
            *self.errors.entry(error).or_default() += 1;
        }
        if record.named {
            *entry(&mut self.clients, &record.client) += 1;
        } else {
            self.unnamed += 1;
        }
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(record);
    }
}

/// Without a copy of the key where it is there already.
fn entry<'m, T: Default>(map: &'m mut BTreeMap<Rc<str>, T>, key: &Rc<str>) -> &'m mut T {
    if !map.contains_key(key) {
        map.insert(key.clone(), T::default());
    }
    map.get_mut(key).expect("it was put in if it was not there")
}
