//! Memory for request bodies, over all connections together and for each client.
//!
//! `max_connections` times `max_body_bytes` is far more than a small machine has; what may really be held at once is
//! `max_buffered_bytes`, and `max_buffered_bytes_per_client` of it by one client. A request that does not fit is refused,
//! and what it held comes back when it ends.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use crate::config;

/// How many bytes may be held.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// In all.
    pub all: u64,
    /// By one client.
    pub each: u64,
}

/// Those of a configuration.
pub fn limits(config: &config::Server) -> Limits {
    Limits { all: config.max_buffered_bytes, each: config.max_buffered_bytes_per_client }
}

/// What is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// What all may hold together.
    All,
    /// One client's share.
    Share,
}

/// What all bodies together may take.
#[derive(Debug)]
pub struct Budget {
    limits: Cell<Limits>,
    used: Cell<u64>,
    /// By clients that hold some.
    clients: RefCell<HashMap<Rc<str>, u64>>,
}

/// One request's part. Given back on drop.
#[derive(Debug)]
pub struct Reserved {
    budget: Rc<Budget>,
    client: Rc<str>,
    bytes: u64,
}

impl Budget {
    /// Up to these limits.
    pub fn new(limits: Limits) -> Rc<Budget> {
        Rc::new(Budget {
            limits: Cell::new(limits),
            used: Cell::new(0),
            clients: RefCell::default(),
        })
    }

    /// From now on up to these; what is reserved stays reserved.
    pub fn set_limits(&self, limits: Limits) {
        self.limits.set(limits);
    }

    /// Nothing yet for a client, to grow with a body.
    pub fn reserve(self: &Rc<Self>, client: &Rc<str>) -> Reserved {
        Reserved { budget: self.clone(), client: client.clone(), bytes: 0 }
    }
}

impl Reserved {
    /// Makes this part `bytes` large, or says what is full and leaves it as it is. Never shrinks.
    pub fn grow_to(&mut self, bytes: u64) -> Result<(), Full> {
        let more = bytes.saturating_sub(self.bytes);
        if more == 0 {
            return Ok(());
        }
        let Budget { limits, used, clients } = &*self.budget;
        let mut clients = clients.borrow_mut();
        let own = clients.get(&self.client).copied().unwrap_or_default().saturating_add(more);
        let all = used.get().saturating_add(more);
        if all > limits.get().all {
            return Err(Full::All);
        }
        if own > limits.get().each {
            return Err(Full::Share);
        }
        used.set(all);
        clients.insert(self.client.clone(), own);
        self.bytes += more;
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let Budget { used, clients, .. } = &*self.budget;
        used.set(used.get() - self.bytes);
        let mut clients = clients.borrow_mut();
        match clients.get_mut(&self.client) {
            Some(own) if *own > self.bytes => *own -= self.bytes,
            _ => drop(clients.remove(&self.client)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_gives_back_another_can_have() {
        let budget = Budget::new(Limits { all: 10, each: 10 });
        let [mut one, mut other] = ["a", "b"].map(|client| budget.reserve(&client.into()));
        assert_eq!(
            (one.grow_to(6), one.grow_to(4)),
            (Ok(()), Ok(())),
            "the smaller one is granted"
        );
        assert_eq!((other.grow_to(5), other.grow_to(4)), (Err(Full::All), Ok(())));
        drop(one);
        assert_eq!((other.grow_to(10), other.grow_to(11)), (Ok(()), Err(Full::All)));
        drop(other);
        assert_eq!((budget.used.get(), budget.clients.borrow().len()), (0, 0));
    }

    #[test]
    fn a_client_has_its_share_over_all_its_requests() {
        let budget = Budget::new(Limits { all: 10, each: 6 });
        let [mut one, mut two, mut other] =
            ["a", "a", "b"].map(|client| budget.reserve(&client.into()));
        assert_eq!((one.grow_to(4), two.grow_to(3)), (Ok(()), Err(Full::Share)));
        assert_eq!((two.grow_to(2), other.grow_to(3)), (Ok(()), Ok(())));
        drop(one);
        assert_eq!((two.grow_to(6), two.grow_to(7)), (Ok(()), Err(Full::Share)));
        drop((two, other));
        assert_eq!((budget.used.get(), budget.clients.borrow().len()), (0, 0));
    }
}
