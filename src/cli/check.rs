//! A configuration in words: what `limitrate check` prints of it, and what a start says of each provider.
//!
//! Tells what differs from the defaults and what follows from it. Shows no key, no token and no header.

use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::config::{
    self, Budget, Client, Config, Day, DayReset, Fairness, Mode, Origins, Pace, Priority, Routing,
    Server, Socket, TrustedProxies,
};
use crate::provider;

/// All of it, for the configuration of `file`.
pub fn report(file: &Path, config: &Config) -> String {
    let noun = if config.providers.len() == 1 { "provider" } else { "providers" };
    let first = format!("{}: fine, {} {noun}\n", file.display(), config.providers.len());
    let server = Some(settings(&config.server))
        .filter(|lines| !lines.is_empty())
        .map(|lines| block("server", &lines));
    let providers =
        config.providers.iter().map(|provider| block(&headline(provider), &details(provider)));
    let warnings = warnings(config).into_iter().map(|warning| format!("\nwarning: {warning}\n"));
    [first].into_iter().chain(server).chain(providers).chain(warnings).collect()
}

/// A provider on one line.
pub fn summary(provider: &config::Provider) -> String {
    let keys = match provider.api_keys.len() {
        0 | 1 => String::new(),
        keys => format!(" with each of {keys} keys"),
    };
    let (most, models) = (worst_case(provider), model_names(provider));
    format!("{}{keys}, at most {most} in any 60 s, models: {models}", headline(provider))
}

/// Where a configuration is right and may still let through more than somebody thinks.
pub fn warnings(config: &Config) -> Vec<String> {
    let of_provider = |provider: &config::Provider| {
        let (rate, keys) = (&provider.rate_limit, provider.api_keys.len());
        let own = excess(&provider.name, &rate.pace, &rate.budget, keys);
        let of_model = |model: &config::Model| {
            let limit = model.rate_limit.as_ref()?;
            excess(
                &format!("{}/{}", provider.name, model.id),
                limit.pace.as_ref()?,
                &limit.budget,
                keys,
            )
        };
        own.into_iter().chain(provider.models.iter().filter_map(of_model)).collect::<Vec<_>>()
    };
    let of_server = open_door(&config.server).into_iter().chain(expired(&config.server));
    of_server.chain(config.providers.iter().flat_map(of_provider)).collect()
}

/// A heading and the lines below it.
fn block(heading: &str, lines: &[(&str, String)]) -> String {
    let lines: String = lines.iter().map(|(key, text)| format!("  {key:<10} {text}\n")).collect();
    format!("\n{heading}\n{lines}")
}

/// What of `server:` decides who is sent where and when, as far as it is not the default.
fn settings(server: &Server) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    if let Some(Socket { path, mode }) = &server.socket {
        let alone = if server.port.is_none() { ", and on no port" } else { "" };
        lines
            .push(("socket", format!("{} with the permissions {mode:04o}{alone}", path.display())));
    }
    if let Some(tls) = &server.tls {
        lines.push(("tls", format!("1.2 and 1.3, certificate until {}", tls.ends())));
    }
    if server.trusted_proxies != TrustedProxies::default() {
        lines.push((
            "trusted",
            format!("{}, where they say for whom they ask", server.trusted_proxies),
        ));
    }
    match &server.cors_origins {
        Origins::Unset => {}
        Origins::Any => lines.push(("pages", "of every origin may call".to_owned())),
        Origins::Listed(origins) => {
            lines.push(("pages", format!("of {} may call", origins.join(", "))))
        }
    }
    if !server.hosts.names().is_empty() {
        let of_no_use =
            if server.auth_token.is_some() { " (not checked with auth_token)" } else { "" };
        let names = server.hosts.names().join(", ");
        lines.push(("hosts", format!("{names}, besides local names{of_no_use}")));
    }
    if server.routing == Routing::Earliest {
        lines.push((
            "routing",
            "earliest, to the provider that can send a request soonest".to_owned(),
        ));
    }
    if server.fallback {
        lines.push((
            "fallback",
            "to the next provider of the same model when one can't do it".to_owned(),
        ));
    }
    if server.fairness == Fairness::Fifo {
        lines.push(("fairness", "fifo, first come, first served, whoever it is".to_owned()));
    }
    lines.extend(server.clients.iter().map(|client| ("client", describe_client(client))));
    lines.extend(heartbeats(server).map(|text| ("heartbeats", text)));
    lines.extend(server.state_file.as_ref().map(|path| ("state_file", path.display().to_string())));
    lines
}

