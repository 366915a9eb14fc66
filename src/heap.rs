//! Futures on the heap, made in their place.
//!
//! `Box::pin(future)` makes a future on the stack first and then moves all of it, most of which means nothing yet. Where its place
//! is there before it, an optimized build makes it there; tests/instructions would show if it no longer did.

use std::pin::Pin;

/// The future that `make` makes, on the heap.
#[inline(always)]
pub fn pinned<F>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::into_pin(Box::write(Box::new_uninit(), make()))
}
