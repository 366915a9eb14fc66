//! No key leaves the gateway but towards its provider.

mod support;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use limitrate::config;
use limitrate::server::Server;
use rustix::process::{Pid, Signal, kill_process};
use support::{
    Client, ClosedPort, Gateway, PATIENCE, Reply, UNSHAPED, Upstream, get, post, provider_at,
    provider_yaml,
};

const KEY: &str = "sk-5ecret-of-the-provider";
const SECOND_KEY: &str = "sk-an0ther";
const HEADER: &str = "s3cret-in-a-header";
const TOKEN: &str = "t0ken-of-the-gateway";
const CLIENTS: &str = "t0ken-of-a-client";
const PROXYS: &str = "pr0xy-password";
/// `user:` and the former, as a proxy gets them (RFC 7617).
const PROXYS_ENCODED: &str = "dXNlcjpwcjB4eS1wYXNzd29yZA";
const CALLERS: &str = "k3y-of-the-caller";
const ENV: [(&str, &str); 6] = [
    ("KEY", KEY),
    ("SECOND_KEY", SECOND_KEY),
    ("HEADER", HEADER),
    ("TOKEN", TOKEN),
    ("CLIENTS", CLIENTS),
    ("PROXYS", PROXYS),
];
const EXTRAS: &str = "api_keys: [\"${KEY}\", \"${SECOND_KEY}\"]\nheaders: {x-api-key: \"${HEADER}\"}\n\
                      request_timeout_seconds: 0.2";
const SERVER: &str = "auth_token: ${TOKEN}\nclients: [{name: chat, token: \"${CLIENTS}\"}]\n";

#[track_caller]
fn assert_no_secret(what: &str, text: &str) {
    for secret in [KEY, SECOND_KEY, HEADER, TOKEN, CLIENTS, PROXYS, PROXYS_ENCODED, CALLERS] {
        assert!(!text.contains(secret), "{what} shows {secret}: {text}");
    }
}

