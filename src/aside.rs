//! Work that computes for milliseconds, on a thread of its own: what runs here holds up no relay and no send.
//!
//! One thread, which begins with the first such work. It waits without the reactor, which is the serving thread's.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::thread;

use futures_lite::future;
use smol::{Executor, Task};

static EXECUTOR: Executor<'static> = Executor::new();
static THREAD: Once = Once::new();

/// Does `work` there. Dropping the task gives it up; what it panics with, who awaits it panics with.
pub fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Task<T> {
    THREAD.call_once(|| {
        let thread = thread::Builder::new().name("limitrate-aside".into()).spawn(run);
        thread.expect("the system has room for a second thread");
    });
    EXECUTOR.spawn(work)
}

fn run() {
    loop {
        let for_ever = || future::block_on(EXECUTOR.run(future::pending::<()>()));
        // Other work goes on after a panic.
        let _ = catch_unwind(AssertUnwindSafe(for_ever));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_who_awaits_its_business_and_others_are_served_on() {
        let here = thread::current().id();
        let failing = spawn(async { panic!("on purpose") });
        assert!(catch_unwind(AssertUnwindSafe(|| future::block_on::<()>(failing))).is_err());
        assert_ne!(future::block_on(spawn(async { thread::current().id() })), here);
    }
}
