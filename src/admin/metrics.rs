//! `/metrics`: the same figures in Prometheus' text format, version 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).
//!
//! Labels are bounded by the configuration: providers, models, clients and keys that it names, statuses, error codes.

use std::fmt::{Display, Write};
use std::rc::Rc;
use std::time::{Instant, SystemTime};

use super::stats::{self, HistogramRow, LaneRow, Row};
use super::unix_seconds;
use crate::provider::Provider;
use crate::shaping::limiter::Held;
use crate::telemetry::{BOUNDS, Telemetry, Totals};

/// The Content-Type of [`metrics`].
pub const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All figures.
pub async fn metrics(
    providers: &[Rc<Provider>],
    telemetry: &Telemetry,
    started: Instant,
) -> Vec<u8> {
    let rows = stats::rows(providers, telemetry).await;
    let mut text = Text::default();
    of_the_program(&mut text, started);
    of_the_lines(&mut text, &rows);
    of_the_lanes(&mut text, &rows);
    of_the_requests(&mut text, &telemetry.totals());
    of_the_times(&mut text, &rows);
    text.0.into_bytes()
}

/// Whether an Accept header asks for these rather than for JSON (RFC 9110 section 12.5.1). Prometheus names OpenMetrics
/// first and this format behind it.
pub fn wants_metrics(accept: &str) -> bool {
    let weight = |wanted: &[&str]| {
        let ranges = accept.split(',').filter_map(|range| {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next()?;
            let weight =
                parts.find_map(|part| part.strip_prefix("q=")?.parse::<f64>().ok()).unwrap_or(1.0);
            wanted.iter().any(|wanted| wanted.eq_ignore_ascii_case(kind)).then_some(weight)
        });
        ranges.fold(0.0, f64::max)
    };
    weight(&["text/plain", "application/openmetrics-text"])
        > weight(&["application/json", "text/html"])
}

