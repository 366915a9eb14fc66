//! Which sockets of a thread have something to read, or room again.
//!
//! async-io asks the kernel for one event of a socket at a time, a system call for each wait, and a look at what has come is five.
//! Here a socket is registered once, for as long as it lives, and the kernel tells what is new since it told last (EPOLLET of epoll(7)): a
//! wait costs no call and a look one. async-io watches all of these as one descriptor, so that the thread sleeps in one place.
//!
//! Who waits must have taken what there was: [`super::Socket`] sees to that. Knows nothing of reads and writes.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use async_io::Async;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::Timespec;

/// So many events one look brings at most.
const EVENTS_PER_LOOK: usize = 64;

/// So often sockets alone are looked at, while there is news of them; then async-io's reactor has its say: new callers, new
/// connections, signals. Its own thread asks it where nobody has for 50 us (`main_loop` of its `driver.rs`): then it is that thread that
/// ends our sleep, until we are the first again.
const LOOKS_PER_REACTOR: usize = 4;

const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// The other side has ended its half, or the connection is no more.
const END: EventFlags = EventFlags::RDHUP.union(EventFlags::HUP).union(EventFlags::ERR);

thread_local! {
    static POLLER: RefCell<Option<Arc<Poller>>> = const { RefCell::new(None) };
}

/// The sockets of one thread. Behind locks, which nobody ever waits for long: a TLS handshake computes on another thread.
#[derive(Debug)]
struct Poller {
    epoll: Async<OwnedFd>,
    /// By descriptor.
    registered: Mutex<Vec<Option<Arc<Mutex<State>>>>>,
}

/// What the kernel has told of one socket, and who waits to hear it.
#[derive(Debug, Default)]
struct State {
    /// Of input there is what there is, and the end or an error: no more news will come.
    ended: bool,
    asks_for_room: bool,
    input: Direction,
    room: Direction,
}

#[derive(Debug, Default)]
struct Direction {
    /// There is news that nobody has asked for yet.
    news: bool,
    waiting: Option<Waker>,
}

impl Direction {
    fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        if std::mem::take(&mut self.news) {
            return Poll::Ready(());
        }
        match &mut self.waiting {
            Some(waker) => waker.clone_from(cx.waker()),
            None => self.waiting = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    fn tell(&mut self) -> Option<Waker> {
        self.news = true;
        self.waiting.take()
    }
}

/// A socket's place among those of the thread that it was made on: that thread wakes whoever waits, on whichever one.
#[derive(Debug)]
pub(super) struct Registration {
    poller: Arc<Poller>,
    state: Arc<Mutex<State>>,
}

impl Registration {
    /// Registers a non-blocking socket, which is to be taken out again before it is closed.
    pub fn new(socket: BorrowedFd<'_>) -> io::Result<Registration> {
        let poller = Poller::of_this_thread()?;
        let state = Arc::default();
        epoll::add(&poller.epoll, socket, key(socket), EventFlags::IN | EventFlags::RDHUP | EventFlags::ET)?;
        // Events come out by this thread's hand only.
        poller.enter(socket, Some(Arc::clone(&state)));
        Ok(Registration { poller, state })
    }

    /// Waits until something has come since the last time.
    pub fn poll_readable(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = lock(&self.state);
        if state.ended { Poll::Ready(()) } else { state.input.poll(cx) }
    }

    /// Waits until there is room since the last time.
    pub fn poll_writable(&self, socket: BorrowedFd<'_>, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let mut state = lock(&self.state);
        if !state.asks_for_room {
            // Few sockets are ever full. To change what is asked for brings what is true by now.
            let events = EventFlags::IN | EventFlags::RDHUP | EventFlags::OUT | EventFlags::ET;
            epoll::modify(&self.poller.epoll, socket, key(socket), events)?;
            state.asks_for_room = true;
        }
        state.room.poll(cx).map(Ok)
    }

