//! Who shares what: several callers the gateway, several API keys a provider's work, a restart the budget before it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::read::{once, word};
use super::section::{Found, SECONDS_MIN, Section, Walk};
use super::tree::Kind;
use super::{Client, Fairness, Priority, Routing, Secret};

const PRIORITIES: [(&str, Priority); 3] =
    [("high", Priority::High), ("normal", Priority::Normal), ("low", Priority::Low)];
const ROUTINGS: [(&str, Routing); 2] = [("first", Routing::First), ("earliest", Routing::Earliest)];
const FAIRNESSES: [(&str, Fairness); 2] = [("client", Fairness::Client), ("fifo", Fairness::Fifo)];

/// A name has to fit on a line of a page.
const CLIENT_NAME_CHARS: usize = 64;

pub(super) fn routing(keys: &mut Section<'_, '_, '_>) -> Routing {
    keys.choice("routing", &ROUTINGS, Routing::First)
}

pub(super) fn fairness(keys: &mut Section<'_, '_, '_>) -> Fairness {
    keys.choice("fairness", &FAIRNESSES, Fairness::Client)
}

/// When heartbeats begin, and whether plain callers get them. An empty value is not the default here: it means never.
pub(super) fn heartbeats(keys: &mut Section<'_, '_, '_>) -> (Option<Duration>, bool) {
    let never = keys.find("heartbeat_after_seconds").is_some_and(|found| matches!(found.node.kind, Kind::Null));
    let after = (!never).then(|| keys.seconds("heartbeat_after_seconds", 15.0, SECONDS_MIN));
    let json = keys.flag("heartbeat_json", false);
    if json && never {
        let problem = "needs heartbeat_after_seconds, which is null; write the seconds there, or remove heartbeat_json";
        keys.refuse("heartbeat_json", problem);
    }
    (after, json)
}

/// `clients:`; `taken` is the token that others may send already.
pub(super) fn clients(keys: &mut Section<'_, '_, '_>, taken: Option<&Secret>) -> Vec<Client> {
    let Some(found) = keys.optional("clients") else { return Vec::new() };
    let items = keys.walk.items(&found, "write entries like - {name: chat, token: \"${CHAT_TOKEN}\"}");
    let (mut names, mut tokens) = (Vec::new(), taken.into_iter().map(|token| token.reveal().to_owned()).collect());
    items.iter().filter_map(|item| client(keys.walk, item, &mut names, &mut tokens)).collect()
}

fn client(walk: &mut Walk<'_>, item: &Found<'_>, names: &mut Vec<String>, tokens: &mut Vec<String>) -> Option<Client> {
    let mut keys = walk.section(item, item.node.id)?;
    let name = keys.required("name", "write how the client is called, e.g. name: chat");
    let name = name.and_then(|found| client_name(keys.walk, &found, names));
    let missing = "write what the client sends as its API key, e.g. token: ${CHAT_TOKEN}";
    let token = keys.required("token", missing).and_then(|found| {
        let token = unlike(keys.walk, &found, tokens, "is the token of somebody else; give each client its own")?;
        Some(token)
    });
    let priority = keys.choice("priority", &PRIORITIES, Priority::Normal);
    let max_queue = keys.whole("max_queue", 1..=1_000_000, "write how many may wait, e.g. max_queue: 20");
    keys.finish();
    Some(Client { name: name?, token: token?, priority, max_queue })
}

fn client_name(walk: &mut Walk<'_>, found: &Found<'_>, names: &mut Vec<String>) -> Option<String> {
    let name = word(walk, found)?;
    if name.chars().count() > CLIENT_NAME_CHARS {
        walk.fault(found, format!("is longer than {CLIENT_NAME_CHARS} characters; write a shorter name"));
    }
    once(walk, found, &name, names, "is the name of an earlier client; give each its own");
    Some(name)
}

/// `api_key:` or `api_keys:`.
pub(super) fn api_keys(keys: &mut Section<'_, '_, '_>) -> Vec<Secret> {
    let one = keys.secret("api_key", "write the key, or remove api_key for a provider without one");
    let Some(found) = keys.optional("api_keys") else { return one.into_iter().collect() };
    if one.is_some() {
        keys.walk.fault(&found, "stands beside api_key; put all keys into api_keys");
    }
    let remedy = "write the keys, e.g. api_keys: [\"${KEY_1}\", \"${KEY_2}\"]";
    let items = keys.list("api_keys", remedy);
    let mut seen = Vec::new();
    let problem = "is an earlier key again; the provider counts it once, so write each key once";
    items.iter().filter_map(|item| unlike(keys.walk, item, &mut seen, problem)).collect()
}

/// A secret that is not empty and none of those `seen`.
fn unlike(walk: &mut Walk<'_>, found: &Found<'_>, seen: &mut Vec<String>, problem: &str) -> Option<Secret> {
    let secret = walk.secret(found)?;
    if secret.reveal().is_empty() {
        walk.fault(found, "is empty; write the key itself, or remove the entry");
        return None;
    }
    once(walk, found, secret.reveal(), seen, problem);
    Some(secret)
}

/// `state_file:`, from the configuration's folder on.
pub(super) fn state_file(keys: &mut Section<'_, '_, '_>) -> Option<PathBuf> {
    let found = keys.optional("state_file")?;
    let text = keys.walk.text(&found)?;
    let path = keys.walk.folder.join(&text.value);
    let problem = if text.value.is_empty() {
        "is empty; write a file name, or remove the key".to_owned()
    } else if fs::metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
        format!("{} is no file; write the name of a file, which is made", text.shown)
    } else if path.parent().is_some_and(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
        format!("{} lies in a folder that does not exist; make the folder", text.shown)
    } else {
        return Some(path);
    };
    keys.walk.fault(&found, problem);
    None
}
