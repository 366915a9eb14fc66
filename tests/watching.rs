//! What an operator sees beside stats and queue: the latest requests, figures for Prometheus, the page, `limitrate top`.

mod support;

use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;
use support::{
    Client, ClosedPort, Gate, Gateway, Process, Reply, UNSHAPED, Upstream, burst, get, post,
    post_with, provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":31,"completion_tokens":7}}"#;

fn body(model: &str) -> String {
    serde_json::json!({ "model": model }).to_string()
}

fn ask(gateway: &Gateway, path: &str, accept: &str) -> support::Response {
    let mut client = Client::connect(gateway.addr());
    client.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n"));
    client.read_response()
}

fn requests(gateway: &Gateway) -> Vec<Value> {
    get(gateway.addr(), "/admin/requests").json()["requests"].as_array().expect("a list").clone()
}

/// The value of one sample.
fn sample(metrics: &str, series: &str) -> Option<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
    Some(line.parse().unwrap_or_else(|_| panic!("{series} is {line}")))
}

#[test]
fn the_latest_requests_the_last_one_first() {
    let upstream = Upstream::answering(|_, _| {
        Reply::with_headers("Content-Type: application/json\r\n", USAGE)
    });
    let provider = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, "");
    let gateway = Gateway::start_with("clients: [{name: chat, token: t}]", &provider, &[]);
    post_with(gateway.addr(), CHAT, "Authorization: Bearer t\r\n", body("m"));
    post(gateway.addr(), "/v1/embeddings?x=1", body("nobody's"));
    get(gateway.addr(), "/admin/stats");

    let page = get(gateway.addr(), "/admin/requests").json();
    assert_eq!(
        (&page["count"], &page["errors"]),
        (&2.into(), &serde_json::json!({"model_not_found": 1}))
    );
    let rows = page["requests"].as_array().expect("a list");
    let [unknown, chat] = &rows[..] else { panic!("not two: {rows:#?}") };
    for (row, key, want) in [
        (chat, "client", Value::from("chat")),
        (chat, "model", "m".into()),
        (chat, "provider", "p".into()),
        (chat, "status", 200.into()),
        (chat, "error", Value::Null),
        (chat, "sends", 1.into()),
        (chat, "input_tokens", 31.into()),
        (chat, "output_tokens", 7.into()),
        (chat, "bytes_in", body("m").len().into()),
        (unknown, "client", "127.0.0.1".into()),
        (unknown, "model", "nobody's".into()),
        (unknown, "path", "/v1/embeddings".into()),
        (unknown, "provider", Value::Null),
        (unknown, "queued_seconds", Value::Null),
        (unknown, "status", 404.into()),
        (unknown, "error", "model_not_found".into()),
    ] {
        assert_eq!(row[key], want, "{key} of {row:#}");
    }
    let times = ["queued_seconds", "first_byte_seconds", "total_seconds"]
        .map(|key| chat[key].as_f64().expect("a time"));
    assert!(times.is_sorted(), "{times:?}");
    assert_eq!(
        get(gateway.addr(), "/admin/requests?limit=1").json()["requests"].as_array().map(Vec::len),
        Some(1)
    );
}

#[test]
fn only_so_many_requests_are_kept() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""));
    let mut client = Client::connect(gateway.addr());
    for n in 0..205 {
        client.post_json(CHAT, body(&format!("unknown-{n}")));
        client.read_response();
    }
    let rows = requests(&gateway);
    assert_eq!(
        (rows.len(), &rows[0]["model"], &rows[199]["model"]),
        (200, &"unknown-204".into(), &"unknown-5".into())
    );
}

