//! What the gateway costs, measured from outside, beside nginx and whoever else is named, in one run on one machine. See
//! benches/README.md for how to read it. Knows nothing of the gateway's inside but its configuration.
//!
//! [`mock`] is the provider, [`driver`] the callers, [`contestant`] whoever stands between them; [`parts`] are the
//! measurements, each of which fills rows of the [`table`].

mod contestant;
mod driver;
mod http;
mod machine;
mod mock;
mod parts;
mod table;
mod tls;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use argh::FromArgs;

use contestant::{Contestant, DIRECT, Entry, GATEWAY, LOGGING, NGINX, Recipe};
use machine::{Cores, now};
use mock::Mock;
use parts::PARTS;
use table::Table;

#[derive(FromArgs)]
/// What limitrate costs, beside nginx and others.
struct Arguments {
    /// fewer and shorter rounds, less than a minute in all; its figures are rough
    #[argh(switch)]
    quick: bool,

    /// rounds of each measurement (5)
    #[argh(option, default = "5")]
    rounds: usize,

    /// port of the mock provider, for gateways that are started by hand (any)
    #[argh(option, default = "0")]
    mock: u16,

    /// serve the mock provider and measure nothing, until it is killed
    #[argh(switch)]
    mock_only: bool,

    /// the gateway's program (target/release/limitrate of this repository)
    #[argh(option)]
    gateway: Option<PathBuf>,

    /// a file for the table besides
    #[argh(option)]
    markdown: Option<PathBuf>,

    /// parts: throughput latency sse memory startup cadence tls (all); and NAME=URL, NAME=URL@PID or NAME=PROGRAM
    #[argh(positional, greedy)]
    what: Vec<String>,
}

/// All that the parts share.
pub struct Bench {
    mock: Mock,
    cores: Cores,
    entries: Vec<Entry>,
    table: Table,
    rounds: usize,
    is_quick: bool,
}

impl Bench {
    /// The contestants of this kind; one that does not start is left out, and the table says so.
    fn start(&mut self, part: &str, is_wanted: impl Fn(&Entry) -> bool) -> Vec<Contestant> {
        let mut started = Vec::new();
        for entry in self.entries.iter().filter(|entry| is_wanted(entry)) {
            match entry.start(&self.mock, &self.cores) {
                Ok(contestant) => started.push(contestant),
                Err(error) => self.table.remark(part, &entry.name, &error),
            }
        }
        started
    }

    /// Measures everybody in turn, and everybody again in each round. Who fails once is left out from then on. A program is started
    /// anew each time: where in memory the kernel puts it decides up to a fifth of what it costs, and stays so until its end.
    fn rounds(
        &mut self,
        part: &str,
        mut measure: impl FnMut(&mut Bench, &Contestant, usize) -> io::Result<()>,
    ) {
        let mut entries = self.entries.clone();
        for round in 0..self.rounds {
            entries.retain(|entry| {
                let started = entry.start(&self.mock, &self.cores);
                match started.and_then(|contestant| measure(self, &contestant, round)) {
                    Ok(()) => true,
                    Err(error) => {
                        self.table.remark(part, &entry.name, &error);
                        false
                    }
                }
            });
        }
    }

    /// A time that is shorter in a quick run.
    fn time(&self, millis: u64) -> Duration {
        Duration::from_millis(if self.is_quick { millis / 4 } else { millis })
    }

    /// A count that is smaller in a quick run.
    fn count(&self, count: u64) -> u64 {
        if self.is_quick { count / 10 } else { count }
    }
}

fn main() -> ExitCode {
    match run(argh::from_env()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> io::Result<()> {
    contestant::end_all_on_a_signal()?;
    let files = machine::raise_file_limit()?;
    let cores = Cores::of_this_machine()?;
    let (parts, named): (Vec<_>, Vec<_>) =
        arguments.what.iter().partition(|word| !word.contains('='));
    if let Some(unknown) =
        parts.iter().find(|part| !PARTS.iter().any(|(name, _)| name == &part.as_str()))
    {
        return Err(io::Error::other(format!("{unknown}: no such part, and not NAME=URL")));
    }
    let program = arguments.gateway.unwrap_or_else(built_gateway);
    let mut entries = vec![
        Entry::new(DIRECT, Recipe::Direct),
        Entry::new(NGINX, Recipe::Nginx),
        Entry::new(GATEWAY, Recipe::Gateway { program: program.clone(), logs: false }),
        Entry::new(LOGGING, Recipe::Gateway { program, logs: true }),
    ];
    for argument in named {
        entries.push(Entry::named(argument).map_err(io::Error::other)?);
    }

    cores.pin_driver()?;
    let mock = Mock::start(arguments.mock, &cores)?;
    eprintln!(
        "the mock provider is at http://{}/v1, with the model fast and any key",
        mock.address
    );
    eprintln!("{}", cores.told());
    if arguments.mock_only {
        loop {
            std::thread::park();
        }
    }
    let began = now();
    let table = Table::new(entries.iter().map(|entry| entry.name.clone()).collect());
    let rounds = if arguments.quick { arguments.rounds.min(2) } else { arguments.rounds.max(1) };
    let mut bench = Bench { mock, cores, entries, table, rounds, is_quick: arguments.quick };
    if files < 2 * contestant::QUEUE as u64 {
        bench
            .table
            .remarks
            .push(format!("only {files} files may be open: memory may fail for that"));
    }
    for (name, part) in PARTS {
        if parts.is_empty() || parts.iter().any(|wanted| wanted.as_str() == name) {
            eprintln!("{name} ...");
            part(&mut bench)?;
        }
    }

    let mut text = format!("{}\n\n", machine::told(&bench.cores)?);
    text += &format!(
        "{}. Medians of {rounds} rounds{}; in parentheses limitrate's figure divided by this one.\n\n",
        bench.cores.told(),
        if arguments.quick { " (quick: rough)" } else { "" },
    );
    text += &bench.table.markdown();
    for remark in &bench.table.remarks {
        text += &format!("\n- {remark}");
    }
    println!("{}", text.trim_end());
    eprintln!("took {} s", (now() - began) / 1_000_000_000);
    if let Some(file) = arguments.markdown {
        fs::write(file, text.trim_end().to_owned() + "\n")?;
    }
    Ok(())
}

/// Where `cargo build --release` puts it.
fn built_gateway() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target =
        target.unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")));
    target.join("release/limitrate")
}
