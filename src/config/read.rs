//! Which keys there are, their defaults, their bounds, and what they become.
//!
//! One function per section of the file; those of `rate_limit:` and `retry:` are in `limits`, what is shared is in
//! `sharing`. A new key is one line here and one field in the types.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::Path;

use super::section::{Found, SECONDS_MIN, Section, Walk, join};
use super::tree::{Kind, Node};
use super::{
    BaseUrl, Config, Model, Provider, Secret, Server, base_url, hosts, limits, network, origins,
    proxy, read_bounded, sharing, socket, tls,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// RFC 9110 section 7.6.1 and RFC 9112 section 6: what the gateway writes itself or one connection keeps to itself.
const FRAMING_HEADERS: [&str; 10] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The whole file. `None` only together with a fault.
pub(super) fn config(walk: &mut Walk<'_>, root: &Node) -> Option<Config> {
    let file = Found { node: root, path: String::new() };
    let mut keys = walk.section(&file, root.id)?;
    let server = keys.section("server").map(server);
    let log = keys.section("log").map(sharing::log);
    let items =
        keys.list("providers", "write at least one entry: - name: ..., as in config.example.yaml");
    let mut names = Vec::new();
    let providers = items.iter().filter_map(|item| provider(keys.walk, item, &mut names)).collect();
    keys.finish();
    Some(Config { log: log?, server: server?, providers })
}

fn server(mut keys: Section<'_, '_, '_>) -> Server {
    let host = host(&mut keys);
    let (port, socket) = socket::doors(&mut keys);
    let tls = tls::tls(&mut keys);
    if port.is_none() {
        keys.refuse("tls", "is of no use with port: null, since the socket speaks plain HTTP; remove one of the two");
    }
    let auth_token = keys.secret(
        "auth_token",
        "write the token that callers send, or remove the key to accept everybody",
    );
    let clients = sharing::clients(&mut keys, auth_token.as_ref());
    let (heartbeat_after, heartbeat_json) = sharing::heartbeats(&mut keys);
    let bytes = buffers(&mut keys);
    let connections = connections(&mut keys);
    let server = Server {
        host,
        port,
        socket,
        tls,
        auth_token,
        trusted_proxies: network::trusted_proxies(&mut keys),
        cors_origins: origins::cors_origins(&mut keys),
        hosts: hosts::hosts(&mut keys),
        max_body_bytes: bytes.one,
        max_buffered_bytes: bytes.all,
        max_buffered_bytes_per_client: bytes.each,
        max_head_bytes: keys.integer("max_head_bytes", 32 << 10, 1 << 10..=1 << 20),
        max_connections: connections.0,
        max_connections_per_client: connections.1,
        header_timeout: keys.seconds("header_timeout_seconds", 30.0, SECONDS_MIN),
        body_timeout: keys.seconds("body_timeout_seconds", 60.0, SECONDS_MIN),
        keep_alive: keys.seconds("keep_alive_seconds", 75.0, SECONDS_MIN),
        write_timeout: keys.seconds("write_timeout_seconds", 60.0, SECONDS_MIN),
        drain: keys.seconds("drain_seconds", 30.0, 0.0),
        drain_queue: keys.flag("drain_queue", false),
        routing: sharing::routing(&mut keys),
        fallback: keys.flag("fallback", false),
        fairness: sharing::fairness(&mut keys),
        clients,
        heartbeat_after,
        heartbeat_json,
        state_file: sharing::state_file(&mut keys),
    };
    keys.finish();
    server
}

/// Memory for request bodies.
struct Bytes {
    /// Of one body.
    one: u64,
    all: u64,
    /// Of one client.
    each: u64,
}

fn buffers(keys: &mut Section<'_, '_, '_>) -> Bytes {
    const MOST: u64 = KIB * KIB * MIB;
    let one = keys.integer("max_body_bytes", 32 * MIB, 1..=KIB * MIB);
    let all = keys.integer("max_buffered_bytes", 256 * MIB, 1..=MOST);
    let half = (all / 2).max(one);
    let each = keys.integer("max_buffered_bytes_per_client", half, 1..=MOST);
    let mut at_least_one_body = |key: &'static str, bytes: u64| {
        let set = keys.optional(key).or_else(|| keys.optional("max_body_bytes"));
        if bytes < one
            && let Some(found) = set
        {
            let problem = format!(
                "is {bytes}, less than one body may take (max_body_bytes: {one}); write at least that"
            );
            keys.walk.fault(&found, problem);
        }
    };
    at_least_one_body("max_buffered_bytes", all);
    at_least_one_body("max_buffered_bytes_per_client", each);
    no_more_than_all(keys, "max_buffered_bytes_per_client", each, ("max_buffered_bytes", all));
    Bytes { one, all, each }
}

