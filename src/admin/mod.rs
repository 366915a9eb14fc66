//! `/admin/health`, `/admin/stats` and `/admin/queue`: how the gateway stands, as JSON.
//!
//! Reads; changes nothing. Shows no key and no header.

use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::config::{self, Budget, Model};
use crate::provider::{Provider, Setup};
use crate::shaping::lane::LaneSnapshot;
use crate::shaping::line::{Timing, Waiting};

/// `{"status":"ok","version":...,"uptime_seconds":...}`
pub fn health(started: Instant) -> Vec<u8> {
    let health = serde_json::json!({
        "status": "ok",
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": started.elapsed().as_secs(),
    });
    health.to_string().into_bytes()
}

/// Every provider's queue and counters, and the settings that concern them all.
pub async fn stats(server: &config::Server, providers: &[Rc<Provider>]) -> Vec<u8> {
    let mut rows = Vec::with_capacity(providers.len());
    for provider in providers {
        rows.extend(row(provider).await);
    }
    serde_json::to_vec(&Stats { server: server_row(server), providers: rows })
        .expect("numbers and strings always serialize")
}

/// Everybody who waits, provider by provider, each line from its head.
pub async fn queue(providers: &[Rc<Provider>]) -> Vec<u8> {
    let (wall, mono) = (SystemTime::now(), Instant::now());
    let mut rows = Vec::new();
    for provider in providers {
        let waiting = provider.waiting().await.unwrap_or_default();
        rows.extend(waiting.into_iter().map(|waiting| queue_row(provider, waiting, wall, mono)));
    }
    serde_json::to_vec(&Queue { queue: rows }).expect("numbers and strings always serialize")
}

#[derive(Serialize)]
struct Stats {
    server: ServerRow,
    providers: Vec<Row>,
}

/// The settings about who goes where, and who goes first.
#[derive(Serialize)]
struct ServerRow {
    routing: &'static str,
    fallback: bool,
    fairness: &'static str,
    clients: Vec<ClientRow>,
    heartbeat_after_seconds: Option<f64>,
    heartbeat_json: bool,
    state_file: Option<String>,
}

#[derive(Serialize)]
struct ClientRow {
    name: String,
    priority: &'static str,
    max_queue: Option<usize>,
}

#[derive(Serialize)]
struct Queue {
    queue: Vec<QueueRow>,
}

/// One who waits.
#[derive(Serialize)]
struct QueueRow {
    provider: String,
    position: usize,
    /// A configured client's name, or an address.
    client: String,
    priority: &'static str,
    model: String,
    /// Unix time.
    since: f64,
    waited_seconds: f64,
    eta_seconds: f64,
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
    rejected_deadline: u64,
    rejected_full: u64,
    rejected_day: u64,
    cooldowns: u64,
    cancelled_in_queue: u64,
    /// Callers who came back to their place, and requests that went to another provider.
    returned_to_place: u64,
    moved_elsewhere: u64,
    /// Places that are kept for callers who left.
    kept_places: usize,
    /// One for each API key.
    lanes: Vec<LaneRow>,
    idle_connections: usize,
    queue_wait_seconds: Summary,
    upstream_latency_seconds: Summary,
}

/// One API key.
#[derive(Serialize)]
struct LaneRow {
    key: String,
    available: u32,
    held_by: &'static str,
    in_flight: usize,
    effective_rpm: f64,
    observed_rpm: u32,
    sent: u64,
    cooldowns: u64,
    last_send_time: Option<f64>,
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
    let (setup, counters, now) = (provider.setup(), provider.counters(), provider.snapshot().await?);
    let config = &setup.config;
    let (rate, tally) = (&config.rate_limit, now.tally);
    let pace = &rate.pace;
    let in_use = now.lanes.iter().enumerate().filter(|(_, lane)| !lane.retired);
    let lanes: Vec<LaneRow> = in_use.map(|(index, lane)| lane_row(&setup, index, lane)).collect();
    Some(Row {
        provider: config.name.clone(),
        mode: pace.mode.name(),
        interval_seconds: pace.interval.as_secs_f64(),
        capacity: pace.capacity,
        tokens: lanes.iter().map(|lane| f64::from(lane.available)).sum::<f64>() - now.queued as f64,
        queued_ahead: now.queued,
        waiting_in_acquire: now.preparing,
        last_send_time: now.lanes.iter().filter_map(|lane| lane.last_send).max().map(unix_seconds),
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
        effective_rpm: lanes.iter().map(|lane| lane.effective_rpm).sum(),
        observed_rpm: now.lanes.iter().map(|lane| lane.sent_last_minute).sum(),
        held_by: now.held_by.name(),
        in_flight: now.lanes.iter().map(|lane| lane.in_flight).sum(),
        estimated_wait_seconds: now.estimated_wait.as_secs_f64(),
        sent: now.lanes.iter().map(|lane| lane.sent).sum(),
        succeeded: counters.succeeded,
        upstream_4xx: counters.upstream_4xx,
        upstream_5xx: counters.upstream_5xx,
        upstream_errors: counters.upstream_errors,
        rejected_wait: tally.rejected_wait,
        rejected_deadline: tally.rejected_deadline,
        rejected_full: tally.rejected_full,
        rejected_day: tally.rejected_day,
        cooldowns: now.lanes.iter().map(|lane| lane.cooldowns).sum(),
        cancelled_in_queue: tally.cancelled,
        returned_to_place: tally.returned,
        moved_elsewhere: tally.moved,
        kept_places: now.kept,
        lanes,
        idle_connections: provider.idle_connections(),
        queue_wait_seconds: tally.queue_wait.into(),
        upstream_latency_seconds: counters.latency.into(),
    })
}

fn server_row(server: &config::Server) -> ServerRow {
    let client = |client: &config::Client| ClientRow {
        name: client.name.clone(),
        priority: client.priority.name(),
        max_queue: client.max_queue,
    };
    ServerRow {
        routing: server.routing.name(),
        fallback: server.fallback,
        fairness: server.fairness.name(),
        clients: server.clients.iter().map(client).collect(),
        heartbeat_after_seconds: server.heartbeat_after.map(|after| after.as_secs_f64()),
        heartbeat_json: server.heartbeat_json,
        state_file: server.state_file.as_ref().map(|path| path.display().to_string()),
    }
}

fn queue_row(provider: &Provider, waiting: Waiting, wall: SystemTime, mono: Instant) -> QueueRow {
    let Waiting { terms, model, since, position, eta } = waiting;
    let waited = mono.saturating_duration_since(since);
    QueueRow {
        provider: provider.name().to_owned(),
        position,
        client: terms.client.to_string(),
        priority: terms.urgency.name(),
        model: provider.setup().model_id(model).to_owned(),
        since: unix_seconds(wall.checked_sub(waited).unwrap_or(SystemTime::UNIX_EPOCH)),
        waited_seconds: waited.as_secs_f64(),
        eta_seconds: eta.as_secs_f64(),
    }
}

fn lane_row(setup: &Setup, index: usize, lane: &LaneSnapshot) -> LaneRow {
    let interval = lane.learned_interval.unwrap_or(setup.config.rate_limit.pace.interval);
    LaneRow {
        key: setup.key_label(index),
        available: lane.available,
        held_by: lane.held_by.name(),
        in_flight: lane.in_flight,
        effective_rpm: 60.0 / interval.as_secs_f64(),
        observed_rpm: lane.sent_last_minute,
        sent: lane.sent,
        cooldowns: lane.cooldowns,
        last_send_time: lane.last_send.map(unix_seconds),
    }
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