    /// Takes the socket out.
    pub fn end(&self, socket: BorrowedFd<'_>) {
        // It was put in by that number, and nobody can have taken it out.
        let _ = epoll::delete(&self.poller.epoll, socket);
        self.poller.enter(socket, None);
    }
}

fn key(socket: BorrowedFd<'_>) -> EventData {
    EventData::new_u64(index(socket) as u64)
}

fn index(socket: BorrowedFd<'_>) -> usize {
    usize::try_from(socket.as_raw_fd()).expect("no descriptor is negative")
}

impl Poller {
    fn of_this_thread() -> io::Result<Arc<Poller>> {
        POLLER.with_borrow_mut(|poller| match poller {
            Some(poller) => Ok(poller.clone()),
            None => {
                let epoll = Async::new_nonblocking(epoll::create(CreateFlags::CLOEXEC)?)?;
                Ok(poller.insert(Arc::new(Poller { epoll, registered: Mutex::default() })).clone())
            }
        })
    }

    fn enter(&self, socket: BorrowedFd<'_>, state: Option<Arc<Mutex<State>>>) {
        let (mut registered, index) = (lock(&self.registered), index(socket));
        if registered.len() <= index {
            registered.resize(index + 1, None);
        }
        registered[index] = state;
    }

    /// Wakes those who wait for what is new, and says of how many sockets there is news. `woken` is room that it uses.
    fn look(&self, woken: &mut Vec<Waker>) -> io::Result<usize> {
        let mut room = [const { MaybeUninit::<Event>::uninit() }; EVENTS_PER_LOOK];
        let events = match epoll::wait(&self.epoll, &mut room, Some(&NO_WAIT)) {
            Err(Errno::INTR) => return self.look(woken),
            waited => waited?.0,
        };
        let registered = lock(&self.registered);
        for event in &*events {
            // Copies: the kernel packs them.
            let (index, flags) = (event.data.u64() as usize, event.flags);
            // A socket may be gone by now. If another one has its number, that one looks in vain once.
            let Some(Some(state)) = registered.get(index) else { continue };
            let mut state = lock(state);
            state.ended |= flags.intersects(END);
            if flags.intersects(END.union(EventFlags::IN)) {
                woken.extend(state.input.tell());
            }
            if flags.intersects(END.union(EventFlags::OUT)) {
                woken.extend(state.room.tell());
            }
        }
        drop(registered);
        // Without the locks: nobody knows what a waker does.
        woken.drain(..).for_each(Waker::wake);
        Ok(events.len())
    }
}

/// Does `work`, and wakes those who wait for this thread's sockets meanwhile.
pub async fn with_watched_sockets<T>(work: impl Future<Output = T>) -> io::Result<T> {
    let poller = Poller::of_this_thread()?;
    let alarm = Arc::new(Alarm::default());
    let waker = Waker::from(alarm.clone());
    let mut work = pin!(work);
    let mut woken = Vec::new();
    // The reactor was asked to wake us for news.
    let mut asked = false;
    poll_fn(|cx| {
        alarm.is_answered_by(cx.waker());
        let mut told = std::mem::take(&mut asked) && poller.epoll.poll_readable(cx)?.is_ready();
        let mut alone = false;
        let mut looks = 0;
        loop {
            if alarm.has_rung()
                && let Poll::Ready(done) = work.as_mut().poll(&mut Context::from_waker(&waker))
            {
                return Poll::Ready(Ok(done));
            }
            // Seldom has more come while the one event was seen to that ended the sleep.
            let came = if alone { 0 } else { poller.look(&mut woken)? };
            alone = std::mem::take(&mut told) && came == 1;
            if came > 0 || alarm.rings() {
                looks += 1;
                if looks < LOOKS_PER_REACTOR {
                    continue;
                }
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            asked = poller.epoll.poll_readable(cx)?.is_pending();
            if asked && alarm.allows_sleep() {
                return Poll::Pending;
            }
        }
    })
    .await
}

/// Wakes a thread, but only while that sleeps: who is awake asks before it goes to sleep.
#[derive(Debug)]
struct Alarm {
    rings: AtomicBool,
    asleep: AtomicBool,
    sleeper: Mutex<Waker>,
}

impl Default for Alarm {
    /// It rings: there is something to begin with.
    fn default() -> Alarm {
        Alarm { rings: true.into(), asleep: false.into(), sleeper: Mutex::new(Waker::noop().clone()) }
    }
}

impl Alarm {
    fn is_answered_by(&self, sleeper: &Waker) {
        self.asleep.store(false, Ordering::SeqCst);
        lock(&self.sleeper).clone_from(sleeper);
    }

    fn rings(&self) -> bool {
        self.rings.load(Ordering::SeqCst)
    }

    /// Whether it rang; it is silent then.
    fn has_rung(&self) -> bool {
        self.rings.swap(false, Ordering::SeqCst)
    }

    /// The thread is about to sleep, which it may where the alarm does not ring already.
    fn allows_sleep(&self) -> bool {
        // In this order: whoever rings between the two wakes the thread.
        self.asleep.store(true, Ordering::SeqCst);
        let allowed = !self.rings();
        self.asleep.store(allowed, Ordering::SeqCst);
        allowed
    }
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.rings.swap(true, Ordering::SeqCst) && self.asleep.load(Ordering::SeqCst) {
            lock(&self.sleeper).wake_by_ref();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::AtomicUsize;
    use std::thread;
    use std::time::{Duration, Instant};

    use futures_lite::future;

    use super::*;
    use crate::socket::Socket;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    async fn byte(socket: &mut Socket<UnixStream>) -> u8 {
        // With room for another one: the next read then waits for news.
        let mut bytes = [0; 2];
        let read = poll_fn(|cx| socket.poll_read(cx, &mut bytes)).await;
        assert_eq!(read.unwrap(), 1);
        bytes[0]
    }

    #[test]
    fn the_thread_sleeps_and_is_woken_by_each_byte() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let echo = thread::spawn(move || {
            let mut byte = [0];
            while theirs.read(&mut byte).unwrap() == 1 {
                theirs.write_all(&byte).unwrap();
            }
        });
        let mut socket = Socket::new(ours).unwrap();
        let rounds = async {
            for round in 0..200 {
                socket.get_ref().write_all(&[round]).unwrap();
                assert_eq!(byte(&mut socket).await, round);
            }
        };
        smol::block_on(with_watched_sockets(rounds)).unwrap();
        drop(socket);
        echo.join().unwrap();
    }

    #[test]
    fn the_reactor_has_its_say_though_there_is_always_something_on_a_socket() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut ours, mut theirs) = (Socket::new(ours).unwrap(), Socket::new(theirs).unwrap());
        let far = Instant::now() + Duration::from_secs(20);
        let busy = async {
            while Instant::now() < far {
                ours.get_ref().write_all(b"x").unwrap();
                byte(&mut theirs).await;
                theirs.get_ref().write_all(b"x").unwrap();
                byte(&mut ours).await;
            }
        };
        let outside = Arc::new(Count::default());
        let waker = Waker::from(outside.clone());
        let mut watched = pin!(with_watched_sockets(busy));
        for round in 1..=3 {
            let poll = watched.as_mut().poll(&mut Context::from_waker(&waker));
            assert!(poll.is_pending(), "it went on until it was done");
            assert_eq!(outside.0.load(Ordering::SeqCst), round, "it wants to go on");
        }
    }

    #[test]
    fn work_that_is_woken_by_nobody_is_left_alone() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let socket = Socket::new(ours).unwrap();
        let polls = AtomicUsize::new(0);
        let work = poll_fn(|_| {
            polls.fetch_add(1, Ordering::SeqCst);
            Poll::<()>::Pending
        });
        let mut watched = pin!(with_watched_sockets(work));
        smol::block_on(async {
            assert!(future::poll_once(&mut watched).await.is_none());
            theirs.write_all(b"nobody waits for this").unwrap();
            assert!(future::poll_once(&mut watched).await.is_none());
        });
        assert_eq!(polls.load(Ordering::SeqCst), 1);
        drop(socket);
    }

    #[test]
    fn a_socket_that_is_gone_holds_no_place() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        // The same connection under another number: its close would not take the first one out.
        let other = ours.try_clone().unwrap();
        let socket = Socket::new(ours).unwrap();
        let place = index(socket.as_fd());
        let poller = Poller::of_this_thread().unwrap();
        assert!(lock(&poller.registered)[place].is_some());
        drop(socket);
        assert!(lock(&poller.registered)[place].is_none());
        drop(other);
    }
}
