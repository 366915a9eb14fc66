//! The gaps between requests as they arrive at a provider with a steady limit, by the kernel's clock of arrival.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use crate::Bench;
use crate::contestant::Contestant;
use crate::driver::{Driver, Until};
use crate::table::Goal;

const LOADING: usize = 64;

/// A provider's limit, and how its arrivals are told.
struct Limit {
    model: &'static str,
    told: &'static str,
    interval_nanos: f64,
    /// Enough to have somebody wait always, however long an answer takes to go round.
    callers: usize,
    sends: u64,
    quick_sends: u64,
}

const SLOW: Limit = Limit {
    model: "rpm600",
    told: "600 rpm",
    interval_nanos: 100e6,
    callers: 16,
    sends: 200,
    quick_sends: 30,
};
const FAST: Limit = Limit {
    model: "rpm60000",
    told: "60,000 rpm",
    interval_nanos: 1e6,
    callers: 256,
    sends: 5000,
    quick_sends: 1000,
};

pub fn cadence(bench: &mut Bench) -> io::Result<()> {
    for contestant in bench.start("cadence", |entry| entry.is_gateway()) {
        if let Err(error) = all(bench, &contestant) {
            bench.table.remark("cadence", &contestant.name, &error);
        }
    }
    Ok(())
}

fn all(bench: &mut Bench, contestant: &Contestant) -> io::Result<()> {
    gaps(bench, contestant, &SLOW, true, "cold")?;
    gaps(bench, contestant, &SLOW, false, "warm")?;
    gaps(bench, contestant, &FAST, false, "warm")?;
    loaded(bench, contestant, |bench| {
        gaps(bench, contestant, &SLOW, false, "warm, loaded")?;
        gaps(bench, contestant, &FAST, false, "warm, loaded")
    })
}

/// Keeps the gateway's other provider busy while `measure` runs.
fn loaded(
    bench: &mut Bench,
    contestant: &Contestant,
    measure: impl FnOnce(&mut Bench) -> io::Result<()>,
) -> io::Result<()> {
    let mut driver =
        Driver::new(&contestant.address, LOADING, contestant.chat("fast", false, 1024))?;
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !is_over.load(Relaxed) {
                driver.run(Until::Answered(5000))?;
            }
            Ok::<_, io::Error>(())
        });
        let measured = measure(bench);
        is_over.store(true, Relaxed);
        let loaded = load.join().map_err(|_| io::Error::other("the load panicked"))?;
        measured.and(loaded)
    })
}

/// Requests that wait for their turn all the time, so that each gap is the gateway's.
fn gaps(
    bench: &mut Bench,
    contestant: &Contestant,
    limit: &Limit,
    is_cold: bool,
    told: &str,
) -> io::Result<()> {
    bench.mock.terms.is_cold.store(is_cold, Relaxed);
    let mut driver =
        Driver::new(&contestant.address, limit.callers, contestant.chat(limit.model, false, 1024))?;
    driver.once()?;
    bench.mock.take_arrivals();
    driver.run(Until::Answered(if bench.is_quick { limit.quick_sends } else { limit.sends }))?;
    let arrivals = bench.mock.take_arrivals();
    let told = format!("{}, {told}", limit.told);
    Gaps::of(&arrivals, limit.interval_nanos)?.note(bench, &contestant.name, 0, &told);
    Ok(())
}

/// How the gaps between arrivals differ from the interval, in milliseconds, and their mean in percent.
pub struct Gaps {
    shorter: f64,
    longer: f64,
    mean: f64,
}

impl Gaps {
    /// An error where there are too few to say anything.
    pub fn of(arrivals: &[u64], interval: f64) -> io::Result<Gaps> {
        let gaps = arrivals.windows(2).map(|pair| pair[1] as f64 - pair[0] as f64);
        let (shortest, longest) = gaps
            .fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), gap| {
                (low.min(gap), high.max(gap))
            });
        let [first, .., last] = arrivals else {
            return Err(io::Error::other("fewer than two arrivals"));
        };
        let mean = (last - first) as f64 / (arrivals.len() - 1) as f64;
        Ok(Gaps {
            shorter: (interval - shortest) / 1e6,
            longer: (longest - interval) / 1e6,
            mean: 100.0 * (interval / mean - 1.0),
        })
    }

    pub fn note(&self, bench: &mut Bench, name: &str, round: usize, told: &str) {
        let table = &mut bench.table;
        table.note(
            &format!("shortest gap is shorter by ms, {told}"),
            3,
            Goal::AtMost(1.0),
            name,
            round,
            self.shorter,
        );
        table.note(
            &format!("longest gap is longer by ms, {told}"),
            3,
            Goal::None,
            name,
            round,
            self.longer,
        );
        table.note(
            &format!("mean rate is off by %, {told}"),
            3,
            Goal::Within(0.5),
            name,
            round,
            self.mean,
        );
    }
}
