//! When the next send may go, and which limit holds it: the arithmetic of shaping.
//!
//! Owns every limit of one provider or one model, one file each. Does not sleep, read a clock, know who waits or what
//! is sent: each call brings its own [`Now`], and the scheduler acts on the answer.

mod adaptive;
mod cadence;
mod day;
mod memory;
mod tokens;
mod window;

pub use adaptive::{Adaptive, Learned, backoff};
pub use memory::Memory;

use std::time::{Duration, Instant, SystemTime};

use cadence::{TokenBucket, least_gap, made_up};
use day::CalendarDay;
use tokens::TokenWindow;
use window::Window;

/// Nanoseconds since [`ORIGIN`] before the limiter was made; lasts 584 years.
type Nanos = u64;

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// So far back reach the sends of a former limiter: further than any that counts. An `Instant` may not, so soon after the
/// machine has started.
const ORIGIN: Duration = Duration::from_secs(2 * 24 * 60 * 60);

/// What a provider allows. A field that is `None` does not limit; a count of 0 is taken for 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// How sends are spread.
    pub cadence: Option<Cadence>,
    /// Sends in any rolling 60 s. Costs 8 bytes a send.
    pub window: Option<u32>,
    /// Sends a day.
    pub day: Option<Day>,
    /// Tokens (the model's) in any rolling 60 s.
    pub tokens: Option<u64>,
    /// Requests in flight.
    pub concurrent: Option<u32>,
    /// How much the way to the provider may vary from one send to the next, clocks included. It is added to every rolling
    /// span and kept around a daily reset, so that the provider's count, made on arrival, agrees with ours, made at the
    /// send. The cadence has none: a provider's bucket forgives what its burst forgives.
    pub margin: Duration,
}

impl Default for Limits {
    /// No limit, and a margin of 500 ms for those to come.
    fn default() -> Self {
        Limits {
            cadence: None,
            window: None,
            day: None,
            tokens: None,
            concurrent: None,
            margin: Duration::from_millis(500),
        }
    }
}

/// A token bucket, full at the start. With a capacity of 1 it is strict spacing: idle time earns nothing, and no two
/// sends are closer than the interval by more than 1 ms, which makes up for those before that waited and went late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cadence {
    /// One token each; 0 is taken for 1 ns. Round 60 s / rpm up, never down.
    pub interval: Duration,
    /// Tokens that the bucket holds.
    pub capacity: u32,
}

/// A daily budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Day {
    /// Sends a day.
    pub max: u32,
    /// When a day ends.
    pub reset: Reset,
}

/// When a daily budget is new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// Every day this long after midnight UTC (a zone's offset already subtracted; taken modulo 24 h). A step of the wall
    /// clock may put the reset off, by a day at most, and never brings it forward.
    At(Duration),
    /// Each send comes back 24 h after it went. Costs 8 bytes a send.
    Rolling,
}

impl Limits {
    /// The most sends in any 60 s, if each leaves on the dot; `None` where no limit counts sends.
    ///
    /// For a bucket that is `capacity - 1 + ceil(60 s / interval)`: 120 for one send every 0.5 s, 129 with a capacity of
    /// 10. A provider that counts both ends of the minute, or whose minute is stretched by the network or by the
    /// lateness that the cadence makes up, may see one more, or what goes in 20 ms; a `window` has its margin against that.
    pub fn worst_case_per_minute(&self) -> Option<u64> {
        let span = nanos(MINUTE);
        self.most(|interval, capacity| capacity - 1 + span.div_ceil(interval))
    }

    /// The most sends that can fall in any `span` of up to 60 s, `[t, t + span)`, lateness that is made up included;
    /// `None` where no limit counts sends.
    pub fn worst_case(&self, span: Duration) -> Option<u64> {
        let span = nanos(span);
        self.most(|interval, capacity| {
            let refills = span.saturating_add(made_up(interval, capacity)).div_ceil(interval);
            let by_gaps =
                span.checked_div(least_gap(interval, capacity)).map_or(u64::MAX, |gaps| gaps + 1);
            by_gaps.min(capacity - 1 + refills)
        })
    }

