//! Who is measured: the mock itself, nginx, the gateway as it is built, and whoever else is named. What is started here
//! ends with its value, and its folder goes too.

use std::fs;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::driver::{Address, ask, chat};
use crate::machine::{self, Cores, free_address, now};
use crate::mock::Mock;

/// How long a program may take until it answers.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connections a proxy keeps to the mock and takes from callers: more than any part asks for.
const KEPT: usize = 1024;
const CALLERS: usize = 14_000;

/// How long the queue of the model `hourly` may get.
pub const QUEUE: usize = 10_000;

pub const DIRECT: &str = "direct";
pub const NGINX: &str = "nginx";
pub const GATEWAY: &str = "limitrate";
pub const LOGGING: &str = "limitrate+log";

/// How a contestant comes about.
#[derive(Clone)]
pub enum Recipe {
    /// No proxy at all.
    Direct,
    Nginx,
    Gateway {
        program: PathBuf,
        /// Whether it writes a line for each request, as it does by default.
        logs: bool,
    },
    /// Somebody else started it.
    Running {
        address: SocketAddr,
        base: String,
        pid: Option<u32>,
    },
}

/// A contestant's name in the table, and what it is.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub recipe: Recipe,
}

impl Entry {
    pub fn new(name: &str, recipe: Recipe) -> Entry {
        Entry { name: name.to_owned(), recipe }
    }

    /// `NAME=http://HOST:PORT[/BASE][@PID]` or `NAME=PROGRAM`, another build of the gateway.
    pub fn named(argument: &str) -> Result<Entry, String> {
        let (name, target) =
            argument.split_once('=').ok_or(format!("{argument}: neither a part nor NAME=URL"))?;
        let Some(rest) = target.strip_prefix("http://") else {
            let program = PathBuf::from(target);
            return match program.is_file() {
                true => Ok(Entry::new(name, Recipe::Gateway { program, logs: false })),
                false => Err(format!("{target}: neither an http:// URL nor a program")),
            };
        };
        let (url, pid) = match rest.split_once('@') {
            Some((url, pid)) => {
                (url, Some(pid.parse().map_err(|_| format!("{pid} is no process id"))?))
            }
            None => (rest, None),
        };
        let (host, base) = url.find('/').map_or((url, "/v1"), |at| url.split_at(at));
        let addresses = host.to_socket_addrs().map_err(|error| format!("{host}: {error}"))?;
        let address = addresses
            .into_iter()
            .find(SocketAddr::is_ipv4)
            .ok_or(format!("{host} has no IPv4 address"))?;
        let base = base.trim_end_matches('/').to_owned();
        Ok(Entry::new(name, Recipe::Running { address, base, pid }))
    }

    pub fn is_gateway(&self) -> bool {
        matches!(self.recipe, Recipe::Gateway { logs: false, .. })
    }

    /// Whether its process is known, so that its memory is. The log makes no difference worth the time to that.
    pub fn is_process(&self) -> bool {
        !matches!(
            self.recipe,
            Recipe::Direct | Recipe::Running { pid: None, .. } | Recipe::Gateway { logs: true, .. }
        )
    }

    pub fn is_started_here(&self) -> bool {
        matches!(self.recipe, Recipe::Nginx | Recipe::Gateway { logs: false, .. })
    }

    /// Starts it, and waits until it answers.
    pub fn start(&self, mock: &Mock, cores: &Cores) -> io::Result<Contestant> {
        let (address, base, process) = match &self.recipe {
            Recipe::Direct => (mock.address, "/v1", Process::None),
            Recipe::Running { address, base, pid } => (*address, &base[..], Process::Foreign(*pid)),
            Recipe::Nginx => {
                let (address, program) = nginx(mock, cores)?;
                (address, "/v1", Process::Own(program))
            }
            Recipe::Gateway { program, logs } => {
                let (address, program) = gateway(program, &providers(mock, *logs), cores)?;
                (address, "/v1", Process::Own(program))
            }
        };
        Ok(Contestant {
            name: self.name.clone(),
            address: address.into(),
            base: base.to_owned(),
            process,
        })
    }
}

/// A contestant that answers.
pub struct Contestant {
    pub name: String,
    pub address: Address,
    base: String,
    process: Process,
}

enum Process {
    None,
    Foreign(Option<u32>),
    Own(Program),
}

impl Contestant {
    pub fn chat(&self, model: &str, is_stream: bool, body_bytes: usize) -> Vec<u8> {
        chat(&self.base, model, is_stream, body_bytes)
    }

    /// CPU time up to now in nanoseconds, if its process is known.
    pub fn cpu(&self) -> io::Result<Option<u64>> {
        self.pid().map(machine::cpu).transpose()
    }

    /// Resident bytes.
    pub fn resident(&self) -> io::Result<u64> {
        machine::resident(self.pid().ok_or(io::Error::other("its process is not known"))?)
    }

    /// From just before its program was started until it answered, in nanoseconds.
    pub fn took_to_start(&self) -> Option<u64> {
        match &self.process {
            Process::Own(program) => Some(program.took),
            _ => None,
        }
    }

    fn pid(&self) -> Option<u32> {
        match &self.process {
            Process::None => None,
            Process::Foreign(pid) => *pid,
            Process::Own(program) => Some(program.child.id()),
        }
    }
}

