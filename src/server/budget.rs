//! Memory for request bodies, over all connections together.
//!
//! `max_connections` times `max_body_bytes` is far more than a small machine has; what may really be held at once is
//! `max_buffered_bytes`. A request that does not fit is refused, and what it held comes back when it ends.

use std::cell::Cell;
use std::rc::Rc;

/// What all bodies together may take.
#[derive(Debug)]
pub struct Budget {
    limit: Cell<u64>,
    used: Cell<u64>,
}

/// One request's part. Given back on drop.
#[derive(Debug)]
pub struct Reserved {
    budget: Rc<Budget>,
    bytes: u64,
}

impl Budget {
    /// Up to `limit` bytes.
    pub fn new(limit: u64) -> Rc<Budget> {
        Rc::new(Budget { limit: Cell::new(limit), used: Cell::new(0) })
    }

    /// From now on up to `limit` bytes; what is reserved stays reserved.
    pub fn set_limit(&self, limit: u64) {
        self.limit.set(limit);
    }

    /// Nothing yet, to grow with a body.
    pub fn reserve(self: &Rc<Self>) -> Reserved {
        Reserved { budget: self.clone(), bytes: 0 }
    }
}

impl Reserved {
    /// Makes this part `bytes` large, or says no and leaves it as it is. Never shrinks.
    #[must_use]
    pub fn grow_to(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        let used = self.budget.used.get().saturating_add(more);
        if used > self.budget.limit.get() {
            return false;
        }
        self.budget.used.set(used);
        self.bytes += more;
        true
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.budget.used.set(self.budget.used.get() - self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_gives_back_another_can_have() {
        let budget = Budget::new(10);
        let (mut one, mut other) = (budget.reserve(), budget.reserve());
        assert!(one.grow_to(6) && one.grow_to(4), "a smaller wish is granted already");
        assert!(!other.grow_to(5) && other.grow_to(4));
        drop(one);
        assert!(other.grow_to(10) && !other.grow_to(11));
        drop(other);
        assert_eq!(budget.used.get(), 0);
    }
}