/// In all, and of one client.
fn connections(keys: &mut Section<'_, '_, '_>) -> (usize, usize) {
    let all = keys.integer("max_connections", 1024, 1..=1_000_000);
    let each = keys.integer("max_connections_per_client", (all / 2).max(1), 1..=1_000_000);
    let most = ("max_connections", all as u64);
    no_more_than_all(keys, "max_connections_per_client", each as u64, most);
    (all, each)
}

/// A share that is more than the whole is a misunderstanding.
fn no_more_than_all(
    keys: &mut Section<'_, '_, '_>,
    key: &'static str,
    each: u64,
    (name, all): (&str, u64),
) {
    if each > all
        && let Some(found) = keys.optional(key)
    {
        let problem = format!(
            "is {each}, more than all clients may have together ({name}: {all}); write at most that"
        );
        keys.walk.fault(&found, problem);
    }
}

/// An address or a name, without a port.
fn host(keys: &mut Section<'_, '_, '_>) -> String {
    let default = "0.0.0.0".to_owned();
    let Some(found) = keys.optional("host") else {
        return default;
    };
    let Some(text) = keys.walk.text(&found) else {
        return default;
    };
    let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let is_name = !text.value.is_empty() && text.value.chars().all(name);
    if !is_name && text.value.parse::<IpAddr>().is_err() {
        let remedy = "write e.g. host: 0.0.0.0 (everybody) or 127.0.0.1 (this machine), and the port under port";
        keys.walk.fault(
            &found,
            format!("must be an address or a host name, not {}; {remedy}", text.shown),
        );
    }
    text.value
}

/// `names` are those of the providers before it.
fn provider(walk: &mut Walk<'_>, item: &Found<'_>, names: &mut Vec<String>) -> Option<Provider> {
    let mut keys = walk.section(item, item.node.id)?;
    let name = keys.required("name", "write a word of your choice, e.g. name: openai");
    let name = name.and_then(|found| provider_name(keys.walk, &found, names));
    let base_url = keys
        .required("base_url", "write where the API is, e.g. base_url: https://api.example.com/v1");
    let base_url = base_url.and_then(|found| base_url_of(keys.walk, &found));
    let api_keys = sharing::api_keys(&mut keys);
    let headers = keys
        .optional("headers")
        .map(|found| headers(keys.walk, &found, !api_keys.is_empty()))
        .unwrap_or_default();
    let proxy = proxy::proxy(&mut keys, base_url.as_ref());
    let ca_pem = keys.optional("ca_file").and_then(|found| ca_pem(keys.walk, &found));
    let models = models(&mut keys);
    let rate_limit = keys.section("rate_limit").and_then(limits::provider);
    let retry = keys.section("retry").map(limits::retry);
    let connect_timeout = keys.seconds("connect_timeout_seconds", 10.0, SECONDS_MIN);
    let request_timeout = keys.seconds("request_timeout_seconds", 600.0, SECONDS_MIN);
    let idle_timeout = keys.seconds("idle_timeout_seconds", 300.0, SECONDS_MIN);
    let max_queue = keys.integer("max_queue", 1000, 1..=1_000_000);
    let pool_max_idle = keys.integer("pool_max_idle", 256, 0..=10_000);
    let pool_idle = keys.seconds("pool_idle_seconds", 50.0, SECONDS_MIN);
    keys.finish();
    Some(Provider {
        name: name?,
        base_url: base_url?,
        api_keys,
        headers,
        proxy,
        ca_pem,
        models,
        rate_limit: rate_limit?,
        retry: retry?,
        connect_timeout,
        request_timeout,
        idle_timeout,
        max_queue,
        pool_max_idle,
        pool_idle,
    })
}

fn provider_name(
    walk: &mut Walk<'_>,
    found: &Found<'_>,
    names: &mut Vec<String>,
) -> Option<String> {
    let name = walk.word(found)?;
    if name.contains('/') {
        walk.fault(
            found,
            "has a /, which parts provider and model in <provider>/<model>; write e.g. a - instead",
        );
    }
    walk.once(found, &name, names, "is the name of an earlier provider; give each its own");
    Some(name)
}

fn base_url_of(walk: &mut Walk<'_>, found: &Found<'_>) -> Option<BaseUrl> {
    let text = walk.text(found)?;
    match base_url::parse(&text.value) {
        Ok(url) => Some(url),
        Err(problem) => {
            walk.fault(found, problem);
            None
        }
    }
}

