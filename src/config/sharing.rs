//! Who shares what: several callers the gateway, several API keys a provider's work, a restart the budget before it; and what is logged.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::section::{Found, SECONDS_MIN, Section, Walk};
use super::tree::Kind;
use crate::log::{self, Format, Level};

use super::{Client, Fairness, HEARTBEAT_AFTER, Priority, Routing, Secret};

const PRIORITIES: [(&str, Priority); 3] =
    [("high", Priority::High), ("normal", Priority::Normal), ("low", Priority::Low)];
const ROUTINGS: [(&str, Routing); 2] = [("first", Routing::First), ("earliest", Routing::Earliest)];
const LEVELS: [(&str, Level); 4] = [
    ("error", Level::Error),
    ("warn", Level::Warn),
    ("info", Level::Info),
    ("debug", Level::Debug),
];
const FORMATS: [(&str, Format); 2] = [("logfmt", Format::Logfmt), ("json", Format::Json)];
const FAIRNESSES: [(&str, Fairness); 2] = [("client", Fairness::Client), ("fifo", Fairness::Fifo)];

/// A name has to fit on a line of a page.
const CLIENT_NAME_CHARS: usize = 64;

/// `log:`
pub(super) fn log(mut keys: Section<'_, '_, '_>) -> log::Settings {
    let settings = log::Settings {
        level: keys.choice("level", &LEVELS, Level::Info),
        format: keys.choice("format", &FORMATS, Format::Logfmt),
    };
    keys.finish();
    settings
}

pub(super) fn routing(keys: &mut Section<'_, '_, '_>) -> Routing {
    keys.choice("routing", &ROUTINGS, Routing::First)
}

pub(super) fn fairness(keys: &mut Section<'_, '_, '_>) -> Fairness {
    keys.choice("fairness", &FAIRNESSES, Fairness::Client)
}

/// When heartbeats begin, and whether plain callers get them. An empty value is not the default here: it means never.
pub(super) fn heartbeats(keys: &mut Section<'_, '_, '_>) -> (Option<Duration>, bool) {
    let never = keys
        .find("heartbeat_after_seconds")
        .is_some_and(|found| matches!(found.node.kind, Kind::Null));
    let after = (!never).then(|| {
        keys.seconds("heartbeat_after_seconds", HEARTBEAT_AFTER.as_secs_f64(), SECONDS_MIN)
    });
    let json = keys.flag("heartbeat_json", false);
    if json && never {
        let remedy = "write the seconds there, or remove heartbeat_json";
        keys.refuse(
            "heartbeat_json",
            &format!("needs heartbeat_after_seconds, which is null (never); {remedy}"),
        );
    }
    (after, json)
}

/// `clients:`; `taken` is the token that others may send already.
pub(super) fn clients(keys: &mut Section<'_, '_, '_>, taken: Option<&Secret>) -> Vec<Client> {
    let Some(found) = keys.optional("clients") else { return Vec::new() };
    let items =
        keys.walk.items(&found, "write entries like - {name: chat, token: \"${CHAT_TOKEN}\"}");
    let (mut names, mut tokens) =
        (Vec::new(), taken.into_iter().map(|token| token.reveal().to_owned()).collect());
    items.iter().filter_map(|item| client(keys.walk, item, &mut names, &mut tokens)).collect()
}

fn client(
    walk: &mut Walk<'_>,
    item: &Found<'_>,
    names: &mut Vec<String>,
    tokens: &mut Vec<String>,
) -> Option<Client> {
    let mut keys = walk.section(item, item.node.id)?;
    let name = keys.required("name", "write a word of your choice, e.g. name: chat");
    let name = name.and_then(|found| client_name(keys.walk, &found, names));
    let remedy = "write what the client sends as its API key, e.g. token: \"${CHAT_TOKEN}\"";
    let again = "is auth_token or the token of an earlier client; give each client its own";
    let token = keys
        .required("token", remedy)
        .and_then(|found| unlike(keys.walk, &found, tokens, again, remedy));
    let priority = keys.choice("priority", &PRIORITIES, Priority::Normal);
    let max_queue =
        keys.whole("max_queue", 1..=1_000_000, "write how many may wait, e.g. max_queue: 20");
    let heartbeat = keys.switch("heartbeat", true);
    keys.finish();
    Some(Client { name: name?, token: token?, priority, max_queue, heartbeat })
}

fn client_name(walk: &mut Walk<'_>, found: &Found<'_>, names: &mut Vec<String>) -> Option<String> {
    let name = walk.word(found)?;
    if name.chars().count() > CLIENT_NAME_CHARS {
        walk.fault(
            found,
            format!("is longer than {CLIENT_NAME_CHARS} characters; write a shorter name"),
        );
    }
    walk.once(found, &name, names, "is the name of an earlier client; give each its own");
    Some(name)
}

/// `api_key:` or `api_keys:`.
pub(super) fn api_keys(keys: &mut Section<'_, '_, '_>) -> Vec<Secret> {
    let one = keys.secret("api_key", "write the key, or remove api_key for a provider without one");
    let Some(found) = keys.optional("api_keys") else { return one.into_iter().collect() };
    if one.is_some() {
        keys.walk
            .fault(&found, "stands beside api_key; put all keys into api_keys and remove api_key");
    }
    let remedy = "write the keys, e.g. api_keys: [\"${KEY_1}\", \"${KEY_2}\"]";
    let items = keys.list("api_keys", remedy);
    let mut seen = Vec::new();
    let again = "is an earlier key again, which has its limits only once; write each key once";
    let empty = "write the key, or remove the entry";
    items.iter().filter_map(|item| unlike(keys.walk, item, &mut seen, again, empty)).collect()
}

/// A secret that is not empty (the remedy: `empty`) and none of those `seen` (else the fault: `again`).
fn unlike(
    walk: &mut Walk<'_>,
    found: &Found<'_>,
    seen: &mut Vec<String>,
    again: &str,
    empty: &str,
) -> Option<Secret> {
    let secret =
        if matches!(found.node.kind, Kind::Null) { Secret::new("") } else { walk.secret(found)? };
    if secret.reveal().is_empty() {
        walk.fault(found, format!("is empty; {empty}"));
        return None;
    }
    walk.once(found, secret.reveal(), seen, again);
    Some(secret)
}

/// `state_file:`, from the configuration's folder on.
pub(super) fn state_file(keys: &mut Section<'_, '_, '_>) -> Option<PathBuf> {
    let found = keys.optional("state_file")?;
    let text = keys.walk.text(&found)?;
    let path = keys.walk.folder.join(&text.value);
    let problem = if text.value.is_empty() {
        "is empty; write the name of a file, or remove the key".to_owned()
    } else if fs::metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
        format!(
            "{} is a folder or device; write the name of a file, which limitrate makes itself",
            text.shown
        )
    } else if path.parent().is_some_and(|folder| !folder.as_os_str().is_empty() && !folder.is_dir())
    {
        let start = "a relative path starts at the folder of this file";
        format!(
            "{} is in a folder that does not exist; make that folder, or write another ({start})",
            text.shown
        )
    } else {
        return Some(path);
    };
    keys.walk.fault(&found, problem);
    None
}
