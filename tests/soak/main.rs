//! The soak: hundreds of callers of mixed manners against providers of mixed manners, through the built binary.
//!
//! `cargo test --test soak` runs it for a few seconds, `just soak 600` for as long as you like; SOAK_SEED replays the
//! choices of a run (not its timing). At the end: every well-behaved request was answered exactly once with the right
//! bytes or an explicit error ([`client`]), no provider was sent to faster than its limit ([`pace`]), and the gateway
//! holds no more than after the warm-up, stops on SIGTERM with 0 and has not panicked. Its configuration is reloaded all
//! the while, and its state file written. Linux only, 127.0.0.1 only.

mod ask;
mod client;
mod garbage;
mod gateway;
mod pace;
mod provider;
mod tally;
mod wire;

use std::cell::Cell;
use std::io::Write as _;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use smol::{LocalExecutor, Timer};

use ask::{Limit, Manners, Model, Spec};
use client::Client;
use gateway::{Gateway, Held};
use provider::Desk;
use tally::Tally;

/// The bound of every wait that is expected to end.
pub const PATIENCE: Duration = Duration::from_secs(20);

const CLIENTS: usize = 300;

/// Callers who are there when the gateway is told to stop.
const LAST_CALLERS: usize = 60;

/// Beyond what is held after the warm-up: what the allocator keeps of a busier moment. 60 s are some 30,000 requests,
/// so that 500 bytes lost by each would show.
const MEMORY_TOLERANCE_KIB: u64 = 12 * 1024;

/// Between two reloads of the configuration.
const RELOAD_EVERY: Duration = ms(700);

/// How long the whole may take beyond its rounds.
const OVERTIME: Duration = Duration::from_secs(120);

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const fn spaced(millis: u64) -> Limit {
    Limit::Bucket { interval: ms(millis), capacity: 1 }
}

const fn plain(id: &'static str, upstream: &'static str) -> Model {
    Model { id, upstream, interval: None }
}

static PROVIDERS: [Spec; 8] = [
    Spec {
        name: "prompt",
        models: &[plain("prompt-1", "prompt-1"), plain("alias", "vendor/Its-Own_Name.v2")],
        limit: spaced(5),
        manners: Manners::Prompt,
        extras: "",
        share: 30,
    },
    Spec {
        name: "slow",
        models: &[plain("slow-1", "slow-1")],
        limit: spaced(20),
        manners: Manners::Slow,
        extras: "",
        share: 10,
    },
    Spec {
        name: "strict",
        models: &[plain("strict-1", "strict-1")],
        limit: Limit::Bucket { interval: ms(10), capacity: 20 },
        manners: Manners::Strict,
        extras: "",
        share: 8,
    },
    Spec {
        name: "old",
        models: &[plain("old-1", "old-1")],
        limit: Limit::Bucket { interval: ms(15), capacity: 25 },
        manners: Manners::Old,
        extras: "",
        share: 10,
    },
    Spec {
        name: "twin",
        models: &[
            Model { id: "twin-slow", upstream: "twin-slow", interval: Some(ms(40)) },
            plain("twin-fast", "twin-fast"),
        ],
        limit: spaced(7),
        manners: Manners::Prompt,
        extras: "",
        share: 8,
    },
    Spec {
        name: "broken",
        models: &[plain("broken-1", "broken-1")],
        limit: spaced(10),
        manners: Manners::Broken,
        extras: "    request_timeout_seconds: 1\n    idle_timeout_seconds: 1\n    retry: {attempts: 3}\n",
        share: 20,
    },
    Spec {
        name: "counted",
        models: &[plain("counted-1", "counted-1")],
        limit: Limit::Window { rpm: 150 },
        manners: Manners::Prompt,
        extras: "",
        share: 5,
    },
    Spec {
        name: "uploads",
        models: &[plain("uploads-1", "uploads-1")],
        limit: Limit::Bucket { interval: ms(40), capacity: 5 },
        manners: Manners::Prompt,
        extras: "",
        share: 0,
    },
];

