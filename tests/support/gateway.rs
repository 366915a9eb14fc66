//! The real gateway on a thread of its own, from the text of its configuration file on. The only file of the harness
//! that knows limitrate's Rust API.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use limitrate::config;
use limitrate::server::{Server, Stop};
use serde_json::Value;

use super::{PATIENCE, get};

/// A rate limit that holds nothing back, for tests about something else.
pub const UNSHAPED: &str = "{mode: burst, rpm: 600000, capacity: 1000}";

/// A rate limit of one send every `ms` milliseconds.
pub fn spaced(ms: u64) -> String {
    format!("{{mode: spaced, interval_seconds: {}}}", ms as f64 / 1000.0)
}

/// A token bucket of `capacity` that earns one token every `ms` milliseconds.
pub fn burst(ms: u64, capacity: u32) -> String {
    format!("{{mode: burst, interval_seconds: {}, capacity: {capacity}}}", ms as f64 / 1000.0)
}

/// An entry of `providers:` whose base_url is `http://{upstream}/v1`; `extras` holds further lines of it.
pub fn provider_yaml(
    name: &str,
    upstream: SocketAddr,
    models: &[&str],
    rate_limit: &str,
    extras: &str,
) -> String {
    provider_at(name, &format!("http://{upstream}/v1"), models, rate_limit, extras)
}

/// An entry of `providers:` with any base_url. Nothing is sent twice unless `extras` has a `retry:` of its own.
pub fn provider_at(
    name: &str,
    base_url: &str,
    models: &[&str],
    rate_limit: &str,
    extras: &str,
) -> String {
    let models = models.join(", ");
    let once = if extras.contains("retry:") { "" } else { "    retry: {attempts: 1}\n" };
    let extras: String = extras.lines().map(|line| format!("    {line}\n")).collect();
    format!(
        "  - name: {name}\n    base_url: {base_url}\n    models: [{models}]\n    rate_limit: {rate_limit}\n{once}{extras}"
    )
}

/// The running gateway; dropping it stops it at once.
pub struct Gateway {
    addr: Option<SocketAddr>,
    stop: async_channel::Sender<Stop>,
    ended: mpsc::Receiver<()>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Gateway {
    /// Serves these entries of `providers:`.
    pub fn start(providers: &str) -> Gateway {
        Gateway::start_with("", providers, &[])
    }

    /// The same with further lines for `server:` and with environment variables.
    pub fn start_with(server: &str, providers: &str, env: &[(&str, &str)]) -> Gateway {
        let server: String = server.lines().map(|line| format!("  {line}\n")).collect();
        let port = if server.contains("  port: ") { "" } else { "  port: 0\n" };
        let yaml = format!("server:\n  host: 127.0.0.1\n{port}{server}providers:\n{providers}");
        let env: Vec<(String, String)> =
            env.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        let (started, address) = mpsc::channel();
        let (stop, stopped) = async_channel::unbounded();
        let (end, ended) = mpsc::channel();
        let thread = thread::spawn(move || {
            // Dropped when this thread ends, in a panic too: that is what `join` waits for.
            let _end: mpsc::Sender<()> = end;
            let server = bind(&yaml, &env);
            started.send(server.local_addr()).expect("the test waits for the address");
            smol::block_on(server.run(stopped)).expect("the gateway runs");
        });
        let addr = address.recv_timeout(PATIENCE).expect("the gateway starts");
        Gateway { addr, stop, ended, thread: Some(thread) }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr.expect("it serves on a port")
    }

    /// The JSON of `/admin/stats`.
    pub fn stats(&self) -> Value {
        get(self.addr(), "/admin/stats").json()
    }

    /// The rows of `/admin/queue`.
    pub fn queue(&self) -> Vec<Value> {
        get(self.addr(), "/admin/queue").json()["queue"].as_array().expect("a list").clone()
    }

    /// Polls the first provider's stats until `wanted` holds for them.
    pub fn wait_stats(&self, wanted: impl Fn(&Value) -> bool, timeout: Duration) -> Value {
        self.wait_stats_of(0, wanted, timeout)
    }

    /// The same of the provider with that index.
    pub fn wait_stats_of(
        &self,
        provider: usize,
        wanted: impl Fn(&Value) -> bool,
        timeout: Duration,
    ) -> Value {
        let deadline = Instant::now() + timeout;
        loop {
            let stats = self.stats()["providers"][provider].take();
            if wanted(&stats) {
                return stats;
            }
            assert!(Instant::now() < deadline, "not within {timeout:?}: {stats:#}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until exactly `n` requests wait in the first provider's queue.
    pub fn wait_queued(&self, n: u64) -> Value {
        self.wait_stats(|stats| stats["queued_ahead"] == n, PATIENCE)
    }

    /// What SIGTERM does.
    pub fn drain(&self) {
        // Fails where the gateway has ended already, which `join` is there to tell.
        let _ = self.stop.try_send(Stop::Drain);
    }

    /// Whether the gateway ends within `timeout`.
    pub fn join(&self, timeout: Duration) -> bool {
        self.ended.recv_timeout(timeout) == Err(mpsc::RecvTimeoutError::Disconnected)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.stop.try_send(Stop::Now);
        let ended = self.join(PATIENCE);
        if thread::panicking() {
            return;
        }
        assert!(ended, "the gateway does not stop");
        let outcome = self.thread.take().expect("joined only here").join();
        assert!(outcome.is_ok(), "the gateway's thread panicked");
    }
}

fn bind(yaml: &str, env: &[(String, String)]) -> Server {
    let lookup =
        |name: &str| env.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    let config = config::parse(yaml, Path::new("test.yaml"), &lookup)
        .unwrap_or_else(|faults| panic!("{faults}\nin\n{yaml}"));
    Server::bind(&config).expect("bind a loopback port")
}