    /// With what the cadence allows, by its interval and its capacity.
    fn most(&self, by_cadence: impl Fn(Nanos, u64) -> u64) -> Option<u64> {
        let cadence = self.cadence.map(|cadence| {
            by_cadence(nanos(cadence.interval).max(1), u64::from(cadence.capacity.max(1)))
        });
        let window = self.window.map(|max| u64::from(max.max(1)));
        let day = self.day.map(|day| match day.reset {
            Reset::At(_) => 2 * u64::from(day.max.max(1)), // one budget before the reset, one after
            Reset::Rolling => u64::from(day.max.max(1)),
        });
        [cadence, window, day].into_iter().flatten().min()
    }
}

/// One reading of both clocks. Everything is measured on `mono`; `wall` only tells when a daily budget resets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Must not run backwards from call to call; where it does, the later reading counts.
    pub mono: Instant,
    /// May step either way.
    pub wall: SystemTime,
}

/// When the next send may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Next {
    /// The earliest instant, never before the `now` of the question; `None` until a request in flight is released.
    /// It is exact: refused a nanosecond before, granted at it, if nothing is sent, settled or cooled down meanwhile.
    pub at: Option<Instant>,
    /// The limit that opens last.
    pub held_by: Held,
}

impl Next {
    /// Both limiters' answers to the same `now` in one: the later of the two.
    #[must_use]
    pub fn latest(self, other: Next) -> Next {
        match (self.at, other.at) {
            (None, _) => self,
            (_, None) => other,
            (Some(ours), Some(theirs)) if theirs > ours => other,
            _ => self,
        }
    }

    /// The limiters' answers for two ways to send: the one that opens first.
    #[must_use]
    pub fn earliest(self, other: Next) -> Next {
        match (self.at, other.at) {
            (Some(ours), Some(theirs)) if theirs < ours => other,
            (None, Some(_)) => other,
            _ => self,
        }
    }
}

/// What a send waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// It may go now.
    Nothing,
    /// The provider asked for a pause.
    Cooldown,
    /// The bucket is empty.
    Cadence,
    /// The rolling minute is full.
    Window,
    /// The day's budget is spent.
    Day,
    /// The rolling minute has no room for this many tokens.
    Tokens,
    /// As many requests as allowed are in flight.
    Concurrency,
}

impl Held {
    /// All there are.
    pub const ALL: [Held; 7] = [
        Held::Nothing,
        Held::Cooldown,
        Held::Cadence,
        Held::Window,
        Held::Day,
        Held::Tokens,
        Held::Concurrency,
    ];

    /// The name in `/admin/stats`.
    pub fn name(self) -> &'static str {
        match self {
            Held::Nothing => "nothing",
            Held::Cooldown => "cooldown",
            Held::Cadence => "cadence",
            Held::Window => "window",
            Held::Day => "day",
            Held::Tokens => "tokens",
            Held::Concurrency => "concurrency",
        }
    }
}

/// One send on the limiter's books, to be [settled](Limiter::settle) and [released](Limiter::release). It belongs to the
/// limiter that gave it out.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a send that is never released stays in flight"]
pub struct SendId(u64);