fn main() -> ExitCode {
    // What cargo passes on to every test program: a filter that another name was meant by, or a wish for a list.
    let mut arguments = std::env::args().skip(1);
    if arguments.any(|argument| {
        argument == "--list" || !(argument.starts_with("--") || "soak".contains(&*argument))
    }) {
        return ExitCode::SUCCESS;
    }
    let seconds = number("SOAK_SECONDS").unwrap_or(5).max(1);
    let seed = number("SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    say(&format!("{seconds} s with {CLIENTS} callers; SOAK_SEED={seed} replays its choices"));
    let gateway_pid = watch(Duration::from_secs(2 * seconds) + OVERTIME);
    let executor = Rc::new(LocalExecutor::new());
    let tally = Rc::new(Tally::default());
    let soak =
        soak(executor.clone(), tally.clone(), Duration::from_secs(seconds), seed, gateway_pid);
    smol::block_on(executor.run(soak));
    if tally.failed() == 0 {
        say("passed");
        return ExitCode::SUCCESS;
    }
    say(&format!(
        "FAILED {} times, SOAK_SEED={seed}; the first of them:\n{}",
        tally.failed(),
        tally.failures()
    ));
    ExitCode::FAILURE
}

async fn soak(
    executor: Rc<LocalExecutor<'static>>,
    tally: Rc<Tally>,
    length: Duration,
    seed: u64,
    gateway_pid: &'static AtomicU32,
) {
    let mut seeds = fastrand::Rng::with_seed(seed);
    let desks = PROVIDERS.iter().map(|spec| Desk::open(spec, seeds.u64(..), &tally, &executor));
    let desks = Rc::new(desks.collect::<Vec<_>>());
    // Long against a machine that stands still for a moment, short enough for those who let it pass.
    let patience = (length / 2).clamp(Duration::from_secs(4), Duration::from_secs(10));
    let mut gateway = Gateway::start(&desks, patience, seed);
    gateway_pid.store(gateway.pid(), Ordering::SeqCst);
    let sessions = Rc::new(Cell::new(0));
    let mut clients = |n| -> Vec<Client> {
        let (gateway, rng) = (gateway.addr, &mut seeds);
        let client = || Client {
            gateway,
            desks: desks.clone(),
            tally: tally.clone(),
            rng: fastrand::Rng::with_seed(rng.u64(..)),
            patience,
            sessions: sessions.clone(),
        };
        std::iter::repeat_with(client).take(n).collect()
    };

    let (warmers, callers, last) = (clients(CLIENTS), clients(CLIENTS), clients(LAST_CALLERS));
    let held_up = Rc::new(Cell::new(Duration::ZERO));
    executor.spawn(heartbeat(held_up.clone())).detach();
    let round =
        |callers, length| round(&executor, callers, length, gateway.pid(), &tally, &sessions);
    round(warmers, (length / 2).min(Duration::from_secs(10))).await;
    let before = settled(&gateway, &desks, None, &tally).await;
    round(callers, length).await;
    let after = settled(&gateway, &desks, Some(before), &tally).await;
    if after.memory_kib > before.memory_kib + MEMORY_TOLERANCE_KIB {
        tally.fail(
            "memory",
            format!("{} KiB after the warm-up, {} at the end", before.memory_kib, after.memory_kib),
        );
    }
    farewell(&executor, &mut gateway, last, &tally).await;
    desks.iter().for_each(|desk| desk.check_pace());

    say(&format!("callers, by manner and outcome:\n{}", tally.table()));
    desks.iter().for_each(|desk| say(&desk.report()));
    say(&format!(
        "the gateway after the warm-up: {} open files, {} KiB; at the end: {}, {} KiB",
        before.files, before.memory_kib, after.files, after.memory_kib
    ));
    say(&format!(
        "the soak itself was held up for at most {:.0} ms",
        held_up.get().as_secs_f64() * 1000.0
    ));
    if tally.failed() > 0 {
        say(&format!("the gateway's last words:\n{}", gateway.last_words()));
    }
}

/// Lets all callers live for `length` and waits for the last of them.
async fn round(
    executor: &Rc<LocalExecutor<'static>>,
    clients: Vec<Client>,
    length: Duration,
    gateway: u32,
    tally: &Rc<Tally>,
    sessions: &Rc<Cell<usize>>,
) {
    let began = Instant::now();
    let lives: Vec<_> =
        clients.into_iter().map(|client| executor.spawn(client.live(began + length))).collect();
    let (tally, sessions) = (tally.clone(), sessions.clone());
    let telling = executor.spawn(async move {
        loop {
            Timer::after(Duration::from_secs(10)).await;
            let (at, total, open) = (began.elapsed().as_secs(), tally.total(), sessions.get());
            let Held { files, memory_kib } = gateway::held(gateway);
            say(&format!(
                "{at:>4} s: {total} requests, {open} sessions open, {files} files, {memory_kib} KiB"
            ));
        }
    });
    // Under load all the while: nobody may notice.
    let reloading = executor.spawn(async move {
        loop {
            pause(RELOAD_EVERY).await;
            gateway::reload(gateway);
        }
    });
    for life in lives {
        life.await;
    }
    telling.cancel().await;
    reloading.cancel().await;
}

/// Waits until nothing is queued or in flight, no connection to a provider is open, and where a count from before is
/// given, no more files are; says what is held then.
async fn settled(
    gateway: &Gateway,
    desks: &[Rc<Desk>],
    before: Option<Held>,
    tally: &Tally,
) -> Held {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let busy = match gateway.stats().await {
            Ok(rows) => busy(&rows, desks),
            Err(error) => Some(error),
        };
        let held = gateway::held(gateway.pid());
        let busy = busy.or_else(|| {
            let files = before.filter(|before| held.files > before.files)?.files;
            Some(format!("{} open files, {files} after the warm-up", held.files))
        });
        let Some(busy) = busy else { return held };
        if Instant::now() > deadline {
            tally.fail("quiet", format!("{} s after the last caller: {busy}", PATIENCE.as_secs()));
            return held;
        }
        pause(ms(50)).await;
    }
}

