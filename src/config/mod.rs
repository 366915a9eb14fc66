//! The validated configuration: what a YAML file means once every fault in it has been refused.
//!
//! Owns the types, their defaults, the expansion of `${VAR}` and the wording of every fault. Touches no environment (the
//! caller passes one in) and no file but the configuration itself and the certificates and keys that it names; past this room no value
//! means "maybe misconfigured".
//!
//! | file | owns |
//! |---|---|
//! | `tree` | YAML text -> nodes, node -> line and column |
//! | `section` | typed reading of the keys of one mapping, gathering faults |
//! | `read` | which keys there are, their defaults and bounds |
//! | `limits` | the same for `rate_limit:` and `retry:` |
//! | `sharing` | the same for `clients:`, `api_keys:` and what else is shared |
//! | `socket` | the same for `port:` and `socket:` |
//! | `tls` | the same for `tls:`, and the certificate with its key |
//! | `network` | the same for `trusted_proxies:` |
//! | `origins`, `hosts` | the same for `cors_origins:` and `hosts:` |
//! | `base_url`, `proxy`, `expand`, `day_reset` | the small grammars inside values |
//! | `faults`, `excerpt` | how faults are printed, and what of the file may be seen with them |

mod base_url;
mod day_reset;
mod excerpt;
mod expand;
mod faults;
mod hosts;
mod limits;
mod nearest;
mod network;
mod origins;
mod proxy;
mod read;
mod section;
mod sharing;
mod socket;
mod tls;
mod tree;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::log;

pub use base_url::url_fault;
pub use faults::Faults;
pub use hosts::{Hosts, is_below};
pub use network::{Network, TrustedProxies};
pub use origins::Origins;
pub use socket::Socket;
pub use tls::Tls;

/// Looks a variable up: its value, or `None` where it is not set.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// No configuration and no CA bundle is larger; past it the path names something else (a log, a device).
const FILE_LIMIT_BYTES: u64 = 1 << 20;

/// When heartbeats begin, unless the file says something else.
pub const HEARTBEAT_AFTER: Duration = Duration::from_secs(15);

/// Reads and validates the file at `path`, or says everything that is wrong with it.
pub fn load(path: &Path, env: Env<'_>) -> Result<Config, Faults> {
    let bytes = File::open(path).and_then(read_bounded).map_err(|error| {
        let problem = format!(
            "cannot be read: {error}; copy config.example.yaml and name the copy with --config"
        );
        Faults::whole_file(path, problem)
    })?;
    match std::str::from_utf8(&bytes) {
        Ok(text) => parse(text, path, env),
        Err(error) => {
            let line =
                1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
            Err(Faults::at_line(path, line, "is not UTF-8 text; save the file as UTF-8"))
        }
    }
}

/// Validates `text`, the content of `file`: the name faults go by, whose folder a relative `ca_file` starts from.
pub fn parse(text: &str, file: &Path, env: Env<'_>) -> Result<Config, Faults> {
    let tree = tree::parse(text).map_err(|fault| Faults::syntax(file, text, fault))?;
    if matches!(tree.kind, tree::Kind::Null) {
        return Err(Faults::whole_file(file, "is empty; copy config.example.yaml".into()));
    }
    let folder = file.parent().unwrap_or(Path::new(""));
    let mut walk = section::Walk::new(env, folder);
    match read::config(&mut walk, &tree) {
        Some(config) if walk.faults.is_empty() => Ok(config),
        _ => Err(Faults::gathered(file, text, &tree, walk.faults)),
    }
}

