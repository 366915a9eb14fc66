//! The limiters of one provider together: its own and one for each of its models.
//!
//! Pure, like the limiters themselves. A send has to fit all of them; a pause or a spent budget of one model leaves the others
//! going.

use std::time::{Duration, Instant};

use super::limiter::{Adaptive, Held, Limiter, Limits, Next, Now, SendId, backoff};

/// A request as the limits see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Which of the provider's models, by index.
    pub model: usize,
    /// Tokens to reserve.
    pub tokens: u64,
}

/// Who has to pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All models of the provider.
    Provider,
    /// The model asked for.
    Model,
}

/// The provider's limiter and its models'.
#[derive(Debug)]
pub struct Books {
    shared: Ledger,
    models: Vec<Ledger>,
    adaptive: Option<Adaptive>,
}

/// A limiter and how often in a row the provider refused what it let go.
#[derive(Debug)]
struct Ledger {
    limiter: Limiter,
    refusals: u32,
}

/// A send that both limiters know, until it is over.
#[derive(Debug)]
pub struct Entry {
    model: usize,
    shared: SendId,
    own: SendId,
}

impl Books {
    /// For a provider with these limits and one entry of `models` for each model. `learn` lets 429s stretch the
    /// provider's cadence, if it has one.
    pub fn new(limits: &Limits, models: &[Limits], learn: bool, now: Now) -> Books {
        let ledger = |limits| Ledger { limiter: Limiter::new(limits, now), refusals: 0 };
        let cadence = limits.cadence.filter(|_| learn);
        Books {
            shared: ledger(limits),
            models: models.iter().map(ledger).collect(),
            adaptive: cadence.map(|cadence| Adaptive::new(cadence.interval)),
        }
    }

    /// When a request may go as far as the provider as a whole is concerned: what holds it here holds everybody behind.
    pub fn next_shared(&self, now: Now, tokens: u64) -> Next {
        self.shared.limiter.next(now, tokens)
    }

    /// When a request may go.
    pub fn next(&self, now: Now, ask: Ask) -> Next {
        self.next_shared(now, ask.tokens).latest(self.models[ask.model].limiter.next(now, ask.tokens))
    }

    /// When the request with `ahead` others of the provider in front of it, `ahead_of_model` of them for its own model, can go
    /// at the earliest.
    pub fn nth(&self, now: Now, model: usize, ahead: usize, ahead_of_model: usize) -> Next {
        self.shared.limiter.nth(now, ahead).latest(self.models[model].limiter.nth(now, ahead_of_model))
    }

    /// [`Books::nth`] as far as the provider as a whole is concerned.
    pub fn nth_shared(&self, now: Now, ahead: usize) -> Next {
        self.shared.limiter.nth(now, ahead)
    }

    /// Whole sends that the provider's own limits would let go now.
    pub fn available(&self, now: Now) -> u32 {
        self.shared.limiter.available(now)
    }

    /// Records a send.
    pub fn sent(&mut self, at: Now, ask: Ask) -> Entry {
        let own = self.models[ask.model].limiter.sent(at, ask.tokens);
        Entry { model: ask.model, shared: self.shared.limiter.sent(at, ask.tokens), own }
    }

    /// Puts the tokens that a send has really used in the place of those reserved.
    pub fn settle(&mut self, entry: &Entry, tokens: u64) {
        self.shared.limiter.settle(&entry.shared, tokens);
        self.models[entry.model].limiter.settle(&entry.own, tokens);
    }

    /// A request is over.
    pub fn release(&mut self, entry: Entry) {
        self.shared.limiter.release(entry.shared);
        self.models[entry.model].limiter.release(entry.own);
    }

    /// The provider refused a request for its rate and asks for a pause of `wait`; where it does not say, one after the
    /// other pauses longer. `random` is from 0 to 1.
    pub fn refused(&mut self, now: Now, model: usize, scope: Scope, wait: Option<Duration>, random: f64) {
        let ledger = match scope {
            Scope::Provider => &mut self.shared,
            Scope::Model => &mut self.models[model],
        };
        ledger.refusals = ledger.refusals.saturating_add(1);
        // "Now" from a provider that has just refused is no time.
        let wait = wait.filter(|wait| !wait.is_zero());
        let until = now.mono + wait.unwrap_or_else(|| backoff(ledger.refusals, random));
        ledger.limiter.cool_down(until);
        if scope == Scope::Provider
            && let Some(adaptive) = &mut self.adaptive
        {
            adaptive.refused(now.mono, until);
        }
        self.adapt(now);
    }

    /// The provider took a request for this model.
    pub fn accepted(&mut self, model: usize) {
        self.shared.refusals = 0;
        self.models[model].refusals = 0;
    }

    /// Lets the cadence recover with time.
    pub fn adapt(&mut self, now: Now) {
        if let Some(adaptive) = &self.adaptive {
            self.shared.limiter.set_interval(now, adaptive.interval(now.mono));
        }
    }

    /// The cadence in force, where learning may have stretched it.
    pub fn learned_interval(&self, now: Instant) -> Option<Duration> {
        self.adaptive.as_ref().map(|adaptive| adaptive.interval(now))
    }
}

/// Whether this is a wait for the next day, which nobody is made to sit through unasked.
pub fn is_day(next: Next) -> bool {
    next.held_by == Held::Day
}
