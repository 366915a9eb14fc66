//! Resident memory: of a gateway that nobody asks, for each connection, for each request that waits, and after many.

use std::io::{self, Write};
use std::time::Duration;

use crate::Bench;
use crate::contestant::{Contestant, QUEUE};
use crate::driver::{Driver, Socket, Until, ask, ask_on};
use crate::machine::now;
use crate::table::{Goal, number};

const IDLE_CONNECTIONS: usize = 2000;
const QUEUED_BODY_BYTES: usize = 4096;
const KIB: f64 = 1024.0;
const MIB: f64 = 1024.0 * 1024.0;

pub fn memory(bench: &mut Bench) -> io::Result<()> {
    for contestant in bench.start("memory", |entry| entry.is_process()) {
        if let Err(error) = idle(bench, &contestant) {
            bench.table.remark("memory", &contestant.name, &error);
        }
    }
    for contestant in bench.start("memory", |entry| entry.is_gateway()) {
        if let Err(error) = queued(bench, &contestant) {
            bench.table.remark("memory", &contestant.name, &error);
        }
    }
    for contestant in bench.start("memory", |entry| entry.is_process()) {
        if let Err(error) = flat(bench, &contestant) {
            bench.table.remark("memory", &contestant.name, &error);
        }
    }
    Ok(())
}

fn idle(bench: &mut Bench, contestant: &Contestant) -> io::Result<()> {
    let name = &contestant.name;
    bench.table.note(
        "RSS idle, MiB",
        2,
        Goal::AtMost(4.0),
        name,
        0,
        contestant.resident()? as f64 / MIB,
    );
    let request = contestant.chat("fast", false, 1024);
    ask(&contestant.address, &request)?;
    let before = contestant.resident()?;
    let mut idle = Vec::with_capacity(IDLE_CONNECTIONS);
    for _ in 0..IDLE_CONNECTIONS {
        let mut socket = Socket::connect(&contestant.address)?;
        ask_on(&mut socket, &request)?; // one at a time: what many requests at once hold is another matter
        idle.push(socket);
    }
    let each = (contestant.resident()? as f64 - before as f64) / IDLE_CONNECTIONS as f64;
    let figure = format!("KiB an idle connection, of {}", number(IDLE_CONNECTIONS as f64, 0));
    bench.table.note(&figure, 2, Goal::AtMost(6.0), name, 0, each / KIB);
    Ok(())
}

/// The model `hourly` sends one request and lets the others wait.
fn queued(bench: &mut Bench, contestant: &Contestant) -> io::Result<()> {
    let count = bench.count(QUEUE as u64) as usize;
    let request = contestant.chat("hourly", false, QUEUED_BODY_BYTES);
    ask(&contestant.address, &request)?;
    let before = contestant.resident()?;
    let mut waiting = Vec::with_capacity(count);
    for _ in 0..count {
        let mut socket = Socket::connect(&contestant.address)?;
        socket.write_all(&request)?;
        waiting.push(socket);
    }
    let wanted = format!("\"queued_ahead\":{count}");
    let began = now();
    loop {
        let stats = ask(&contestant.address, b"GET /admin/stats HTTP/1.1\r\nHost: bench\r\n\r\n")?;
        if String::from_utf8_lossy(&stats).replace(' ', "").contains(&wanted) {
            break;
        }
        if now() - began > Duration::from_secs(20).as_nanos() as u64 {
            return Err(io::Error::other(format!(
                "{count} requests are not in the queue after 20 s"
            )));
        }
    }
    let each =
        (contestant.resident()? as f64 - before as f64) / count as f64 - QUEUED_BODY_BYTES as f64;
    let (name, table) = (&contestant.name, &mut bench.table);
    let figure = format!(
        "KiB a queued request with its connection, beside its body, of {} with 4 KiB",
        number(count as f64, 0)
    );
    table.note(&figure, 2, Goal::None, name, 0, each / KIB);
    if let Some(connection) = table
        .value(&format!("KiB an idle connection, of {}", number(IDLE_CONNECTIONS as f64, 0)), name)
    {
        let figure = "KiB a queued request, beside its body and an idle connection";
        table.note(figure, 2, Goal::AtMost(3.0), name, 0, each / KIB - connection);
    }
    Ok(())
}

/// Loads it with a million requests, or as many as it does in 40 s.
fn flat(bench: &mut Bench, contestant: &Contestant) -> io::Result<()> {
    let wanted = bench.count(1_000_000);
    let mut driver = Driver::new(&contestant.address, 64, contestant.chat("fast", false, 1024))?;
    driver.run(Until::Elapsed(bench.time(2000)))?;
    let before = contestant.resident()?;
    let (mut answers, began) = (0, now());
    while answers < wanted && now() - began < bench.time(40_000).as_nanos() as u64 {
        answers += driver.run(Until::Elapsed(bench.time(1000)))?.answers; // a run notes its times: a short one is small
    }
    let (name, table) = (&contestant.name, &mut bench.table);
    table.note(
        "RSS after warming up with 64 connections, MiB",
        2,
        Goal::None,
        name,
        0,
        before as f64 / MIB,
    );
    let grown = contestant.resident()? as f64 - before as f64;
    table.note("then thousand requests", 0, Goal::None, name, 0, answers as f64 / 1e3);
    table.note("RSS grown by them, MiB", 2, Goal::AtMost(0.5), name, 0, grown / MIB);
    Ok(())
}