fn read_bounded(file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(FILE_LIMIT_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_LIMIT_BYTES {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(bytes)
}

/// A whole configuration file.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// What is told on standard error, and how; default: each request, as logfmt.
    pub log: log::Settings,
    /// The front: where to listen and what a caller may use up.
    pub server: Server,
    /// At least one, with unique names, in the order of the file (the order decides routing).
    pub providers: Vec<Provider>,
}

/// `server:` with every default filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    /// An address or a name to bind; default `0.0.0.0`.
    pub host: String,
    /// Default 8080; 0 lets the system choose. `None` only where there is a socket.
    pub port: Option<u16>,
    /// A unix socket to serve on, beside the port or alone.
    pub socket: Option<Socket>,
    /// TLS on the port; `None`: plain HTTP.
    pub tls: Option<Tls>,
    /// What callers have to send as `Authorization: Bearer ...`; `None` accepts everybody.
    pub auth_token: Option<Secret>,
    /// Whose X-Forwarded-For is believed; default nobody's.
    pub trusted_proxies: TrustedProxies,
    /// The web pages that may call; default: what the browser does with none named.
    pub cors_origins: Origins,
    /// Names that clients may reach it by, besides those of a local network; default none.
    pub hosts: Hosts,
    /// The largest request body, default 32 MiB; past it 413.
    pub max_body_bytes: u64,
    /// All request bodies held at once, over all connections, default 256 MiB; past it 503.
    pub max_buffered_bytes: u64,
    /// Of one client's requests, default half of that or one body, whichever is more; past it 503.
    pub max_buffered_bytes_per_client: u64,
    /// The largest request head, default 32 KiB; past it 431.
    pub max_head_bytes: usize,
    /// Connections served at once, default 1024; past it 503.
    pub max_connections: usize,
    /// Of one client, default half of that; past it 503. Trusted proxies speak for many and have no limit of their own.
    pub max_connections_per_client: usize,
    /// From the first byte of a head to its last, default 30 s.
    pub header_timeout: Duration,
    /// Between two bytes of a request body, default 60 s.
    pub body_timeout: Duration,
    /// Between two requests on one connection, default 75 s.
    pub keep_alive: Duration,
    /// A caller who takes no byte of its answer, default 60 s.
    pub write_timeout: Duration,
    /// How long running requests may go on after SIGTERM, default 30 s.
    pub drain: Duration,
    /// Whether queued requests are still sent after SIGTERM; default: no, they get 503.
    pub drain_queue: bool,
    /// Which of several providers that list a model gets a request for it; default: the first.
    pub routing: Routing,
    /// Whether a request moves on when its provider is down or out of its budget of the day; default: no.
    pub fallback: bool,
    /// How callers share a line; default: clients in turn.
    pub fairness: Fairness,
    /// Callers who are known by a token of their own; names and tokens are unique, and no token is `auth_token`.
    pub clients: Vec<Client>,
    /// How long a streaming caller waits before it hears from the gateway, default 15 s; `None`: it never does.
    pub heartbeat_after: Option<Duration>,
    /// Whether plain callers get white space in front of their answer; default: no.
    pub heartbeat_json: bool,
    /// What a restart has to know; `None` keeps nothing.
    pub state_file: Option<PathBuf>,
}

/// A caller who is known by a token.
#[derive(Debug, Clone, PartialEq)]
pub struct Client {
    /// Shown in logs and pages.
    pub name: String,
    /// Sent by it as its API key.
    pub token: Secret,
    /// Its priority among clients; default normal.
    pub priority: Priority,
    /// How many of its requests may wait at one provider; `None`: as many as anybody's.
    pub max_queue: Option<usize>,
    /// Whether it gets heartbeats unless a request says otherwise; default: yes.
    pub heartbeat: bool,
}

/// A step of priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Priority {
    /// After the others.
    Low,
    /// As most.
    #[default]
    Normal,
    /// Before the others.
    High,
}

impl Priority {
    /// The word in the file and in the header.
    pub fn name(self) -> &'static str {
        match self {
            Priority::Low => "low",
            Priority::Normal => "normal",
            Priority::High => "high",
        }
    }
}

/// Which of several providers that list a model gets a request for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// The first in the file.
    First,
    /// The one whose slot comes first.
    Earliest,
}

impl Routing {
    /// The word in the file.
    pub fn name(self) -> &'static str {
        match self {
            Routing::First => "first",
            Routing::Earliest => "earliest",
        }
    }
}

