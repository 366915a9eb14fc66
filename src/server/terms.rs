//! Who a caller is and what it asks for beside the answer, from its address, its token and its headers.
//!
//! What an SDK announces of itself is believed where it can be read and passed over where not; a header of ours with a value
//! that it can't have is refused.

use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::Gateway;
use super::heartbeat::{CommentEnd, Form, Heartbeat};
use super::token::presents;
use crate::config::{self, Priority};
use crate::error::Error;
use crate::http1::RequestHead;
use crate::openai::{self, Peek};
use crate::shaping::terms::Terms;

const PRIORITY: &str = "X-Limitrate-Priority";
const DEADLINE: &str = "X-Limitrate-Deadline-Ms";
const HEARTBEAT: &str = "X-Limitrate-Heartbeat";

/// How long an SDK waits between two bytes (openai-python and anthropic, `_base_client.py`), in seconds.
const SDK_READ_TIMEOUT: &str = "x-stainless-read-timeout";

/// How long openai-node waits for the head of a stream or for the whole of a plain answer (`client.ts`,
/// `parseResponseWithTimeout`), in whole seconds, rounded down.
const SDK_TIMEOUT: &str = "x-stainless-timeout";

/// How often the SDK has sent this request before; sent with every request, 0 the first time.
const SDK_RETRIES: &str = "x-stainless-retry-count";

/// The language of an SDK: `go`, `python`, `js` (openai-go, `internal/requestconfig`).
const SDK_LANGUAGE: &str = "x-stainless-lang";

/// What a request asks for beside its answer.
pub struct Wishes {
    /// How it waits.
    pub terms: Rc<Terms>,
    /// Whether its client is one of the configuration.
    pub named: bool,
    /// What keeps its caller patient.
    pub heartbeat: Option<Heartbeat>,
}

/// What is read of a body, in a time that grows with its length.
#[derive(Debug)]
pub struct Examined {
    /// What routing has to know.
    pub peek: Peek,
    /// By which the request is known again, if its SDK counts tries.
    fingerprint: Option<u64>,
}

/// What an SDK's request is known again by: made with this. Nothing where it comes from no such SDK.
pub fn fingerprints<'g>(gateway: &'g Gateway, head: &RequestHead) -> Option<&'g RandomState> {
    retries(head).map(|_| &gateway.fingerprints)
}

/// Reads the body of a request for `target`.
pub fn examine(
    body: &[u8],
    target: &str,
    fingerprints: Option<&RandomState>,
) -> Result<Examined, Error> {
    let peek = openai::peek(body)?;
    let fingerprint = fingerprints.map(|fingerprints| fingerprints.hash_one((target, body)));
    Ok(Examined { peek, fingerprint })
}

/// Reads a request that was complete at `since`, of a client at `address`.
pub fn wishes(
    gateway: &Gateway,
    address: &Rc<str>,
    head: &RequestHead,
    Examined { peek, fingerprint }: &Examined,
    since: Instant,
) -> Result<Wishes, Error> {
    let client = client(&gateway.config, head);
    let (between_bytes, timeout) = (seconds(head, SDK_READ_TIMEOUT), seconds(head, SDK_TIMEOUT));
    let (for_the_head, for_the_whole) = if peek.stream { (timeout, None) } else { (None, timeout) };
    let patience = [between_bytes, for_the_head].into_iter().flatten().min();
    let heartbeat = heartbeat(&gateway.config, client, head, peek.stream, patience, since)?;
    // Who hears from us does not give up, unless it wants the whole answer by then.
    let gives_up =
        [patience.filter(|_| heartbeat.is_none()), for_the_whole].into_iter().flatten().min();
    let gives_up = gives_up.and_then(|patience| since.checked_add(patience));
    let header = deadline(head, since)?;
    // A stream is of use from its first event on, a plain response once it is there.
    let (send_by, respond_by) = if peek.stream { (header, None) } else { (None, header) };
    let terms = Terms {
        client: client.map_or_else(|| address.clone(), |at| gateway.client_names[at].clone()),
        class: client.map_or(Priority::Normal, |at| gateway.config.clients[at].priority),
        urgency: priority(head)?,
        max_queue: client.and_then(|at| gateway.config.clients[at].max_queue),
        deadline: [gives_up, respond_by].into_iter().flatten().min(),
        send_by,
        fingerprint: *fingerprint,
        repeated: retries(head).is_some_and(|count| count > 0),
    };
    Ok(Wishes { terms: Rc::new(terms), named: client.is_some(), heartbeat })
}

fn retries(head: &RequestHead) -> Option<u32> {
    text(head, SDK_RETRIES)?.parse().ok()
}

/// Who is held to account for a request from this address: the configured client whose token was sent, or the address.
pub fn accountable(gateway: &Gateway, address: &Rc<str>, head: &RequestHead) -> Rc<str> {
    client(&gateway.config, head)
        .map_or_else(|| address.clone(), |at| gateway.client_names[at].clone())
}

/// The configured client whose token was sent, by index.
fn client(config: &config::Server, head: &RequestHead) -> Option<usize> {
    config.clients.iter().position(|client| presents(head, &client.token))
}

fn priority(head: &RequestHead) -> Result<Priority, Error> {
    word(head, PRIORITY, "high, normal or low", |word| match word {
        "high" => Some(Priority::High),
        "normal" => Some(Priority::Normal),
        "low" => Some(Priority::Low),
        _ => None,
    })
    .map(Option::unwrap_or_default)
}

fn deadline(head: &RequestHead, since: Instant) -> Result<Option<Instant>, Error> {
    let patience = word(head, DEADLINE, "a whole number of milliseconds", |word| {
        let digits = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| Duration::from_millis(word.parse().unwrap_or(u64::MAX)))
    })?;
    Ok(patience.and_then(|patience| since.checked_add(patience)))
}

fn heartbeat(
    config: &config::Server,
    client: Option<usize>,
    head: &RequestHead,
    stream: bool,
    patience: Option<Duration>,
    since: Instant,
) -> Result<Option<Heartbeat>, Error> {
    let asked_for = word(head, HEARTBEAT, "on or off", |word| match word {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    })?;
    let wanted = asked_for.unwrap_or(client.is_none_or(|at| config.clients[at].heartbeat));
    let Some(after) = config.heartbeat_after.filter(|_| wanted) else { return Ok(None) };
    let form = match stream {
        true => Form::Events,
        false if config.heartbeat_json && openai::answers_in_json(&head.target) => Form::WhiteSpace,
        false => return Ok(None),
    };
    let comment_end = match text(head, SDK_LANGUAGE) {
        Some("go") => CommentEnd::LineEnd,
        _ => CommentEnd::EmptyLine,
    };
    let heartbeat = Heartbeat::new(form, after, patience, since);
    Ok(Some(heartbeat.ending_comments_with(comment_end)))
}

fn word<T>(
    head: &RequestHead,
    name: &'static str,
    wanted: &'static str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, Error> {
    let Some(value) = head.headers.get(name) else { return Ok(None) };
    let value = String::from_utf8_lossy(value);
    match read(value.trim().to_ascii_lowercase().as_str()) {
        Some(read) => Ok(Some(read)),
        None => Err(Error::InvalidHeader { name, value: value.into_owned(), wanted }),
    }
}

fn seconds(head: &RequestHead, name: &str) -> Option<Duration> {
    let seconds: f64 = text(head, name)?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok().filter(|patience| !patience.is_zero())
}

fn text<'h>(head: &'h RequestHead, name: &str) -> Option<&'h str> {
    std::str::from_utf8(head.headers.get(name)?).ok().map(str::trim)
}
