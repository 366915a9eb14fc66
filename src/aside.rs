//! Work that computes for milliseconds, on threads of its own: what runs here holds up no relay and no send.
//!
//! Each thread begins with the first such work. It waits without the reactor, which is the serving thread's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use futures_lite::future;
use smol::Executor;

/// Computes TLS handshakes: each takes about a millisecond.
static HANDSHAKES: Aside = Aside::new("limitrate-aside");

/// Parses large bodies: one takes up to 10 ms per MiB, and handshakes must not wait for that. A single
/// thread, so that many such bodies leave the other processors to the serving thread.
pub static BODIES: Aside = Aside::new("limitrate-bodies");

/// Does a part of a TLS handshake there, like [`Aside::run`].
pub async fn aside<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    HANDSHAKES.run(work).await
}

/// A thread for such work, one piece after the other.
pub struct Aside {
    name: &'static str,
    executor: Executor<'static>,
    is_running: AtomicBool,
}

impl Aside {
    const fn new(name: &'static str) -> Aside {
        Aside { name, executor: Executor::new(), is_running: AtomicBool::new(false) }
    }

    /// Does `work` there; here, where the system gives no thread. Dropping the future gives the work up; a
    /// panic of the work is one of whoever awaits it.
    pub async fn run<T: Send + 'static>(
        &'static self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> T {
        if self.is_running() { self.executor.spawn(work).await } else { work.await }
    }

    fn is_running(&'static self) -> bool {
        if !self.is_running.swap(true, Ordering::Relaxed) {
            let run = || future::block_on(self.executor.run(future::pending::<()>()));
            let begun = thread::Builder::new().name(self.name.into()).spawn(run);
            self.is_running.store(begun.is_ok(), Ordering::Relaxed);
        }
        self.is_running.load(Ordering::Relaxed)
    }
}

/// From here on the pages of a buffer are so many that to give them back takes half a millisecond.
const MANY_BYTES: usize = 4 * 1024 * 1024;

/// Bytes that may be many: another thread gives their pages back then.
#[derive(Debug, Default)]
pub struct Buffer(pub Vec<u8>);

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.0.capacity() >= MANY_BYTES {
            let bytes = std::mem::take(&mut self.0);
            smol::unblock(move || drop(bytes)).detach();
        }
    }
}

impl Buffer {
    /// Makes room for so many bytes more. To move many takes the allocator 1 ms per MiB, on another thread.
    pub async fn reserve(&mut self, more: usize) {
        if self.0.len() < MANY_BYTES / 4 {
            return self.0.reserve_exact(more);
        }
        let mut bytes = std::mem::take(&mut self.0);
        let moved = smol::unblock(move || {
            bytes.reserve_exact(more);
            bytes
        });
        self.0 = moved.await;
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn a_panic_is_who_awaits_its_business_and_others_are_served_on() {
        let here = thread::current().id();
        let failing = HANDSHAKES.run(async { panic!("on purpose") });
        assert!(catch_unwind(AssertUnwindSafe(|| future::block_on::<()>(failing))).is_err());
        let there =
            |aside: &'static Aside| future::block_on(aside.run(async { thread::current().id() }));
        assert_ne!(there(&HANDSHAKES), here);
        assert!(![here, there(&HANDSHAKES)].contains(&there(&BODIES)), "each has its own thread");
    }
}
