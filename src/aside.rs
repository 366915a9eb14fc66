//! Work that computes for milliseconds, on a thread of its own: what runs here holds up no relay and no send.
//!
//! One thread, which begins with the first such work. It waits without the reactor, which is the serving thread's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use futures_lite::future;
use smol::Executor;

static EXECUTOR: Executor<'static> = Executor::new();
static IS_RUNNING: AtomicBool = AtomicBool::new(false);

/// Does `work` there; here, where the system gives no second thread. Dropping the future gives the work up; a panic of the work is one
/// of whoever awaits it.
pub async fn aside<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    if is_running() { EXECUTOR.spawn(work).await } else { work.await }
}

fn is_running() -> bool {
    if !IS_RUNNING.swap(true, Ordering::Relaxed) {
        let run = || future::block_on(EXECUTOR.run(future::pending::<()>()));
        let begun = thread::Builder::new().name("limitrate-aside".into()).spawn(run);
        IS_RUNNING.store(begun.is_ok(), Ordering::Relaxed);
    }
    IS_RUNNING.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn a_panic_is_who_awaits_its_business_and_others_are_served_on() {
        let here = thread::current().id();
        let failing = aside(async { panic!("on purpose") });
        assert!(catch_unwind(AssertUnwindSafe(|| future::block_on::<()>(failing))).is_err());
        assert_ne!(future::block_on(aside(async { thread::current().id() })), here);
    }
}
