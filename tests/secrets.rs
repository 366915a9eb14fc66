//! No key leaves the gateway but towards its provider.

mod support;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use limitrate::config;
use limitrate::server::Server;
use rustix::process::{Pid, Signal, kill_process};
use support::{
    Client, ClosedPort, Gateway, PATIENCE, Reply, UNSHAPED, Upstream, get, post, provider_at, provider_yaml,
};

const KEY: &str = "sk-5ecret-of-the-provider";
const HEADER: &str = "s3cret-in-a-header";
const TOKEN: &str = "t0ken-of-the-gateway";
const CALLERS: &str = "k3y-of-the-caller";
const ENV: [(&str, &str); 3] = [("KEY", KEY), ("HEADER", HEADER), ("TOKEN", TOKEN)];
const EXTRAS: &str = "api_key: ${KEY}\nheaders: {x-api-key: \"${HEADER}\"}\nrequest_timeout_seconds: 0.2";

#[track_caller]
fn assert_no_secret(what: &str, text: &str) {
    for secret in [KEY, HEADER, TOKEN, CALLERS] {
        assert!(!text.contains(secret), "{what} shows {secret}: {text}");
    }
}

/// Every page and every refusal of a gateway with this provider.
fn pages(base_url: &str) -> Vec<String> {
    let providers = provider_at("p", base_url, &["m"], UNSHAPED, EXTRAS);
    let gateway = Gateway::start_with("auth_token: ${TOKEN}", &providers, &ENV);
    let requests = [
        ("POST /v1/chat/completions", r#"{"model":"m"}"#),
        ("POST /v1/chat/completions", r#"{"model":"p/x"}"#),
        ("POST /v1/chat/completions", "{"),
        ("GET /v1/models", ""),
        ("GET /v1/chat/completions", ""),
        ("GET /nowhere", ""),
        ("GET /admin/stats", ""),
        ("GET /admin/health", ""),
    ];
    let mut pages = Vec::new();
    for (request, body) in requests {
        for key in [TOKEN, CALLERS] {
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
    assert_eq!(request.header("authorization"), Some(format!("Bearer {KEY}")), "the keys were in use");
    assert_eq!(request.header("x-api-key").as_deref(), Some(HEADER));
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
    let lookup = |name: &str| ENV.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    let provider = provider_at("p", "https://127.0.0.1:1/v1", &["m"], UNSHAPED, EXTRAS);
    let yaml = format!("server:\n  port: 0\n  host: 127.0.0.1\n  auth_token: ${{TOKEN}}\nproviders:\n{provider}");
    let config = config::parse(&yaml, Path::new("config.yaml"), &lookup).unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(config.providers[0].api_keys[0].reveal(), KEY);
    assert_no_secret("the configuration", &format!("{config:?} {config:#?}"));
    assert_no_secret("the server", &format!("{:?}", Server::bind(&config).unwrap()));
}

#[test]
fn the_faults_of_a_file_show_no_key() {
    let lookup = |name: &str| ENV.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    for broken in [
        format!("api_key: [{KEY}]"),
        format!("api_key: {{value: {KEY}}}"),
        format!("headers: {{\"bad name\": {HEADER}}}"),
        format!("headers: {{x-ok: \"{HEADER}\\n\"}}"),
        format!("api_key: \"{KEY}\\u0007\""),
        "api_key: \"${KEY}\\n\"".to_owned(),
    ] {
        let provider = provider_at("p", "https://127.0.0.1:1/v1", &["m"], UNSHAPED, &broken);
        let faults = config::parse(&format!("providers:\n{provider}"), Path::new("config.yaml"), &lookup);
        let faults = faults.err().unwrap_or_else(|| panic!("accepted {broken:?}"));
        assert_no_secret("the message", &faults.to_string());
    }
}

#[test]
fn the_program_prints_no_key_when_it_checks_starts_and_logs() {
    let closed = ClosedPort::new();
    let provider = provider_at("p", &format!("http://{}/v1", closed.addr()), &["m"], UNSHAPED, EXTRAS);
    let server = "server:\n  host: 127.0.0.1\n  port: 0\n  auth_token: ${TOKEN}\n";
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
    let mut client = Client::connect(address.and_then(|address| address.parse().ok()).expect("the address is printed"));
    client.post_json_with("/v1/chat/completions", &format!("Authorization: Bearer {TOKEN}\r\n"), r#"{"model":"m"}"#);
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