/// Keeps all [`Limits`] together: a send may go when the last of them opens.
///
/// Like `x/time/rate` it is asked ([`next`](Limiter::next)), then told ([`sent`](Limiter::sent)); unlike it, nothing is
/// reserved in between, so who leaves the queue has nothing to give back. A send counts from the instant it really
/// went (the cadence apart), and one that was not allowed is recorded all the same: the limits it broke are in debt.
///
/// - *cadence*: `limit_req rate=` and `burst=`, kept as the theoretical arrival time of GCRA in whole nanoseconds: no
///   drift. A send that waited and went late makes those behind it no later: up to 20 ms of that is made up, by gaps that are
///   shorter by 1 ms at most (where there are bursts, up to 1 ms), so the mean rate is the configured one. Idle time, when
///   nobody waited, is not; a request that comes back for another try has waited all the while.
///   [`set_interval`](Limiter::set_interval) changes the rate while running.
/// - *window*: a ring of the last `max` send instants; the oldest plus 60 s plus the margin is when there is room again.
/// - *day*: the same ring over 24 h, or a count that starts anew at a time of day.
/// - *tokens*: an estimate taken at the send, corrected by [`settle`](Limiter::settle), gone after 60 s plus the margin.
/// - *concurrency*: from `sent` to [`release`](Limiter::release).
/// - *cooldown*: nothing goes before [`cool_down`](Limiter::cool_down)'s instant.
#[derive(Debug)]
pub struct Limiter {
    start: Instant,
    cooldown: Nanos,
    cadence: Option<TokenBucket>,
    window: Option<Window>,
    rolling_day: Option<Window>,
    calendar_day: Option<CalendarDay>,
    tokens: Option<TokenWindow>,
    concurrent: Option<u32>,
    in_flight: u32,
    sends: u64,
}

impl Limiter {
    /// A limiter that has sent nothing yet: its bucket is full, its windows are empty.
    pub fn new(limits: &Limits, now: Now) -> Self {
        let minute = nanos(MINUTE + limits.margin);
        let rolling = |day: Day| {
            (day.reset == Reset::Rolling).then(|| Window::new(day.max, nanos(DAY + limits.margin)))
        };
        let calendar = |day: Day| match day.reset {
            Reset::At(time) => Some(CalendarDay::new(day.max, nanos(time), nanos(limits.margin))),
            Reset::Rolling => None,
        };
        Limiter {
            start: now.mono,
            cooldown: 0,
            cadence: limits.cadence.map(TokenBucket::new),
            window: limits.window.map(|max| Window::new(max, minute)),
            rolling_day: limits.day.and_then(rolling),
            calendar_day: limits.day.and_then(calendar),
            tokens: limits.tokens.map(|max| TokenWindow::new(max, minute)),
            concurrent: limits.concurrent.map(|max| max.max(1)),
            in_flight: 0,
            sends: 0,
        }
    }

    /// When a send of `cost` tokens may go. One whose cost exceeds the whole limit goes when the token window is empty.
    pub fn next(&self, now: Now, cost: u64) -> Next {
        if self.concurrent.is_some_and(|max| self.in_flight >= max) {
            return Next { at: None, held_by: Held::Concurrency };
        }
        let time = self.time(now.mono);
        let tokens = self.tokens.as_ref().map_or(0, |tokens| tokens.earliest(time, cost));
        self.latest(time, self.openings(now, 0).into_iter().chain([(tokens, Held::Tokens)]))
    }

    /// The earliest instant at which the `n`-th send from now (0 is the next) can go. Never too late: the scheduler may
    /// refuse on it. Exact where one limit alone holds a queue that never runs dry, but for what is not known yet: tokens
    /// and concurrency are left out (ask [`next`](Limiter::next) for the head of the queue), and behind a bucket that is
    /// full all lateness that can be made up is taken off, up to 20 ms.
    pub fn nth_at(&self, now: Now, n: usize) -> Instant {
        self.nth(now, n).at.expect("limits that count sends always open in time")
    }

    /// [`nth_at`](Self::nth_at), and which limit opens last; there is always an instant.
    pub fn nth(&self, now: Now, n: usize) -> Next {
        self.latest(self.time(now.mono), self.openings(now, n as u64))
    }

