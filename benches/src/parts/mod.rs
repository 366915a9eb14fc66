//! The measurements, in the order of the table.

mod cadence;
mod memory;
mod sse;
mod startup;
mod throughput;
mod tls;

use std::io;

use crate::Bench;

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
