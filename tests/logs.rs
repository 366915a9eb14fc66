//! The log: a line for each request, in the formats and at the levels that the file asks for, and no secret in any.

mod support;

use rustix::process::Signal;
use serde_json::Value;
use support::{
    Client, Ending, Gate, Process, Reply, UNSHAPED, Upstream, get, post, post_with, provider_yaml,
    sse,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":["very private"]}"#;
const STREAM: &str = r#"{"model":"m","stream":true}"#;
const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":31,"completion_tokens":7}}"#;

fn gateway(
    server: &str,
    log: &str,
    upstream: &Upstream,
    rate_limit: &str,
    extras: &str,
) -> Process {
    let providers = provider_yaml("nim", upstream.addr(), &["m"], rate_limit, extras);
    let file = Process::config(server, &format!("{providers}log: {log}\n"));
    Process::serve(&file)
}

/// The value of a key in a logfmt line, quotes and all.
fn value<'l>(line: &'l str, key: &str) -> Option<&'l str> {
    let rest = line.split_once(&format!(" {key}="))?.1;
    let end = match rest.strip_prefix('"') {
        Some(quoted) => quoted.find('"')? + 2,
        None => rest.find(' ').unwrap_or(rest.len()),
    };
    Some(&rest[..end])
}

fn number(line: &str, key: &str) -> f64 {
    let value = value(line, key).unwrap_or_else(|| panic!("no {key} in {line}"));
    value.parse().unwrap_or_else(|_| panic!("{key} is no number in {line}"))
}

#[test]
fn a_request_is_a_line_with_everything_that_is_known_of_it() {
    let upstream =
        Upstream::start([Reply::with_headers("Content-Type: application/json\r\n", USAGE)]);
    let server = "clients: [{name: chat room, token: very-secret-token}]";
    let process = gateway(server, "{level: info}", &upstream, UNSHAPED, "api_key: very-secret-key");
    let answer = post_with(
        process.addr(),
        &format!("{CHAT}?key=very-secret"),
        "Authorization: Bearer very-secret-token\r\n",
        BODY,
    );
    assert_eq!(answer.status, 200);
    let line = process.wait_log("msg=request");
    for (key, want) in [
        ("level", "info"),
        ("client", "\"chat room\""),
        ("method", "POST"),
        ("path", CHAT),
        ("provider", "nim"),
        ("model", "m"),
        ("status", "200"),
        ("tokens_in", "31"),
        ("tokens_out", "7"),
    ] {
        assert_eq!(value(&line, key), Some(want), "{key} in {line}");
    }
    assert_eq!(value(&line, "id"), answer.header("x-request-id").as_deref());
    assert_eq!(number(&line, "bytes_in"), BODY.len() as f64);
    assert!(number(&line, "bytes_out") > USAGE.len() as f64, "head and body: {line}");
    assert!(number(&line, "queued_ms") <= number(&line, "ttfb_ms"), "{line}");
    assert!(number(&line, "ttfb_ms") <= number(&line, "total_ms"), "{line}");
    assert!(line.starts_with("ts=20") && line.contains("Z level="), "{line}");
    for absent in ["error", "retries", "stream"] {
        assert_eq!(value(&line, absent), None, "{line}");
    }
    assert!(!line.contains("very-secret") && !line.contains("very private"), "{line}");
}

#[test]
fn a_stream_tells_its_tokens_and_a_retry_is_counted() {
    let usage = format!("data: {USAGE}\n\n");
    let chunks = vec![sse::event("Hi"), usage.into_bytes(), sse::done()];
    let busy = Reply::Json(500, "{}".to_owned());
    let upstream = Upstream::start([busy, Reply::stream(chunks, &Gate::open())]);
    let process = gateway("", "{}", &upstream, UNSHAPED, "retry: {attempts: 2}");
    assert_eq!(post(process.addr(), CHAT, STREAM).status, 200);
    let line = process.wait_log("msg=request");
    for (key, want) in [
        ("stream", "true"),
        ("retries", "1"),
        ("tokens_in", "31"),
        ("tokens_out", "7"),
        ("status", "200"),
    ] {
        assert_eq!(value(&line, key), Some(want), "{key} in {line}");
    }
}

#[test]
fn whoever_hangs_up_is_a_499_with_the_time_it_waited() {
    let upstream = Upstream::start([Reply::ok()]);
    let process = gateway("", "{}", &upstream, "{mode: spaced, interval_seconds: 3600}", "");
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    let mut waits = Client::connect(process.addr());
    waits.post_json(CHAT, BODY);
    process.wait_queued(1);
    drop(waits);
    let line = process.wait_log("status=499");
    assert_eq!(value(&line, "error"), Some("caller_gone"), "{line}");
    assert_eq!(value(&line, "queued_ms"), value(&line, "total_ms"), "it only waited: {line}");
    assert_eq!(value(&line, "bytes_out"), Some("0"), "{line}");
}

