//! Work that may not take for ever, and one timer for all who wait on a thread.
//!
//! Nearly every wait of a gateway has a limit and nearly none reaches it. A timer of the reactor's own for each would cost
//! a wake-up of the reactor each; so the limits of a thread are kept in one list, and one timer stands at the first of them.
//! It is moved where a nearer one comes, and not where the first goes away.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use async_io::Timer;
use futures_lite::future;
use pin_project_lite::pin_project;

pin_project! {
    /// See [`within`]. No `async fn`: one of those holds what it is given twice, and here that would be in every connection.
    #[must_use = "nothing is done before it is polled"]
    pub struct Within<W> {
        #[pin]
        work: W,
        limit: Duration,
        late: Option<Sleep>,
    }
}

/// What `work` brings within `limit`; `None` if it takes longer, and then it is to be dropped.
pub fn within<W: Future>(limit: Duration, work: W) -> Within<W> {
    Within { work, limit, late: None }
}

impl<W: Future> Future for Within<W> {
    type Output = Option<W::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(done) = this.work.poll(cx) {
            return Poll::Ready(Some(done));
        }
        let late = match this.late {
            Some(late) => Pin::new(late).poll(cx),
            // Most work is done at once, and then there is no limit to keep.
            None => this.late.insert(after(*this.limit)).begin(cx),
        };
        late.map(|()| None)
    }
}

/// Waits so long, or for ever where that is beyond all time.
pub fn after(limit: Duration) -> Sleep {
    Sleep { at: Instant::now().checked_add(limit), wait: Wait::Unasked }
}

/// Waits until then.
pub fn until(at: Instant) -> Sleep {
    Sleep { at: Some(at), wait: Wait::Unasked }
}

/// Does `work`, and has one timer for all that waits by this file on this thread meanwhile.
pub async fn with_one_timer<T>(work: impl Future<Output = T>) -> T {
    let Some(in_force) = InForce::new() else { return work.await };
    future::or(work, in_force.0.tick()).await
}

/// A wait; see [`after`] and [`until`].
#[derive(Debug)]
#[must_use = "it waits only where it is polled"]
pub struct Sleep {
    at: Option<Instant>,
    wait: Wait,
}

#[derive(Debug)]
enum Wait {
    Unasked,
    Listed(Rc<Clock>, Key),
    /// Nobody keeps a list on this thread.
    Alone(Box<Timer>),
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(at) = self.at else { return Poll::Pending };
        match &mut self.wait {
            Wait::Listed(clock, key) if clock.still_waits(*key, cx.waker()) => {
                return Poll::Pending;
            }
            Wait::Alone(timer) => {
                if Pin::new(timer).poll(cx).is_pending() {
                    return Poll::Pending;
                }
            }
            Wait::Listed(..) | Wait::Unasked => {}
        }
        if at <= Instant::now() {
            self.wait = Wait::Unasked;
            return Poll::Ready(());
        }
        self.begin(cx)
    }
}

impl Sleep {
    /// The first poll of one that lies ahead, without another look at the clock.
    fn begin(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(at) = self.at else { return Poll::Pending };
        match CLOCK.with_borrow(Clone::clone) {
            Some(clock) => {
                let key = clock.list(at, cx.waker());
                self.wait = Wait::Listed(clock, key);
                Poll::Pending
            }
            None => {
                let mut timer = Box::new(Timer::at(at));
                let poll = Pin::new(&mut timer).poll(cx).map(|_| ());
                self.wait = Wait::Alone(timer);
                poll
            }
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        if let Wait::Listed(clock, key) = self {
            let waker = clock.waiting.borrow_mut().remove(key);
            drop(waker);
        }
    }
}

thread_local! {
    static CLOCK: RefCell<Option<Rc<Clock>>> = const { RefCell::new(None) };
}

/// When, and which of those at that instant.
type Key = (Instant, u64);

/// Who waits on a thread.
#[derive(Debug, Default)]
struct Clock {
    waiting: RefCell<BTreeMap<Key, Waker>>,
    next: Cell<u64>,
}

impl Clock {
    fn list(&self, at: Instant, waker: &Waker) -> Key {
        let key = (at, self.next.get());
        self.next.set(key.1 + 1);
        self.waiting.borrow_mut().insert(key, waker.clone());
        key
    }

