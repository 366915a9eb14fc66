//! Whether new TLS connections delay what else is going on: streams on their way, and the next send of a steady provider.
//! `direct` has the same handshakes on the same cores, without a gateway.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use rustls::ClientConfig;

use crate::Bench;
use crate::contestant::{DIRECT, Program, Recipe, Settings, gateway};
use crate::driver::{Address, Driver, Until, chat};
use crate::machine::now;
use crate::parts::cadence::Gaps;
use crate::table::{Goal, percentile};
use crate::tls::{Identity, ask_at_once, caller, provider};

const STREAMS: usize = 100;
const CONNECTIONS: usize = 100;
const PACE_NANOS: u64 = 20_000_000;
const SPACED: &str = "mode: spaced, rpm: 6000";
const INTERVAL_NANOS: f64 = 10e6;
const SOCKET: &str = "plain.sock";

/// A round takes seconds here, and its largest delays are what counts: more of them say no more.
const MOST_ROUNDS: usize = 3;

/// How the handshakes come about.
#[derive(Clone, Copy)]
enum Burst {
    Nothing,
    ToProvider,
    ByCallers,
}

/// What is measured: the mock itself or a gateway, which takes TLS at its port and plain HTTP at its socket.
struct Way {
    name: String,
    plain: Address,
    tls: SocketAddr,
    /// Lives as long as it is measured; none for the mock.
    program: Option<Program>,
}

pub fn tls(bench: &mut Bench) -> io::Result<()> {
    let identity = Identity::new()?;
    let caller = caller(&identity)?;
    let provider = provider(&identity, &bench.cores)?;
    bench.mock.stream(u32::MAX, PACE_NANOS);
    bench.mock.terms.is_cold.store(false, Relaxed);

    let plain = Address::Tcp(bench.mock.address);
    let mut ways = vec![Way { name: DIRECT.to_owned(), plain, tls: provider, program: None }];
    for entry in bench.entries.iter().filter(|entry| entry.is_gateway()) {
        let Recipe::Gateway { program, .. } = &entry.recipe else { continue };
        match way(bench, &entry.name, program, &identity, provider) {
            Ok(way) => ways.push(way),
            Err(error) => bench.table.remark("tls", &entry.name, &error),
        }
    }
    let rounds = if bench.is_quick { 1 } else { bench.rounds.min(MOST_ROUNDS) };
    for round in 0..rounds {
        for burst in [Burst::Nothing, Burst::ToProvider, Burst::ByCallers] {
            for way in &ways {
                if let Err(error) = measure(bench, way, &caller, burst, round) {
                    bench.table.remark("tls", &way.name, &error);
                }
            }
        }
    }
    Ok(())
}

fn way(
    bench: &Bench,
    name: &str,
    program: &Path,
    identity: &Identity,
    tls_provider: SocketAddr,
) -> io::Result<Way> {
    let (fast, steady) = (bench.mock.address, bench.mock.noted);
    let unlimited = "mode: burst, rpm: 60000000, capacity: 1000000";
    let rest = format!(
        "log: {{level: error}}\nproviders:\n\
         \x20 - {{name: fast, base_url: 'http://{fast}/v1', models: [fast], rate_limit: {{{unlimited}}}}}\n\
         \x20 - {{name: steady, base_url: 'http://{steady}/v1', models: [steady], rate_limit: {{{SPACED}}}}}\n\
         \x20 - {{name: tls, base_url: 'https://{tls_provider}/v1', models: [tls], ca_file: ca.pem, \
         rate_limit: {{{unlimited}}}}}\n"
    );
    let settings = Settings {
        server: format!("socket: {SOCKET}, tls: {{cert_file: ca.pem, key_file: key.pem}}"),
        rest,
        files: vec![("ca.pem", identity.certificate.clone()), ("key.pem", identity.key.clone())],
        socket: Some(SOCKET),
    };
    let (tls, program) = gateway(program, &settings, &bench.cores)?;
    let plain = Address::Unix(program.folder().join(SOCKET));
    Ok(Way { name: name.to_owned(), plain, tls, program: Some(program) })
}

