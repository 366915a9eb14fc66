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
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use async_io::Async;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::Timespec;

/// So many events one look brings at most: what is not among them, nobody knows of until the next.
const EVENTS_PER_LOOK: usize = 256;

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

/// The sockets of one thread. Behind locks for the sake of TLS handshakes, which wait on another thread.
#[derive(Debug)]
struct Poller {
    epoll: Async<OwnedFd>,
    /// By descriptor.
    registered: Mutex<Vec<Option<Arc<State>>>>,
    /// Somebody looks.
    watched: AtomicBool,
}

/// What the kernel has told of one socket, and who waits to hear it.
#[derive(Debug, Default)]
struct State {
    ended: AtomicBool,
    asks_for_room: AtomicBool,
    input: Mutex<Direction>,
    room: Mutex<Direction>,
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

    /// There is news, for whom this returns.
    fn tell(&mut self) -> Option<Waker> {
        self.news = true;
        self.waiting.take()
    }
}

/// A socket that is registered with the poller of the thread that it was made on: that thread wakes who waits, on whichever one. In
/// each direction that is the one who asked last.
#[derive(Debug)]
pub(super) struct Registered<T: AsFd> {
    io: T,
    poller: Arc<Poller>,
    state: Arc<State>,
}

impl<T: AsFd> Registered<T> {
    /// `io` is non-blocking.
    pub fn new(io: T) -> io::Result<Registered<T>> {
        let poller = Poller::of_this_thread()?;
        let (socket, state) = (io.as_fd(), Arc::default());
        epoll::add(
            &poller.epoll,
            socket,
            key(socket),
            EventFlags::IN | EventFlags::RDHUP | EventFlags::ET,
        )?;
        // In time: no other thread looks.
        poller.set(socket, Some(Arc::clone(&state)));
        Ok(Registered { io, poller, state })
    }

    /// The socket itself.
    pub fn get_ref(&self) -> &T {
        &self.io
    }

    /// Waits until something has come since the last time.
    pub fn poll_readable(&self, cx: &Context<'_>) -> Poll<()> {
        lock(&self.state.input).poll(cx)
    }

    /// Whether the end has come, or an error: behind the last bytes, and no news is to follow.
    pub fn has_ended(&self) -> bool {
        self.state.ended.load(Ordering::Relaxed)
    }

    /// Waits until there is room since the last time.
    pub fn poll_writable(&self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        if !self.state.asks_for_room.swap(true, Ordering::Relaxed) {
            // Few sockets are ever full. To change what is asked for brings what is true by now.
            let events = EventFlags::IN | EventFlags::RDHUP | EventFlags::OUT | EventFlags::ET;
            epoll::modify(&self.poller.epoll, &self.io, key(self.io.as_fd()), events)?;
        }
        lock(&self.state.room).poll(cx).map(Ok)
    }
}

impl<T: AsFd> Drop for Registered<T> {
    /// Before the socket is closed: its number is another one's then.
    fn drop(&mut self) {
        // It was put in by that number, and nobody can have taken it out.
        let _ = epoll::delete(&self.poller.epoll, &self.io);
        self.poller.set(self.io.as_fd(), None);
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
                let new =
                    Poller { epoll, registered: Mutex::default(), watched: AtomicBool::default() };
                Ok(poller.insert(Arc::new(new)).clone())
            }
        })
    }

    fn set(&self, socket: BorrowedFd<'_>, state: Option<Arc<State>>) {
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
            // Another thread may have taken it out meanwhile; its number is not another one's before this thread goes on.
            let Some(Some(state)) = registered.get(index) else { continue };
            if flags.intersects(END) {
                state.ended.store(true, Ordering::Relaxed);
            }
            if flags.intersects(END.union(EventFlags::IN)) {
                woken.extend(lock(&state.input).tell());
            }
            if flags.intersects(END.union(EventFlags::OUT)) {
                woken.extend(lock(&state.room).tell());
            }
        }
        drop(registered);
        // Without the locks: nobody knows what a waker does.
        woken.drain(..).for_each(Waker::wake);
        Ok(events.len())
    }
}

