//! One API key of a provider: its books, its open grants, its counters.
//!
//! Pure. Does not know who waits.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

use super::books::{Ask, Books, BooksMemory, Entry, Scope};
use super::limiter::{Held, Now};
use super::observed::Observed;
use super::terms::Rules;

/// Sends whose time is kept to be shown.
const RECENT_SENDS: usize = 64;

/// What is known of an API key's use before.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "there is one for each API key, at the start")]
pub enum Past {
    /// It was not used, as far as anybody is concerned: its budgets are full.
    Fresh,
    /// It may have been used as much as its limits allow.
    Lost,
    /// It was used like this.
    Remembered {
        /// As of some instant.
        memory: BooksMemory,
        /// Since that instant.
        elapsed: Duration,
        /// How long it may have been used afterwards without a word of it; `None`: it was not.
        unsaved: Option<Duration>,
    },
}

/// A lane as it stands.
#[derive(Debug, Clone)]
pub struct LaneSnapshot {
    /// Whole sends that could go now.
    pub available: u32,
    /// Sent and not finished.
    pub in_flight: usize,
    /// The limit that holds its next send.
    pub held_by: Held,
    /// Sends in the last 60 s.
    pub sent_last_minute: u32,
    /// The cadence in force where 429s may stretch it.
    pub learned_interval: Option<Duration>,
    /// Request heads written.
    pub sent: u64,
    /// Answers that asked for a pause.
    pub cooldowns: u64,
    /// When the last head was written.
    pub last_send: Option<SystemTime>,
    /// When the latest heads were written, oldest first.
    pub recent_sends: Vec<SystemTime>,
    /// Whether its key is not used any more.
    pub retired: bool,
}

/// One API key.
#[derive(Debug)]
pub(super) struct Lane {
    pub books: Books,
    /// Whether its key is not to be used any more.
    pub retired: bool,
    /// The models that the open grants are for.
    pub granted: Vec<usize>,
    in_flight: usize,
    sent: u64,
    cooldowns: u64,
    last_send: Option<Now>,
    recent: VecDeque<SystemTime>,
    observed: Observed,
}

impl Lane {
    /// With such a past, nothing in flight.
    pub fn new(rules: &Rules, past: &Past, now: Now) -> Lane {
        Lane {
            books: books(rules, past, now),
            retired: false,
            granted: Vec::new(),
            in_flight: 0,
            sent: 0,
            cooldowns: 0,
            last_send: None,
            recent: VecDeque::new(),
            observed: Observed::new(now.mono),
        }
    }

    /// Whether one more grant may be open: the first one may, and as many as could go at this very instant.
    pub fn may_grant(&self, now: Now) -> bool {
        !self.retired && (self.granted.is_empty() || self.granted.len() < self.books.at_once(now))
    }

    /// A send of one of this lane's grants, wanted for `waited`.
    pub fn sent(&mut self, at: Now, waited: Duration, ask: Ask) -> Entry {
        self.returned(ask.model);
        self.sent += 1;
        self.in_flight += 1;
        self.last_send = Some(at);
        if self.recent.len() == RECENT_SENDS {
            self.recent.pop_front();
        }
        self.recent.push_back(at.wall);
        self.observed.sent(at.mono);
        self.books.sent(at, waited, ask)
    }

    /// A grant for this model is no longer open.
    pub fn returned(&mut self, model: usize) {
        if let Some(index) = self.granted.iter().position(|granted| *granted == model) {
            self.granted.swap_remove(index);
        }
    }

    /// One of its sends is over.
    pub fn finished(&mut self, entry: Entry) {
        self.in_flight -= 1;
        self.books.release(entry);
    }

    /// The provider refused one of its sends for its rate; see [`Books::refused`].
    pub fn refused(
        &mut self,
        model: usize,
        scope: Scope,
        wait: Option<Duration>,
        now: Now,
        random: f64,
    ) {
        self.cooldowns += 1;
        self.books.refused(now, model, scope, wait, random);
    }

    /// When it was used last; lanes take turns by that.
    pub fn rests_since(&self) -> Option<Instant> {
        self.last_send.map(|at| at.mono)
    }

    /// A send that may still go on an open grant counts as gone: nobody will be there to tell.
    pub fn give_up_grants(&mut self, now: Now) {
        for model in std::mem::take(&mut self.granted) {
            let entry = self.books.sent(now, Duration::ZERO, Ask { model, tokens: 0 });
            self.books.release(entry);
        }
    }

    /// How it stands.
    pub fn snapshot(&mut self, now: Now) -> LaneSnapshot {
        LaneSnapshot {
            available: self.books.available(now),
            in_flight: self.in_flight,
            held_by: self.books.next_shared(now, 0).held_by,
            sent_last_minute: self.observed.per_minute(now.mono),
            learned_interval: self.books.learned_interval(now.mono),
            sent: self.sent,
            cooldowns: self.cooldowns,
            last_send: self.last_send.map(|at| at.wall),
            recent_sends: self.recent.iter().copied().collect(),
            retired: self.retired,
        }
    }
}

fn books(rules: &Rules, past: &Past, now: Now) -> Books {
    let mut books = Books::new(&rules.limits, &rules.models, rules.adaptive, now);
    match past {
        Past::Fresh => {}
        Past::Lost => books.assume_the_worst(now),
        Past::Remembered { memory, elapsed, unsaved } => {
            books.recall(memory, *elapsed, now);
            if let Some(unsaved) = unsaved {
                let sends = rules.limits.worst_case(*unsaved).unwrap_or(0);
                books.assume_the_worst(now);
                books.spend_day(u32::try_from(sends).unwrap_or(u32::MAX), now);
            }
        }
    }
    books
}
