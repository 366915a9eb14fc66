//! The validated configuration: what a YAML file means once every fault in it has been refused.
//!
//! Owns the types and their defaults. Does not read files or environment variables by itself beyond [`load`]; past this
//! room no value means "maybe misconfigured".

use std::fmt;
use std::time::Duration;

/// A whole configuration file.
#[derive(Debug, Clone)]
pub struct Config {
    /// The front: where to listen and what a caller may use up.
    pub server: Server,
    /// At least one, with unique names, in the order of the file (the order decides routing).
    pub providers: Vec<Provider>,
}

/// `server:` with every default filled in.
#[derive(Debug, Clone)]
pub struct Server {
    /// An address or a name to bind; default `0.0.0.0`.
    pub host: String,
    /// Default 8080; 0 lets the system choose.
    pub port: u16,
    /// What callers have to send as `Authorization: Bearer ...`; `None` accepts everybody.
    pub auth_token: Option<Secret>,
    /// The largest request body, default 32 MiB; past it 413.
    pub max_body_bytes: u64,
    /// The largest request head, default 32 KiB; past it 431.
    pub max_head_bytes: usize,
    /// Connections served at once, default 1024; past it 503.
    pub max_connections: usize,
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
}

/// One entry of `providers:`.
#[derive(Debug, Clone)]
pub struct Provider {
    /// Unique, without `/`.
    pub name: String,
    /// Where `/v1` of the gateway leads to.
    pub base_url: BaseUrl,
    /// Sent as `Authorization: Bearer ...`; `None` sends no Authorization.
    pub api_key: Option<Secret>,
    /// Extra request headers, name and value; a name given here replaces the caller's.
    pub headers: Vec<(String, Secret)>,
    /// Extra trusted CA certificates: the PEM text of `ca_file`.
    pub ca_pem: Option<Vec<u8>>,
    /// At least one.
    pub models: Vec<Model>,
    /// How fast this provider is sent to.
    pub rate_limit: RateLimit,
    /// DNS, TCP and TLS together, default 10 s.
    pub connect_timeout: Duration,
    /// From the sent request to the response head, default 600 s.
    pub request_timeout: Duration,
    /// Between two bytes of a response body, default 300 s.
    pub idle_timeout: Duration,
    /// Requests that may wait at once, default 1000; past it 503.
    pub max_queue: usize,
    /// Idle connections kept, default 16.
    pub pool_max_idle: usize,
    /// How long an idle connection is kept, default 50 s.
    pub pool_idle: Duration,
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
}

/// One entry of `models:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// The name callers use.
    pub id: String,
    /// The name the provider gets; the same as `id` unless it is an alias.
    pub upstream: String,
}

/// `rate_limit:` of a provider.
#[derive(Debug, Clone)]
pub struct RateLimit {
    /// How sends are spread.
    pub mode: Mode,
    /// As written; `None` where only `interval_seconds` was given.
    pub rpm: Option<f64>,
    /// The cadence: the longer of 60 s / rpm and `interval_seconds`; never zero.
    pub interval: Duration,
    /// Sends that may go at once; 1 in `spaced` mode.
    pub capacity: u32,
    /// How long a request may wait in the queue; `None` waits for ever.
    pub max_wait: Option<Duration>,
}

/// How sends are spread in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One send every interval; idle time earns nothing.
    Spaced,
    /// A token bucket: full at the start, one token every interval.
    Burst,
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
