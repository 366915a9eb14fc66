//! `/admin/stats`: how every provider's line stands, and what went through it.

use std::rc::Rc;
use std::time::{Instant, SystemTime};

use serde::Serialize;

use super::unix_seconds;
use crate::config::{self, Budget, Model};
use crate::provider::{Provider, Setup};
use crate::shaping::lane::LaneSnapshot;
use crate::shaping::line::Timing;
use crate::telemetry::{BOUNDS, Histogram, ProviderTotals, Telemetry};

/// Every provider's queue and counters, and the settings that concern them all.
pub async fn stats(
    server: &config::Server,
    providers: &[Rc<Provider>],
    telemetry: &Telemetry,
    started: Instant,
) -> Vec<u8> {
    let providers = rows(providers, telemetry).await;
    serde_json::to_vec(&Stats {
        server: server_row(server, started),
        histogram_bounds: BOUNDS,
        providers,
    })
    .expect("numbers and strings always serialize")
}

/// Every provider as it stands.
pub(super) async fn rows(providers: &[Rc<Provider>], telemetry: &Telemetry) -> Vec<Row> {
    let mut rows = Vec::with_capacity(providers.len());
    for provider in providers {
        rows.extend(row(provider, telemetry).await);
    }
    rows
}

#[derive(Serialize)]
struct Stats {
    server: ServerRow,
    /// Of all histograms, in seconds.
    histogram_bounds: [f64; BOUNDS.len()],
    providers: Vec<Row>,
}

/// The settings about who goes where, and who goes first.
#[derive(Serialize)]
struct ServerRow {
    version: &'static str,
    /// Unix time of this answer.
    time: f64,
    uptime_seconds: f64,
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

/// One provider. The first eight fields are those of LimitRateAPI, with its names and meanings.
#[derive(Serialize)]
pub(super) struct Row {
    pub provider: String,
    pub mode: &'static str,
    pub interval_seconds: f64,
    pub capacity: u32,
    /// Sends that could go now, less the requests that wait.
    pub tokens: f64,
    pub queued_ahead: usize,
    /// Those of the queued whose turn is near: they make or hold a connection.
    pub waiting_in_acquire: usize,
    /// Unix time.
    pub last_send_time: Option<f64>,
    pub rpm: Option<f64>,
    pub max_wait_seconds: Option<f64>,
    pub max_queue: usize,
    #[serde(flatten)]
    pub budget: BudgetRow,
    pub cooldown: &'static str,
    pub adaptive: bool,
    pub retry: RetryRow,
    /// Models with limits of their own.
    pub model_limits: Vec<ModelRow>,
    /// Requests a minute: as the cadence is now, where 429s may stretch it, and as they went in the last 60 s.
    pub effective_rpm: f64,
    pub observed_rpm: u32,
    /// What the next send waits for.
    pub held_by: &'static str,
    pub in_flight: usize,
    pub estimated_wait_seconds: f64,
    pub sent: u64,
    pub succeeded: u64,
    pub upstream_4xx: u64,
    pub upstream_5xx: u64,
    pub upstream_errors: u64,
    pub rejected_wait: u64,
    pub rejected_deadline: u64,
    pub rejected_full: u64,
    pub rejected_day: u64,
    pub cooldowns: u64,
    pub cancelled_in_queue: u64,
    /// Callers who came back to their place, and requests that went to another provider.
    pub returned_to_place: u64,
    pub moved_elsewhere: u64,
    /// Places that are kept for callers who left.
    pub kept_places: usize,
    /// One for each API key.
    pub lanes: Vec<LaneRow>,
    pub idle_connections: usize,
    pub queue_wait_seconds: Summary,
    pub upstream_latency_seconds: Summary,
    /// Since a request was there: until it was sent, until its answer began, until that was over.
    pub queued_histogram: HistogramRow,
    pub first_byte_histogram: HistogramRow,
    pub total_histogram: HistogramRow,
    /// Unix times of the latest sends, oldest first.
    pub recent_sends: Vec<f64>,
}

/// One API key.
#[derive(Serialize)]
pub(super) struct LaneRow {
    pub key: String,
    pub available: u32,
    pub held_by: &'static str,
    pub in_flight: usize,
    pub effective_rpm: f64,
    pub observed_rpm: u32,
    pub sent: u64,
    pub cooldowns: u64,
    pub last_send_time: Option<f64>,
}

/// The limits beside the cadence, those that are set.
#[derive(Serialize)]
pub(super) struct BudgetRow {
    window: Option<u32>,
    window_margin_ms: u128,
    rpd: Option<u32>,
    day_resets_at: Option<String>,
    tpm: Option<u64>,
    max_concurrent: Option<u32>,
}

#[derive(Serialize)]
pub(super) struct RetryRow {
    attempts: u32,
    statuses: Vec<u16>,
    max_cooldown_seconds: f64,
}

#[derive(Serialize)]
pub(super) struct ModelRow {
    model: String,
    mode: Option<&'static str>,
    interval_seconds: Option<f64>,
    capacity: Option<u32>,
    rpm: Option<f64>,
    #[serde(flatten)]
    budget: BudgetRow,
}

#[derive(Serialize)]
pub(super) struct Summary {
    pub count: u64,
    pub sum: f64,
    max: f64,
}

/// How many took how long: a count for each bound, and one for what took longer.
#[derive(Serialize)]
pub(super) struct HistogramRow {
    pub count: u64,
    pub sum: f64,
    pub buckets: [u64; BOUNDS.len() + 1],
}

async fn row(provider: &Provider, telemetry: &Telemetry) -> Option<Row> {
    let (setup, counters, now) =
        (provider.setup(), provider.counters(), provider.snapshot().await?);
    let config = &setup.config;
    let (rate, tally) = (&config.rate_limit, now.tally);
    let pace = &rate.pace;
    let in_use = now.lanes.iter().enumerate().filter(|(_, lane)| !lane.retired);
    let mut recent_sends: Vec<f64> =
        now.lanes.iter().flat_map(|lane| &lane.recent_sends).copied().map(unix_seconds).collect();
    recent_sends.sort_unstable_by(f64::total_cmp);
    let nothing = ProviderTotals::default();
    let totals = telemetry.totals();
    let totals = totals.providers.get(provider.name()).unwrap_or(&nothing);
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
        queued_histogram: totals.queued.into(),
        first_byte_histogram: totals.first_byte.into(),
        total_histogram: totals.total.into(),
        recent_sends,
    })
}

fn server_row(server: &config::Server, started: Instant) -> ServerRow {
    let client = |client: &config::Client| ClientRow {
        name: client.name.clone(),
        priority: client.priority.name(),
        max_queue: client.max_queue,
    };
    ServerRow {
        version: env!("CARGO_PKG_VERSION"),
        time: unix_seconds(SystemTime::now()),
        uptime_seconds: started.elapsed().as_secs_f64(),
        routing: server.routing.name(),
        fallback: server.fallback,
        fairness: server.fairness.name(),
        clients: server.clients.iter().map(client).collect(),
        heartbeat_after_seconds: server.heartbeat_after.map(|after| after.as_secs_f64()),
        heartbeat_json: server.heartbeat_json,
        state_file: server.state_file.as_ref().map(|path| path.display().to_string()),
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
        Summary {
            count: timing.count,
            sum: timing.sum.as_secs_f64(),
            max: timing.max.as_secs_f64(),
        }
    }
}

impl From<Histogram> for HistogramRow {
    fn from(histogram: Histogram) -> HistogramRow {
        HistogramRow {
            count: histogram.count(),
            sum: histogram.sum.as_secs_f64(),
            buckets: histogram.buckets,
        }
    }
}