#[test]
fn the_queue_page_shows_as_many_as_are_asked_for() {
    let upstream = Upstream::start([Reply::Stall]);
    let gateway =
        Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], &spaced(3_600_000), ""));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let mut client = Client::connect(gateway.addr());
            client.post_json(CHAT, body("m"));
            client
        })
        .collect();
    gateway.wait_queued(3);
    for (query, want) in [("", 3), ("?limit=2", 2), ("?x=1&limit=0", 0), ("?limit=many", 3)] {
        let page = get(gateway.addr(), &format!("/admin/queue{query}")).json();
        assert_eq!(page["queue"].as_array().map(Vec::len), Some(want), "{query}");
    }
    drop(callers);
}

#[test]
fn figures_for_prometheus() {
    let upstream = Upstream::answering(|_, n| match n {
        0 => Reply::with_headers("Content-Type: application/json\r\n", USAGE),
        1 => Reply::TooMany(vec![("Retry-After", "0".into())]),
        _ => Reply::Json(400, "{}".into()),
    });
    let provider = provider_yaml(
        "p",
        upstream.addr(),
        &["m", "n"],
        &burst(3_600_000, 7),
        "retry: {attempts: 1}",
    );
    let gateway = Gateway::start_with("clients: [{name: chat, token: t}]", &provider, &[]);
    post_with(gateway.addr(), CHAT, "Authorization: Bearer t\r\n", body("m"));
    post(gateway.addr(), CHAT, body("m"));
    post(gateway.addr(), CHAT, body("n"));
    post(gateway.addr(), CHAT, body("unknown"));
    let response = get(gateway.addr(), "/metrics");
    assert_eq!(
        response.header("content-type").as_deref(),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    let metrics = response.text();
    for (series, want) in [
        (r#"limitrate_requests_total{provider="p",model="m",status="200"}"#, 1.0),
        (r#"limitrate_requests_total{provider="p",model="m",status="429"}"#, 1.0),
        (r#"limitrate_requests_total{provider="p",model="n",status="400"}"#, 1.0),
        (r#"limitrate_requests_total{provider="",model="",status="404"}"#, 1.0),
        (r#"limitrate_client_requests_total{client="chat"}"#, 1.0),
        (r#"limitrate_client_requests_total{client="other"}"#, 3.0),
        (r#"limitrate_errors_total{code="model_not_found"}"#, 1.0),
        (r#"limitrate_tokens_total{provider="p",model="m",kind="input"}"#, 31.0),
        (r#"limitrate_tokens_total{provider="p",model="m",kind="output"}"#, 7.0),
        (r#"limitrate_sends_total{provider="p"}"#, 3.0),
        (r##"limitrate_key_sends_total{provider="p",key="#1"}"##, 3.0),
        (r#"limitrate_upstream_answers_total{provider="p",kind="4xx"}"#, 2.0),
        (r#"limitrate_cooldowns_total{provider="p"}"#, 1.0),
        (r#"limitrate_queue_length{provider="p"}"#, 0.0),
        (r#"limitrate_queue_wait_seconds_count{provider="p"}"#, 3.0),
        (r#"limitrate_queue_wait_seconds_bucket{provider="p",le="+Inf"}"#, 3.0),
        (r#"limitrate_request_duration_seconds_count{provider="p"}"#, 3.0),
    ] {
        assert_eq!(sample(&metrics, series), Some(want), "{series} in\n{metrics}");
    }
    let held: f64 = metrics
        .lines()
        .filter(|line| line.starts_with("limitrate_held_by{"))
        .filter_map(|line| line.split(' ').next_back()?.parse::<f64>().ok())
        .sum();
    assert_eq!(held, 1.0, "one reason at a time:\n{metrics}");
    assert!(
        sample(&metrics, "process_resident_memory_bytes").is_some_and(|bytes| bytes > 1e6),
        "{metrics}"
    );
    assert!(sample(&metrics, "process_open_fds").is_some_and(|files| files > 3.0), "{metrics}");
    let mut bounds: Vec<f64> = Vec::new();
    for line in metrics.lines().filter(|line| {
        line.starts_with("limitrate_time_to_first_byte_seconds_bucket{provider=\"p\"")
    }) {
        bounds.push(line.split(' ').next_back().expect("a value").parse().expect("a number"));
    }
    assert!(bounds.len() > 10 && bounds.is_sorted(), "buckets add up: {bounds:?}");
}

#[test]
fn who_was_never_sent_waited_for_nothing_that_counts() {
    let upstream = Upstream::start([Reply::ok()]);
    let provider = provider_yaml("p", upstream.addr(), &["m"], &spaced(3_600_000), "max_queue: 1");
    let gateway = Gateway::start(&provider);
    assert_eq!(post(gateway.addr(), CHAT, body("m")).status, 200);
    let mut waits = Client::connect(gateway.addr());
    waits.post_json(CHAT, body("m"));
    gateway.wait_queued(1);
    assert_eq!(post(gateway.addr(), CHAT, body("m")).code(), "queue_full");
    drop(waits);
    gateway.wait_queued(0);
    let metrics = get(gateway.addr(), "/metrics").text();
    assert_eq!(sample(&metrics, r#"limitrate_queue_wait_seconds_count{provider="p"}"#), Some(1.0));
    assert_eq!(
        sample(&metrics, r#"limitrate_requests_total{provider="p",model="m",status="503"}"#),
        Some(1.0)
    );
}

#[test]
fn keys_that_end_alike_are_told_apart() {
    let upstream = Upstream::start([Reply::ok()]);
    let keys = "api_keys: [first-long-key-same, other-long-key-same, another-long-key-apart]";
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, keys));
    let lanes = gateway.stats()["providers"][0]["lanes"].clone();
    let labels: Vec<_> =
        lanes.as_array().expect("a list").iter().map(|lane| lane["key"].clone()).collect();
    assert_eq!(labels, ["#1", "#2", "...part"]);
}

#[test]
fn stats_are_figures_for_who_wants_them_so() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""));
    let prometheus =
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
    let figures = ask(&gateway, "/admin/stats", prometheus);
    assert!(figures.text().starts_with("# HELP limitrate_build_info "), "{figures:?}");
    assert_eq!(figures.header("vary").as_deref(), Some("Accept"));
    for accept in ["*/*", "application/json", "text/html,*/*;q=0.8"] {
        let json = ask(&gateway, "/admin/stats", accept);
        assert_eq!(json.json()["providers"][0]["provider"], "p", "{accept}");
    }
}

/// Where Prometheus' own tool is installed, it has no complaint.
#[test]
fn promtool_takes_the_figures() {
    let Ok(mut promtool) = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
    else {
        return;
    };
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let provider = provider_yaml(
        "\"p \\\"\\\\ q\"",
        upstream.addr(),
        &["'a \\ \" b'"],
        UNSHAPED,
        "api_keys: [a, b]",
    );
    let gateway = Gateway::start(&provider);
    assert_eq!(post(gateway.addr(), CHAT, body("a \\ \" b")).status, 200);
    post(gateway.addr(), CHAT, body("unknown"));
    let metrics = get(gateway.addr(), "/metrics").text();
    assert!(metrics.contains(r#"model="a \\ \" b""#), "{metrics}");
    std::io::Write::write_all(&mut promtool.stdin.take().expect("piped"), metrics.as_bytes())
        .expect("it reads");
    let output = promtool.wait_with_output().expect("it ends");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}\n{metrics}");
}

#[test]
fn the_page_is_for_everybody_and_its_figures_are_not() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = Gateway::start_with(
        "auth_token: secret",
        &provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""),
        &[],
    );
    let page = get(gateway.addr(), "/admin/");
    assert_eq!(
        (page.status, page.header("content-type").as_deref()),
        (200, Some("text/html; charset=utf-8"))
    );
    let policy = page.header("content-security-policy").expect("a policy");
    for part in
        ["default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"]
    {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
    for outside in ["src=\"", "href=\"http", "url(", "@import"] {
        assert!(!page.text().contains(outside), "the page loads something: {outside}");
    }
    let moved = get(gateway.addr(), "/admin");
    assert_eq!((moved.status, moved.header("location").as_deref()), (308, Some("admin/")));
    for path in ["/admin/stats", "/admin/queue", "/admin/requests", "/metrics"] {
        assert_eq!(get(gateway.addr(), path).status, 401, "{path}");
    }
}

#[test]
fn top_shows_lines_and_requests() {
    let upstream = Upstream::answering(|_, n| if n == 0 { Reply::ok() } else { Reply::Stall });
    let providers =
        provider_yaml("nim", upstream.addr(), &["m"], "{mode: spaced, interval_seconds: 3600}", "");
    let file = Process::config("auth_token: secret", &providers);
    let process = Process::serve(&file);
    let bearer = "Authorization: Bearer secret\r\n";
    assert_eq!(post_with(process.addr(), CHAT, bearer, body("m")).status, 200);
    let mut waits = Client::connect(process.addr());
    waits.post_json_with(CHAT, bearer, body("m"));
    let url = format!("http://{}", process.addr());
    let top = |token: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_limitrate"));
        let output = command
            .args(["top", "--url", &url])
            .env("LIMITRATE_TOKEN", token)
            .output()
            .expect("it runs");
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let deadline = std::time::Instant::now() + support::PATIENCE;
    let screen = loop {
        let (code, screen, err) = top("secret");
        assert_eq!((code, &*err), (Some(0), ""), "{screen}");
        if screen.contains("    1/1000") {
            break screen;
        }
        assert!(std::time::Instant::now() < deadline, "nobody waits:\n{screen}");
    };
    for part in
        ["nim ", "waits for its slot", "  1  127.0.0.1", "goes in  60 min", " 200    127.0.0.1"]
    {
        assert!(screen.contains(part), "no {part:?} in\n{screen}");
    }
    assert!(!screen.contains('\u{1b}'), "no colours into a pipe: {screen:?}");

    let (code, out, err) = top("wrong");
    assert_eq!((code, &*out), (Some(1), ""));
    assert!(
        err.contains("it wants a token")
            && err.contains("LIMITRATE_TOKEN")
            && !err.contains("wrong"),
        "{err}"
    );
    process.signal(Signal::TERM);
    drop(waits);

    let nobody = ClosedPort::new();
    let output = Process::run(&["top", "--url", &format!("http://{}", nobody.addr())]);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && err.contains("can't connect"), "{err}");
}

#[test]
fn top_finds_the_gateway_and_its_token_in_the_file() {
    let upstream = Upstream::start([Reply::ok()]);
    let probe = std::net::TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
    let port = probe.local_addr().expect("an address").port();
    drop(probe);
    let provider = provider_yaml("nim", upstream.addr(), &["m"], UNSHAPED, "");
    let text = format!(
        "server: {{host: 127.0.0.1, port: {port}, auth_token: secret}}\nproviders:\n{provider}"
    );
    let file = Process::file("config.yaml", &text);
    let _process = Process::serve(&file);
    let output = Process::run(&["top", "--config", file.to_str().expect("UTF-8")]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("\nnim "), "{output:?}");
}

#[test]
fn a_stream_that_runs_is_no_request_that_is_over() {
    let gate = Gate::closed();
    let upstream = Upstream::start([Reply::stream(
        vec![support::sse::event("Hi"), support::sse::done()],
        &gate,
    )]);
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""));
    let mut client = Client::connect(gateway.addr());
    client.post_json(CHAT, r#"{"model":"m","stream":true}"#);
    client.read_head();
    assert_eq!(requests(&gateway).len(), 0);
    gate.release(2);
    while client.read_chunk().is_ok() {}
    gateway.wait_stats(|stats| stats["total_histogram"]["count"] == 1, support::PATIENCE);
    let rows = requests(&gateway);
    assert_eq!((rows.len(), &rows[0]["stream"]), (1, &true.into()), "{rows:#?}");
}
