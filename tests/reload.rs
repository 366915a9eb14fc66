//! SIGHUP: the file is read again and put in force whole or not at all; nobody who is there notices more than what changed.

mod support;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{
    Client, Gate, PATIENCE, Process, Reply, UNSHAPED, Upstream, get, post, provider_yaml, spaced,
    sse,
};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","messages":[]}"#;

/// Longer than any test.
const NEVER_MS: u64 = 3_600_000;

fn yaml(server: &str, providers: &str) -> String {
    let server: String = server.lines().map(|line| format!("  {line}\n")).collect();
    format!("server:\n  host: 127.0.0.1\n  port: 0\n{server}providers:\n{providers}")
}

fn serve(server: &str, providers: &str) -> (PathBuf, Process) {
    let file = Process::file("config.yaml", &yaml(server, providers));
    let process = Process::serve(&file);
    (file, process)
}

/// Writes the file anew and waits until it is in force; returns what the log says of it.
fn reload(process: &Process, file: &Path, text: &str) -> String {
    fs::write(file, text).expect("write the configuration");
    process.signal(Signal::HUP);
    process.wait_log("reloaded")
}

fn ask(addr: SocketAddr) -> Client {
    let mut client = Client::connect(addr);
    client.post_json(CHAT, BODY);
    client
}

fn wait_queued(addr: SocketAddr, n: u64) {
    let deadline = Instant::now() + PATIENCE;
    while get(addr, "/admin/stats").json()["providers"][0]["queued_ahead"] != n {
        assert!(Instant::now() < deadline, "never {n} in line");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_faulty_file_changes_nothing() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let provider = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, "");
    let (file, process) = serve("", &provider);
    for (text, fault) in [
        (yaml("", &provider.replace("rpm: 600000", "rpm: 0")), "must be more than 0"),
        (yaml("prot: 1", &provider), "is no known key"),
        ("providers: [".to_owned(), "is no valid YAML"),
    ] {
        let said = reload(&process, &file, &text);
        assert!(said.contains("nothing was reloaded"), "{said}");
        process.wait_log(fault);
        assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    }
    fs::remove_file(&file).expect("remove the configuration");
    process.signal(Signal::HUP);
    process.wait_log("nothing was reloaded");
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
}

#[test]
fn those_in_line_go_on_under_the_new_limits() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let provider = |limit: &str| provider_yaml("p", upstream.addr(), &["m"], limit, "");
    let (file, process) = serve("", &provider(&spaced(NEVER_MS)));
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    let mut waiting = [ask(process.addr()), ask(process.addr())];
    wait_queued(process.addr(), 2);
    let said = reload(&process, &file, &yaml("", &provider(&spaced(50))));
    assert!(said.ends_with("reloaded: p is changed\""), "{said}");
    for client in &mut waiting {
        assert_eq!(client.read_response().status, 200);
    }
    assert_eq!(upstream.requests().len(), 3);
    let stats = get(process.addr(), "/admin/stats").json();
    assert_eq!(
        (&stats["providers"][0]["sent"], &stats["providers"][0]["interval_seconds"]),
        (&3.into(), &0.05.into())
    );
}

#[test]
fn what_was_sent_counts_under_the_new_limits() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let provider = |rpd: u32| {
        let limit = format!("{{mode: burst, rpm: 600000, capacity: 1000, rpd: {rpd}}}");
        provider_yaml("p", upstream.addr(), &["m"], &limit, "")
    };
    let (file, process) = serve("", &provider(5));
    for _ in 0..3 {
        assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    }
    reload(&process, &file, &yaml("", &provider(4)));
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    assert_eq!(post(process.addr(), CHAT, BODY).code(), "daily_limit_reached");
    reload(&process, &file, &yaml("", &provider(5)));
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    assert_eq!(post(process.addr(), CHAT, BODY).code(), "daily_limit_reached");
}

