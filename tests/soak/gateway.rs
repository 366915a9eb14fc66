//! The gateway under test: the built binary as a child process, its configuration, and what the system says about it.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::ask::{Limit, Spec};
use crate::pause;
use crate::provider::Desk;
use crate::wire::{Framing, Wire};

/// Lines of the log kept for the report.
const LOG_LINES: usize = 40;

/// The child. Killed when dropped.
pub struct Gateway {
    pub addr: SocketAddr,
    child: Child,
    /// Its configuration and its state file.
    files: [PathBuf; 2],
    log: Arc<Mutex<Log>>,
}

#[derive(Default)]
struct Log {
    last: VecDeque<String>,
    panics: Vec<String>,
}

/// What a process holds.
#[derive(Debug, Clone, Copy)]
pub struct Held {
    pub files: usize,
    pub memory_kib: u64,
}

impl Gateway {
    /// `patience` is how long it waits for a request head, and the measure of its other deadlines towards callers.
    pub fn start(desks: &[Rc<Desk>], patience: Duration, seed: u64) -> Gateway {
        let file = |extension| {
            std::env::temp_dir()
                .join(format!("limitrate-soak-{}-{seed}.{extension}", std::process::id()))
        };
        let files @ [config, state] = &[file("yaml"), file("json")];
        std::fs::write(config, server(patience, state) + &entries(desks))
            .expect("write the configuration");
        forget_the_past(config, state);
        let mut child = spawn(config);
        let log = Arc::new(Mutex::new(Log::default()));
        let (stderr, shared) = (child.stderr.take().expect("stderr is piped"), log.clone());
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                shared.lock().expect("nobody panics with the log").add(line);
            }
        });
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let first = lines.next().and_then(Result::ok).unwrap_or_default();
        let addr = first
            .split("http://")
            .nth(1)
            .and_then(|rest| rest.trim_end_matches("/v1").parse().ok());
        thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let log_now =
            || log.lock().expect("nobody panics with the log").last.make_contiguous().join("\n");
        let addr = addr.unwrap_or_else(|| panic!("no address in {first:?}\n{}", log_now()));
        Gateway { addr, child, files: files.clone(), log }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The rows of `/admin/stats`.
    pub async fn stats(&self) -> Result<Vec<Value>, String> {
        let answer = async {
            let mut wire = Wire::connect(self.addr).await.map_err(|error| error.to_string())?;
            let request =
                b"GET /admin/stats HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n";
            wire.send(request).await.map_err(|error| error.to_string())?;
            let head = wire.head().await.map_err(|end| format!("{end:?}"))?;
            let mut body = Vec::new();
            let framing = head.framing(Framing::UntilClose).map_err(|end| format!("{end:?}"))?;
            wire.body(framing, &mut body).await.map_err(|end| format!("{end:?}"))?;
            serde_json::from_slice::<Value>(&body).map_err(|error| error.to_string())
        };
        let mut stats = answer.await.map_err(|error: String| format!("/admin/stats: {error}"))?;
        stats["providers"]
            .as_array_mut()
            .map(std::mem::take)
            .ok_or_else(|| format!("/admin/stats says {stats}"))
    }

    pub fn terminate(&self) {
        signal(self.pid(), Signal::TERM);
    }

    /// How it ended, if it does within `patience`.
    pub async fn ended(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            let status = self.child.try_wait().expect("a child can be waited for");
            if status.is_some() || Instant::now() > deadline {
                return status;
            }
            pause(Duration::from_millis(10)).await;
        }
    }

    /// Lines of its log that tell of a panic.
    pub fn panics(&self) -> Vec<String> {
        self.log.lock().expect("nobody panics with the log").panics.clone()
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        self.log.lock().expect("nobody panics with the log").last.make_contiguous().join("\n")
    }
}

fn spawn(config: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_limitrate"))
        .arg("--config")
        .arg(config)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start the gateway")
}

/// A first start would assume that every minute's limit is used up: leaves a state file of an hour ago.
fn forget_the_past(config: &Path, state: &Path) {
    const HOUR_MS: u64 = 3_600_000;
    let mut child = spawn(config);
    let mut first = String::new();
    let _ = BufReader::new(child.stdout.take().expect("stdout is piped")).read_line(&mut first);
    signal(child.id(), Signal::TERM);
    let _ = child.wait();
    let written = std::fs::read(state).expect("the gateway writes its state file");
    let mut content: Value = serde_json::from_slice(&written).expect("the state file is JSON");
    content["saved_at"] = (content["saved_at"].as_u64().expect("a time") - HOUR_MS).into();
    std::fs::write(state, content.to_string()).expect("write the state file");
}

/// Makes the gateway read its configuration again.
pub fn reload(pid: u32) {
    signal(pid, Signal::HUP);
}

fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a child has a pid");
    // Fails where it has ended already, which `ended` tells.
    let _ = kill_process(pid, signal);
}

/// What process `pid` holds, from /proc.
pub fn held(pid: u32) -> Held {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the gateway runs").count();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the gateway runs");
    let memory =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    Held {
        files,
        memory_kib: memory
            .and_then(|kib| kib.trim().parse().ok())
            .expect("Linux tells VmRSS in kB"),
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for file in &self.files {
            let _ = std::fs::remove_file(file);
        }
    }
}

impl Log {
    fn add(&mut self, line: String) {
        if line.contains("panicked") && self.panics.len() < LOG_LINES {
            self.panics.push(line.clone());
        }
        if self.last.len() == LOG_LINES {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }
}

fn server(patience: Duration, state: &Path) -> String {
    let (head, rest, state) = (patience.as_secs(), 2 * patience.as_secs(), state.display());
    format!(
        "server:\n  host: 127.0.0.1\n  port: 0\n  header_timeout_seconds: {head}\n  body_timeout_seconds: {rest}\n  \
         keep_alive_seconds: {rest}\n  drain_seconds: 10\n  max_connections_per_client: 1024\n  state_file: {state}\nproviders:\n"
    )
}

fn entries(desks: &[Rc<Desk>]) -> String {
    let mut yaml = String::new();
    for desk in desks {
        let Spec { name, models, limit, extras, .. } = desk.spec;
        let limit = match *limit {
            Limit::Bucket { interval, capacity: 1 } => {
                format!("mode: spaced, interval_seconds: {}", interval.as_secs_f64())
            }
            Limit::Bucket { interval, capacity } => {
                format!(
                    "mode: burst, interval_seconds: {}, capacity: {capacity}",
                    interval.as_secs_f64()
                )
            }
            Limit::Window { rpm } => format!("mode: window, rpm: {rpm}, max_wait_seconds: 1"),
        };
        // Idle connections go soon, so that the count of open files comes back within a soak's patience.
        let base = format!("    base_url: http://{}/v1\n    pool_idle_seconds: 1\n", desk.addr);
        write!(yaml, "  - name: {name}\n{base}    rate_limit: {{{limit}}}\n{extras}    models:\n")
            .expect("a String takes all");
        for model in *models {
            let own = model.interval.map(|interval| {
                format!(
                    ", rate_limit: {{mode: spaced, interval_seconds: {}}}",
                    interval.as_secs_f64()
                )
            });
            let (id, upstream, own) = (model.id, model.upstream, own.unwrap_or_default());
            writeln!(yaml, "      - {{id: {id}, upstream: {upstream}{own}}}")
                .expect("a String takes all");
        }
    }
    yaml
}