    /// How many sends could go at this instant, each of a token or less; `u32::MAX` where nothing limits. 0 or 1 for
    /// strict spacing.
    pub fn available(&self, now: Now) -> u32 {
        let time = self.time(now.mono);
        if time < self.cooldown {
            return 0;
        }
        let left = [
            self.cadence.as_ref().map(|cadence| cadence.available(time)),
            self.window.as_ref().map(|window| window.available(time)),
            self.rolling_day.as_ref().map(|window| window.available(time)),
            self.calendar_day.as_ref().map(|day| day.available(time, now.wall)),
            self.tokens.as_ref().and_then(|tokens| (tokens.earliest(time, 1) > time).then_some(0)),
            self.concurrent.map(|max| max.saturating_sub(self.in_flight)),
        ];
        left.into_iter().flatten().min().unwrap_or(u32::MAX)
    }

    /// Whether it holds nothing back at all, whoever asks.
    pub fn is_unlimited(&self, now: Now) -> bool {
        // Taken apart whole, so that no limit to come is forgotten here.
        let Limiter {
            cooldown,
            cadence: None,
            window: None,
            rolling_day: None,
            calendar_day: None,
            tokens: None,
            concurrent: None,
            start: _,
            in_flight: _,
            sends: _,
        } = self
        else {
            return false;
        };
        *cooldown <= self.time(now.mono)
    }

    /// Whether one send is to it as any other.
    pub fn counts_sends_alone(&self) -> bool {
        self.tokens.is_none()
    }

    /// How many more may be in flight; `usize::MAX` where that is not limited.
    pub fn room(&self) -> usize {
        self.concurrent.map_or(usize::MAX, |max| max.saturating_sub(self.in_flight) as usize)
    }

    /// Records a send at the instant its bytes went out, with `cost` tokens reserved for it. It had been wanted for
    /// `waited`: the cadence makes up for lateness within that.
    pub fn sent(&mut self, at: Now, waited: Duration, cost: u64) -> SendId {
        let time = self.time(at.mono);
        if let Some(cadence) = &mut self.cadence {
            cadence.sent(time, nanos(waited));
        }
        for window in [&mut self.window, &mut self.rolling_day].into_iter().flatten() {
            window.sent(time);
        }
        if let Some(day) = &mut self.calendar_day {
            day.sent(time, at.wall);
        }
        self.in_flight = self.in_flight.saturating_add(1);
        SendId(self.reserve(time, cost))
    }

    /// Replaces what was reserved for a send by what it really used, as of the send. Too late after the send has left
    /// the window: then nothing changes.
    pub fn settle(&mut self, id: &SendId, tokens: u64) {
        if let Some(window) = &mut self.tokens {
            window.settle(id.0, tokens);
        }
    }

    /// The request is no longer in flight.
    pub fn release(&mut self, id: SendId) {
        debug_assert!(id.0 < self.sends, "the id of another limiter");
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Nothing goes before `until`. Never shortens a cooldown that is running.
    pub fn cool_down(&mut self, until: Instant) {
        self.cooldown = self.cooldown.max(self.time(until));
    }

    /// Changes the cadence's interval. The bucket keeps its tokens and fills at the new rate from now on, so that no span
    /// admits more than the capacity plus what each rate yields in its own time. Without a cadence nothing happens.
    pub fn set_interval(&mut self, now: Now, interval: Duration) {
        let time = self.time(now.mono);
        if let Some(cadence) = &mut self.cadence {
            cadence.set_interval(time, interval);
        }
    }

    /// Tokens for one more send. Returns its number, which is also the token window's.
    fn reserve(&mut self, time: Nanos, tokens: u64) -> u64 {
        if let Some(window) = &mut self.tokens {
            window.sent(time, tokens);
        }
        self.sends += 1;
        self.sends - 1
    }

    fn latest(&self, time: Nanos, openings: impl IntoIterator<Item = (Nanos, Held)>) -> Next {
        let mut latest = (time, Held::Nothing);
        for (at, limit) in openings {
            if at > latest.0 {
                latest = (at, limit);
            }
        }
        Next { at: Some(self.instant(latest.0)), held_by: latest.1 }
    }

    /// When each limit that counts sends opens for the `n`-th from now; 0 where there is no such limit.
    fn openings(&self, now: Now, n: u64) -> [(Nanos, Held); 5] {
        let time = self.time(now.mono);
        let from = time.max(self.cooldown);
        let rolling =
            |window: &Option<Window>| window.as_ref().map_or(0, |window| window.earliest(from, n));
        [
            (self.cooldown, Held::Cooldown),
            (self.cadence.as_ref().map_or(0, |cadence| cadence.earliest(from, n)), Held::Cadence),
            (rolling(&self.window), Held::Window),
            (rolling(&self.rolling_day), Held::Day),
            (
                self.calendar_day.as_ref().map_or(0, |day| day.earliest(time, now.wall, n)),
                Held::Day,
            ),
        ]
    }

    fn time(&self, at: Instant) -> Nanos {
        nanos(ORIGIN + at.saturating_duration_since(self.start))
    }

    /// Of a time since the limiter was made.
    fn instant(&self, time: Nanos) -> Instant {
        self.start + Duration::from_nanos(time - nanos(ORIGIN))
    }
}

/// A duration in nanoseconds, at most 584 years.
fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock() -> impl Fn(u64) -> Now {
        let base = Instant::now();
        move |ms| Now {
            mono: base + Duration::from_millis(ms),
            wall: SystemTime::UNIX_EPOCH + Duration::from_millis(ms),
        }
    }

