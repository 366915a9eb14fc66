//! The providers: they read requests strictly, note when each came, and answer with the manners of their [`Spec`].

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::socket::{setsockopt, sockopt::ReceiveTimestampns};
use smol::{Async, LocalExecutor};

use crate::ask::{Ask, Limit, Manners, Spec};
use crate::pace;
use crate::pause;
use crate::tally::Tally;
use crate::wire::{Framing, Wire};

/// What [`Manners::Strict`] asks for in its 429s.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How soon after a 429 the gateway has to hold still.
const REACTION: Duration = Duration::from_millis(500);

/// A provider and what it has seen.
pub struct Desk {
    pub spec: &'static Spec,
    pub addr: SocketAddr,
    tally: Rc<Tally>,
    rng: RefCell<fastrand::Rng>,
    /// Kernel time of each request head, and its model.
    arrivals: RefCell<Vec<(u64, usize)>>,
    /// Requests besides, whose time is not known because the gateway had hung up when they were read.
    undated: Cell<u64>,
    /// By request id: how often it was read whole, and how often it was answered with 429.
    seen: RefCell<HashMap<u64, (u32, u32)>>,
    /// From and to, in nanoseconds since the epoch.
    /// From when the first refusal of each was out, to its end.
    pauses: RefCell<Vec<(u64, u64)>>,
    /// The end of a pause of which no refusal is out yet.
    begun_pause: Cell<Option<u64>>,
    paused_until: Cell<Option<Instant>>,
    next_pause: Cell<Instant>,
    acts: RefCell<BTreeMap<&'static str, u64>>,
    open: Cell<usize>,
}

/// What is done with one request.
enum Act {
    Answer(Shape),
    Refuse,
    Fail,
    Break(Fault),
}

/// How a whole answer goes out.
struct Shape {
    delimited: Delimited,
    think: Duration,
    between: Duration,
    /// 103 Early Hints first.
    interim: bool,
    /// Close afterwards, and whether the answer says so.
    close: Option<bool>,
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    CloseBefore,
    ResetBefore,
    StallBefore,
    NotHttp,
    CloseInside,
    ResetInside,
    StallInside,
    MoreThanPromised,
}

const FAULTS: [Fault; 8] = [
    Fault::CloseBefore,
    Fault::ResetBefore,
    Fault::StallBefore,
    Fault::NotHttp,
    Fault::CloseInside,
    Fault::ResetInside,
    Fault::StallInside,
    Fault::MoreThanPromised,
];

/// How the end of an answer is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delimited {
    Length,
    Chunks,
    Close,
}