fn headers(walk: &mut Walk<'_>, found: &Found<'_>, has_api_key: bool) -> Vec<(String, Secret)> {
    let Kind::Map(pairs) = &found.node.kind else {
        let noun = found.node.kind.noun();
        walk.fault(
            found,
            format!("must be a mapping, not {noun}; write e.g. headers: {{x-team: \"lab\"}}"),
        );
        return Vec::new();
    };
    let mut headers: Vec<(String, Secret)> = Vec::new();
    for (key, value) in pairs {
        let Kind::Text(name) = &key.kind else {
            let at = Found { node: key, path: found.path.clone() };
            walk.fault(&at, format!("has a name that is {}; put it in quotes", key.kind.noun()));
            continue;
        };
        let path = join(&found.path, name);
        let taken = headers.iter().any(|(other, _)| other.eq_ignore_ascii_case(name));
        if let Some(problem) = header_name_fault(name, taken, has_api_key) {
            walk.fault(&Found { node: key, path }, problem);
            continue;
        }
        headers
            .extend(walk.secret(&Found { node: value, path }).map(|value| (name.clone(), value)));
    }
    headers
}

fn header_name_fault(name: &str, taken: bool, has_api_key: bool) -> Option<&'static str> {
    // RFC 9110 section 5.6.2.
    let is_token_char =
        |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let lower = name.to_ascii_lowercase();
    if name.is_empty() || !name.bytes().all(is_token_char) {
        Some("is no header name; use letters, digits and - only")
    } else if FRAMING_HEADERS.contains(&lower.as_str()) {
        Some("is a header that the gateway writes itself; remove it")
    } else if taken {
        Some("is written twice (upper and lower case are the same); keep one of them")
    } else if has_api_key && lower == "authorization" {
        Some("is what api_key is sent as; keep one of the two")
    } else {
        None
    }
}

fn ca_pem(walk: &mut Walk<'_>, found: &Found<'_>) -> Option<Vec<u8>> {
    let text = walk.text(found)?;
    let problem = match read_regular(&walk.folder.join(&text.value)) {
        Err(error) => {
            format!(
                "{} cannot be read: {error}; a relative path starts at the folder of this file",
                text.shown
            )
        }
        Ok(pem) if holds_certificate(&pem) => return Some(pem),
        Ok(_) => {
            format!(
                "{} holds no PEM certificate; it needs -----BEGIN CERTIFICATE----- and what follows",
                text.shown
            )
        }
    };
    walk.fault(found, problem);
    None
}

/// Only a regular file: a pipe or a device would keep the start waiting.
pub(super) fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    read_bounded(File::open(path)?)
}

fn holds_certificate(pem: &[u8]) -> bool {
    native_tls::Certificate::stack_from_pem(pem).is_ok_and(|certificates| !certificates.is_empty())
}

fn models(keys: &mut Section<'_, '_, '_>) -> Vec<Model> {
    let items = keys.list("models", "write the names callers use, e.g. models: [model-a, model-b]");
    let mut ids = Vec::new();
    items.iter().filter_map(|item| model(keys.walk, item, &mut ids)).collect()
}

/// `name`, or `{id: name, upstream: name-at-the-provider, rate_limit: ...}`.
fn model(walk: &mut Walk<'_>, item: &Found<'_>, ids: &mut Vec<String>) -> Option<Model> {
    if !matches!(item.node.kind, Kind::Map(_)) {
        let id = model_id(walk, item, ids)?;
        return Some(Model { upstream: id.clone(), id, rate_limit: None });
    }
    let mut keys = walk.section(item, item.node.id)?;
    let id = keys
        .required("id", "write the name callers use, e.g. {id: fast, upstream: vendor/model-a}");
    let id = id.and_then(|found| model_id(keys.walk, &found, ids));
    let upstream = keys.optional("upstream").map(|found| keys.walk.word(&found));
    let rate_limit =
        keys.optional("rate_limit").and_then(|_| keys.section("rate_limit")).map(limits::model);
    keys.finish();
    let id = id?;
    let upstream = upstream.unwrap_or_else(|| Some(id.clone()))?;
    Some(Model { id, upstream, rate_limit })
}

fn model_id(walk: &mut Walk<'_>, found: &Found<'_>, ids: &mut Vec<String>) -> Option<String> {
    let id = walk.word(found)?;
    walk.once(found, &id, ids, "is listed twice; keep one of them");
    Some(id)
}