    fn every(interval: Duration, capacity: u32) -> Limits {
        Limits { cadence: Some(Cadence { interval, capacity }), ..Limits::default() }
    }

    #[test]
    fn the_limit_that_opens_last_holds() {
        let at = clock();
        let limits = Limits {
            cadence: Some(Cadence { interval: Duration::from_secs(1), capacity: 1 }),
            window: Some(4),
            day: Some(Day { max: 6, reset: Reset::Rolling }),
            tokens: Some(100),
            concurrent: Some(2),
            margin: Duration::from_millis(500),
        };
        let mut limiter = Limiter::new(&limits, at(0));
        let next = |limiter: &Limiter, ms, cost| {
            let next = limiter.next(at(ms), cost);
            (next.at.map(|instant| (instant - at(0).mono).as_millis()), next.held_by)
        };
        assert_eq!(next(&limiter, 0, 10), (Some(0), Held::Nothing));
        let first = limiter.sent(at(0), Duration::ZERO, 90);
        assert_eq!(next(&limiter, 0, 10), (Some(1000), Held::Cadence));
        assert_eq!(next(&limiter, 0, 11), (Some(60_500), Held::Tokens));
        limiter.settle(&first, 1);
        assert_eq!(next(&limiter, 400, 11), (Some(1000), Held::Cadence));
        limiter.cool_down(at(3000).mono);
        limiter.cool_down(at(2000).mono);
        assert_eq!(next(&limiter, 400, 11), (Some(3000), Held::Cooldown));
        assert_eq!(limiter.available(at(2999)), 0);
        assert_eq!(limiter.available(at(3000)), 1);
        let second = limiter.sent(at(3000), Duration::ZERO, 1);
        assert_eq!(next(&limiter, 9000, 1), (None, Held::Concurrency));
        assert_eq!(limiter.available(at(9000)), 0);
        limiter.release(first);
        assert_eq!(next(&limiter, 9000, 1), (Some(9000), Held::Nothing));
        limiter.release(second);
        for ms in [9000, 10_000] {
            let id = limiter.sent(at(ms), Duration::ZERO, 1);
            limiter.release(id);
        }
        assert_eq!(next(&limiter, 20_000, 1), (Some(60_500), Held::Window));
        for ms in [61_000, 64_000] {
            let id = limiter.sent(at(ms), Duration::ZERO, 1);
            limiter.release(id);
        }
        assert_eq!(next(&limiter, 200_000, 1), (Some(86_400_500), Held::Day));
        assert_eq!(limiter.available(at(200_000)), 0);
    }

