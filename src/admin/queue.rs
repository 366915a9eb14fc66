//! `/admin/queue`: everybody who waits.

use std::rc::Rc;
use std::time::{Instant, SystemTime};

use serde::Serialize;

use super::unix_seconds;
use crate::provider::Provider;
use crate::shaping::line::Waiting;

/// Everybody who waits, provider by provider, each line from its head; of each no more than `limit`.
pub async fn queue(providers: &[Rc<Provider>], limit: usize) -> Vec<u8> {
    let (wall, mono) = (SystemTime::now(), Instant::now());
    let mut rows = Vec::new();
    for provider in providers {
        let waiting = provider.waiting().await.unwrap_or_default();
        rows.extend(
            waiting.into_iter().take(limit).map(|waiting| queue_row(provider, waiting, wall, mono)),
        );
    }
    serde_json::to_vec(&Queue { queue: rows }).expect("numbers and strings always serialize")
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

fn queue_row(provider: &Provider, waiting: Waiting, wall: SystemTime, mono: Instant) -> QueueRow {
    let Waiting { terms, model, since, position, eta } = waiting;
    let waited = mono.saturating_duration_since(since);
    QueueRow {
        provider: provider.name().to_string(),
        position,
        client: terms.client.to_string(),
        priority: terms.urgency.name(),
        model: provider.setup().model_id(model).to_string(),
        since: unix_seconds(wall.checked_sub(waited).unwrap_or(SystemTime::UNIX_EPOCH)),
        waited_seconds: waited.as_secs_f64(),
        eta_seconds: eta.as_secs_f64(),
    }
}