#[test]
fn a_provider_that_goes_ends_with_its_last_request_and_a_new_one_serves() {
    let gate = Gate::closed();
    let held = gate.clone();
    let old = Upstream::answering(move |_, _| {
        Reply::stream(vec![sse::event("a"), sse::event("b")], &held)
    });
    let new = Upstream::answering(|_, _| Reply::ok());
    let limit = "{mode: burst, rpm: 600000, capacity: 1000, max_concurrent: 1}";
    let (file, process) = serve("", &provider_yaml("old", old.addr(), &["m"], limit, ""));
    let mut running = ask(process.addr());
    gate.release(1);
    running.read_head();
    let mut waiting = ask(process.addr());
    wait_queued(process.addr(), 1);
    let said =
        reload(&process, &file, &yaml("", &provider_yaml("new", new.addr(), &["n"], UNSHAPED, "")));
    assert!(said.ends_with("new is new; old is gone\""), "{said}");
    assert_eq!(post(process.addr(), CHAT, BODY).code(), "model_not_found");
    assert_eq!(post(process.addr(), CHAT, BODY.replace("\"m\"", "\"n\"")).status, 200);
    gate.release(100);
    for event in ["a", "b"] {
        assert_eq!(running.read_chunk().map(|chunk| chunk.bytes), Ok(sse::event(event)));
    }
    waiting.read_head();
    assert_eq!((old.requests().len(), new.requests().len()), (2, 1));
}

#[test]
fn what_was_sent_counts_when_a_provider_comes_back() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let limit = "{mode: burst, rpm: 600000, capacity: 1000, rpd: 1}";
    let only = |name| yaml("", &provider_yaml(name, upstream.addr(), &["m"], limit, ""));
    let file = Process::file("config.yaml", &only("p"));
    let process = Process::serve(&file);
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    reload(&process, &file, &only("q"));
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    reload(&process, &file, &only("p"));
    assert_eq!(post(process.addr(), CHAT, BODY).code(), "daily_limit_reached");
    assert_eq!(upstream.requests().len(), 2);
}

#[test]
fn a_connection_and_the_counters_live_on_under_another_key_and_token() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let provider = |keys: &str| provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, keys);
    let (file, process) = serve("", &provider("api_key: sk-the-first-key"));
    let mut client = Client::connect(process.addr());
    client.post_json(CHAT, BODY);
    assert_eq!(client.read_response().status, 200);
    let said = reload(
        &process,
        &file,
        &yaml("auth_token: new-token", &provider("api_key: sk-the-second-key")),
    );
    assert!(said.ends_with("server is changed; p is changed\""), "{said}");
    client.post_json(CHAT, BODY);
    assert_eq!(client.read_response().code(), "invalid_api_key");
    let mut client = Client::connect(process.addr());
    client.post_json_with(CHAT, "Authorization: Bearer new-token\r\n", BODY);
    assert_eq!(client.read_response().status, 200);
    let keys: Vec<_> =
        upstream.requests().iter().map(|request| request.header("authorization")).collect();
    assert_eq!(
        keys,
        [Some("Bearer sk-the-first-key".into()), Some("Bearer sk-the-second-key".into())]
    );
    reload(
        &process,
        &file,
        &yaml("", &provider("api_keys: [sk-the-first-key, sk-the-second-key]")),
    );
    let stats = get(process.addr(), "/admin/stats").json();
    let lanes: Vec<_> = stats["providers"][0]["lanes"].as_array().expect("lanes").iter().collect();
    assert_eq!(lanes.iter().map(|lane| &lane["sent"]).collect::<Vec<_>>(), [1, 1]);
}

#[test]
fn the_listener_moves_with_the_address_and_stays_where_that_is_taken() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let provider = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, "");
    let (file, process) = serve("", &provider);
    let taken =
        yaml("", &provider).replace("port: 0", &format!("port: {}", upstream.addr().port()));
    let said = reload(&process, &file, &taken);
    assert!(said.contains("nothing was reloaded: cannot serve on 127.0.0.1:"), "{said}");
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    let mut connected = Client::connect(process.addr());
    fs::write(&file, yaml("", &provider).replace("127.0.0.1\n  port", "127.0.0.2\n  port"))
        .expect("write");
    process.signal(Signal::HUP);
    let said = process.wait_log("from now on at");
    let moved = said
        .split("http://")
        .nth(1)
        .and_then(|rest| rest.strip_suffix("/v1\""))
        .expect("an address");
    let moved: SocketAddr = moved.parse().expect("an address");
    assert_eq!(moved.ip().to_string(), "127.0.0.2");
    assert_eq!(post(moved, CHAT, BODY).status, 200);
    connected.post_json(CHAT, BODY);
    assert_eq!(connected.read_response().status, 200, "who was connected stays");
    assert!(std::net::TcpStream::connect(process.addr()).is_err());
}