/// A process of ours with its folder; dropping it ends it.
pub struct Program {
    child: Child,
    folder: Folder,
    took: u64,
}

impl Program {
    pub fn folder(&self) -> &Path {
        &self.folder.0
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        running().retain(|(pid, _)| *pid != self.child.id());
    }
}

/// The programs that are to be ended, with their folders.
static RUNNING: Mutex<Vec<(u32, PathBuf)>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<(u32, PathBuf)>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has SIGINT and SIGTERM end what was started here, too. To be called before there is another thread.
pub fn end_all_on_a_signal() -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?; // threads inherit it; std takes it from children
    thread::spawn(move || {
        let _ = signals.wait();
        for (pid, folder) in running().iter() {
            let _ = kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
            let _ = fs::remove_dir_all(folder);
        }
        process::exit(1);
    });
    Ok(())
}

/// A folder for a program's files, gone when it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> io::Result<Folder> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "limitrate-bench-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let folder = Folder(std::env::temp_dir().join(name));
        fs::create_dir(&folder.0)?;
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a gateway is told: its files by name, and in `config.yaml` everything below `host` and `port`.
pub struct Settings {
    pub server: String,
    pub rest: String,
    pub files: Vec<(&'static str, String)>,
    /// Where it answers for its health, if not at its port in plain HTTP; relative to its folder.
    pub socket: Option<&'static str>,
}

/// A provider for each part: they have the mock's addresses and differ in their limits.
fn providers(mock: &Mock, logs: bool) -> Settings {
    let provider = |model: &str, address: SocketAddr, rate: &str| {
        format!(
            "  - {{name: {model}, base_url: 'http://{address}/v1', models: [{model}], pool_max_idle: {KEPT}, \
             max_queue: {QUEUE}, rate_limit: {{{rate}}}}}\n"
        )
    };
    let rest = [
        format!("log: {{level: {}}}\nproviders:\n", if logs { "info" } else { "error" }),
        provider("fast", mock.address, "mode: burst, rpm: 60000000, capacity: 1000000"),
        provider("rpm600", mock.noted, "mode: spaced, rpm: 600"),
        provider("rpm60000", mock.noted, "mode: spaced, rpm: 60000"),
        provider("hourly", mock.address, "mode: spaced, interval_seconds: 3600"),
    ];
    Settings {
        server: format!("max_connections: {CALLERS}, max_connections_per_client: {CALLERS}"),
        rest: rest.concat(),
        files: Vec::new(),
        socket: None,
    }
}

/// A gateway that answers for its health.
pub fn gateway(
    program: &Path,
    settings: &Settings,
    cores: &Cores,
) -> io::Result<(SocketAddr, Program)> {
    let (address, folder) = (free_address()?, Folder::new()?);
    let server =
        format!("server: {{host: 127.0.0.1, port: {}, {}}}\n", address.port(), settings.server);
    fs::write(folder.0.join("config.yaml"), server + &settings.rest)?;
    for (name, text) in &settings.files {
        fs::write(folder.0.join(name), text)?;
    }
    let mut command = Command::new(program);
    command.arg("--config").arg(folder.0.join("config.yaml"));
    let asked =
        settings.socket.map_or(Address::Tcp(address), |name| Address::Unix(folder.0.join(name)));
    Ok((address, start(command, folder, &asked, "/admin/health", cores)?))
}

/// One nginx process with keep-alive on both sides, no log and no buffering.
fn nginx(mock: &Mock, cores: &Cores) -> io::Result<(SocketAddr, Program)> {
    let (address, folder) = (free_address()?, Folder::new()?);
    let text = format!(
        "daemon off; master_process off; pid nginx.pid; error_log stderr emerg;\n\
         events {{ worker_connections {}; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 300; client_max_body_size 32m;\n\
         upstream up {{ server {}; keepalive {KEPT}; keepalive_requests 1000000000; }}\n\
         server {{ listen {address} backlog=4096;\n\
         location = /admin/health {{ return 200 ok; }}\n\
         location / {{ proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection '';\n\
         proxy_buffering off; client_body_buffer_size 128k; }} }} }}\n",
        4 * KEPT,
        mock.address,
    );
    fs::write(folder.0.join("nginx.conf"), text)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(&folder.0).arg("-c").arg("nginx.conf");
    Ok((address, start(command, folder, &address.into(), "/admin/health", cores)?))
}

/// Starts a program on its core and asks it until it answers, without a pause: what runs here has another core.
fn start(
    mut command: Command,
    folder: Folder,
    asked: &Address,
    path: &str,
    cores: &Cores,
) -> io::Result<Program> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let request = format!("GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n");
    let began = now();
    let name = Path::new(command.get_program())
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let child = cores.on_the_proxys(|| command.spawn());
    let child = child.map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
    running().push((child.id(), folder.0.clone()));
    let mut program = Program { child, folder, took: 0 };
    while let Err(error) = ask(asked, request.as_bytes()) {
        if let Some(status) = program.child.try_wait()? {
            return Err(io::Error::other(format!("{name} ended at once, with {status}")));
        }
        if now() - began > PATIENCE.as_nanos() as u64 {
            return Err(error);
        }
    }
    program.took = now() - began;
    Ok(program)
}
