//! Shaping: when may the next request of one provider leave?
//!
//! [`limiter`], [`books`] and [`queue`] are pure: they take `now` and say what to do. [`scheduler`] is the thin driver around
//! them, and the only code in this room that sleeps.
//!
//! Words: a *waiter* stands in the queue; a *grant* tells it that its slot is open; the *permit* it gets with that is
//! spent when the request head is on the wire. A permit that is dropped unspent costs nothing.

pub mod books;
pub mod limiter;
pub mod observed;
pub mod queue;
pub mod scheduler;
