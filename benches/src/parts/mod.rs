//! The measurements, in the order of the table.

mod cadence;
mod memory;
mod sse;
mod startup;
mod throughput;
mod tls;

use std::io;

use crate::Bench;
use crate::contestant::Contestant;
use crate::driver::{Driver, Seen, Until};

/// Fills the rows of one part.
type Part = fn(&mut Bench) -> io::Result<()>;

/// Each part by the name that the command line has for it.
pub const PARTS: [(&str, Part); 7] = [
    ("throughput", throughput::throughput),
    ("latency", throughput::latency),
    ("sse", sse::sse),
    ("memory", memory::memory),
    ("startup", startup::startup),
    ("cadence", cadence::cadence),
    ("tls", tls::tls),
];

/// What the driver sees in so many milliseconds, after so many to warm up; and the CPU time that the contestant spent
/// meanwhile, in nanoseconds, where its process is known.
fn load(
    bench: &Bench,
    contestant: &Contestant,
    driver: &mut Driver,
    warm_up: u64,
    measured: u64,
) -> io::Result<(Seen, Option<u64>)> {
    driver.run(Until::Elapsed(bench.time(warm_up)))?;
    let before = contestant.cpu()?;
    let seen = driver.run(Until::Elapsed(bench.time(measured)))?;
    let spent = contestant.cpu()?.zip(before).map(|(after, before)| after - before);
    Ok((seen, spent))
}