#[test]
fn a_refusal_is_a_line_too_even_of_what_is_no_request() {
    let upstream = Upstream::start([Reply::ok()]);
    let process = gateway("", "{}", &upstream, UNSHAPED, "");
    post(process.addr(), CHAT, "{\"model\":\"a\\u001b[2J \\\"b\"}");
    let line = process.wait_log("error=model_not_found");
    assert_eq!((value(&line, "status"), value(&line, "provider")), (Some("404"), None), "{line}");
    assert!(line.contains(r#" model="a\u001b[2J \"b" "#), "nothing breaks out: {line}");
    let mut client = Client::connect(process.addr());
    client.send("BLAH\r\n\r\n");
    assert_eq!(client.read_response().status, 400);
    let line = process.wait_log("error=malformed_request");
    assert_eq!(
        (value(&line, "method"), value(&line, "client")),
        (None, Some("127.0.0.1")),
        "{line}"
    );
}

#[test]
fn a_stream_that_breaks_off_says_so() {
    let broken =
        Reply::Stream { chunks: vec![sse::event("Hi")], gate: Gate::open(), ending: Ending::Reset };
    let upstream = Upstream::start([broken]);
    let process = gateway("", "{}", &upstream, UNSHAPED, "");
    let mut client = Client::connect(process.addr());
    client.post_json(CHAT, STREAM);
    client.read_to_end();
    let line = process.wait_log("msg=request");
    assert_eq!(
        (value(&line, "status"), value(&line, "error")),
        (Some("200"), Some("upstream_disconnected")),
        "{line}"
    );
}

#[test]
fn json_has_the_same_with_numbers_as_numbers() {
    let upstream = Upstream::start([Reply::ok()]);
    let process = gateway("", "{format: json}", &upstream, UNSHAPED, "");
    post(process.addr(), CHAT, BODY);
    let line: Value =
        serde_json::from_str(&process.wait_log("\"request\"")).expect("one JSON object a line");
    assert_eq!(
        (&line["msg"], &line["level"], &line["status"]),
        (&"request".into(), &"info".into(), &200.into())
    );
    assert!(line["total_ms"].is_f64() && line["ts"].is_string(), "{line}");
}

#[test]
fn a_level_leaves_out_what_matters_less() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let process = gateway("", "{level: debug}", &upstream, UNSHAPED, "");
    get(process.addr(), "/admin/health");
    let line = process.wait_log("path=/admin/health");
    assert_eq!(value(&line, "level"), Some("debug"));

    let process = gateway("", "{level: warn}", &upstream, UNSHAPED, "");
    post(process.addr(), CHAT, BODY);
    process.signal(Signal::TERM);
    let rest = process.rest_of_log();
    assert!(
        rest.iter().all(|line| line.contains(" level=warn ")),
        "neither the request nor the stop matters enough: {rest:?}"
    );
}

#[test]
fn a_reload_changes_level_and_format() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let providers = provider_yaml("nim", upstream.addr(), &["m"], UNSHAPED, "");
    let file = Process::config("", &format!("{providers}log: {{level: error}}\n"));
    let process = Process::serve(&file);
    let text = std::fs::read_to_string(&file).expect("it was written");
    std::fs::write(&file, text.replace("{level: error}", "{format: json}")).expect("write");
    process.signal(Signal::HUP);
    process.wait_log("{\"ts\":");
    post(process.addr(), CHAT, BODY);
    process.wait_log("\"msg\":\"request\"");
}

#[test]
fn lines_in_the_journal_have_a_priority_and_no_time() {
    let upstream = Upstream::start([Reply::ok()]);
    let providers = provider_yaml("nim", upstream.addr(), &["m"], UNSHAPED, "");
    let file = Process::config("", &providers);
    // systemd names the device and inode of the stream that it has made standard error.
    let process = Process::serve_with(
        &file,
        "export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2)",
        &[],
    );
    post(process.addr(), CHAT, BODY);
    let line = process.wait_log("msg=request");
    assert!(line.starts_with("<6>level=info msg=request "), "{line}");
    // Where standard error is something else by now, its lines are for whoever reads that.
    let process = Process::serve_with(&file, "", &[("JOURNAL_STREAM", "1:1")]);
    get(process.addr(), "/v1/models");
    assert!(process.wait_log("msg=request").starts_with("ts="));
}

#[test]
fn a_log_that_nobody_reads_stops_nobody_and_says_what_is_lost() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let providers = provider_yaml("nim", upstream.addr(), &["m"], UNSHAPED, "");
    let mut process = Process::serve_unread(&Process::config("", &providers));
    let mut client = Client::connect(process.addr());
    // A pipe takes 64 KiB and the backlog 256 KiB; a line has over 200 bytes.
    for _ in 0..3000 {
        client.get(&format!("/v1/models/{}", "x".repeat(110)));
        assert_eq!(client.read_response().status, 404);
    }
    process.read_log();
    let line = process.wait_log("lines were lost here");
    assert_eq!(value(&line, "level"), Some("warn"), "{line}");
}