impl Desk {
    /// Listens on a port of its own and serves from now on.
    pub fn open(
        spec: &'static Spec,
        seed: u64,
        tally: &Rc<Tally>,
        executor: &Rc<LocalExecutor<'static>>,
    ) -> Rc<Desk> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
        // Before the first connection, which inherits it: data may come before `accept` does.
        setsockopt(&listener, ReceiveTimestampns, &true).expect("set SO_TIMESTAMPNS");
        let desk = Rc::new(Desk {
            spec,
            addr: listener.local_addr().expect("a bound listener has an address"),
            tally: tally.clone(),
            rng: RefCell::new(fastrand::Rng::with_seed(seed)),
            arrivals: RefCell::default(),
            undated: Cell::new(0),
            seen: RefCell::default(),
            pauses: RefCell::default(),
            begun_pause: Cell::default(),
            paused_until: Cell::new(None),
            next_pause: Cell::new(Instant::now() + RETRY_AFTER),
            acts: RefCell::default(),
            open: Cell::new(0),
        });
        let listener = Async::new(listener).expect("watch a listener");
        let (serving, spawner) = (desk.clone(), executor.clone());
        let accept = async move {
            while let Ok((stream, _)) = listener.accept().await {
                let desk = serving.clone();
                spawner.spawn(async move { desk.serve(Wire::new(stream)).await }).detach();
            }
        };
        executor.spawn(accept).detach();
        desk
    }

    /// Connections of the gateway.
    pub fn open_connections(&self) -> usize {
        self.open.get()
    }

    /// How often a request was read whole, less how often it was refused and had to come again. Forgets it.
    pub fn deliveries(&self, id: u64) -> u32 {
        self.seen.borrow_mut().remove(&id).map_or(0, |(read, refused)| read - refused)
    }

    /// Whether every answer has to be whole.
    pub fn is_reliable(&self) -> bool {
        self.spec.manners != Manners::Broken
    }

    /// Checks the provider's limit, its models', and its pauses.
    pub fn check_pace(&self) {
        let mut arrivals = self.arrivals.borrow_mut();
        arrivals.sort_unstable();
        let times: Vec<u64> = arrivals.iter().map(|&(at, _)| at).collect();
        let tolerance = if self.spec.name == "uploads" { pace::LATE } else { pace::EXACT };
        let mut results = vec![match self.spec.limit {
            Limit::Bucket { interval, capacity } => {
                pace::bucket(&times, interval, capacity, tolerance)
            }
            Limit::Window { rpm } => pace::window(&times, rpm, Duration::from_secs(60)),
        }];
        for (n, model) in self.spec.models.iter().enumerate() {
            let Some(interval) = model.interval else { continue };
            let times: Vec<u64> =
                arrivals.iter().filter(|&&(_, model)| model == n).map(|&(at, _)| at).collect();
            results.push(pace::bucket(&times, interval, 1, tolerance));
        }
        results.push(pace::pauses(&times, &self.pauses.borrow(), REACTION));
        for fault in results.into_iter().filter_map(Result::err) {
            self.tally.fail(self.spec.name, fault);
        }
    }

    /// For the table at the end.
    pub fn report(&self) -> String {
        let arrivals = self.arrivals.borrow();
        let times: Vec<u64> = arrivals.iter().map(|&(at, _)| at).collect();
        let gap = pace::smallest_gap(&times).map_or("-".to_owned(), |gap| format!("{gap:.3} ms"));
        let acts: Vec<_> = self.acts.borrow().iter().map(|(act, n)| format!("{act} {n}")).collect();
        format!(
            "{:<10} {:>6} sends, smallest gap {gap:>11}, {} undated: {}",
            self.spec.name,
            times.len(),
            self.undated.get(),
            acts.join(", ")
        )
    }

    async fn serve(self: Rc<Self>, mut wire: Wire) {
        self.open.set(self.open.get() + 1);
        while self.one_request(&mut wire).await {}
        self.open.set(self.open.get() - 1);
    }

    /// Says whether the connection goes on. A send that fails means that the gateway has hung up, as it may.
    async fn one_request(&self, wire: &mut Wire) -> bool {
        let Ok(head) = wire.head().await else { return false };
        let mut body = Vec::new();
        let framing = head.framing(Framing::Length(0)).unwrap_or(Framing::Length(0));
        if wire.body(framing, &mut body).await.is_err() {
            // Its caller left during the upload.
            self.undated.set(self.undated.get() + 1);
            return false;
        }
        let model =
            |ask: &Ask| self.spec.models.iter().position(|model| model.upstream == ask.model);
        let Some((ask, model)) =
            Ask::parse(&body).and_then(|ask| model(&ask).map(|model| (ask, model)))
        else {
            self.tally.fail(self.spec.name, format!("a request arrived changed: {head:?}"));
            return false;
        };
        if wire.has_ended() {
            self.undated.set(self.undated.get() + 1);
        } else {
            let at =
                head.arrived.expect("the kernel stamps what a socket with SO_TIMESTAMPNS receives");
            self.arrivals.borrow_mut().push((at, model));
        }
        let act = self.choose();
        self.count(&act);
        self.saw(ask.id, matches!(act, Act::Refuse));
        self.perform(wire, &ask, act).await.unwrap_or(false)
    }

    fn saw(&self, id: u64, refusing: bool) {
        let mut seen = self.seen.borrow_mut();
        let (read, refused) = seen.entry(id).or_default();
        *read += 1;
        *refused += u32::from(refusing);
    }

    fn count(&self, act: &Act) {
        let name = match act {
            Act::Answer(_) => "answered",
            Act::Refuse => "429",
            Act::Fail => "500",
            Act::Break(Fault::CloseBefore) => "closed before",
            Act::Break(Fault::ResetBefore) => "reset before",
            Act::Break(Fault::StallBefore) => "stalled before",
            Act::Break(Fault::NotHttp) => "no HTTP",
            Act::Break(Fault::CloseInside) => "closed inside",
            Act::Break(Fault::ResetInside) => "reset inside",
            Act::Break(Fault::StallInside) => "stalled inside",
            Act::Break(Fault::MoreThanPromised) => "more than promised",
        };
        *self.acts.borrow_mut().entry(name).or_default() += 1;
    }

    fn choose(&self) -> Act {
        let mut rng = self.rng.borrow_mut();
        let ms = |range| Duration::from_millis(range);
        let delimited = if rng.bool() { Delimited::Chunks } else { Delimited::Length };
        let mut shape = Shape {
            delimited,
            think: Duration::ZERO,
            between: Duration::ZERO,
            interim: rng.u8(..) < 20,
            close: None,
        };
        match self.spec.manners {
            Manners::Prompt => shape.close = (rng.u8(..) < 10).then_some(true),
            Manners::Slow => (shape.think, shape.between) = (ms(rng.u64(..300)), ms(rng.u64(..30))),
            Manners::Strict if self.pauses_now(&mut rng) => return Act::Refuse,
            Manners::Strict => {}
            Manners::Old if rng.bool() => {
                (shape.delimited, shape.close) = (Delimited::Close, Some(true))
            }
            Manners::Old => shape.close = (rng.u8(..) < 100).then_some(false),
            Manners::Broken => match rng.u8(..100) {
                0..35 => return Act::Break(FAULTS[rng.usize(..FAULTS.len())]),
                35..40 => return Act::Fail,
                _ => shape.between = ms(rng.u64(..10)),
            },
        }
        Act::Answer(shape)
    }

    /// Begins a pause every few seconds; within one everybody is refused.
    fn pauses_now(&self, rng: &mut fastrand::Rng) -> bool {
        let now = Instant::now();
        if self.paused_until.get().is_some_and(|until| now < until) {
            return true;
        }
        if now < self.next_pause.get() {
            return false;
        }
        self.next_pause.set(now + RETRY_AFTER + Duration::from_millis(rng.u64(1000..3000)));
        self.paused_until.set(Some(now + RETRY_AFTER));
        self.begun_pause.set(Some(unix_nanos() + nanos(RETRY_AFTER)));
        true
    }

    async fn perform(&self, wire: &mut Wire, ask: &Ask, act: Act) -> io::Result<bool> {
        match act {
            Act::Refuse => {
                let retry_after = format!("Retry-After: {}\r\n", RETRY_AFTER.as_secs());
                wire.send(&error("429 Too Many Requests", &retry_after, "rate_limit_exceeded"))
                    .await?;
                // The gateway cannot know of it before: this process may have been held up.
                if let Some(end) = self.begun_pause.take() {
                    self.pauses.borrow_mut().push((unix_nanos(), end));
                }
                Ok(true)
            }
            Act::Fail => {
                wire.send(&error("500 Internal Server Error", "", "server_error")).await?;
                Ok(true)
            }
            Act::Answer(shape) => answer(wire, ask, &shape).await,
            Act::Break(fault) => self.go_wrong(wire, ask, fault).await,
        }
    }

    /// Never leaves a connection that could be used again.
    async fn go_wrong(&self, wire: &mut Wire, ask: &Ask, fault: Fault) -> io::Result<bool> {
        let delimited =
            if self.rng.borrow_mut().bool() { Delimited::Chunks } else { Delimited::Length };
        let pieces = ask.answer();
        match fault {
            Fault::CloseBefore | Fault::ResetBefore | Fault::StallBefore => {}
            Fault::NotHttp => wire.send(b"SSH-2.0-OpenSSH_9.9\r\n").await?,
            Fault::MoreThanPromised => {
                let whole =
                    [head(ask, delimited, None, &pieces), framed(&pieces, delimited)].concat();
                wire.send(
                    &[whole, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong".to_vec()]
                        .concat(),
                )
                .await?;
                wire.rest().await;
            }
            Fault::CloseInside | Fault::ResetInside | Fault::StallInside => {
                let whole = framed(&pieces, delimited);
                let cut = self.rng.borrow_mut().usize(..whole.len());
                wire.send(&[&head(ask, delimited, None, &pieces), &whole[..cut]].concat()).await?;
            }
        }
        match fault {
            Fault::StallBefore | Fault::StallInside => {
                wire.rest().await;
            }
            Fault::ResetBefore | Fault::ResetInside => {
                wire.reset_on_close();
            }
            Fault::CloseBefore | Fault::CloseInside | Fault::NotHttp | Fault::MoreThanPromised => {}
        }
        Ok(false)
    }
}

