//! The command line: `limitrate` serves, `limitrate check` explains a configuration, `limitrate demo` shows it all
//! without a key.
//!
//! Owns what a person reads at the start, the exit codes (0 fine, 1 runtime failure, 2 bad configuration or usage), the
//! signals and systemd's notifications.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use argh::FromArgs;
use async_channel::Sender;
use async_signal::{Signal, Signals};
use futures_lite::{StreamExt, future};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::{self, Budget, Config, Day, DayReset, Mode, Pace, RateLimit};
use crate::log;
use crate::server::{Server, Stop};
use crate::{demo, provider};

const DEFAULT_CONFIG: &str = "config.yaml";

/// File descriptors beside two per connection: standard streams, listener, reactor, idle connections.
const SPARE_FILES: u64 = 64;

/// An OpenAI-compatible LLM gateway that queues instead of rejecting. Without a command it serves.
#[derive(FromArgs)]
struct Args {
    /// the configuration file (default: ./config.yaml)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,
    /// print the version
    #[argh(switch, short = 'V')]
    version: bool,
    #[argh(subcommand)]
    command: Option<Command>,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Command {
    Check(Check),
    Demo(Demo),
}

/// Validate the configuration and say what it will do.
#[derive(FromArgs)]
#[argh(subcommand, name = "check")]
struct Check {
    /// the configuration file (default: ./config.yaml)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,
}

/// Serve two built-in providers on 127.0.0.1, without a file or a key.
#[derive(FromArgs)]
#[argh(subcommand, name = "demo")]
struct Demo {
    /// the port to serve on (default: 8080)
    #[argh(option, default = "8080")]
    port: u16,
}

/// Runs one command line; the first argument is the program's name.
pub fn run(arguments: Vec<String>) -> ExitCode {
    let arguments: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    let args = match Args::from_args(&["limitrate"], &arguments) {
        Ok(args) => args,
        Err(exit) => return early_exit(exit),
    };
    if args.version {
        say(format_args!("limitrate {}", env!("CARGO_PKG_VERSION")));
        return ExitCode::SUCCESS;
    }
    match args.command {
        None => with_config(args.config, serve),
        Some(Command::Check(check)) => with_config(check.config.or(args.config), explain),
        Some(Command::Demo(demo)) => serve_demo(demo.port),
    }
}

/// `--help` and usage errors: argh reports both the same way.
fn early_exit(exit: argh::EarlyExit) -> ExitCode {
    match exit.status {
        Ok(()) => {
            say(format_args!("{}", exit.output.trim_end()));
            ExitCode::SUCCESS
        }
        Err(()) => {
            log::line(format_args!("{}", exit.output.trim_end()));
            ExitCode::from(2)
        }
    }
}

fn with_config(file: Option<PathBuf>, then: impl FnOnce(&Path, Config) -> ExitCode) -> ExitCode {
    let default = Path::new(DEFAULT_CONFIG);
    if file.is_none() && !default.exists() {
        log::line(format_args!(
            "there is no {DEFAULT_CONFIG} here\n\
             \n  To configure your providers:  cp config.example.yaml config.yaml, and edit it\
             \n  To use a file elsewhere:      limitrate --config FILE\
             \n  To see it work without a key: limitrate demo"
        ));
        return ExitCode::from(2);
    }
    let file = file.as_deref().unwrap_or(default);
    match config::load(file, &|name| std::env::var(name).ok()) {
        Ok(config) => then(file, config),
        Err(faults) => {
            log::line(format_args!("{} can't be used\n{faults}", file.display()));
            ExitCode::from(2)
        }
    }
}

/// `limitrate check`
fn explain(file: &Path, config: Config) -> ExitCode {
    let count = config.providers.len();
    let noun = if count == 1 { "provider" } else { "providers" };
    say(format_args!("{}: fine, {count} {noun}", file.display()));
    for provider in &config.providers {
        say(format_args!("\n{}", describe(provider)));
        say(format_args!("  base_url   {}", provider.base_url));
        say(format_args!("  models     {}", model_names(provider)));
        let rate = &provider.rate_limit;
        match rate.max_wait {
            None => say(format_args!(
                "  queue      up to {} requests, each waits for as long as it takes",
                provider.max_queue
            )),
            Some(wait) => say(format_args!(
                "  queue      up to {} requests; one that would wait over {} gets 503 with Retry-After",
                provider.max_queue,
                seconds(wait)
            )),
        }
        for limit in limits(&rate.budget) {
            say(format_args!("  limit      {limit}"));
        }
        say(format_args!("  worst case {} sends in any 60 s", worst_case(rate)));
        for (model, limit) in provider.models.iter().filter_map(|model| Some((model, model.rate_limit.as_ref()?))) {
            let all: Vec<String> = limit.pace.iter().map(spread).chain(limits(&limit.budget)).collect();
            say(format_args!("  model      {}: {}", model.id, all.join("; ")));
        }
    }
    for warning in warnings(&config) {
        say(format_args!("\nwarning: {warning}"));
    }
    ExitCode::SUCCESS
}

/// `limitrate`
fn serve(_file: &Path, config: Config) -> ExitCode {
    for warning in warnings(&config) {
        log::line(format_args!("{warning}"));
    }
    serve_until_signalled(&config, |address| {
        say(format_args!("limitrate {} at {}", env!("CARGO_PKG_VERSION"), addresses(address)));
    })
}

/// `limitrate demo`
fn serve_demo(port: u16) -> ExitCode {
    let upstream = match demo::start() {
        Ok(upstream) => upstream,
        Err(error) => {
            log::line(format_args!("the demo provider can't start: {error}"));
            return ExitCode::from(1);
        }
    };
    serve_until_signalled(&demo::config(port, upstream), |address| {
        say(format_args!("{}", demo::instructions(address)));
    })
}

fn serve_until_signalled(config: &Config, announce: impl FnOnce(SocketAddr)) -> ExitCode {
    match try_serving(config, announce) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let (host, port) = (&config.server.host, config.server.port);
            match error.kind() {
                std::io::ErrorKind::AddrInUse => log::line(format_args!(
                    "port {port} on {host} is taken by another program; `ss -ltnp 'sport = :{port}'` says by which. \
                     Stop that one or choose another server.port"
                )),
                std::io::ErrorKind::PermissionDenied => log::line(format_args!(
                    "port {port} on {host} may not be opened by this user: {error}. Choose a server.port of 1024 or more"
                )),
                _ => log::line(format_args!("cannot serve on {host}:{port}: {error}")),
            }
            ExitCode::from(1)
        }
    }
}