/// Does `work`, and wakes those who wait for this thread's sockets meanwhile. An error says that this is done already, or that the
/// kernel has no room for it.
pub async fn with_watched_sockets<T>(work: impl Future<Output = T>) -> io::Result<T> {
    let watching = Watching::begin()?;
    let poller = &watching.0;
    let alarm = Arc::new(Alarm::default());
    let waker = Waker::from(alarm.clone());
    let mut work = pin!(work);
    let mut woken = Vec::new();
    // The reactor was asked to end the sleep when there is news.
    let mut asked = false;
    poll_fn(|cx| {
        alarm.is_off(cx.waker());
        let mut quiet = false;
        if std::mem::take(&mut asked) {
            // Whatever ended the sleep, the news comes first: a connection that was closed meanwhile is not to be used.
            quiet = poller.look(&mut woken)? <= 1;
            // So that the reactor's own word for it is not taken for more.
            let _ = poller.epoll.poll_readable(cx)?;
        }
        let mut looks = 0;
        loop {
            if alarm.has_rung()
                && let Poll::Ready(done) = work.as_mut().poll(&mut Context::from_waker(&waker))
            {
                return Poll::Ready(Ok(done));
            }
            // Seldom has more come while a single event was seen to, and then the reactor says so.
            let sleeps = std::mem::take(&mut quiet) && !alarm.rings();
            if !sleeps && poller.look(&mut woken)? > 0 || alarm.rings() {
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

/// That a thread looks at its sockets.
struct Watching(Arc<Poller>);

impl Watching {
    fn begin() -> io::Result<Watching> {
        let poller = Poller::of_this_thread()?;
        // The reactor wakes but one who waits for the epoll.
        if poller.watched.swap(true, Ordering::Relaxed) {
            return Err(io::Error::other(
                "the sockets of this thread are watched already: one server to a thread",
            ));
        }
        Ok(Watching(poller))
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.watched.store(false, Ordering::Relaxed);
    }
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
        Alarm {
            rings: true.into(),
            asleep: false.into(),
            sleeper: Mutex::new(Waker::noop().clone()),
        }
    }
}

impl Alarm {
    /// The thread is awake, and to be woken so once it sleeps.
    fn is_off(&self, sleeper: &Waker) {
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
    use std::cell::Cell;
    use std::io::{Read, Write};
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
        let mut polls = 0;
        let mut watched = Box::pin(with_watched_sockets(rounds));
        let counted = poll_fn(|cx| {
            polls += 1;
            watched.as_mut().poll(cx)
        });
        smol::block_on(counted).unwrap();
        assert!(polls <= 200 * 5, "it did not sleep: {polls}");
        drop(watched);
        drop(socket);
        echo.join().unwrap();
    }

    #[test]
    fn who_rings_as_the_thread_falls_asleep_is_heard() {
        let (there, asked) = async_channel::bounded(1);
        let (back, answered) = async_channel::bounded(1);
        let other = thread::spawn(move || {
            while let Ok(number) = asked.recv_blocking() {
                back.send_blocking(number).unwrap();
            }
        });
        let rounds = async move {
            for round in 0..5_000 {
                there.send(round).await.unwrap();
                assert_eq!(answered.recv().await, Ok(round));
            }
        };
        smol::block_on(with_watched_sockets(rounds)).unwrap();
        other.join().unwrap();
    }

    #[test]
    fn what_ended_the_sleep_is_known_before_anything_is_done() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut socket = Socket::new(ours).unwrap();
        let known = Cell::new(None);
        let inside = RefCell::new(Waker::noop().clone());
        let work = poll_fn(|cx| {
            inside.replace(cx.waker().clone());
            let read = socket.poll_read(&mut Context::from_waker(Waker::noop()), &mut [0; 8]);
            known.set(Some(read.is_ready()));
            Poll::<()>::Pending
        });
        let outside = Arc::new(Count::default());
        let waker = Waker::from(outside.clone());
        let cx = &mut Context::from_waker(&waker);
        let mut watched = pin!(with_watched_sockets(work));
        assert!(watched.as_mut().poll(cx).is_pending());
        assert_eq!(known.take(), Some(false));
        theirs.write_all(b"x").unwrap();
        // Until the reactor knows. It was asked to.
        smol::block_on(async {
            while outside.0.load(Ordering::SeqCst) == 0 {
                future::yield_now().await;
            }
        });
        inside.borrow().wake_by_ref();
        assert!(watched.as_mut().poll(cx).is_pending());
        assert_eq!(known.take(), Some(true));
    }

    #[test]
    fn a_thread_has_one_who_watches_its_sockets() {
        let twice = with_watched_sockets(with_watched_sockets(future::ready(())));
        assert!(smol::block_on(twice).unwrap().is_err());
        smol::block_on(with_watched_sockets(future::ready(()))).unwrap();
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
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // The same connection under another number: with that open, the close of the first one does not take it out.
        let other = ours.try_clone().unwrap();
        let socket = Socket::new(ours).unwrap();
        let place = index(socket.as_fd());
        let poller = Poller::of_this_thread().unwrap();
        assert!(lock(&poller.registered)[place].is_some());
        drop(socket);
        assert!(lock(&poller.registered)[place].is_none());
        theirs.write_all(b"x").unwrap();
        assert_eq!(poller.look(&mut Vec::new()).unwrap(), 0);
        drop(other);
    }
}
