//! Whose turn it is on the thread: providers' schedulers come before everything else, and clock and sockets are looked at often
//! enough for them.
//!
//! A `LocalExecutor` on its own runs its tasks in the order in which they were woken, and up to 200 of them before it lets
//! anybody look. With one provider loaded by many connections, the slot of another one would open late by
//! all that is ready at that moment, twice: when its time has come, and when its scheduler runs. Knows nothing of what the
//! tasks do.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use futures_lite::future;
use smol::LocalExecutor;

/// So many other tasks run at most before an urgent one: the more messages a scheduler finds at once, the less each costs.
const TASKS_BETWEEN_URGENT: usize = 8;

/// So often urgent tasks have their turn at most before those outside are let in who look which waits are over
/// (`deadline::with_one_timer`) and what has come (`socket::with_watched_sockets`): a reading of the clock and a system call.
const TURNS_BETWEEN_LOOKS: usize = 2;

/// The tasks of one thread.
#[derive(Debug, Default)]
pub(super) struct Turns {
    urgent: LocalExecutor<'static>,
    others: LocalExecutor<'static>,
}

impl Turns {
    /// Runs a task behind those that are ready before it.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.others.spawn(task).detach();
    }

    /// Runs a task before nearly all that are not urgent, whenever it is ready. For tasks that do little and wait for others.
    pub fn spawn_urgent(&self, task: impl Future<Output = ()> + 'static) {
        self.urgent.spawn(task).detach();
    }

    /// Does `work` and runs all tasks meanwhile.
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> T {
        let tasks = async {
            let mut turns = 0;
            loop {
                while self.urgent.try_tick() {}
                let others =
                    (0..TASKS_BETWEEN_URGENT).take_while(|_| self.others.try_tick()).count();
                turns += 1;
                if others == 0 {
                    self.something_to_do().await;
                } else if turns >= TURNS_BETWEEN_LOOKS {
                    future::yield_now().await;
                } else {
                    continue;
                }
                turns = 0;
            }
        };
        future::or(work, tasks).await
    }

    /// Waits until a task is ready, or may be.
    ///
    /// Runs none that woke it: while one executor waits beside the other in here, a task of this one that wakes one of
    /// that one would wake the thread as well, which would look in vain before the next wait.
    async fn something_to_do(&self) {
        let mut ticks = pin!(future::or(self.urgent.tick(), self.others.tick()));
        let mut is_asleep = false;
        poll_fn(|cx| {
            if is_asleep {
                return Poll::Ready(());
            }
            is_asleep = true;
            ticks.as_mut().poll(cx)
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;
    use std::time::Duration;

    use async_io::Timer;

    use super::*;

    #[test]
    fn who_is_urgent_goes_before_most_who_are_ready() {
        const TASKS: usize = 3 * TASKS_BETWEEN_URGENT;
        let turns = Turns::default();
        let order = Rc::new(RefCell::new(Vec::new()));
        let (wake, woken) = async_channel::unbounded();
        let told = order.clone();
        turns.spawn_urgent(async move {
            while let Ok(number) = woken.recv().await {
                told.borrow_mut().push(TASKS + number);
            }
        });
        for number in 0..TASKS {
            let (told, wake) = (order.clone(), wake.clone());
            turns.spawn(async move {
                told.borrow_mut().push(number);
                wake.try_send(number).unwrap();
            });
        }
        smol::block_on(turns.run(async {
            while order.borrow().len() < 2 * TASKS {
                future::yield_now().await;
            }
        }));
        let mut want = Vec::new();
        for first in (0..TASKS).step_by(TASKS_BETWEEN_URGENT) {
            let some = first..first + TASKS_BETWEEN_URGENT;
            want.extend(some.clone().chain(some.map(|number| TASKS + number)));
        }
        assert_eq!(*order.borrow(), want);
    }

    #[test]
    fn others_may_look_although_there_is_always_something_to_do() {
        let turns = Turns::default();
        let ran = Rc::new(Cell::new(0));
        for _ in 0..100 {
            let ran = ran.clone();
            turns.spawn(async move {
                loop {
                    ran.set(ran.get() + 1);
                    future::yield_now().await;
                }
            });
        }
        // Every look polls the work anew.
        let (mut before, mut most) = (0, 0);
        let looks = future::poll_fn(|cx| {
            most = most.max(ran.get() - before);
            before = ran.get();
            cx.waker().wake_by_ref();
            std::task::Poll::<()>::Pending
        });
        let timer = async {
            Timer::after(Duration::from_millis(5)).await;
        };
        smol::block_on(turns.run(future::or(timer, looks)));
        assert_eq!(most, TURNS_BETWEEN_LOOKS * TASKS_BETWEEN_URGENT);
    }
}
