//! Shaping: when may the next request of one provider leave, and whose is it?
//!
//! | file | owns |
//! |---|---|
//! | [`limiter`] | the limits of one scope: when the next send may go |
//! | [`books`] | the limiters of one API key together, the provider's and its models' |
//! | [`queue`] | the order in which waiters go: clients in turn, priority, ageing, places kept |
//! | [`lane`] | one API key: its books, its open grants, its past |
//! | [`terms`] | a line's rules, and the terms of one request |
//! | [`line`] | the queue and the lanes: who goes next, when, on which lane, and who waits in vain |
//! | `by_id` | a map from ids of our own |
//! | `walk` | when each waiter can go at the earliest |
//! | [`observed`] | how many really went |
//! | [`scheduler`] | the thin driver around them: the task, its mailbox, its timer |
//!
//! All but the scheduler are pure: they take `now` and say what to do.
//!
//! Words: a *waiter* stands in the queue; a *grant* tells it that its slot is open; the *permit* it gets with that is
//! spent when the request head is on the wire. A permit that is dropped unspent costs nothing. A *lane* is one API key
//! with its own count of everything.

pub mod books;
mod by_id;
pub mod lane;
pub mod limiter;
pub mod line;
pub mod observed;
pub mod queue;
pub mod scheduler;
pub mod terms;
mod walk;
mod word;
