//! Requests a second and what they cost, and the time that a request takes longer than without a proxy.

use std::io;

use super::load;
use crate::Bench;
use crate::driver::Driver;
use crate::table::{Goal, is_proxy, percentile};

const CONNECTIONS: usize = 64;
const BODIES: [(usize, &str); 2] = [(1024, "1 KiB"), (100 * 1024, "100 KiB")];

pub fn throughput(bench: &mut Bench) -> io::Result<()> {
    for (bytes, size) in BODIES {
        bench.rounds("throughput", |bench, contestant, round| {
            let mut driver = Driver::new(
                &contestant.address,
                CONNECTIONS,
                contestant.chat("fast", false, bytes),
            )?;
            let (seen, spent) = load(bench, contestant, &mut driver, 200, 1200)?;
            let (name, table) = (&contestant.name, &mut bench.table);
            let rate = format!("requests/s, {CONNECTIONS} connections, {size}");
            table.note(
                &rate,
                0,
                Goal::AtLeastOfNginx(1.0 / 1.5),
                name,
                round,
                seen.answers_per_second(),
            );
            let Some(spent) = spent else { return Ok(()) };
            let cpu = format!("CPU µs/request, {CONNECTIONS} connections, {size}");
            let each = spent as f64 / 1e3 / seen.answers as f64;
            table.note(&cpu, 1, Goal::AtMostOfNginx(1.5), name, round, each);
            let busy = format!("% of its core busy meanwhile, {size}");
            table.note(
                &busy,
                0,
                Goal::None,
                name,
                round,
                spent as f64 * 100.0 / seen.elapsed as f64,
            );
            Ok(())
        });
    }
    Ok(())
}

pub fn latency(bench: &mut Bench) -> io::Result<()> {
    for connections in [1, 8] {
        let mut direct = [0.0; 2];
        let goals = if connections == 8 {
            [Goal::AtMost(100.0), Goal::AtMost(1000.0)]
        } else {
            [Goal::None; 2]
        };
        bench.rounds("latency", |bench, contestant, round| {
            let mut driver = Driver::new(
                &contestant.address,
                connections,
                contestant.chat("fast", false, 1024),
            )?;
            let (mut seen, _) = load(bench, contestant, &mut driver, 200, 800)?;
            let name = &contestant.name;
            let s = if connections == 1 { "" } else { "s" };
            for (at, percent) in [50, 99].into_iter().enumerate() {
                let value = percentile(&mut seen.times, percent) as f64 / 1e3;
                let whole = format!("latency p{percent} µs, {connections} connection{s}");
                bench.table.note(&whole, 1, Goal::None, name, round, value);
                if !is_proxy(name) {
                    direct[at] = value;
                    continue;
                }
                let added = format!("added to direct, p{percent} µs, {connections} connection{s}");
                bench.table.note(&added, 1, goals[at], name, round, value - direct[at]);
            }
            Ok(())
        });
    }
    Ok(())
}