/// What there still is to do, if anything.
fn busy(rows: &[serde_json::Value], desks: &[Rc<Desk>]) -> Option<String> {
    let of = |row: &serde_json::Value| {
        ["queued_ahead", "waiting_in_acquire", "in_flight", "idle_connections"]
            .into_iter()
            .find(|&key| row[key] != 0)
            .map(|key| format!("{key} of {} is {}", row["provider"], row[key]))
    };
    let open = |desk: &Rc<Desk>| {
        (desk.open_connections() > 0)
            .then(|| format!("{} connections to {}", desk.open_connections(), desk.spec.name))
    };
    rows.iter().find_map(of).or_else(|| desks.iter().find_map(open))
}

/// Stops the gateway under load: everybody who is there is answered, and it ends with 0.
async fn farewell(
    executor: &Rc<LocalExecutor<'static>>,
    gateway: &mut Gateway,
    last: Vec<Client>,
    tally: &Rc<Tally>,
) {
    let total = |rows: Vec<serde_json::Value>| -> u64 {
        rows.iter()
            .flat_map(|row| [&row["sent"], &row["queued_ahead"]])
            .filter_map(serde_json::Value::as_u64)
            .sum()
    };
    let before = gateway.stats().await.map(total).unwrap_or_default();
    let waiting: Vec<_> =
        last.into_iter().map(|client| executor.spawn(client.last_request())).collect();
    // Some may be refused at once, so this may not come true; their answers show all the same.
    let deadline = Instant::now() + Duration::from_secs(1);
    while gateway.stats().await.map(total).unwrap_or_default() < before + waiting.len() as u64
        && Instant::now() < deadline
    {
        pause(ms(5)).await;
    }
    gateway.terminate();
    for caller in waiting {
        caller.await;
    }
    match gateway.ended(PATIENCE).await {
        Some(status) if status.success() => {}
        Some(status) => tally.fail("SIGTERM", format!("the gateway ended with {status}")),
        None => tally.fail("SIGTERM", "the gateway does not end".into()),
    }
    for line in gateway.panics() {
        tally.fail("panic", line);
    }
}

/// Measures how late this process gets to run, which tells a broken promise from a machine that stood still.
async fn heartbeat(held_up: Rc<Cell<Duration>>) {
    const BEAT: Duration = ms(20);
    loop {
        let began = Instant::now();
        pause(BEAT).await;
        held_up.set(held_up.get().max(began.elapsed() - BEAT));
    }
}

/// Ends a soak that hangs, gateway included. Returns where to write the gateway's process id.
fn watch(limit: Duration) -> &'static AtomicU32 {
    static PID: AtomicU32 = AtomicU32::new(0);
    thread::spawn(move || {
        thread::sleep(limit);
        say(&format!("STUCK: not over after {} s; ending it", limit.as_secs()));
        if let Some(pid) = i32::try_from(PID.load(Ordering::SeqCst)).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        std::process::exit(3);
    });
    &PID
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no whole number: {text:?}")))
}

/// Sleeps.
pub async fn pause(duration: Duration) {
    Timer::after(duration).await;
}

fn say(line: &str) {
    // A closed pipe is no reason to end.
    let _ = writeln!(std::io::stdout().lock(), "soak: {line}");
}