fn describe_client(client: &Client) -> String {
    let priority = match client.priority {
        Priority::High => ", goes first",
        Priority::Normal => "",
        Priority::Low => ", goes last",
    };
    let most = client
        .max_queue
        .map(|max| format!(", at most {max} waiting at a provider"))
        .unwrap_or_default();
    let beats = if client.heartbeat { "" } else { ", without heartbeats" };
    format!("{}{priority}{most}{beats}", client.name)
}

/// `None` where they are the default.
fn heartbeats(server: &Server) -> Option<String> {
    let Some(after) = server.heartbeat_after else { return Some("none".to_owned()) };
    if server.heartbeat_json {
        let after = seconds(after);
        return Some(format!(
            "after {after} in streams, in front of plain answers four times as late"
        ));
    }
    (after != config::HEARTBEAT_AFTER).then(|| format!("after {} in streams", seconds(after)))
}

/// `nvidia-nim: spaced, one send every 1.5 s (40 a minute)`
fn headline(provider: &config::Provider) -> String {
    format!("{}: {}", provider.name, spread(&provider.rate_limit.pace))
}

fn details(provider: &config::Provider) -> Vec<(&'static str, String)> {
    let mut lines =
        vec![("base_url", provider.base_url.to_string()), ("models", model_names(provider))];
    if let Some(proxy) = &provider.proxy {
        let from =
            proxy.variable.map(|variable| format!(", as {variable} says")).unwrap_or_default();
        let with = if proxy.credential.is_some() { ", with a user name" } else { "" };
        lines.insert(1, ("proxy", format!("http://{}{with}{from}", proxy.authority())));
    }
    let keys = provider.api_keys.len();
    if keys > 1 {
        lines.push(("api_keys", format!("{keys}, each with these limits")));
    }
    let rate = &provider.rate_limit;
    let wait = match rate.max_wait {
        None => ", each waits for as long as it takes".to_owned(),
        Some(wait) => {
            format!("; one that would wait over {} gets 503 with Retry-After", seconds(wait))
        }
    };
    lines.push(("queue", format!("up to {} requests{wait}", provider.max_queue)));
    lines.extend(limits(&rate.budget).into_iter().map(|limit| ("limit", limit)));
    lines.push(("worst case", format!("{} sends in any 60 s", worst_case(provider))));
    lines.extend(provider.models.iter().filter_map(describe_model).map(|text| ("model", text)));
    lines
}

/// A model's own limits, if it has any.
fn describe_model(model: &config::Model) -> Option<String> {
    let limit = model.rate_limit.as_ref()?;
    let all: Vec<String> = limit.pace.iter().map(spread).chain(limits(&limit.budget)).collect();
    Some(format!("{}: {}", model.id, all.join("; ")))
}

fn spread(pace: &Pace) -> String {
    let (every, a_minute) = (seconds(pace.interval), per_minute(pace.interval));
    match pace.mode {
        Mode::Spaced => format!("spaced, one send every {every} ({a_minute} a minute)"),
        Mode::Burst => {
            format!(
                "burst, up to {} at once, then one send every {every} ({a_minute} a minute)",
                pace.capacity
            )
        }
        Mode::Window => format!("window, up to {0} at once ({0} a minute)", pace.capacity),
    }
}

/// The most sends in any 60 s, with all keys together.
fn worst_case(provider: &config::Provider) -> u64 {
    let rate = &provider.rate_limit;
    let of_one = provider::worst_case_per_minute(Some(&rate.pace), &rate.budget)
        .expect("a pace always limits");
    of_one * provider.api_keys.len().max(1) as u64
}

/// One phrase for each limit beside the pace.
fn limits(budget: &Budget) -> Vec<String> {
    let minute = seconds(Duration::from_secs(60) + budget.window_margin);
    let day = |day: Day| match day.reset {
        DayReset::At(_) => format!("{} sends a day, which begins at {} UTC", day.max, day.reset),
        DayReset::Rolling => format!("{} sends in any 24 h", day.max),
    };
    let all = [
        budget.window.map(|max| format!("{max} sends in any {minute}")),
        budget.day.map(day),
        budget.tokens_per_minute.map(|max| format!("{max} tokens in any {minute}")),
        budget.max_concurrent.map(|max| format!("{max} requests in flight")),
    ];
    all.into_iter().flatten().map(|limit| format!("at most {limit}")).collect()
}