fn try_serving(config: &Config, announce: impl FnOnce(SocketAddr)) -> std::io::Result<()> {
    raise_file_limit(config.server.max_connections as u64);
    let server = Server::bind(config)?;
    let signals = Signals::new([Signal::Term, Signal::Int])?;
    announce(server.local_addr()?);
    for provider in &config.providers {
        let most = worst_case(&provider.rate_limit);
        say(format_args!("  {}, at most {most} in any 60 s, models: {}", describe(provider), model_names(provider)));
    }
    notify_systemd("READY=1");
    log::in_background();
    let (stop, stopped) = async_channel::bounded(2);
    let served = smol::block_on(future::or(server.run(stopped), forward_signals(signals, stop)));
    log::flush();
    served
}

/// SIGTERM and SIGINT drain; the second one ends at once. Never returns.
async fn forward_signals<T>(mut signals: Signals, stop: Sender<Stop>) -> T {
    while let Some(Ok(_)) = signals.next().await {
        notify_systemd("STOPPING=1");
        let _ = stop.try_send(Stop::Drain);
    }
    future::pending().await
}

/// Lets as many files be open as the system allows and says where that is not enough.
fn raise_file_limit(max_connections: u64) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_err() {
        log::line(format_args!("the limit on open files stays at {}", current.unwrap_or(u64::MAX)));
    }
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    // A caller's connection and the provider's that answers it.
    let wanted = 2 * max_connections + SPARE_FILES;
    if wanted > allowed {
        log::line(format_args!(
            "max_connections: {max_connections} may need {wanted} open files and the system allows {allowed}; \
             raise `ulimit -Hn` (LimitNOFILE= in systemd) or set max_connections: {}",
            allowed.saturating_sub(SPARE_FILES) / 2
        ));
    }
}