/// Every page and every refusal of a gateway with this provider.
fn pages(base_url: &str) -> Vec<String> {
    let providers = provider_at("p", base_url, &["m"], UNSHAPED, EXTRAS);
    let gateway = Gateway::start_with(SERVER, &providers, &ENV);
    let requests = [
        ("POST /v1/chat/completions", r#"{"model":"m"}"#),
        ("POST /v1/chat/completions", r#"{"model":"p/x"}"#),
        ("POST /v1/chat/completions", "{"),
        ("GET /v1/models", ""),
        ("GET /v1/chat/completions", ""),
        ("GET /nowhere", ""),
        ("GET /admin/stats", ""),
        ("GET /admin/queue", ""),
        ("GET /admin/health", ""),
    ];
    let mut pages = Vec::new();
    for (request, body) in requests {
        for key in [TOKEN, CLIENTS, CALLERS] {
            let mut client = Client::connect(gateway.addr());
            let length = body.len();
            client.send(format!(
                "{request} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n{body}"
            ));
            pages.push(format!("{request}: {:?}", client.read_response()));
        }
    }
    pages
}

#[test]
fn no_page_and_no_refusal_shows_a_key() {
    let closed = ClosedPort::new();
    let (fine, stalling) = (Upstream::start([Reply::ok()]), Upstream::start([Reply::Stall]));
    for base_url in [
        format!("http://{}/v1", closed.addr()),
        format!("https://{}/v1", closed.addr()),
        format!("http://{}.invalid/v1", "a".repeat(64)),
        format!("http://{}/v1", stalling.addr()),
        format!("http://{}/v1", fine.addr()),
    ] {
        for page in pages(&base_url) {
            assert_no_secret(&base_url, &page);
        }
    }
    let request = &fine.wait_requests(1, PATIENCE)[0];
    assert_eq!(
        request.header("authorization"),
        Some(format!("Bearer {KEY}")),
        "the keys were in use"
    );
    assert_eq!(request.header("x-api-key").as_deref(), Some(HEADER));
}

#[test]
fn who_waits_is_shown_by_name_and_told_of_failures_without_a_key() {
    let closed = ClosedPort::new();
    let base_url = format!("http://{}/v1", closed.addr());
    let extras = format!("{EXTRAS}\nretry: {{attempts: 2}}");
    let providers = provider_at("p", &base_url, &["m"], UNSHAPED, &extras);
    let gateway =
        Gateway::start_with(&format!("{SERVER}heartbeat_after_seconds: 0.1"), &providers, &ENV);
    let mut client = Client::connect(gateway.addr());
    let header = format!("Authorization: Bearer {CLIENTS}\r\n");
    client.post_json_with("/v1/chat/completions", &header, r#"{"model":"m","stream":true}"#);
    let answer = client.read_response();
    assert_eq!(answer.status, 200, "a heartbeat came first: {answer:?}");
    assert!(answer.text().contains("upstream_unreachable"), "{answer:?}");
    assert_no_secret("the event", &format!("{answer:?}"));

    let upstream = Upstream::start([Reply::ok()]);
    let providers = provider_yaml("p", upstream.addr(), &["m"], "{interval_seconds: 1000}", EXTRAS);
    let clients = "clients: [{name: chat, token: \"${CLIENTS}\"}]";
    let gateway = Gateway::start_with(clients, &providers, &ENV);
    let call = |_| {
        let mut client = Client::connect(gateway.addr());
        client.post_json_with("/v1/chat/completions", &header, r#"{"model":"m"}"#);
        client
    };
    let callers = [(); 3].map(call);
    upstream.wait_requests(2, PATIENCE);
    let provider = gateway.wait_queued(1);
    let lanes = &provider["lanes"];
    assert_eq!(
        (&lanes[0]["key"], &lanes[1]["key"]),
        (&"...ider".into(), &"#2".into()),
        "{provider}"
    );
    assert_no_secret("the statistics", &gateway.stats().to_string());
    let queue = get(gateway.addr(), "/admin/queue");
    assert_eq!(queue.json()["queue"][0]["client"], "chat", "{queue:?}");
    assert_no_secret("the queue", &format!("{queue:?}"));
    drop(callers);
}

#[test]
fn broken_answers_of_every_kind_show_no_key() {
    for reply in [
        Reply::Stall,
        Reply::Reset,
        Reply::CloseBeforeAnswer,
        Reply::TruncateAt(80, "0123456789".repeat(10)),
        Reply::Raw(b"nonsense\r\n\r\n".to_vec()),
    ] {
        let upstream = Upstream::start([reply.clone()]);
        let providers = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, EXTRAS);
        let gateway = Gateway::start_with("", &providers, &ENV);
        let answer = post(gateway.addr(), "/v1/chat/completions", r#"{"model":"m"}"#);
        assert_no_secret("the answer", &format!("{reply:?} {answer:?}"));
        assert_no_secret("the statistics", &get(gateway.addr(), "/admin/stats").text());
    }
}

#[test]
fn debug_output_shows_no_key() {
    let lookup = |name: &str| {
        ENV.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    };
    let extras = format!("{EXTRAS}\nproxy: http://user:${{PROXYS}}@127.0.0.1:1");
    let provider = provider_at("p", "https://127.0.0.1:1/v1", &["m"], UNSHAPED, &extras);
    let clients = "[{name: chat, token: \"${CLIENTS}\"}]";
    let server =
        format!("  port: 0\n  host: 127.0.0.1\n  auth_token: ${{TOKEN}}\n  clients: {clients}\n");
    let yaml = format!("server:\n{server}providers:\n{provider}");
    let config = config::parse(&yaml, Path::new("config.yaml"), &lookup)
        .unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(config.providers[0].api_keys[0].reveal(), KEY);
    assert_eq!(config.server.clients[0].token.reveal(), CLIENTS);
    let credential = config.providers[0].proxy.as_ref().and_then(|proxy| proxy.credential.as_ref());
    assert_eq!(
        credential.map(|credential| credential.reveal()),
        Some(format!("Basic {PROXYS_ENCODED}==").as_str())
    );
    assert_no_secret("the configuration", &format!("{config:?} {config:#?}"));
    assert_no_secret("the server", &format!("{:?}", Server::bind(&config).unwrap()));
}

#[test]
fn the_faults_of_a_file_show_no_key() {
    let lookup = |name: &str| {
        ENV.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    };
    for broken in [
        format!("api_key: [{KEY}]"),
        format!("api_key: {{value: {KEY}}}"),
        format!("headers: {{\"bad name\": {HEADER}}}"),
        format!("headers: {{x-ok: \"{HEADER}\\n\"}}"),
        format!("api_key: \"{KEY}\\u0007\""),
        "api_key: \"${KEY}\\n\"".to_owned(),
        format!("api_keys: {KEY}"),
        format!("api_keys: [{KEY}, {KEY}]"),
        format!("api_keys: [{KEY}, [{SECOND_KEY}]]"),
        format!("api_key: {KEY}\napi_keys: [{SECOND_KEY}]"),
        format!("api_keys: [{KEY}, \"{SECOND_KEY}\\n\"]"),
    ] {
        let provider = provider_at("p", "https://127.0.0.1:1/v1", &["m"], UNSHAPED, &broken);
        let faults =
            config::parse(&format!("providers:\n{provider}"), Path::new("config.yaml"), &lookup);
        let faults = faults.err().unwrap_or_else(|| panic!("accepted {broken:?}"));
        assert_no_secret("the message", &faults.to_string());
    }
    // A key where nobody looks for one, or in a file that nobody can read.
    for broken in [
        format!("apikey: {KEY}"),
        format!("api_key : {KEY}\n    api_kye: {SECOND_KEY}"),
        format!("api_key: {KEY}\nrate_limits: 4 # {SECOND_KEY}"),
        format!("api_key: {KEY} # {SECOND_KEY}\n api_key: {KEY}"),
        format!("api_key: {KEY}: {SECOND_KEY}"),
        format!("api_key: \"{KEY}"),
        format!("api_key: '{KEY} {SECOND_KEY}"),
        format!("api_key: @{KEY}"),
        format!("api_key: !{KEY} {SECOND_KEY}"),
        format!("api_key: &{KEY} [*{SECOND_KEY}]"),
        format!("api_key: [{KEY}, {SECOND_KEY}"),
        format!("api_key: {{a: ${{KEY:-{KEY}}}}}"),
        format!("api_key: ${{{KEY}"),
        format!("api_key: |\n  {KEY}\n {SECOND_KEY}"),
        format!("api_key:\n  {KEY}\n  {SECOND_KEY}\u{e9}"),
        format!("{KEY}\napi_key: x"),
        format!("\t{KEY}"),
        format!("headers: {{max_queue: {HEADER}\u{e9}, rpm: {KEY}}}"),
        format!("headers:\n  name: \"{HEADER}\\n\""),
        format!("headers: {{x: {HEADER}}}\nmax_queue: 0"),
        format!("{{headers: {{name: {HEADER},\n  port: {KEY}}}, max_queue: 0}}"),
        format!("proxy: socks5://user:{KEY}@127.0.0.1:1"),
        format!("proxy: http://user:{KEY}@127.0.0.1:0"),
        format!("proxy: [http://user:{KEY}@127.0.0.1:1]"),
        format!("prxy: http://user:{KEY}@127.0.0.1:1"),
        format!("max_queue: 0 # proxy: http://user:{KEY}@127.0.0.1:1"),
    ] {
        let provider = provider_at(
            "p",
            &format!("https://user:{HEADER}@127.0.0.1:1/v1"),
            &["m"],
            UNSHAPED,
            &broken,
        );
        let faults =
            config::parse(&format!("providers:\n{provider}"), Path::new("config.yaml"), &lookup);
        let faults = faults.err().unwrap_or_else(|| panic!("accepted {broken:?}"));
        assert_no_secret("the message", &faults.to_string());
        faults.in_brief().for_each(|fault| assert_no_secret("the log", &fault));
    }
    let provider = provider_at("p", "https://127.0.0.1:1/v1", &["m"], UNSHAPED, "");
    for broken in [
        format!("[{{name: a, token: {CLIENTS}}}, {{name: b, token: {CLIENTS}}}]"),
        format!("[{{name: a, token: {TOKEN}}}]"),
        format!("[{{name: a, token: [{CLIENTS}]}}]"),
        format!("[{{name: a, token: \"{CLIENTS} \"}}]"),
        format!("[{{token: {CLIENTS}}}]"),
        format!("[{CLIENTS}]"),
        format!("{{chat: {CLIENTS}}}"),
    ] {
        let text =
            format!("server:\n  auth_token: {TOKEN}\n  clients: {broken}\nproviders:\n{provider}");
        let faults = config::parse(&text, Path::new("config.yaml"), &lookup);
        let faults = faults.err().unwrap_or_else(|| panic!("accepted {broken:?}"));
        assert_no_secret("the message", &faults.to_string());
    }
}

#[test]
fn the_program_prints_no_key_when_it_checks_starts_and_logs() {
    let closed = ClosedPort::new();
    let extras = format!("{EXTRAS}\nproxy: http://user:${{PROXYS}}@{}", closed.addr());
    let provider = provider_at("p", "http://127.0.0.1:1/v1", &["m"], UNSHAPED, &extras);
    let clients = "[{name: chat, token: \"${CLIENTS}\"}]";
    let server = format!(
        "server:\n  host: 127.0.0.1\n  port: 0\n  auth_token: ${{TOKEN}}\n  clients: {clients}\n"
    );
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("secrets.yaml");
    std::fs::write(&file, format!("{server}providers:\n{provider}")).unwrap();
    let program = || {
        let mut program = Command::new(env!("CARGO_BIN_EXE_limitrate"));
        program.envs(ENV).arg("--config").arg(&file).stdout(Stdio::piped()).stderr(Stdio::piped());
        program
    };

    let check = program().arg("check").output().unwrap();
    assert!(check.status.success(), "{check:?}");
    assert_no_secret("check", &format!("{check:?}"));

    let mut serving = Running(program().spawn().unwrap());
    let mut stdout = BufReader::new(serving.0.stdout.take().unwrap());
    let mut printed = String::new();
    stdout.read_line(&mut printed).unwrap();
    let address = printed.split("http://").nth(1).and_then(|rest| rest.split("/v1").next());
    let mut client = Client::connect(
        address.and_then(|address| address.parse().ok()).expect("the address is printed"),
    );
    client.post_json_with(
        "/v1/chat/completions",
        &format!("Authorization: Bearer {TOKEN}\r\n"),
        r#"{"model":"m"}"#,
    );
    assert_eq!(client.read_response().status, 502);
    drop(client);
    kill_process(Pid::from_child(&serving.0), Signal::TERM).unwrap();
    stdout.read_to_string(&mut printed).unwrap();
    serving.0.stderr.take().unwrap().read_to_string(&mut printed).unwrap();
    assert!(printed.contains("cannot be reached"), "the failure was logged: {printed}");
    assert_no_secret("the program", &printed);
}

/// A program that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Fails where the test has ended it already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