fn of_the_program(text: &mut Text, started: Instant) {
    text.family("limitrate_build_info", "gauge", "The version that runs.");
    text.sample("limitrate_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    text.family("process_start_time_seconds", "gauge", "When it started, in Unix time.");
    text.sample(
        "process_start_time_seconds",
        &[],
        unix_seconds(SystemTime::now()) - started.elapsed().as_secs_f64(),
    );
    if let Some(bytes) = resident_bytes() {
        text.family("process_resident_memory_bytes", "gauge", "Memory in use.");
        text.sample("process_resident_memory_bytes", &[], bytes);
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        text.family("process_open_fds", "gauge", "Open files, connections among them.");
        text.sample("process_open_fds", &[], files.count());
    }
}

/// proc(5): the second field of statm, in pages.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

fn of_the_lines(text: &mut Text, rows: &[Row]) {
    let mut gauge =
        |name, help, value: &dyn Fn(&Row) -> f64| text.each(rows, name, "gauge", help, value);
    gauge("limitrate_queue_length", "Requests that wait in line.", &|row| row.queued_ahead as f64);
    gauge("limitrate_tokens", "Sends that could go now, less the requests that wait.", &|row| {
        row.tokens
    });
    gauge(
        "limitrate_in_flight",
        "Requests that were sent and are not answered to the end.",
        &|row| row.in_flight as f64,
    );
    gauge("limitrate_estimated_wait_seconds", "What a request that came now would wait.", &|row| {
        row.estimated_wait_seconds
    });
    gauge(
        "limitrate_effective_rpm",
        "Requests a minute that may be sent as things stand.",
        &|row| row.effective_rpm,
    );
    gauge("limitrate_observed_rpm", "Requests that were sent in the last minute.", &|row| {
        row.observed_rpm.into()
    });
    gauge("limitrate_idle_connections", "Connections kept to the provider.", &|row| {
        row.idle_connections as f64
    });
    gauge("limitrate_kept_places", "Places kept for callers who may try again.", &|row| {
        row.kept_places as f64
    });

    text.family("limitrate_held_by", "gauge", "1 for what the next send waits for.");
    for row in rows {
        for reason in Held::ALL.map(Held::name) {
            let labels = [("provider", &*row.provider), ("reason", reason)];
            text.sample("limitrate_held_by", &labels, u8::from(row.held_by == reason));
        }
    }

    let mut counter =
        |name, help, value: &dyn Fn(&Row) -> f64| text.each(rows, name, "counter", help, value);
    counter("limitrate_sends_total", "Requests that left, retries included.", &|row| {
        row.sent as f64
    });
    counter(
        "limitrate_cooldowns_total",
        "Answers that made the provider or a model pause.",
        &|row| row.cooldowns as f64,
    );
    counter("limitrate_cancelled_in_queue_total", "Callers who left the line.", &|row| {
        row.cancelled_in_queue as f64
    });
    counter(
        "limitrate_returned_to_place_total",
        "Callers who tried again and got their place back.",
        &|row| row.returned_to_place as f64,
    );
    counter(
        "limitrate_moved_elsewhere_total",
        "Requests that another provider could send sooner.",
        &|row| row.moved_elsewhere as f64,
    );

    text.family(
        "limitrate_upstream_answers_total",
        "counter",
        "What the provider answered, what was tried again included.",
    );
    for row in rows {
        let answers = [
            ("ok", row.succeeded),
            ("4xx", row.upstream_4xx),
            ("5xx", row.upstream_5xx),
            ("broken", row.upstream_errors),
        ];
        for (kind, count) in answers {
            text.sample(
                "limitrate_upstream_answers_total",
                &[("provider", &row.provider), ("kind", kind)],
                count,
            );
        }
    }
    text.family("limitrate_rejected_total", "counter", "Requests that were refused, by the limit.");
    for row in rows {
        let refusals = [
            ("wait", row.rejected_wait),
            ("deadline", row.rejected_deadline),
            ("full", row.rejected_full),
            ("day", row.rejected_day),
        ];
        for (limit, count) in refusals {
            text.sample(
                "limitrate_rejected_total",
                &[("provider", &row.provider), ("limit", limit)],
                count,
            );
        }
    }
}

fn of_the_lanes(text: &mut Text, rows: &[Row]) {
    let mut each = |name, kind, help, value: &dyn Fn(&LaneRow) -> u64| {
        text.family(name, kind, help);
        for (row, lane) in rows.iter().flat_map(|row| row.lanes.iter().map(move |lane| (row, lane)))
        {
            text.sample(name, &[("provider", &row.provider), ("key", &lane.key)], value(lane));
        }
    };
    each(
        "limitrate_key_sends_total",
        "counter",
        "Requests that left with this API key.",
        &|lane| lane.sent,
    );
    each(
        "limitrate_key_cooldowns_total",
        "counter",
        "Answers that made this API key pause.",
        &|lane| lane.cooldowns,
    );
    each("limitrate_key_in_flight", "gauge", "Requests in flight with this API key.", &|lane| {
        lane.in_flight as u64
    });
}

fn of_the_requests(text: &mut Text, totals: &Totals) {
    let name = "limitrate_requests_total";
    text.family(
        name,
        "counter",
        "Requests by the status that their caller got; without provider where they came to none.",
    );
    for (status, count) in &totals.unrouted {
        text.sample(
            name,
            &[("provider", ""), ("model", ""), ("status", &status.to_string())],
            count,
        );
    }
    let models = totals.providers.iter().flat_map(|(provider, totals)| {
        totals.models.iter().map(move |(model, totals)| (provider, model, totals))
    });
    for (provider, model, totals) in models.clone() {
        for (status, count) in &totals.statuses {
            text.sample(
                name,
                &[("provider", provider), ("model", model), ("status", &status.to_string())],
                count,
            );
        }
    }
    let name = "limitrate_tokens_total";
    text.family(name, "counter", "Tokens, as far as answers told them.");
    for (provider, model, totals) in models {
        for (kind, count) in [("input", totals.input_tokens), ("output", totals.output_tokens)] {
            text.sample(name, &[("provider", provider), ("model", model), ("kind", kind)], count);
        }
    }
    let name = "limitrate_errors_total";
    text.family(name, "counter", "Errors that callers got, and callers who left (caller_gone).");
    for (code, count) in &totals.errors {
        text.sample(name, &[("code", code)], count);
    }
    let name = "limitrate_client_requests_total";
    text.family(
        name,
        "counter",
        "Requests by client of the configuration; all without a name are other.",
    );
    for (client, count) in &totals.clients {
        text.sample(name, &[("client", client)], count);
    }
    text.sample(name, &[("client", "other")], totals.unnamed);
}

fn of_the_times(text: &mut Text, rows: &[Row]) {
    let name = "limitrate_upstream_latency_seconds";
    text.family(name, "summary", "From a send to the head of its answer.");
    for row in rows {
        let labels = [("provider", &*row.provider)];
        text.sample(&format!("{name}_sum"), &labels, row.upstream_latency_seconds.sum);
        text.sample(&format!("{name}_count"), &labels, row.upstream_latency_seconds.count);
    }
    let mut histogram = |name, help, of: &dyn Fn(&Row) -> &HistogramRow| {
        text.family(name, "histogram", help);
        rows.iter().for_each(|row| text.histogram(name, &row.provider, of(row)));
    };
    histogram("limitrate_queue_wait_seconds", "From a request to its last send.", &|row| {
        &row.queued_histogram
    });
    histogram(
        "limitrate_time_to_first_byte_seconds",
        "From a request to the beginning of its answer.",
        &|row| &row.first_byte_histogram,
    );
    histogram(
        "limitrate_request_duration_seconds",
        "From a request to the end of its answer.",
        &|row| &row.total_histogram,
    );
}

/// Families one after the other, all samples of each behind its head.
#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    /// A family with one sample for each provider.
    fn each(
        &mut self,
        rows: &[Row],
        name: &str,
        kind: &str,
        help: &str,
        value: &dyn Fn(&Row) -> f64,
    ) {
        self.family(name, kind, help);
        for row in rows {
            self.sample(name, &[("provider", &row.provider)], value(row));
        }
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<_> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        match labels[..] {
            [] => self.line(format_args!("{name} {value}")),
            _ => self.line(format_args!("{name}{{{}}} {value}", labels.join(","))),
        }
    }

    /// Buckets are cumulative here.
    fn histogram(&mut self, name: &str, provider: &str, row: &HistogramRow) {
        let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        let mut below = 0;
        for (bound, count) in bounds.zip(row.buckets) {
            below += count;
            self.sample(
                &format!("{name}_bucket"),
                &[("provider", provider), ("le", &bound)],
                below,
            );
        }
        self.sample(&format!("{name}_sum"), &[("provider", provider)], row.sum);
        self.sample(&format!("{name}_count"), &[("provider", provider)], row.count);
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("a String takes whatever is written to it");
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gets_metrics() {
        for (accept, want) in [
            (
                "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                true,
            ),
            (
                "application/openmetrics-text; version=0.0.1; q=0.75, text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                true,
            ),
            ("text/plain", true),
            ("TEXT/PLAIN;q=0.2", true),
            ("*/*", false),
            ("", false),
            ("application/json, text/plain, */*", false),
            ("application/json;q=0.1,text/plain;q=0.2", true),
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", false),
            ("text/plain;q=0", false),
        ] {
            assert_eq!(wants_metrics(accept), want, "{accept}");
        }
    }

    #[test]
    fn labels_are_escaped() {
        let mut text = Text::default();
        text.sample("m", &[("model", "a\\b\"c\nd"), ("kind", "x")], 1.5);
        assert_eq!(text.0, "m{model=\"a\\\\b\\\"c\\nd\",kind=\"x\"} 1.5\n");
    }
}
