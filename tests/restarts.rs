//! What a restart remembers: in order, after a kill, and with a file that says nothing.

mod support;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{
    Client, PATIENCE, Process, Recorded, Reply, Upstream, burst, get, post, provider_yaml, spaced,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

/// A configuration with a state file beside it, and the file.
fn config(upstream: &Upstream, rate_limit: &str, extras: &str) -> (PathBuf, PathBuf) {
    let config = Process::config(
        "state_file: state.json",
        &provider_yaml("p", upstream.addr(), &["m"], rate_limit, extras),
    );
    let state = config.with_file_name("state.json");
    (config, state)
}

/// A state file under which everything may be sent.
fn with_nothing_sent(config: &Path) {
    let mut process = Process::serve(config);
    process.signal(Signal::TERM);
    assert!(process.wait_exit().success());
}

fn stop(mut process: Process) {
    process.signal(Signal::TERM);
    assert!(process.wait_exit().success());
}

fn kill(mut process: Process) {
    process.signal(Signal::KILL);
    assert!(!process.wait_exit().success());
}

fn ask(addr: SocketAddr) -> Client {
    let mut client = Client::connect(addr);
    client.post_json(CHAT, BODY);
    client
}

fn state(file: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(file).expect("the state file is there"))
        .expect("the state file is JSON")
}

/// The most requests that arrived in any span, both ends included.
fn most_within(requests: &[Recorded], span: Duration) -> usize {
    let at: Vec<Instant> = requests.iter().map(|request| request.arrived).collect();
    let within =
        |from: &Instant| at.iter().filter(|at| *at >= from && **at - *from <= span).count();
    at.iter().map(within).max().unwrap_or(0)
}

#[test]
fn the_cadence_goes_on_after_an_orderly_stop() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let (config, file) = config(&upstream, &spaced(2000), "");
    with_nothing_sent(&config);
    // Three processes, one after the other: none of them knows more than the file.
    let mut sent = Vec::new();
    for _ in 0..3 {
        let process = Process::serve(&config);
        let asked = Instant::now();
        assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
        sent.push((asked, Instant::now()));
        stop(process);
        assert_eq!(state(&file)["clean"], true);
    }
    for pair in sent.windows(2) {
        // From before the first could have been sent to after the second was answered: never shorter than the gap itself.
        let (first, second) = (pair[0].0, pair[1].1);
        assert!(second - first >= Duration::from_millis(2000), "{:?}", second - first);
    }
}

#[test]
fn what_nobody_has_used_is_not_waited_for() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let (config, _) = config(&upstream, &spaced(3_600_000), "");
    with_nothing_sent(&config);
    let state =
        fs::read_to_string(config.with_file_name("state.json")).expect("the state file is there");
    // As if an hour had passed since.
    let saved_at = serde_json::from_str::<serde_json::Value>(&state).expect("JSON")["saved_at"]
        .as_u64()
        .expect("a time");
    let old = state.replace(&saved_at.to_string(), &(saved_at - 3_600_000).to_string());
    fs::write(config.with_file_name("state.json"), old).expect("write the state file");
    let process = Process::serve(&config);
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
}

#[test]
fn a_spent_day_and_a_pause_outlive_the_program() {
    let refusing =
        "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 200\r\nContent-Length: 0\r\n\r\n";
    for (limit, reply, want, code) in [
        (
            "{mode: burst, rpm: 6000, capacity: 10, rpd: 1, max_wait_seconds: 5}",
            Reply::ok(),
            200,
            "daily_limit_reached",
        ),
        (
            "{mode: burst, rpm: 6000, capacity: 10, max_wait_seconds: 5}",
            Reply::Raw(refusing.into()),
            429,
            "queue_wait_exceeded",
        ),
    ] {
        let upstream = Upstream::start([reply]);
        let (config, _) = config(&upstream, limit, "");
        with_nothing_sent(&config);
        let process = Process::serve(&config);
        assert_eq!(post(process.addr(), CHAT, BODY).status, want);
        stop(process);
        let process = Process::serve(&config);
        let refused = post(process.addr(), CHAT, BODY);
        assert_eq!((refused.status, refused.code().as_str()), (503, code), "{refused:?}");
        assert_eq!(upstream.requests().len(), 1);
        stop(process);
    }
}