/// How callers share a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fairness {
    /// Clients take turns; first come, first served within one.
    Client,
    /// First come, first served over all.
    Fifo,
}

impl Fairness {
    /// The word in the file.
    pub fn name(self) -> &'static str {
        match self {
            Fairness::Client => "client",
            Fairness::Fifo => "fifo",
        }
    }
}

/// One entry of `providers:`.
#[derive(Debug, Clone, PartialEq)]
pub struct Provider {
    /// Unique, without `/`.
    pub name: String,
    /// Where `/v1` of the gateway leads to.
    pub base_url: BaseUrl,
    /// Sent as `Authorization: Bearer ...`, or `x-api-key` below `/v1/messages`; each has the limits for itself, and no two
    /// are the same. Without any, none is sent.
    pub api_keys: Vec<Secret>,
    /// Extra request headers, name and value, each name once; a name given here replaces the caller's. Never a
    /// hop-by-hop or framing header, and no Authorization beside an API key.
    pub headers: Vec<(String, Secret)>,
    /// What stands between; `None`: nothing.
    pub proxy: Option<Proxy>,
    /// Extra trusted CA certificates: the PEM text of `ca_file`.
    pub ca_pem: Option<Vec<u8>>,
    /// At least one.
    pub models: Vec<Model>,
    /// How fast this provider is sent to.
    pub rate_limit: RateLimit,
    /// What is sent again.
    pub retry: Retry,
    /// DNS, TCP and TLS together, default 10 s.
    pub connect_timeout: Duration,
    /// From the sent request to the response head, default 600 s.
    pub request_timeout: Duration,
    /// Between two bytes of a response body, default 300 s.
    pub idle_timeout: Duration,
    /// Requests that may wait at once, default 1000; past it 503.
    pub max_queue: usize,
    /// Idle connections kept at most, default 256.
    pub pool_max_idle: usize,
    /// How long an idle connection is kept, default 50 s.
    pub pool_idle: Duration,
}

/// An HTTP proxy on the way to a provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// A name or an address; an IPv6 address without brackets.
    pub host: String,
    /// Given, or 80.
    pub port: u16,
    /// What `Proxy-Authorization` says (RFC 7617), if the URL has a user name.
    pub credential: Option<Secret>,
    /// The variable of the environment that names it; `None`: the file does.
    pub variable: Option<&'static str>,
}

impl Proxy {
    /// `host:port`
    pub fn authority(&self) -> String {
        host_port(&self.host, self.port)
    }
}

/// As in a request's target and in an address to connect to.
pub fn host_port(host: &str, port: u16) -> String {
    format!("{}:{port}", bracketed(host))
}

/// An IPv6 address in brackets (RFC 3986 section 3.2.2), anything else as it is.
fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// `base_url`, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl {
    /// Whether the scheme is https.
    pub tls: bool,
    /// A name or an address; an IPv6 address without brackets.
    pub host: String,
    /// Given, or the scheme's default.
    pub port: u16,
    /// Empty, or with a leading and no trailing slash: `/v1`.
    pub path: String,
    authority: String,
}

impl BaseUrl {
    /// Of the parts that are public here.
    pub fn new(tls: bool, host: String, port: u16, path: String) -> BaseUrl {
        let authority = match (tls, port) {
            (true, 443) | (false, 80) => bracketed(&host),
            _ => host_port(&host, port),
        };
        BaseUrl { tls, host, port, path, authority }
    }

    /// `host:port`, whatever the port.
    pub fn host_port(&self) -> String {
        host_port(&self.host, self.port)
    }

    /// `host`, or `host:port` where the port is not the scheme's default: the Host header (RFC 9110 section 7.2).
    pub fn authority(&self) -> &str {
        &self.authority
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}

/// One entry of `models:`.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// The name callers use.
    pub id: String,
    /// The name the provider gets; the same as `id` unless it is an alias.
    pub upstream: String,
    /// The model's own limits, kept beside the provider's.
    pub rate_limit: Option<ModelLimit>,
}