async fn answer(wire: &mut Wire, ask: &Ask, shape: &Shape) -> io::Result<bool> {
    let pieces = ask.answer();
    pause(shape.think).await;
    if shape.interim {
        wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n").await?;
    }
    let head = head(ask, shape.delimited, shape.close, &pieces);
    if shape.between.is_zero() {
        wire.send(&[head, framed(&pieces, shape.delimited)].concat()).await?;
        return Ok(shape.close.is_none());
    }
    wire.send(&head).await?;
    for piece in &pieces {
        pause(shape.between).await;
        wire.send(&frame(piece, shape.delimited)).await?;
    }
    if shape.delimited == Delimited::Chunks {
        wire.send(LAST_CHUNK).await?;
    }
    Ok(shape.close.is_none())
}

const LAST_CHUNK: &[u8] = b"0\r\nx-trailer: is not passed on\r\n\r\n";

fn head(ask: &Ask, delimited: Delimited, close: Option<bool>, pieces: &[Vec<u8>]) -> Vec<u8> {
    let media = if ask.stream { "text/event-stream" } else { "application/json" };
    let framing = match delimited {
        Delimited::Chunks => "Transfer-Encoding: chunked\r\n".to_owned(),
        Delimited::Length => {
            format!("Content-Length: {}\r\n", pieces.iter().map(Vec::len).sum::<usize>())
        }
        Delimited::Close => String::new(),
    };
    let close = if close == Some(true) { "Connection: close\r\n" } else { "" };
    format!("HTTP/1.1 200 OK\r\nContent-Type: {media}\r\n{framing}{close}\r\n").into_bytes()
}

fn framed(pieces: &[Vec<u8>], delimited: Delimited) -> Vec<u8> {
    let mut whole: Vec<u8> = pieces.iter().flat_map(|piece| frame(piece, delimited)).collect();
    if delimited == Delimited::Chunks {
        whole.extend_from_slice(LAST_CHUNK);
    }
    whole
}

fn frame(piece: &[u8], delimited: Delimited) -> Vec<u8> {
    match delimited {
        Delimited::Chunks if piece.is_empty() => Vec::new(),
        Delimited::Chunks => {
            [format!("{:X};n=1\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat()
        }
        Delimited::Length | Delimited::Close => piece.to_vec(),
    }
}

fn error(status: &str, extra: &str, code: &str) -> Vec<u8> {
    let body = format!(
        r#"{{"error":{{"message":"On purpose","type":"soak","param":null,"code":"{code}"}}}}"#
    );
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{extra}Content-Length: {length}\r\n\r\n{body}")
        .into()
}

fn unix_nanos() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    nanos(since.expect("it is past 1970"))
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).expect("it is before 2500")
}