/// Streams run, a steady provider is sent to, and then come the handshakes; what is noted is from then on.
fn measure(
    bench: &mut Bench,
    way: &Way,
    caller: &Arc<ClientConfig>,
    burst: Burst,
    round: usize,
) -> io::Result<()> {
    let mut steady = match way.program {
        Some(_) => Some(Driver::new(&way.plain, 16, chat("/v1", "steady", false, 1024))?),
        None => None,
    };
    if let Some(steady) = &mut steady {
        steady.once()?;
    }
    // Last, and then they are read without a pause: an event that waits for its reader would count as late.
    let mut streams = Driver::new(&way.plain, STREAMS, chat("/v1", "fast", true, 1024))?;
    streams.run(Until::Elapsed(bench.time(500)))?;
    bench.mock.take_arrivals();
    let (is_made, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    let (mut delays, took) = thread::scope(|scope| {
        let handshakes = scope.spawn(|| {
            let began = now();
            let made = handshakes(way, caller, burst);
            is_made.store(true, Relaxed);
            made.map(|()| now() - began)
        });
        let sends = scope.spawn(|| match &mut steady {
            None => Ok(()),
            Some(steady) => {
                while !is_over.load(Relaxed) {
                    steady.run(Until::Answered(2))?;
                }
                Ok::<_, io::Error>(())
            }
        });
        let mut delays = Vec::new();
        let began = now();
        let measured = loop {
            match streams.run(Until::Elapsed(Duration::from_millis(50))) {
                Ok(seen) => delays.extend(seen.delays),
                Err(error) => break Err(error),
            }
            if is_made.load(Relaxed) && now() - began > 500_000_000 {
                break Ok(());
            }
        };
        is_over.store(true, Relaxed);
        let took = handshakes.join().map_err(|_| io::Error::other("the handshakes panicked"))?;
        let sent = sends.join().map_err(|_| io::Error::other("the steady callers panicked"))?;
        measured.and(sent).and(took).map(|took| (delays, took))
    })?;
    let arrivals = bench.mock.take_arrivals();

    let while_ = match burst {
        Burst::Nothing => "no TLS".to_owned(),
        Burst::ToProvider => format!("{CONNECTIONS} TLS connections to a provider"),
        Burst::ByCallers => format!("{CONNECTIONS} TLS connections of callers"),
    };
    let table = &mut bench.table;
    if !matches!(burst, Burst::Nothing) {
        table.note(
            &format!("{while_} took ms"),
            0,
            Goal::None,
            &way.name,
            round,
            took as f64 / 1e6,
        );
    }
    for (told, percent) in [("p50", 50), ("p99", 99), ("max", 100)] {
        let delay = percentile(&mut delays, percent) as f64 / 1e3;
        let figure = format!("delay of an event {told} µs, {STREAMS} streams, {while_}");
        table.note(&figure, 0, Goal::None, &way.name, round, delay);
    }
    if way.program.is_some() {
        Gaps::of(&arrivals, INTERVAL_NANOS)?.note(
            bench,
            &way.name,
            round,
            &format!("6,000 rpm, {while_}"),
        );
    }
    Ok(())
}

fn handshakes(way: &Way, caller: &Arc<ClientConfig>, burst: Burst) -> io::Result<()> {
    match (burst, &way.program) {
        (Burst::Nothing, _) => Ok(()),
        (Burst::ToProvider, Some(_)) => {
            Driver::new(&way.plain, CONNECTIONS, chat("/v1", "tls", false, 1024))?.once().map(drop)
        }
        _ => ask_at_once(way.tls, caller, &chat("/v1", "fast", false, 1024), CONNECTIONS),
    }
}
