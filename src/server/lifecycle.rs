//! Going down in two phases that everybody can wait for: first draining, then aborting.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_channel::{Receiver, Sender};
use futures_lite::Stream;

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

    /// The same for who waits again and again.
    pub fn watch(&self) -> Watch {
        Watch(Box::pin(self.0.clone()))
    }
}

/// Waits until a phase begins, as often as it is asked. It stays listed between the waits: a connection is spared an allocation and
/// an entry in a list for each of its requests.
#[derive(Debug)]
pub struct Watch(Pin<Box<Receiver<Infallible>>>);

impl Future for Watch {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll_next(cx).map(|_ended| ())
    }
}

#[cfg(test)]
mod tests {
    use futures_lite::future::{block_on, poll_once};

    use super::*;

    #[test]
    fn whoever_watches_hears_of_a_phase_whenever_it_asks() {
        let (lifecycle, draining, aborting) = Lifecycle::new();
        let mut watches = [draining.watch(), draining.watch()];
        // Listed by one task, which asks no more; the other one never asked.
        assert!(block_on(poll_once(&mut watches[0])).is_none());
        lifecycle.drain();
        for watch in watches.iter_mut().chain([&mut draining.watch()]) {
            for _ in 0..2 {
                assert!(block_on(poll_once(&mut *watch)).is_some(), "as often as it asks");
            }
        }
        assert!(
            block_on(poll_once(&mut aborting.watch())).is_none(),
            "the other phase has not begun"
        );
    }

    #[test]
    fn who_waits_is_woken_by_whichever_task_asked_last() {
        let (lifecycle, draining, _) = Lifecycle::new();
        let mut watch = draining.watch();
        assert!(block_on(poll_once(&mut watch)).is_none());
        let waiting = std::thread::spawn(move || block_on(watch));
        lifecycle.drain();
        waiting.join().unwrap();
    }
}
