//! `/admin/health` and `/admin/stats`: how the gateway stands, as JSON.
//!
//! Reads; changes nothing. Shows no key and no header.

use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::provider::Provider;
use crate::shaping::scheduler::Timing;

/// `{"status":"ok","version":...,"uptime_seconds":...}`
pub fn health(started: Instant) -> Vec<u8> {
    let health = serde_json::json!({
        "status": "ok",
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": started.elapsed().as_secs(),
    });
    health.to_string().into_bytes()
}

/// Every provider's queue and counters.
pub async fn stats(providers: &[Rc<Provider>]) -> Vec<u8> {
    let mut rows = Vec::with_capacity(providers.len());
    for provider in providers {
        rows.extend(row(provider).await);
    }
    serde_json::to_vec(&Stats { providers: rows }).expect("numbers and strings always serialize")
}

#[derive(Serialize)]
struct Stats {
    providers: Vec<Row>,
}

/// One provider. The first eight fields are those of LimitRateAPI, with its names and meanings.
#[derive(Serialize)]
struct Row {
    provider: String,
    mode: &'static str,
    interval_seconds: f64,
    capacity: u32,
    /// Sends that could go now, less the requests that wait.
    tokens: f64,
    queued_ahead: usize,
    /// Those of the queued whose turn is near: they make or hold a connection.
    waiting_in_acquire: usize,
    /// Unix time.
    last_send_time: Option<f64>,
    rpm: Option<f64>,
    max_wait_seconds: Option<f64>,
    max_queue: usize,
    /// The limits beside the cadence, those that are set.
    window: Option<u32>,
    rpd: Option<u32>,
    tpm: Option<u64>,
    max_concurrent: Option<u32>,
    /// Requests a minute: as the cadence is now, where 429s may stretch it, and as they went in the last 60 s.
    effective_rpm: f64,
    observed_rpm: u32,
    /// What the next send waits for.
    held_by: &'static str,
    in_flight: usize,
    estimated_wait_seconds: f64,
    sent: u64,
    succeeded: u64,
    upstream_4xx: u64,
    upstream_5xx: u64,
    upstream_errors: u64,
    rejected_wait: u64,
    rejected_full: u64,
    rejected_day: u64,
    cooldowns: u64,
    cancelled_in_queue: u64,
    idle_connections: usize,
    queue_wait_seconds: Summary,
    upstream_latency_seconds: Summary,
}

#[derive(Serialize)]
struct Summary {
    count: u64,
    sum: f64,
    max: f64,
}

async fn row(provider: &Provider) -> Option<Row> {
    let (config, counters, now) = (provider.config(), provider.counters(), provider.snapshot().await?);
    let (rate, tally) = (&config.rate_limit, now.tally);
    let pace = &rate.pace;
    Some(Row {
        provider: config.name.clone(),
        mode: pace.mode.name(),
        interval_seconds: pace.interval.as_secs_f64(),
        capacity: pace.capacity,
        tokens: f64::from(now.available) - now.queued as f64,
        queued_ahead: now.queued,
        waiting_in_acquire: now.preparing,
        last_send_time: tally.last_send.map(unix_seconds),
        rpm: pace.rpm,
        max_wait_seconds: rate.max_wait.map(|wait| wait.as_secs_f64()),
        max_queue: config.max_queue,
        window: rate.budget.window,
        rpd: rate.budget.day.map(|day| day.max),
        tpm: rate.budget.tokens_per_minute,
        max_concurrent: rate.budget.max_concurrent,
        effective_rpm: 60.0 / now.learned_interval.unwrap_or(pace.interval).as_secs_f64(),
        observed_rpm: now.sent_last_minute,
        held_by: now.held_by.name(),
        in_flight: now.in_flight,
        estimated_wait_seconds: now.estimated_wait.as_secs_f64(),
        sent: tally.sent,
        succeeded: counters.succeeded,
        upstream_4xx: counters.upstream_4xx,
        upstream_5xx: counters.upstream_5xx,
        upstream_errors: counters.upstream_errors,
        rejected_wait: tally.rejected_wait,
        rejected_full: tally.rejected_full,
        rejected_day: tally.rejected_day,
        cooldowns: tally.cooldowns,
        cancelled_in_queue: tally.cancelled,
        idle_connections: provider.idle_connections(),
        queue_wait_seconds: tally.queue_wait.into(),
        upstream_latency_seconds: counters.latency.into(),
    })
}

impl From<Timing> for Summary {
    fn from(timing: Timing) -> Summary {
        Summary { count: timing.count, sum: timing.sum.as_secs_f64(), max: timing.max.as_secs_f64() }
    }
}

fn unix_seconds(at: SystemTime) -> f64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}
