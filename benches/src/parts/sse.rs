//! Streams: how many events a second pass, what each costs, and how much later it arrives.

use std::io;

use super::load;
use crate::Bench;
use crate::driver::Driver;
use crate::table::{Goal, is_proxy, percentile};

const FLAT_STREAMS: usize = 64;
const PACED_STREAMS: usize = 1000;
const PACE_NANOS: u64 = 20_000_000;

pub fn sse(bench: &mut Bench) -> io::Result<()> {
    bench.mock.stream(2000, 0);
    bench.rounds("sse", |bench, contestant, round| {
        let mut driver =
            Driver::new(&contestant.address, FLAT_STREAMS, contestant.chat("fast", true, 1024))?;
        let (seen, spent) = load(bench, contestant, &mut driver, 300, 1000)?;
        let (name, table) = (&contestant.name, &mut bench.table);
        let rate = format!("SSE events/s, {FLAT_STREAMS} streams flat out");
        table.note(
            &rate,
            0,
            Goal::AtLeastOfNginx(1.0 / 1.3),
            name,
            round,
            seen.events_per_second(),
        );
        let Some(spent) = spent else { return Ok(()) };
        let cpu = format!("CPU µs/event, {FLAT_STREAMS} streams flat out");
        let each = spent as f64 / 1e3 / seen.events as f64;
        table.note(&cpu, 2, Goal::AtMostOfNginx(1.3), name, round, each);
        let busy = format!("% of its core busy meanwhile, {FLAT_STREAMS} streams");
        table.note(&busy, 0, Goal::None, name, round, spent as f64 * 100.0 / seen.elapsed as f64);
        Ok(())
    });

    bench.mock.stream(u32::MAX, PACE_NANOS);
    let mut direct = [0.0; 2];
    bench.rounds("sse", |bench, contestant, round| {
        let mut driver =
            Driver::new(&contestant.address, PACED_STREAMS, contestant.chat("fast", true, 1024))?;
        let (mut seen, spent) = load(bench, contestant, &mut driver, 1000, 2000)?;
        let (name, table) = (&contestant.name, &mut bench.table);
        let told = "1,000 streams, an event every 20 ms"; // PACED_STREAMS, PACE_NANOS
        if let Some(spent) = spent {
            let each = spent as f64 / 1e3 / seen.events as f64;
            table.note(
                &format!("CPU µs/event, {told}"),
                2,
                Goal::AtMostOfNginx(1.3),
                name,
                round,
                each,
            );
        }
        let due = PACED_STREAMS as f64 * 1e9 / PACE_NANOS as f64;
        let share = 100.0 * seen.events_per_second() / due;
        table.note(
            &format!("% of the events that were due, {told}"),
            0,
            Goal::None,
            name,
            round,
            share,
        );
        for (at, percent) in [50, 99].into_iter().enumerate() {
            let value = percentile(&mut seen.delays, percent) as f64 / 1e3;
            table.note(
                &format!("delay of an event p{percent} µs, {told}"),
                1,
                Goal::None,
                name,
                round,
                value,
            );
            if !is_proxy(name) {
                direct[at] = value;
                continue;
            }
            let added = format!("added to direct, p{percent} µs, {told}");
            table.note(&added, 1, Goal::None, name, round, value - direct[at]);
        }
        Ok(())
    });
    Ok(())
}
