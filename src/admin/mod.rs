//! `/admin/health` and `/admin/stats`: how the gateway stands, as JSON.
//!
//! Reads; changes nothing. Shows no key and no header.

use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::config::{Budget, Model};
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
    #[serde(flatten)]
    budget: BudgetRow,
    cooldown: &'static str,
    adaptive: bool,
    retry: RetryRow,
    /// Models with limits of their own.
    model_limits: Vec<ModelRow>,
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

/// The limits beside the cadence, those that are set.
#[derive(Serialize)]
struct BudgetRow {
    window: Option<u32>,
    window_margin_ms: u128,
    rpd: Option<u32>,
    day_resets_at: Option<String>,
    tpm: Option<u64>,
    max_concurrent: Option<u32>,
}

#[derive(Serialize)]
struct RetryRow {
    attempts: u32,
    statuses: Vec<u16>,
    max_cooldown_seconds: f64,
}

#[derive(Serialize)]
struct ModelRow {
    model: String,
    mode: Option<&'static str>,
    interval_seconds: Option<f64>,
    capacity: Option<u32>,
    rpm: Option<f64>,
    #[serde(flatten)]
    budget: BudgetRow,
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
        budget: budget_row(&rate.budget),
        cooldown: rate.cooldown.name(),
        adaptive: rate.adaptive,
        retry: RetryRow {
            attempts: config.retry.attempts,
            statuses: config.retry.statuses.clone(),
            max_cooldown_seconds: config.retry.max_cooldown.as_secs_f64(),
        },
        model_limits: config.models.iter().filter_map(model_row).collect(),
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

fn budget_row(budget: &Budget) -> BudgetRow {
    BudgetRow {
        window: budget.window,
        window_margin_ms: budget.window_margin.as_millis(),
        rpd: budget.day.map(|day| day.max),
        day_resets_at: budget.day.map(|day| day.reset.to_string()),
        tpm: budget.tokens_per_minute,
        max_concurrent: budget.max_concurrent,
    }
}

fn model_row(model: &Model) -> Option<ModelRow> {
    let limit = model.rate_limit.as_ref()?;
    let pace = limit.pace.as_ref();
    Some(ModelRow {
        model: model.id.clone(),
        mode: pace.map(|pace| pace.mode.name()),
        interval_seconds: pace.map(|pace| pace.interval.as_secs_f64()),
        capacity: pace.map(|pace| pace.capacity),
        rpm: pace.and_then(|pace| pace.rpm),
        budget: budget_row(&limit.budget),
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