#[test]
fn who_is_believed_and_which_pages_may_call_changes_between_two_requests_of_a_connection() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let provider = provider_yaml("p", upstream.addr(), &["m"], &spaced(NEVER_MS), "");
    let (file, process) = serve("", &provider);
    let mut client = Client::connect(process.addr());
    let headers = "X-Forwarded-For: 192.0.2.1\r\nOrigin: https://chat.example.com\r\n";
    let get_models = |host: &str| {
        format!(
            "GET /v1/models HTTP/1.1\r\nHost: {host}\r\nOrigin: https://chat.example.com\r\n\r\n"
        )
    };
    client.post_json(CHAT, BODY);
    assert_eq!(client.read_response().status, 200, "takes the slot");
    client.send(get_models("gw.example.com"));
    assert_eq!(client.read_response().code(), "host_not_allowed");
    client.send(get_models("gateway"));
    assert_eq!(client.read_response().code(), "origin_not_allowed");
    let front = "trusted_proxies: [127.0.0.1]\ncors_origins: [\"https://chat.example.com\"]\n\
                 hosts: [gw.example.com]";
    reload(&process, &file, &yaml(front, &provider));
    client.send(get_models("gw.example.com"));
    assert_eq!(client.read_response().status, 200);
    client.post_json_with(CHAT, headers, "{}");
    assert_eq!(
        client.read_response().header("access-control-allow-origin").as_deref(),
        Some("https://chat.example.com")
    );
    client.post_json_with(CHAT, headers, BODY);
    wait_queued(process.addr(), 1);
    assert_eq!(get(process.addr(), "/admin/queue").json()["queue"][0]["client"], "192.0.2.1");
}

#[test]
fn an_unchanged_file_says_so() {
    let upstream = Upstream::answering(|_, _| Reply::ok());
    let providers = [("p", "m"), ("q", "n")]
        .map(|(name, model)| provider_yaml(name, upstream.addr(), &[model], UNSHAPED, ""));
    let (file, process) = serve("", &providers.concat());
    let said = reload(&process, &file, &yaml("", &providers.concat()));
    assert!(said.ends_with("reloaded: nothing is different\""), "{said}");
    let [p, q] = providers;
    let said = reload(&process, &file, &yaml("", &(q + &p)));
    assert!(said.ends_with("the providers are in another order\""), "{said}");
    let said = reload(&process, &file, &yaml("state_file: state.json", &p));
    assert!(said.contains("state_file takes effect at the next start; q is gone"), "{said}");
}

#[test]
fn a_queued_request_takes_its_key_to_the_host_that_it_is_configured_for() {
    let [old, new] = [(); 2].map(|()| Upstream::answering(|_, _| Reply::ok()));
    let provider = |upstream: &Upstream, key: &str| {
        provider_yaml("p", upstream.addr(), &["m"], &spaced(1500), &format!("api_key: {key}"))
    };
    let (file, process) = serve("", &provider(&old, "old-key"));
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    // The second request waits for its slot, on a connection to the old host.
    let mut second = ask(process.addr());
    wait_queued(process.addr(), 1);
    let deadline = Instant::now() + PATIENCE;
    while get(process.addr(), "/admin/stats").json()["providers"][0]["waiting_in_acquire"] != 1 {
        assert!(Instant::now() < deadline, "the request does not prepare a connection");
    }
    let said = reload(&process, &file, &yaml("", &provider(&new, "new-key")));
    assert!(said.contains("p is changed"), "{said}");
    assert_eq!(second.read_response().status, 200);
    assert_eq!(post(process.addr(), CHAT, BODY).status, 200);
    for (upstream, key) in [(&old, "Bearer old-key"), (&new, "Bearer new-key")] {
        let shown = upstream
            .requests()
            .iter()
            .map(|request| request.header("authorization"))
            .collect::<Vec<_>>();
        assert!(shown.iter().all(|shown| shown.as_deref() == Some(key)), "{key}: {shown:?}");
    }
    assert_eq!(old.requests().len() + new.requests().len(), 3);
    assert_eq!(new.requests().len(), 2, "the connection to the old host is not used again");
}
