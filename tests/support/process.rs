//! The built binary as a process of its own: for signals, exit codes, limits of the system and what it prints.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{PATIENCE, get};

const BINARY: &str = env!("CARGO_BIN_EXE_limitrate");

/// A gateway that serves. Dropping it kills it.
pub struct Process {
    child: Child,
    addr: Option<SocketAddr>,
    said: String,
    log: Receiver<String>,
    /// Held so that it stays open.
    _unread: Option<ChildStderr>,
}

impl Process {
    /// A new file under the build directory.
    pub fn file(name: &str, text: &str) -> PathBuf {
        static FILES: AtomicUsize = AtomicUsize::new(0);
        let n = FILES.fetch_add(1, Ordering::Relaxed);
        let folder =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{n}", std::process::id()));
        // Process numbers come again: an earlier run may have left one of that name.
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("create a folder under the build directory");
        let file = folder.join(name);
        fs::write(&file, text).expect("write a file under the build directory");
        file
    }

    /// A configuration with these lines of `server:` and these entries of `providers:`.
    pub fn config(server: &str, providers: &str) -> PathBuf {
        let server: String = server.lines().map(|line| format!("  {line}\n")).collect();
        let text =
            format!("server:\n  host: 127.0.0.1\n  port: 0\n{server}providers:\n{providers}");
        Process::file("config.yaml", &text)
    }

    /// Runs a command line to its end.
    pub fn run(arguments: &[&str]) -> Output {
        Process::run_in(Path::new(env!("CARGO_TARGET_TMPDIR")), arguments)
    }

    /// The same in another working directory.
    pub fn run_in(folder: &Path, arguments: &[&str]) -> Output {
        Command::new(BINARY).args(arguments).current_dir(folder).output().expect("the binary runs")
    }

    /// Serves what `config` says.
    pub fn serve(config: &Path) -> Process {
        Process::serve_with(config, "", &[])
    }

    /// The same after a line of shell (`ulimit`) and with environment variables.
    pub fn serve_with(config: &Path, shell: &str, env: &[(&str, &str)]) -> Process {
        Process::serve_given(config, shell, env, Stdio::null())
    }

    /// The same with this standard input.
    pub fn serve_given(config: &Path, shell: &str, env: &[(&str, &str)], stdin: Stdio) -> Process {
        let mut process = Process::spawn(config, shell, env, stdin);
        process.read_log();
        process
    }

    /// Begins to read a standard error that nobody has read so far.
    pub fn read_log(&mut self) {
        self.log = lines(self._unread.take().expect("nobody reads it yet"));
    }

    /// Serves what `config` says, with a standard error that fills up.
    pub fn serve_unread(config: &Path) -> Process {
        Process::spawn(config, "", &[], Stdio::null())
    }

    fn spawn(config: &Path, shell: &str, env: &[(&str, &str)], stdin: Stdio) -> Process {
        let mut child = Command::new("sh")
            .args(["-c", &format!("{shell}\nexec \"$0\" --config \"$1\""), BINARY])
            .arg(config)
            .envs(env.iter().copied())
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("sh runs");
        let said = lines(child.stdout.take().expect("stdout is piped"));
        let unread = child.stderr.take().expect("stderr is piped");
        let Ok(first) = said.recv_timeout(PATIENCE) else {
            let _ = child.kill();
            panic!("it does not serve: {:?}", lines(unread).iter().collect::<Vec<_>>());
        };
        let addr = first.split("://").nth(1).and_then(|rest| rest.split('/').next()?.parse().ok());
        Process { child, addr, said: first, log: channel().1, _unread: Some(unread) }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr.unwrap_or_else(|| panic!("no address in {:?}", self.said))
    }

    /// The first line that it printed.
    pub fn said(&self) -> &str {
        &self.said
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("signal the gateway");
    }

    /// Stops it in its sleep, until SIGCONT.
    pub fn stop(&self) {
        self.wait_state('S');
        self.signal(Signal::STOP);
        self.wait_state('T');
    }

    /// Waits until its first thread is in this state (proc_pid_stat(5)).
    fn wait_state(&self, state: char) {
        let stat = format!("/proc/{}/stat", self.id());
        let deadline = Instant::now() + PATIENCE;
        // Behind the name, which is in brackets.
        let is =
            |stat: String| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(state));
        while !fs::read_to_string(&stat).is_ok_and(is) {
            assert!(Instant::now() < deadline, "not in state {state}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for a line on standard error.
    pub fn wait_log(&self, part: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.log.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(part) => return line,
                Ok(line) => seen.push(line),
                Err(_) => panic!("no {part:?} in {seen:#?}"),
            }
        }
    }

    /// What it still says until it ends.
    pub fn rest_of_log(&self) -> Vec<String> {
        let line = || match self.log.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("it does not end"),
        };
        std::iter::from_fn(line).collect()
    }

    /// Waits until so many requests wait in the first provider's queue.
    pub fn wait_queued(&self, n: u64) {
        let deadline = Instant::now() + PATIENCE;
        while get(self.addr(), "/admin/stats").json()["providers"][0]["queued_ahead"] != n {
            assert!(Instant::now() < deadline, "not {n} in line");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until it has ended by itself.
    pub fn wait_exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for the gateway") {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (line, lines) = channel();
    thread::spawn(move || {
        BufReader::new(pipe).lines().map_while(Result::ok).try_for_each(|text| line.send(text))
    });
    lines
}
