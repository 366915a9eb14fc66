//! `/admin/requests`: the latest requests.

use std::collections::BTreeMap;

use serde::Serialize;

use super::unix_seconds;
use crate::telemetry::{Record, Telemetry};

/// The latest requests that are over, the last one first; no more than `limit`.
pub fn requests(telemetry: &Telemetry, limit: usize) -> Vec<u8> {
    let totals = telemetry.totals();
    let rows = totals.recent.iter().rev().take(limit).map(row).collect();
    serde_json::to_vec(&Requests { count: totals.count, errors: &totals.errors, requests: rows })
        .expect("numbers and strings always serialize")
}

#[derive(Serialize)]
struct Requests<'t> {
    /// So far, those included that are not shown any more.
    count: u64,
    /// How often callers got which error, by its code.
    errors: &'t BTreeMap<&'static str, u64>,
    requests: Vec<RequestRow<'t>>,
}

/// One that is over.
#[derive(Serialize)]
struct RequestRow<'t> {
    /// Unix time of its end.
    time: f64,
    id: &'t str,
    client: &'t str,
    method: &'t str,
    path: &'t str,
    /// As the caller wrote it.
    model: Option<&'t str>,
    provider: Option<&'t str>,
    stream: bool,
    status: u16,
    error: Option<&'static str>,
    sends: u32,
    queued_seconds: Option<f64>,
    first_byte_seconds: f64,
    total_seconds: f64,
    bytes_in: u64,
    bytes_out: u64,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
}

fn row(record: &Record) -> RequestRow<'_> {
    RequestRow {
        time: unix_seconds(record.ended),
        id: &record.id,
        client: &record.client,
        method: record.method.as_deref().unwrap_or_default(),
        path: &record.path,
        model: record.asked_for.as_deref(),
        provider: record.route.as_ref().map(|(provider, _)| &**provider),
        stream: record.stream,
        status: record.status,
        error: record.error,
        sends: record.sends,
        queued_seconds: record.queued.map(|queued| queued.as_secs_f64()),
        first_byte_seconds: record.first_byte.as_secs_f64(),
        total_seconds: record.total.as_secs_f64(),
        bytes_in: record.bytes_in,
        bytes_out: record.bytes_out,
        input_tokens: record.usage.input(),
        output_tokens: record.usage.output(),
    }
}