/// Tokens of clients alone keep nobody out.
fn open_door(server: &Server) -> Option<String> {
    (!server.clients.is_empty() && server.auth_token.is_none()).then(|| {
        "clients are told by their tokens, but everybody else who can reach the port is served too; \
         add server.auth_token to keep them out"
            .to_owned()
    })
}

fn expired(server: &Server) -> Option<String> {
    let tls = server.tls.as_ref().filter(|tls| !tls.is_valid_at(SystemTime::now()))?;
    Some(format!(
        "the certificate in server.tls is not valid today (until {}); clients refuse it",
        tls.ends()
    ))
}

/// A bucket that starts full lets more than `rpm` through in its first minute.
fn excess(name: &str, pace: &Pace, budget: &Budget, keys: usize) -> Option<String> {
    let rpm = pace.rpm.filter(|_| pace.mode == Mode::Burst)?;
    let most = provider::worst_case_per_minute(Some(pace), budget)
        .filter(|most| *most as f64 > rpm.ceil())?;
    let each = if keys > 1 { " with each key" } else { "" };
    Some(format!(
        "{name}: capacity {} on top of rpm {rpm} lets {most} requests through in the first 60 s{each}; \
         add strict_window: true if your provider counts a rolling minute",
        pace.capacity
    ))
}

fn model_names(provider: &config::Provider) -> String {
    let name = |model: &config::Model| match model.id == model.upstream {
        true => model.id.clone(),
        false => format!("{} (as {})", model.id, model.upstream),
    };
    provider.models.iter().map(name).collect::<Vec<_>>().join(", ")
}

fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds > 0.0 && seconds < 0.01 {
        format!("{} ms", rounded(seconds * 1000.0))
    } else {
        format!("{} s", rounded(seconds))
    }
}

