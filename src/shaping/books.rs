//! The limiters of one provider together: its own and one for each of its models.
//!
//! Pure, like the limiters themselves. A send has to fit all of them; a pause or a spent budget of one model leaves the others
//! going.

use std::time::{Duration, Instant};

use super::limiter::{
    Adaptive, Held, Learned, Limiter, Limits, Memory, Next, Now, SendId, backoff,
};

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

impl Ledger {
    fn new(limits: &Limits, now: Now) -> Ledger {
        Ledger { limiter: Limiter::new(limits, now), refusals: 0 }
    }
}

/// What books remember, for those that come after them. By default nothing.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BooksMemory {
    /// Of the provider's limiter.
    pub shared: Memory,
    /// Of each model's, by index.
    pub models: Vec<Memory>,
    /// How 429s have stretched the provider's cadence.
    pub learned: Option<Learned>,
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
        let cadence = limits.cadence.filter(|_| learn);
        Books {
            shared: Ledger::new(limits, now),
            models: models.iter().map(|limits| Ledger::new(limits, now)).collect(),
            adaptive: cadence.map(|cadence| Adaptive::new(cadence.interval)),
        }
    }

    /// When a request may go as far as the provider as a whole is concerned: what holds it here holds everybody behind.
    pub fn next_shared(&self, now: Now, tokens: u64) -> Next {
        self.shared.limiter.next(now, tokens)
    }

    /// When a request may go.
    pub fn next(&self, now: Now, ask: Ask) -> Next {
        self.next_shared(now, ask.tokens)
            .latest(self.models[ask.model].limiter.next(now, ask.tokens))
    }

    /// When the request with `ahead` others of the provider in front of it, `ahead_of_model` of them for its own model, can go
    /// at the earliest.
    pub fn nth(&self, now: Now, model: usize, ahead: usize, ahead_of_model: usize) -> Next {
        self.shared
            .limiter
            .nth(now, ahead)
            .latest(self.models[model].limiter.nth(now, ahead_of_model))
    }

    /// [`Books::nth`] as far as the provider as a whole is concerned.
    pub fn nth_shared(&self, now: Now, ahead: usize) -> Next {
        self.shared.limiter.nth(now, ahead)
    }

    /// Whether no model has a limit of its own at present.
    pub fn are_shared_alone(&self, now: Now) -> bool {
        self.models.iter().all(|model| model.limiter.is_unlimited(now))
    }

    /// Whole sends that the provider's own limits would let go now.
    pub fn available(&self, now: Now) -> u32 {
        self.shared.limiter.available(now)
    }

    /// How many requests could go at this instant, whatever they ask for: 1 where that depends on them, or would need to be
    /// counted by model.
    pub fn at_once(&self, now: Now) -> usize {
        let all_count_alike =
            self.shared.limiter.counts_sends_alone() && self.are_shared_alone(now);
        if all_count_alike { self.available(now) as usize } else { 1 }
    }

    /// How many more the provider may have in flight.
    pub fn room(&self) -> usize {
        self.shared.limiter.room()
    }

    /// How many more a model may have in flight.
    pub fn room_of(&self, model: usize) -> usize {
        self.models[model].limiter.room()
    }

    /// Records a send that had been wanted for `waited`.
    pub fn sent(&mut self, at: Now, waited: Duration, ask: Ask) -> Entry {
        let own = self.models[ask.model].limiter.sent(at, waited, ask.tokens);
        Entry { model: ask.model, shared: self.shared.limiter.sent(at, waited, ask.tokens), own }
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
    pub fn refused(
        &mut self,
        now: Now,
        model: usize,
        scope: Scope,
        wait: Option<Duration>,
        random: f64,
    ) {
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

    /// What is to be remembered as of now.
    pub fn memory(&self, now: Now) -> BooksMemory {
        BooksMemory {
            shared: self.shared.limiter.memory(now),
            models: self.models.iter().map(|model| model.limiter.memory(now)).collect(),
            learned: self.adaptive.as_ref().and_then(|adaptive| adaptive.memory(now.mono)),
        }
    }

    /// Makes books that have sent nothing yet the successors of those whose memory this is, its models in the order of these
    /// here; `elapsed` has passed since it was taken. See [`Limiter::recall`].
    pub fn recall(&mut self, memory: &BooksMemory, elapsed: Duration, now: Now) {
        self.shared.limiter.recall(&memory.shared, elapsed, now);
        let unknown = Memory::default();
        for (index, model) in self.models.iter_mut().enumerate() {
            model.limiter.recall(memory.models.get(index).unwrap_or(&unknown), elapsed, now);
        }
        if let (Some(adaptive), Some(learned)) = (&mut self.adaptive, &memory.learned) {
            adaptive.recall(learned, elapsed, now.mono);
        }
        self.adapt(now);
    }

    /// Goes on under other limits; models may have been added at the end. See [`Limiter::change`].
    pub fn change(&mut self, limits: &Limits, models: &[Limits], learn: bool, now: Now) {
        self.shared.limiter.change(limits, now);
        let known = self.models.len();
        for (ledger, limits) in self.models.iter_mut().zip(models) {
            ledger.limiter.change(limits, now);
        }
        self.models.extend(models.iter().skip(known).map(|limits| Ledger::new(limits, now)));
        let learned = self.adaptive.as_ref().and_then(|adaptive| adaptive.memory(now.mono));
        let cadence = limits.cadence.filter(|_| learn);
        self.adaptive = cadence.map(|cadence| Adaptive::new(cadence.interval));
        if let (Some(adaptive), Some(learned)) = (&mut self.adaptive, learned) {
            adaptive.recall(&learned, Duration::ZERO, now.mono);
        }
        self.adapt(now);
    }

    /// See [`Limiter::assume_the_worst`].
    pub fn assume_the_worst(&mut self, now: Now) {
        self.limiters().for_each(|limiter| limiter.assume_the_worst(now));
    }

    /// See [`Limiter::spend_day`]. Each model may have had all of these sends.
    pub fn spend_day(&mut self, sends: u32, now: Now) {
        self.limiters().for_each(|limiter| limiter.spend_day(sends, now));
    }

    fn limiters(&mut self) -> impl Iterator<Item = &mut Limiter> {
        [&mut self.shared].into_iter().chain(&mut self.models).map(|ledger| &mut ledger.limiter)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shaping::limiter::{Cadence, Day, Reset};
    use std::time::SystemTime;

    const PROVIDER: Scope = Scope::Provider;
    const MODEL: Scope = Scope::Model;

    fn clock() -> impl Fn(u64) -> Now {
        let base = Instant::now();
        move |at| Now { mono: base + ms(at), wall: SystemTime::UNIX_EPOCH + ms(at) }
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn every(millis: u64) -> Limits {
        Limits { cadence: Some(Cadence { interval: ms(millis), capacity: 1 }), ..Limits::default() }
    }

    fn ask(model: usize) -> Ask {
        Ask { model, tokens: 0 }
    }

    /// When each model's next request may go, in ms from the start, and what holds it.
    fn next(books: &Books, now: &impl Fn(u64) -> Now, at: u64) -> [(Option<u128>, Held); 2] {
        [0, 1].map(|model| {
            let next = books.next(now(at), ask(model));
            (next.at.map(|at| (at - now(0).mono).as_millis()), next.held_by)
        })
    }

    #[test]
    fn a_send_counts_for_the_provider_and_for_its_model() {
        let now = clock();
        let mut books = Books::new(&every(10), &[every(70), Limits::default()], false, now(0));
        let entry = books.sent(now(0), Duration::ZERO, ask(0));
        assert_eq!(next(&books, &now, 0), [(Some(70), Held::Cadence), (Some(10), Held::Cadence)]);
        assert_eq!(next(&books, &now, 30), [(Some(70), Held::Cadence), (Some(30), Held::Nothing)]);
        books.release(entry);
    }

    #[test]
    fn both_know_what_a_send_used_and_when_it_is_over() {
        let now = clock();
        let limits = |tokens, concurrent| Limits {
            tokens: Some(tokens),
            concurrent: Some(concurrent),
            margin: Duration::ZERO,
            ..Limits::default()
        };
        let mut books =
            Books::new(&limits(100, 2), &[limits(50, 1), Limits::default()], false, now(0));
        let entry = books.sent(now(0), Duration::ZERO, Ask { model: 0, tokens: 100 });
        let other = |model| books.next(now(1), Ask { model, tokens: 40 });
        assert_eq!((other(0).at, other(0).held_by), (None, Held::Concurrency));
        assert_eq!((other(1).at, other(1).held_by), (Some(now(60_000).mono), Held::Tokens));
        books.settle(&entry, 20);
        books.release(entry);
        for (model, tokens, held_by) in [
            (0, 30, Held::Nothing),
            (0, 31, Held::Tokens),
            (1, 80, Held::Nothing),
            (1, 81, Held::Tokens),
        ] {
            assert_eq!(
                books.next(now(1), Ask { model, tokens }).held_by,
                held_by,
                "model {model}, {tokens} tokens"
            );
        }
    }

    #[test]
    fn a_models_pause_leaves_the_others_going_and_the_providers_does_not() {
        let now = clock();
        for (scope, others) in
            [(MODEL, (Some(0), Held::Nothing)), (PROVIDER, (Some(500), Held::Cooldown))]
        {
            let mut books = Books::new(
                &Limits::default(),
                &[Limits::default(), Limits::default()],
                false,
                now(0),
            );
            books.refused(now(0), 0, scope, Some(ms(500)), 0.0);
            assert_eq!(next(&books, &now, 0), [(Some(500), Held::Cooldown), others]);
            assert_eq!(books.next_shared(now(0), 0).held_by, others.1);
        }
    }

    #[test]
    fn a_later_pause_never_shortens_a_running_one() {
        let now = clock();
        let mut books =
            Books::new(&Limits::default(), &[Limits::default(), Limits::default()], false, now(0));
        for (at, wait, until) in [(0, 500, 500), (100, 10, 500), (200, 400, 600)] {
            books.refused(now(at), 1, MODEL, Some(ms(wait)), 0.0);
            assert_eq!(next(&books, &now, at)[1].0, Some(until), "after the refusal at {at} ms");
        }
    }

    #[test]
    fn pauses_without_a_time_double_until_a_request_is_taken() {
        let now = clock();
        let mut books =
            Books::new(&Limits::default(), &[Limits::default(), Limits::default()], false, now(0));
        let mut at = 0;
        let mut pause = |books: &mut Books, wait| {
            at += 100_000;
            books.refused(now(at), 0, MODEL, wait, 0.0);
            let until = next(books, &now, at)[0].0.map(|until| until - u128::from(at));
            until.expect("a pause ends")
        };
        assert_eq!([None, None, None].map(|wait| pause(&mut books, wait)), [1000, 2000, 4000]);
        // A stated time counts as one more refusal, and "now" is none.
        assert_eq!(
            [Some(7), Some(0), None].map(|wait| pause(&mut books, wait.map(ms))),
            [7, 16_000, 32_000]
        );
        books.accepted(1);
        assert_eq!(
            pause(&mut books, None),
            60_000,
            "the other model's success says nothing of this one's"
        );
        books.accepted(0);
        assert_eq!(pause(&mut books, None), 1000);
    }

    #[test]
    fn only_what_the_whole_provider_refused_stretches_its_cadence() {
        let now = clock();
        for (learn, scope, want) in
            [(true, PROVIDER, 150), (true, MODEL, 100), (false, PROVIDER, 100)]
        {
            let mut books =
                Books::new(&every(100), &[Limits::default(), Limits::default()], learn, now(0));
            for at in [0, 1000] {
                books.refused(now(at), 0, scope, Some(ms(200)), 0.0);
            }
            let _entry = books.sent(now(2000), Duration::ZERO, ask(1));
            let opens = next(&books, &now, 2000)[1].0;
            assert_eq!(opens, Some(2000 + u128::from(want)), "{learn} {scope:?}");
            assert_eq!(books.learned_interval(now(1200).mono), learn.then_some(ms(want)));
            // Half an hour of quiet brings the whole rate back.
            books.adapt(now(2_000_000));
            let _entry = books.sent(now(2_000_000), Duration::ZERO, ask(1));
            assert_eq!(next(&books, &now, 2_000_000)[1].0, Some(2_000_100));
        }
    }

    #[test]
    fn successors_know_what_each_model_sent_and_assume_the_worst_of_what_is_new() {
        let now = clock();
        let limits = [every(70), every(80), every(90)];
        let mut books = Books::new(&every(10), &limits[..2], false, now(0));
        let entry = books.sent(now(0), Duration::ZERO, ask(1));
        books.release(entry);
        let memory = books.memory(now(5));
        let waits = |books: &Books, at| {
            [0, 1, 2].map(|model| {
                (books.next(now(at), ask(model)).at.expect("time frees it") - now(at).mono)
                    .as_millis()
            })
        };
        let mut successor = Books::new(&every(10), &limits, false, now(100));
        successor.recall(&memory, ms(1), now(100));
        assert_eq!(waits(&successor, 100), [4, 74, 90]);
        successor.assume_the_worst(now(100));
        assert_eq!(waits(&successor, 100), [70, 80, 90]);
        let day = Limits { day: Some(Day { max: 3, reset: Reset::Rolling }), ..Limits::default() };
        for (shared, model) in [(&day, Limits::default()), (&Limits::default(), day.clone())] {
            let mut books = Books::new(shared, &[model], false, now(0));
            for (sends, held_by) in [(2, Held::Nothing), (1, Held::Day)] {
                books.spend_day(sends, now(0));
                assert_eq!(books.next(now(0), ask(0)).held_by, held_by);
            }
        }
    }

    #[test]
    fn a_line_is_counted_by_provider_and_by_model() {
        let now = clock();
        // To the millisecond that each gap may be shorter if the first of them has waited before.
        let books = Books::new(&every(10), &[every(70), Limits::default()], false, now(0));
        for (model, ahead, ahead_of_model, want) in
            [(0, 0, 0, 0), (0, 3, 0, 27), (0, 3, 1, 69), (1, 3, 3, 27)]
        {
            let nth = books.nth(now(0), model, ahead, ahead_of_model);
            assert_eq!(
                nth.at,
                Some(now(want).mono),
                "model {model}, {ahead} ahead, {ahead_of_model} of its own"
            );
        }
        assert_eq!(books.nth_shared(now(0), 2).at, Some(now(18).mono));
    }
}
