//! The command line: `limitrate` serves, `limitrate check` explains a configuration, `limitrate demo` shows it all
//! without a key, `limitrate health` and `limitrate top` ask one that runs.
//!
//! Owns what a person reads at the start, the exit codes (0 fine, 1 runtime failure, 2 bad configuration or usage), the
//! signals, systemd's sockets and notifications. A configuration in words is `check`'s.

mod ask;
mod check;
mod health;
mod top;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use argh::FromArgs;
use async_channel::Sender;
use async_signal::{Signal, Signals};
use futures_lite::{StreamExt, future};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::{self, Config, Secret};
use crate::server::{Place, Server, Stop};
use crate::{demo, log};
use ask::Target;

const DEFAULT_CONFIG: &str = "config.yaml";

/// File descriptors beside two per connection: standard streams, listener, pollers, idle connections to providers,
/// connections that are refused or make room.
const SPARE_FILES: u64 = 192;

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
    Health(Health),
    Top(Top),
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

/// Ask a running gateway whether it serves; exits with 0 if it does.
#[derive(FromArgs)]
#[argh(subcommand, name = "health")]
struct Health {
    /// where it serves (default: http://127.0.0.1:8080)
    #[argh(option, arg_name = "url", from_str_fn(Target::of_url))]
    url: Option<Target>,
    /// the configuration file that says where it serves, in the place of --url
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,
}

/// Show a running gateway's lines and latest requests, live in this terminal.
#[derive(FromArgs)]
#[argh(subcommand, name = "top")]
struct Top {
    /// where it serves (default: http://127.0.0.1:8080); the variable LIMITRATE_TOKEN has its token
    #[argh(option, arg_name = "url", from_str_fn(Target::of_url))]
    url: Option<Target>,
    /// the configuration file that says where it serves and its token, in the place of --url
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,
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
        Some(Command::Health(health)) => {
            with_target(health.url, health.config.or(args.config), |target, _| ask(target))
        }
        Some(Command::Top(top)) => {
            with_target(top.url, top.config.or(args.config), |target, token| {
                let given = std::env::var("LIMITRATE_TOKEN").ok().filter(|token| !token.is_empty());
                top::run(&target.with_token(given.map(Secret::new).or(token)))
            })
        }
    }
}

/// Where a gateway is: at a URL, or where a file says, which says its token too; else where it is if nobody says anything.
fn with_target(
    url: Option<Target>,
    file: Option<PathBuf>,
    then: impl FnOnce(Target, Option<Secret>) -> ExitCode,
) -> ExitCode {
    match (url, file) {
        (None, Some(file)) => with_config(Some(file), |_, config| {
            then(Target::of_config(&config.server), config.server.auth_token.clone())
        }),
        (url, _) => {
            let target = url
                .unwrap_or_else(|| Target::of_url(ask::DEFAULT_URL).expect("the default is a URL"));
            then(target, None)
        }
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
            log::error(format_args!("{}", exit.output.trim_end()));
            ExitCode::from(2)
        }
    }
}

fn with_config(file: Option<PathBuf>, then: impl FnOnce(&Path, Config) -> ExitCode) -> ExitCode {
    let default = Path::new(DEFAULT_CONFIG);
    if file.is_none() && !default.exists() {
        log::error(format_args!(
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
            log::error(format_args!("{} can't be used\n{faults}", file.display()));
            ExitCode::from(2)
        }
    }
}

/// `limitrate check`
fn explain(file: &Path, config: Config) -> ExitCode {
    say(format_args!("{}", check::report(file, &config).trim_end()));
    ExitCode::SUCCESS
}

/// `limitrate`
fn serve(file: &Path, config: Config) -> ExitCode {
    serve_until_signalled(&config, Some(file), |server| {
        let places: Vec<String> = server.places().iter().map(directions).collect();
        let given = if server.is_adopted() { " (given by systemd)" } else { "" };
        say(format_args!(
            "limitrate {} at {}{given}",
            env!("CARGO_PKG_VERSION"),
            places.join(" and ")
        ));
    })
}

/// `limitrate demo`
fn serve_demo(port: u16) -> ExitCode {
    let upstream = match demo::start() {
        Ok(upstream) => upstream,
        Err(error) => {
            log::error(format_args!("the demo provider can't start: {error}"));
            return ExitCode::from(1);
        }
    };
    serve_until_signalled(&demo::config(port, upstream), None, |server| {
        let address = server.local_addr().expect("the demo has a port");
        say(format_args!("{}", demo::instructions(address)));
    })
}

/// `limitrate health`
fn ask(place: Target) -> ExitCode {
    match health::ask(&place) {
        Ok(words) => {
            say(format_args!("{words}"));
            ExitCode::SUCCESS
        }
        Err(words) => {
            log::error(format_args!("{words}"));
            ExitCode::from(1)
        }
    }
}

/// `file` is read again on SIGHUP.
fn serve_until_signalled(
    config: &Config,
    file: Option<&Path>,
    announce: impl FnOnce(&Server),
) -> ExitCode {
    let code = match try_serving(config, file, announce) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let (host, port) = (&config.server.host, config.server.port.unwrap_or_default());
            match error.kind() {
                std::io::ErrorKind::AddrInUse => log::error(format_args!(
                    "port {port} on {host} is taken by another program; `ss -ltnp 'sport = :{port}'` says by which. \
                     Stop that one or choose another server.port"
                )),
                std::io::ErrorKind::PermissionDenied => log::error(format_args!(
                    "port {port} on {host} may not be opened by this user. Choose a server.port of 1024 or more"
                )),
                _ => log::error(format_args!("{error}")),
            }
            ExitCode::from(1)
        }
    };
    log::flush();
    code
}