/// `rate_limit:` of a model: at least one limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelLimit {
    /// `None` where neither `rpm` nor `interval_seconds` is given.
    pub pace: Option<Pace>,
    /// The limits beside the pace.
    pub budget: Budget,
}

/// `rate_limit:` of a provider.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateLimit {
    /// How sends are spread.
    pub pace: Pace,
    /// The limits beside the pace.
    pub budget: Budget,
    /// How long a request may wait in the queue; `None` waits for ever.
    pub max_wait: Option<Duration>,
    /// What pauses when the provider asks for a pause.
    pub cooldown: CooldownScope,
    /// Whether repeated 429s stretch the interval; never in `window` mode, which has none. Default: no.
    pub adaptive: bool,
}

/// How sends are spread in time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// By which rule.
    pub mode: Mode,
    /// As written; `None` where only `interval_seconds` was given.
    pub rpm: Option<f64>,
    /// The cadence: the longer of 60 s / rpm and `interval_seconds`; never zero. In `window` mode the mean of a full minute.
    pub interval: Duration,
    /// Sends that may go at once: 1 in `spaced` mode, the whole window in `window` mode.
    pub capacity: u32,
}

/// The rule by which sends are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One send every interval, closer by 1 ms at most; idle time earns nothing.
    Spaced,
    /// A token bucket: full at the start, one token every interval.
    Burst,
    /// At once, up to [`Budget::window`].
    Window,
}

impl Mode {
    /// The word in the file.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Spaced => "spaced",
            Mode::Burst => "burst",
            Mode::Window => "window",
        }
    }
}

/// The limits beside the pace; a field that is `None` does not limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Sends in any rolling 60 s, at least 1: the whole part of `rpm`, in `window` mode or with `strict_window`.
    pub window: Option<u32>,
    /// How much the way to the provider may vary from send to send, default 500 ms: added to every rolling span and kept
    /// around a daily reset.
    pub window_margin: Duration,
    /// Sends a day.
    pub day: Option<Day>,
    /// Tokens (the model's) in any rolling 60 s, at least 1.
    pub tokens_per_minute: Option<u64>,
    /// Requests in flight, at least 1.
    pub max_concurrent: Option<u32>,
}

/// A daily budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Day {
    /// Sends a day, at least 1.
    pub max: u32,
    /// When it is new.
    pub reset: DayReset,
}

/// When a daily budget is new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DayReset {
    /// Every day this long after midnight UTC, below 24 h; default midnight itself.
    At(Duration),
    /// Each send comes back 24 h after it went.
    Rolling,
}

impl fmt::Display for DayReset {
    /// As in the file, in UTC.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DayReset::At(time) => {
                let minutes = time.as_secs() / 60;
                write!(f, "{:02}:{:02}", minutes / 60, minutes % 60)
            }
            DayReset::Rolling => f.write_str("rolling"),
        }
    }
}

/// What pauses when a provider asks for a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CooldownScope {
    /// What the provider's answer says: the model where it names one, or else the whole provider.
    Auto,
    /// The whole provider.
    Provider,
    /// The model that was asked for.
    Model,
}

impl CooldownScope {
    /// The word in the file; `auto` where the key is absent.
    pub fn name(self) -> &'static str {
        match self {
            CooldownScope::Auto => "auto",
            CooldownScope::Provider => "provider",
            CooldownScope::Model => "model",
        }
    }
}

/// `retry:` of a provider: what is sent again before the caller got a byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// Sends of one request in all, default 5; 1 never repeats.
    pub attempts: u32,
    /// The answers that are repeated, each 400..=599; default 429, 500, 502, 503, 504, 529. May be empty.
    pub statuses: Vec<u16>,
    /// The longest pause that is waited out, default 300 s: a provider that asks for longer gets its answer passed on.
    pub max_cooldown: Duration,
}

/// A value that no log, error, page or Debug output may show.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Self {
        Secret(value.into())
    }

    /// The value itself, for the wire only.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}
