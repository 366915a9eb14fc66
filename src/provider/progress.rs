//! How far a request is before its answer begins, for those who wait for it.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use super::Provider;
use crate::shaping::scheduler::Ticket;

/// Written on the way, read by whoever keeps the caller company.
#[derive(Default)]
pub struct Progress(RefCell<Stage>);

#[derive(Default)]
enum Stage {
    #[default]
    Arrived,
    Queued(Rc<Provider>, Ticket),
    Pausing,
    Sent,
}

/// Where a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// In line.
    Queued {
        /// Place, from 1.
        position: usize,
        /// Until its slot, at the least.
        eta: Duration,
    },
    /// Between two attempts, or between two lines.
    Pausing,
    /// At the provider, which has not answered yet.
    Sent,
}

impl Progress {
    /// Where it is now.
    pub async fn whereabouts(&self) -> Whereabouts {
        let (provider, ticket) = match &*self.0.borrow() {
            Stage::Queued(provider, ticket) => (provider.clone(), *ticket),
            Stage::Sent => return Whereabouts::Sent,
            Stage::Arrived | Stage::Pausing => return Whereabouts::Pausing,
        };
        match provider.scheduler.whereabouts(ticket).await {
            Some((position, eta)) => Whereabouts::Queued { position, eta },
            // Its slot is open, and the next look will tell.
            None => Whereabouts::Pausing,
        }
    }

    pub(super) fn queued(&self, provider: &Rc<Provider>, ticket: Ticket) {
        self.0.replace(Stage::Queued(provider.clone(), ticket));
    }

    /// In the same line by another ticket.
    pub(super) fn queued_as(&self, ticket: Ticket) {
        if let Stage::Queued(_, current) = &mut *self.0.borrow_mut() {
            *current = ticket;
        }
    }

    pub(super) fn pausing(&self) {
        self.0.replace(Stage::Pausing);
    }

    pub(super) fn sent(&self) {
        self.0.replace(Stage::Sent);
    }
}