/// A bucket of 5 that earns one token a second, killed again and again in the middle of its burst: a provider that keeps such a
/// bucket, or counts how many come in a second, finds nothing to refuse.
#[test]
fn a_kill_in_the_middle_of_a_burst_breaks_no_limit() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let (config, file) = config(&upstream, &burst(1000, 5), "");
    with_nothing_sent(&config);
    let mut callers = Vec::new();
    for round in 0..4 {
        let process = Process::serve(&config);
        if round > 0 {
            process.wait_log("was not written at an orderly end");
        }
        callers.extend((0..12).map(|_| ask(process.addr())));
        let sent = upstream.requests().len();
        // In the first round the bucket is full; afterwards there is a token a second and no more.
        upstream.wait_requests(sent + if round == 0 { 5 } else { 1 }, PATIENCE);
        kill(process);
        assert_eq!(state(&file)["clean"], false);
    }
    let requests = upstream.requests();
    assert!(requests.len() >= 8, "{}", requests.len());
    for seconds in [1, 2, 3] {
        // Late reading may bring two of them closer together than they came, by one.
        let most = most_within(&requests, Duration::from_secs(seconds));
        assert!(most <= 5 + seconds as usize + 1, "{most} in {seconds} s");
    }
}

#[test]
fn without_a_word_of_before_the_first_request_waits_for_one_interval() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    for (content, said) in [
        (None, "does not exist yet"),
        (Some("{\"version\":1,\"saved_at\":"), "ends too early"),
        (Some("{\"version\":9}"), "version 9"),
        (Some("my notes\n"), "does not write"),
    ] {
        let (config, file) = config(&upstream, &spaced(1500), "");
        if let Some(content) = content {
            fs::write(&file, content).expect("write the state file");
        }
        let started = Instant::now();
        let process = Process::serve(&config);
        let line = process.wait_log("state.json");
        assert!(line.contains(said) && line.contains("assuming"), "{line}");
        assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
        assert!(started.elapsed() >= Duration::from_millis(1500), "{:?}", started.elapsed());
        stop(process);
        assert_eq!(state(&file)["clean"], true);
        // Whatever it was, it may be of use to somebody.
        let aside = fs::read_to_string(file.with_file_name("state.json.damaged")).ok();
        assert_eq!(aside.as_deref(), content);
    }
}

#[test]
fn it_is_written_while_running_at_a_bounded_rate() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let (config, file) =
        config(&upstream, "{mode: burst, rpm: 600000, capacity: 1000, rpd: 1000}", "");
    with_nothing_sent(&config);
    let process = Process::serve(&config);
    let spent = || {
        state(&file)["providers"]["p"][0]["shared"]["calendar_day"]["spent"]
            .as_u64()
            .expect("a count")
    };
    let deadline = Instant::now() + 3 * PATIENCE;
    let (mut asked, mut versions) = (0, std::collections::BTreeSet::new());
    while versions.len() < 2 {
        assert!(Instant::now() < deadline, "never written");
        assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
        asked += 1;
        versions.extend(Some(spent()).filter(|spent| *spent > 0));
        thread::sleep(Duration::from_millis(10));
    }
    assert!(asked > 100, "two writes for {asked} sends");
    stop(process);
    assert_eq!(spent(), asked);
}

#[test]
fn each_key_is_remembered_for_itself_and_none_is_in_the_file() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let keys = "api_keys: [sk-the-first-secret, sk-the-second-secret]";
    let (config, file) =
        config(&upstream, "{mode: spaced, rpm: 6000, rpd: 1, max_wait_seconds: 5}", keys);
    with_nothing_sent(&config);
    let process = Process::serve(&config);
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    stop(process);
    let text = fs::read_to_string(&file).expect("the state file is there");
    assert!(!text.contains("secret"), "{text}");
    // In another order, they are still who they are.
    let swapped = fs::read_to_string(&config).expect("the configuration is there");
    let swapped = swapped.replace(keys, "api_keys: [sk-the-second-secret, sk-the-first-secret]");
    fs::write(&config, swapped).expect("write the configuration");
    let process = Process::serve(&config);
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    assert_eq!(post(process.addr(), CHAT, BODY).code(), "daily_limit_reached");
    let by: Vec<_> =
        upstream.requests().iter().map(|request| request.header("authorization")).collect();
    assert_ne!(by[0], by[1]);
    stop(process);
}

#[test]
fn a_file_that_cannot_be_written_stops_the_start() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let (config, file) = config(&upstream, &spaced(1000), "");
    // Whoever runs the tests may be root, who may write anywhere; but no file takes the place of a folder.
    fs::create_dir(file.with_file_name("state.json.new")).expect("make a folder");
    let output = Process::run(&["--config", config.to_str().expect("a path in UTF-8")]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("state.json") && said.contains("can't be written"), "{said}");
}

#[test]
fn the_stats_name_the_file() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let (config, file) = config(&upstream, &spaced(1000), "");
    let process = Process::serve(&config);
    let stats = get(process.addr(), "/admin/stats").json();
    assert_eq!(stats["server"]["state_file"], file.to_str().expect("a path in UTF-8"));
}
