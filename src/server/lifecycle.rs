//! Going down in two phases that everybody can wait for: first draining, then aborting.

use std::convert::Infallible;

use async_channel::{Receiver, Sender};

/// Starts the phases; a phase begins when its sender is closed.
pub struct Lifecycle {
    drain: Sender<Infallible>,
    abort: Sender<Infallible>,
}

/// A phase that begins once and never ends.
#[derive(Debug, Clone)]
pub struct Phase(Receiver<Infallible>);

impl Lifecycle {
    /// The switch, the draining phase, the aborting phase.
    pub fn new() -> (Lifecycle, Phase, Phase) {
        let (drain, draining) = async_channel::bounded(1);
        let (abort, aborting) = async_channel::bounded(1);
        (Lifecycle { drain, abort }, Phase(draining), Phase(aborting))
    }

    /// From now on no new request is taken.
    pub fn drain(&self) {
        self.drain.close();
    }

    /// From now on running requests are cut off.
    pub fn abort(&self) {
        self.abort.close();
    }
}

impl Phase {
    /// Whether it has begun.
    pub fn has_begun(&self) -> bool {
        self.0.is_closed()
    }

    /// Waits until it begins.
    pub async fn begins(&self) {
        let _ = self.0.recv().await;
    }
}