    #[test]
    fn the_latest_of_two_answers_is_the_one_without_a_time_or_the_later() {
        let clock = clock();
        let at = |ms| Some(clock(ms).mono);
        let now = Next { at: at(0), held_by: Held::Nothing };
        let soon = Next { at: at(5), held_by: Held::Window };
        let later = Next { at: at(6), held_by: Held::Day };
        let unknown = Next { at: None, held_by: Held::Concurrency };
        for (one, other, want) in
            [(now, now, now), (now, soon, soon), (soon, later, later), (later, unknown, unknown)]
        {
            assert_eq!(one.latest(other), want);
            assert_eq!(other.latest(one), want);
        }
    }

    #[test]
    fn nothing_limits_where_nothing_is_configured() {
        let at = clock();
        let mut limiter = Limiter::new(&Limits::default(), at(0));
        let _in_flight: Vec<_> =
            (0..1000).map(|_| limiter.sent(at(0), Duration::ZERO, u64::MAX)).collect();
        assert_eq!(limiter.next(at(0), u64::MAX).at, Some(at(0).mono));
        assert_eq!(limiter.nth_at(at(0), 1_000_000), at(0).mono);
        assert_eq!(limiter.available(at(0)), u32::MAX);
        assert_eq!(Limits::default().worst_case_per_minute(), None);
    }

    #[test]
    fn the_worst_minute_is_the_tightest_of_what_each_limit_lets_through() {
        let half_a_second = Duration::from_millis(500);
        let daily = |max, reset| Limits { day: Some(Day { max, reset }), ..Limits::default() };
        let cases = [
            (every(half_a_second, 1), 120),
            (every(half_a_second, 10), 129),
            (every(Duration::from_secs(7), 1), 9),
            (every(Duration::from_secs(61), 1), 1),
            (every(Duration::from_secs(61), 3), 3),
            (Limits { window: Some(40), ..Limits::default() }, 40),
            (Limits { window: Some(120), ..every(half_a_second, 10) }, 120),
            (daily(50, Reset::Rolling), 50),
            (daily(50, Reset::At(Duration::ZERO)), 100),
        ];
        for (limits, want) in cases {
            assert_eq!(limits.worst_case_per_minute(), Some(want), "{limits:?}");
        }
    }

    #[test]
    fn the_worst_case_counts_a_first_send_that_was_late() {
        let spans = |limits: Limits, spans: [u64; 3]| {
            spans.map(|ms| limits.worst_case(Duration::from_millis(ms)))
        };
        assert_eq!(
            spans(every(Duration::from_millis(500), 1), [0, 59_999, 60_000]),
            [1, 121, 121].map(Some)
        );
        assert_eq!(
            spans(every(Duration::from_millis(500), 10), [499, 500, 1000]),
            [10, 11, 12].map(Some)
        );
        assert_eq!(spans(every(Duration::from_millis(1), 1), [0, 1, 100]), [20, 21, 120].map(Some));
    }

    #[test]
    fn three_at_once_at_forty_a_minute_leave_at_0_and_1500_and_3000_ms() {
        let at = clock();
        let mut limiter = Limiter::new(&every(Duration::from_millis(1500), 1), at(0));
        let expected: Vec<_> = (0..3).map(|n| limiter.nth_at(at(0), n)).collect();
        // Those behind the first could go a millisecond earlier each, had it waited before.
        for ((instant, foreseen), ms) in
            expected.into_iter().zip([0, 1499, 2998]).zip([0, 1500, 3000])
        {
            assert_eq!(instant, at(foreseen).mono);
            assert_eq!(
                (limiter.next(at(0), 0).at, limiter.available(at(ms))),
                (Some(at(ms).mono), 1)
            );
            let id = limiter.sent(at(ms), Duration::ZERO, 0);
            limiter.release(id);
            assert_eq!(limiter.available(at(ms)), 0);
        }
    }
}