    fn still_waits(&self, key: Key, waker: &Waker) -> bool {
        match self.waiting.borrow_mut().get_mut(&key) {
            Some(known) => {
                known.clone_from(waker);
                true
            }
            None => false,
        }
    }

    /// Wakes everybody in time, for ever. To be polled after whatever may have listed somebody.
    async fn tick<T>(&self) -> T {
        // And where it stands.
        let mut timer: Option<(Timer, Instant)> = None;
        poll_fn(|cx| {
            loop {
                self.wake_until(Instant::now());
                let first = self.first();
                if let Some(first) =
                    first.filter(|first| timer.as_ref().is_none_or(|(_, set_to)| first < set_to))
                {
                    timer = Some((Timer::at(first), first));
                }
                let rings =
                    timer.as_mut().is_some_and(|(timer, _)| Pin::new(timer).poll(cx).is_ready());
                if !rings {
                    return Poll::Pending;
                }
                timer = None;
            }
        })
        .await
    }

    fn first(&self) -> Option<Instant> {
        self.waiting.borrow().first_key_value().map(|((at, _), _)| *at)
    }

    fn wake_until(&self, now: Instant) {
        while self.first().is_some_and(|first| first <= now) {
            let woken = self.waiting.borrow_mut().pop_first();
            if let Some((_, waker)) = woken {
                waker.wake();
            }
        }
    }
}

/// The thread's own clock, until it is dropped.
struct InForce(Rc<Clock>);

impl InForce {
    /// None where there is one already.
    fn new() -> Option<InForce> {
        CLOCK.with_borrow_mut(|clock| match clock {
            None => Some(InForce(clock.insert(Rc::default()).clone())),
            Some(_) => None,
        })
    }
}

impl Drop for InForce {
    fn drop(&mut self) {
        CLOCK.take();
        // Whoever still waits finds another way.
        self.0.waiting.take().into_values().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(5);

    #[test]
    fn what_is_done_in_time_counts_and_nothing_else() {
        let limit = Duration::from_millis(1);
        let all = async || {
            assert_eq!(within(limit, future::ready(1)).await, Some(1));
            assert_eq!(within(limit, future::pending::<()>()).await, None);
            assert_eq!(within(Duration::MAX, future::ready(1)).await, Some(1));
            assert!(
                future::poll_once(within(Duration::MAX, future::pending::<()>())).await.is_none()
            );
        };
        smol::block_on(all());
        smol::block_on(with_one_timer(with_one_timer(all())));
    }

    #[test]
    fn everybody_is_woken_in_time_whoever_asked_first_and_nobody_before() {
        let start = Instant::now();
        let executor = smol::LocalExecutor::new();
        let waits: Vec<_> =
            [9, 3, 7, 1, 5, 3].into_iter().map(|ticks| start + TICK * ticks).collect();
        let tasks: Vec<_> = waits
            .iter()
            .map(|at| {
                let at = *at;
                executor.spawn(async move {
                    until(at).await;
                    Instant::now()
                })
            })
            .collect();
        let woken = smol::block_on(with_one_timer(executor.run(async {
            let mut woken = Vec::new();
            for task in tasks {
                woken.push(task.await);
            }
            woken
        })));
        assert!(woken.iter().zip(&waits).all(|(woken, at)| woken >= at), "{woken:?} {waits:?}");
        assert_eq!(woken.iter().max(), woken.first(), "the longest wait ends last");
    }

    #[test]
    fn who_gives_up_is_forgotten_and_a_nearer_limit_moves_the_timer() {
        smol::block_on(with_one_timer(async {
            let clock = CLOCK.with_borrow(Clone::clone).unwrap();
            let far = Duration::from_secs(3600);
            assert_eq!(within(far, future::yield_now()).await, Some(()));
            assert!(clock.waiting.borrow().is_empty(), "what was done in time waits no more");
            let mut long = after(far);
            assert!(future::poll_once(&mut long).await.is_none());
            assert_eq!(within(TICK, future::pending::<()>()).await, None);
            drop(long);
            assert!(clock.waiting.borrow().is_empty());
        }));
    }

    #[test]
    fn who_waits_longer_than_the_list_is_kept_is_woken_all_the_same() {
        let mut sleep = after(TICK);
        smol::block_on(with_one_timer(async {
            assert!(future::poll_once(&mut sleep).await.is_none());
        }));
        smol::block_on(sleep);
    }
}
