//! What an operator sees: `/admin/health`, `/admin/stats`, `/admin/queue` and `/admin/requests` as JSON, `/metrics` for
//! Prometheus, and the page at `/admin/`, which is made of these.
//!
//! Reads; changes nothing. Shows no key and no header.

mod metrics;
mod page;
mod queue;
mod requests;
mod stats;

pub use metrics::{METRICS_TYPE, metrics, wants_metrics};
pub use page::{PAGE, PAGE_HEADERS};
pub use queue::queue;
pub use requests::requests;
pub use stats::stats;

use std::time::{Duration, Instant, SystemTime};

/// No other page may show this in a frame (RFC 7034; CSP level 3, section 6.4.2).
pub const UNFRAMED: [(&str, &str); 2] =
    [("X-Frame-Options", "DENY"), ("Content-Security-Policy", "frame-ancestors 'none'")];

/// `{"status":"ok","version":...,"uptime_seconds":...}`
pub fn health(started: Instant) -> Vec<u8> {
    let health = serde_json::json!({
        "status": "ok",
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": started.elapsed().as_secs(),
    });
    health.to_string().into_bytes()
}

fn unix_seconds(at: SystemTime) -> f64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}