fn try_serving(
    config: &Config,
    file: Option<&Path>,
    announce: impl FnOnce(&Server),
) -> std::io::Result<()> {
    let given = sockets_of_systemd()?;
    let server =
        if given.is_empty() { Server::bind(config) } else { Server::adopt(config, given) }?;
    // From here on everything on standard error is a line of the log.
    log::start(config.log);
    warn(config);
    raise_file_limit(config.server.max_connections as u64);
    let signals = Signals::new([Signal::Term, Signal::Int, Signal::Hup])?;
    let reloads = server.reloads();
    announce(&server);
    for provider in &config.providers {
        say(format_args!("  {}", check::summary(provider)));
    }
    notify_systemd("READY=1");
    let (stop, stopped) = async_channel::bounded(2);
    let file = file.map(Path::to_owned);
    smol::block_on(server.run_beside(stopped, forward_signals(signals, stop, file, reloads)))
}

/// SIGTERM and SIGINT drain; the second one ends at once. SIGHUP reads the file again, where there is one. Never returns.
async fn forward_signals(
    mut signals: Signals,
    stop: Sender<Stop>,
    file: Option<PathBuf>,
    reloads: Sender<Config>,
) {
    while let Some(Ok(signal)) = signals.next().await {
        if let (Signal::Hup, Some(file)) = (signal, &file) {
            reload(file, &reloads);
            continue;
        }
        notify_systemd("STOPPING=1");
        let _ = stop.try_send(Stop::Drain);
    }
    future::pending().await
}

/// A file with any fault changes nothing.
fn reload(file: &Path, reloads: &Sender<Config>) {
    match config::load(file, &|name| std::env::var(name).ok()) {
        Ok(config) => {
            warn(&config);
            raise_file_limit(config.server.max_connections as u64);
            // The latest counts.
            let _ = reloads.force_send(config);
        }
        Err(faults) => {
            log::error(format_args!("nothing was reloaded: {} can't be used", file.display()));
            faults.in_brief().for_each(|fault| log::error(format_args!("{fault}")));
        }
    }
}

/// What is no fault and may still be a mistake.
fn warn(config: &Config) {
    for warning in check::warnings(config) {
        log::warn(format_args!("{warning}"));
    }
}

/// Lets as many files be open as the system allows and says where that is not enough.
fn raise_file_limit(max_connections: u64) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_err() {
        log::warn(format_args!("the limit on open files stays at {}", current.unwrap_or(u64::MAX)));
    }
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    // A caller's connection and the provider's that answers it.
    let wanted = 2 * max_connections + SPARE_FILES;
    if wanted > allowed {
        log::warn(format_args!(
            "max_connections: {max_connections} may need {wanted} open files and the system allows {allowed}; \
             raise `ulimit -Hn` (LimitNOFILE= in systemd) or set max_connections: {}",
            allowed.saturating_sub(SPARE_FILES) / 2
        ));
    }
}

/// sd_listen_fds(3): sockets that systemd has opened for this process. To be asked for once.
fn sockets_of_systemd() -> std::io::Result<Vec<OwnedFd>> {
    let sockets = sd_listen_fds::get().map_err(|error| {
        std::io::Error::other(format!(
            "LISTEN_PID and LISTEN_FDS are not as systemd sets them: {error}"
        ))
    })?;
    Ok(sockets.into_iter().map(|(_, socket)| socket.into_std()).collect())
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
        log::warn(format_args!("systemd can't be told {state}: {error}"));
    }
}

/// Where to point an SDK at.
fn directions(place: &Place) -> String {
    let (scheme, address) = match place {
        Place::Http(address) if address.ip().is_unspecified() => ("http", address),
        Place::Https(address) if address.ip().is_unspecified() => ("https", address),
        place => return place.to_string(),
    };
    let port = address.port();
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{scheme}://localhost:{port}/v1, from other machines {scheme}://{host}:{port}/v1")
}

/// Standard output may be closed; that stops nobody from serving.
fn say(message: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout().lock(), "{message}");
}