fn per_minute(interval: Duration) -> f64 {
    rounded(60.0 / interval.as_secs_f64())
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Providers with these rate limits, each with model `m` and model `n`, which has `own`.
    fn config(rate_limits: &[&str], own: &str) -> Config {
        let provider = |(at, limit)| {
            format!(
                "  - name: p{at}\n    base_url: http://h\n    models: [m, {{id: n, rate_limit: {own}}}]\n    \
                 rate_limit: {limit}\n"
            )
        };
        let text: String = rate_limits.iter().enumerate().map(provider).collect();
        config::parse(&format!("providers:\n{text}"), Path::new("test"), &|_| None).unwrap()
    }

    #[test]
    fn a_bucket_on_top_of_rpm_is_warned_of() {
        let config = config(
            &[
                "{mode: burst, rpm: 120, capacity: 10}",
                "{mode: burst, rpm: 40.5, capacity: 2}",
                "{mode: burst, rpm: 120, capacity: 1}",
                "{mode: burst, rpm: 120, capacity: 10, strict_window: true}",
                "{mode: burst, rpm: 120, capacity: 10, interval_seconds: 1}",
                "{mode: burst, rpm: 120, capacity: 10, rpd: 60}",
                "{mode: burst, interval_seconds: 0.5, capacity: 10}",
                "{mode: spaced, rpm: 40.5}",
                "{mode: window, rpm: 120}",
            ],
            "{mode: burst, rpm: 3, capacity: 3, rpd: 9}",
        );
        let advice = "requests through in the first 60 s; add strict_window: true if your provider counts a rolling minute";
        let (of_models, of_providers): (Vec<_>, Vec<_>) =
            warnings(&config).into_iter().partition(|warning| warning.contains("/n: "));
        assert_eq!(
            of_providers,
            [
                format!("p0: capacity 10 on top of rpm 120 lets 129 {advice}"),
                format!("p1: capacity 2 on top of rpm 40.5 lets 42 {advice}"),
            ]
        );
        assert_eq!(of_models.len(), config.providers.len());
        assert_eq!(of_models[0], format!("p0/n: capacity 3 on top of rpm 3 lets 5 {advice}"));
    }

    #[test]
    fn every_limit_is_told() {
        let all = "{mode: window, rpm: 40, window_margin_ms: 1500, rpd: 900, day_resets_at: \"00:00-08:00\", tpm: 70, \
                   max_concurrent: 4}";
        let config = config(&[all, "{rpm: 40}"], "{rpd: 5, day_resets_at: rolling}");
        let [first, second] = config.providers.as_slice() else { panic!("{config:?}") };
        assert_eq!(headline(first), "p0: window, up to 40 at once (40 a minute)");
        assert_eq!(
            limits(&first.rate_limit.budget),
            [
                "at most 40 sends in any 61.5 s",
                "at most 900 sends a day, which begins at 08:00 UTC",
                "at most 70 tokens in any 61.5 s",
                "at most 4 requests in flight",
            ]
        );
        assert_eq!(worst_case(first), 40);
        assert_eq!(limits(&second.rate_limit.budget), [""; 0]);
        assert_eq!(worst_case(second), 40);
        let own = second.models[1].rate_limit.as_ref().unwrap();
        assert_eq!(
            (own.pace, limits(&own.budget)),
            (None, vec!["at most 5 sends in any 24 h".to_owned()])
        );
    }
    /// A configuration with this `server:` and one provider with this line more.
    fn with(server: &str, provider: &str) -> Config {
        let text = format!(
            "server: {{{server}}}\nproviders:\n  - name: p\n    base_url: http://h\n    models: [m]\n    \
             rate_limit: {{mode: burst, rpm: 30, capacity: 5}}\n    {provider}\n"
        );
        config::parse(&text, Path::new("test"), &|_| None)
            .unwrap_or_else(|faults| panic!("{text}{faults}"))
    }

    #[test]
    fn of_the_server_all_that_is_not_the_default_is_told() {
        let told = |server: &str| {
            let lines = settings(&with(server, "").server);
            lines.into_iter().map(|(key, text)| format!("{key}: {text}")).collect::<Vec<_>>()
        };
        assert_eq!(
            told("port: 1, routing: first, fairness: client, heartbeat_after_seconds: 15"),
            [""; 0]
        );
        let clients = "[{name: a, token: t1, priority: high}, {name: b, token: t2, priority: low, max_queue: 3}, \
                       {name: c, token: t3}]";
        assert_eq!(
            told(&format!(
                "port: null, socket: s.sock, trusted_proxies: [127.0.0.1, unix], cors_origins: ['http://a', 'http://b:1'], routing: earliest, fallback: true, fairness: fifo, state_file: s, clients: {clients}"
            )),
            [
                "socket: s.sock with the permissions 0660, and on no port",
                "trusted: 127.0.0.1/32, unix, where they say for whom they ask",
                "pages: of http://a, http://b:1 may call",
                "routing: earliest, to the provider that can send a request soonest",
                "fallback: to the next provider of the same model when one can't do it",
                "fairness: fifo, first come, first served, whoever it is",
                "client: a, goes first",
                "client: b, goes last, at most 3 waiting at a provider",
                "client: c",
                "state_file: s",
            ]
        );
        for (server, heartbeats) in [
            ("heartbeat_after_seconds: null", "none"),
            ("heartbeat_after_seconds: 0.5", "after 0.5 s in streams"),
            (
                "heartbeat_json: true",
                "after 15 s in streams, in front of plain answers four times as late",
            ),
        ] {
            assert_eq!(told(server), [format!("heartbeats: {heartbeats}")]);
        }
    }

    #[test]
    fn the_worst_case_is_the_sum_over_the_keys() {
        for (keys, line, most, each) in [
            ("", None, 34, ""),
            ("api_key: k1", None, 34, ""),
            ("api_keys: [k1]", None, 34, ""),
            (
                "api_keys: [k1, k2, k3]",
                Some("3, each with these limits"),
                102,
                " with each of 3 keys",
            ),
        ] {
            let config = with("", keys);
            let provider = &config.providers[0];
            let told = details(provider);
            let text = |key: &str| {
                told.iter().find(|(name, _)| *name == key).map(|(_, text)| text.as_str())
            };
            assert_eq!(text("api_keys"), line);
            assert_eq!(text("worst case"), Some(format!("{most} sends in any 60 s").as_str()));
            let pace = "burst, up to 5 at once, then one send every 2 s (30 a minute)";
            assert_eq!(
                summary(provider),
                format!("p: {pace}{each}, at most {most} in any 60 s, models: m")
            );
            let of_each = "34 requests through in the first 60 s with each key;";
            assert_eq!(warnings(&config)[0].contains(of_each), line.is_some(), "{keys}");
        }
    }

    #[test]
    fn clients_without_a_token_for_the_others_are_warned_of() {
        let warned = |server: &str| {
            warnings(&with(server, "")).iter().any(|text| text.contains("auth_token"))
        };
        assert!(warned("clients: [{name: a, token: t1}]"));
        assert!(!warned("auth_token: t0, clients: [{name: a, token: t1}]"));
        assert!(!warned("clients: []"));
    }
}