/// sd_notify(3): one datagram to the socket that systemd names. Without one there is nothing to do.
fn notify_systemd(state: &str) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let Ok(socket) = UnixDatagram::unbound() else { return };
    let path = path.as_encoded_bytes();
    let address = match path.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(Path::new(&*String::from_utf8_lossy(path))),
    };
    let sent = address.and_then(|address| socket.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        log::line(format_args!("systemd can't be told {state}: {error}"));
    }
}

/// `nvidia-nim: spaced, one send every 1.5 s (40 a minute)`
fn describe(provider: &config::Provider) -> String {
    format!("{}: {}", provider.name, spread(&provider.rate_limit.pace))
}

fn spread(pace: &Pace) -> String {
    let (every, a_minute) = (seconds(pace.interval), per_minute(pace.interval));
    match pace.mode {
        Mode::Spaced => format!("spaced, one send every {every} ({a_minute} a minute)"),
        Mode::Burst => {
            format!("burst, up to {} at once, then one send every {every} ({a_minute} a minute)", pace.capacity)
        }
        Mode::Window => format!("window, up to {0} at once ({0} a minute)", pace.capacity),
    }
}

/// The most sends in any 60 s.
fn worst_case(rate: &RateLimit) -> u64 {
    provider::worst_case_per_minute(Some(&rate.pace), &rate.budget).expect("a pace always limits")
}

/// One phrase for each limit beside the pace.
fn limits(budget: &Budget) -> Vec<String> {
    let minute = seconds(Duration::from_secs(60) + budget.window_margin);
    let day = |day: Day| match day.reset {
        DayReset::At(_) => format!("{} sends a day, which begins at {} UTC", day.max, day.reset),
        DayReset::Rolling => format!("{} sends in any 24 h", day.max),
    };
    let all = [
        budget.window.map(|max| format!("{max} sends in any {minute}")),
        budget.day.map(day),
        budget.tokens_per_minute.map(|max| format!("{max} tokens in any {minute}")),
        budget.max_concurrent.map(|max| format!("{max} requests in flight")),
    ];
    all.into_iter().flatten().map(|limit| format!("at most {limit}")).collect()
}

/// Where a configuration is right and may still let through more than somebody thinks.
fn warnings(config: &Config) -> Vec<String> {
    let of_provider = |provider: &config::Provider| {
        let rate = &provider.rate_limit;
        let own = excess(&provider.name, &rate.pace, &rate.budget);
        let of_model = |model: &config::Model| {
            let limit = model.rate_limit.as_ref()?;
            excess(&format!("{}/{}", provider.name, model.id), limit.pace.as_ref()?, &limit.budget)
        };
        own.into_iter().chain(provider.models.iter().filter_map(of_model)).collect::<Vec<_>>()
    };
    config.providers.iter().flat_map(of_provider).collect()
}

/// A bucket that starts full lets more than `rpm` through in its first minute.
fn excess(name: &str, pace: &Pace, budget: &Budget) -> Option<String> {
    let rpm = pace.rpm.filter(|_| pace.mode == Mode::Burst)?;
    let most = provider::worst_case_per_minute(Some(pace), budget).filter(|most| *most as f64 > rpm.ceil())?;
    Some(format!(
        "{name}: capacity {} on top of rpm {rpm} lets {most} requests through in the first 60 s; \
         add strict_window: true if your provider counts a rolling minute",
        pace.capacity
    ))
}

fn model_names(provider: &config::Provider) -> String {
    let name = |model: &config::Model| match model.id == model.upstream {
        true => model.id.clone(),
        false => format!("{} (as {})", model.id, model.upstream),
    };
    provider.models.iter().map(name).collect::<Vec<_>>().join(", ")
}

fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds > 0.0 && seconds < 0.01 {
        format!("{} ms", rounded(seconds * 1000.0))
    } else {
        format!("{} s", rounded(seconds))
    }
}

fn per_minute(interval: Duration) -> f64 {
    rounded(60.0 / interval.as_secs_f64())
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Where to point an SDK at.
fn addresses(address: SocketAddr) -> String {
    let port = address.port();
    if !address.ip().is_unspecified() {
        return format!("http://{address}/v1");
    }
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("http://localhost:{port}/v1, from other machines http://{host}:{port}/v1")
}

/// Standard output may be closed; that stops nobody from serving.
fn say(message: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout().lock(), "{message}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Providers with these rate limits, each with model `m` and model `n`, which has `own`.
    fn config(rate_limits: &[&str], own: &str) -> Config {
        let provider = |(at, limit)| {
            format!(
                "  - name: p{at}\n    base_url: http://h\n    models: [m, {{id: n, rate_limit: {own}}}]\n    \
                 rate_limit: {limit}\n"
            )
        };
        let text: String = rate_limits.iter().enumerate().map(provider).collect();
        config::parse(&format!("providers:\n{text}"), Path::new("test"), &|_| None).unwrap()
    }

    #[test]
    fn a_bucket_on_top_of_rpm_is_warned_of() {
        let config = config(
            &[
                "{mode: burst, rpm: 120, capacity: 10}",
                "{mode: burst, rpm: 40.5, capacity: 2}",
                "{mode: burst, rpm: 120, capacity: 1}",
                "{mode: burst, rpm: 120, capacity: 10, strict_window: true}",
                "{mode: burst, rpm: 120, capacity: 10, interval_seconds: 1}",
                "{mode: burst, rpm: 120, capacity: 10, rpd: 60}",
                "{mode: burst, interval_seconds: 0.5, capacity: 10}",
                "{mode: spaced, rpm: 40.5}",
                "{mode: window, rpm: 120}",
            ],
            "{mode: burst, rpm: 3, capacity: 3, rpd: 9}",
        );
        let advice =
            "requests through in the first 60 s; add strict_window: true if your provider counts a rolling minute";
        let (of_models, of_providers): (Vec<_>, Vec<_>) =
            warnings(&config).into_iter().partition(|warning| warning.contains("/n: "));
        assert_eq!(
            of_providers,
            [
                format!("p0: capacity 10 on top of rpm 120 lets 129 {advice}"),
                format!("p1: capacity 2 on top of rpm 40.5 lets 42 {advice}"),
            ]
        );
        assert_eq!(of_models.len(), config.providers.len());
        assert_eq!(of_models[0], format!("p0/n: capacity 3 on top of rpm 3 lets 5 {advice}"));
    }

    #[test]
    fn every_limit_is_told() {
        let all = "{mode: window, rpm: 40, window_margin_ms: 1500, rpd: 900, day_resets_at: \"00:00-08:00\", tpm: 70, \
                   max_concurrent: 4}";
        let config = config(&[all, "{rpm: 40}"], "{rpd: 5, day_resets_at: rolling}");
        let [first, second] = config.providers.as_slice() else { panic!("{config:?}") };
        assert_eq!(describe(first), "p0: window, up to 40 at once (40 a minute)");
        assert_eq!(
            limits(&first.rate_limit.budget),
            [
                "at most 40 sends in any 61.5 s",
                "at most 900 sends a day, which begins at 08:00 UTC",
                "at most 70 tokens in any 61.5 s",
                "at most 4 requests in flight",
            ]
        );
        assert_eq!(worst_case(&first.rate_limit), 40);
        assert_eq!(limits(&second.rate_limit.budget), [""; 0]);
        assert_eq!(worst_case(&second.rate_limit), 40);
        let own = second.models[1].rate_limit.as_ref().unwrap();
        assert_eq!((own.pace, limits(&own.budget)), (None, vec!["at most 5 sends in any 24 h".to_owned()]));
    }
}
