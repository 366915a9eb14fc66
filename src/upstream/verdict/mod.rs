//! What a provider's refusal says: whether waiting helps, how long, and for whom.
//!
//! Knows the dialects of the providers, their headers and their texts. `time` reads durations and dates. Does not know
//! what the operator configured, and keeps nothing from one answer to the next.

mod time;

use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::http1::Headers;
use time::UnixTime;

/// The longest wait that is believed. What is longer was meant in another unit, or is a mistake: it counts as not said.
pub const MAX_WAIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// What resets later than that is no limit of a minute or an hour: a quota of a day or a month is spent.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// What an answer means for the request that got it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// No refusal that this room knows: the answer is the caller's.
    PassOn,
    /// The request can be repeated after a pause, and all others of that scope should pause too.
    CoolDown {
        /// How long, at most [`MAX_WAIT`]; zero where the time it names has passed. None where it does not say.
        wait: Option<Duration>,
        /// Who pauses.
        scope: Scope,
    },
    /// The provider failed and asks for nothing: the request can be repeated after a backoff, others need not pause.
    Repeat,
    /// Waiting does not help: a quota of a day or of money is spent, or the request is over a limit by itself.
    Exhausted,
}

/// Whom a refusal concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The provider, or the answer does not say.
    Provider,
    /// The model that was asked for, and no other.
    Model,
}

/// Whether [`judge`] may find a refusal in an answer of this status, and so needs its body.
pub fn may_be_refusal(status: u16) -> bool {
    matches!(status, 429 | 503 | 529)
}

/// Judges an answer by its status, headers and body; `now` is the wall clock, for an answer without `Date`.
///
/// A 429 is always [`Verdict::CoolDown`] or [`Verdict::Exhausted`]. A 503, and Anthropic's 529, is a refusal only with a
/// Retry-After. The body may be cut, compressed or no JSON: then the headers alone speak. Where there is more than one
/// time, this is the order, of what is exact before what is a bound:
///
/// 1. `retry-after-ms`, then `Retry-After` (seconds or a date);
/// 2. these two in OpenRouter's `error.metadata.headers`, then Gemini's `RetryInfo` and "try again in 7m59.56s" in a text;
/// 3. when the limits that are spent reset. OpenAI's headers tell the time until a limit is *full* again, more than has to
///    be waited. If this is over an hour, the quota is one of a day or more: exhausted.
///
/// A daily quota that is named as such is exhausted unless the provider states a wait of up to an hour: those of OpenAI and
/// Groq refill all day long.
pub fn judge(status: u16, headers: &Headers, body: &[u8], now: SystemTime) -> Verdict {
    // The provider's times are of the provider's clock, and a Pi may not know what day it is.
    let now = text(headers, "date").and_then(time::http_date).unwrap_or_else(|| UnixTime::of(now));
    match status {
        429 => too_many_requests(headers, &Body::read(body), now),
        503 | 529 => match retry_after(headers, now) {
            Some(wait) => Verdict::CoolDown { wait: Some(wait), scope: Body::read(body).scope() },
            None => Verdict::Repeat,
        },
        500 | 502 | 504 => Verdict::Repeat,
        _ => Verdict::PassOn,
    }
}

fn too_many_requests(headers: &Headers, body: &Body, now: UnixTime) -> Verdict {
    if body.has(FINAL) {
        return Verdict::Exhausted;
    }
    let stated = retry_after(headers, now).or_else(|| body.wait(now));
    let wait = stated
        .or_else(|| spent_limits_reset(&body.headers, now))
        .or_else(|| spent_limits_reset(headers, now));
    let daily = body.names_a_daily_limit();
    if (daily || stated.is_none()) && wait.map_or(daily, |wait| wait > LONGEST_PAUSE) {
        return Verdict::Exhausted;
    }
    Verdict::CoolDown { wait, scope: body.scope() }
}

/// What a client is told to wait (RFC 9110 section 10.2.3), in milliseconds by OpenAI and Azure.
fn retry_after(headers: &Headers, now: UnixTime) -> Option<Duration> {
    let exact = || {
        time::number(text(headers, "retry-after-ms")?, Duration::from_millis(1)).filter(believable)
    };
    let usual = || {
        let value = text(headers, "retry-after")?;
        let seconds = time::number(value, Duration::from_secs(1));
        seconds.or_else(|| Some(time::http_date(value)?.after(now))).filter(believable)
    };
    exact().or_else(usual)
}

/// The headers that tell what is left of a limit and when it resets. Several may be in one answer.
const LIMITS: [[&str; 2]; 7] = [
    ["x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
    ["x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
    ["anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"],
    ["anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-tokens-reset"],
    ["anthropic-ratelimit-input-tokens-remaining", "anthropic-ratelimit-input-tokens-reset"],
    ["anthropic-ratelimit-output-tokens-remaining", "anthropic-ratelimit-output-tokens-reset"],
    ["x-ratelimit-remaining", "x-ratelimit-reset"],
];

/// When the last of the limits resets that are spent, as far as the answer tells what is left.
fn spent_limits_reset(headers: &Headers, now: UnixTime) -> Option<Duration> {
    let spent = LIMITS
        .iter()
        .filter(|[remaining, _]| text(headers, remaining).is_none_or(|left| left == "0"));
    spent.filter_map(|[_, reset]| time::reset(text(headers, reset)?, now).filter(believable)).max()
}

fn text<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    std::str::from_utf8(headers.get(name)?).ok().map(str::trim)
}

fn believable(wait: &Duration) -> bool {
    *wait <= MAX_WAIT
}

/// What only bodies contain that mean [`Verdict::Exhausted`], in lower case. Where does not matter: as a code, as a type, in
/// the message, or quoted by a provider in between.
const FINAL: &[&str] = &[
    "insufficient_quota",         // OpenAI; as a type also beside the next three
    "credit_balance_exhausted",   // OpenAI
    "spend_limit_", // OpenAI: organization_.._exceeded, project_..; Anthropic: enforced_.._reached
    "usage_limit_exceeded", // OpenAI: organization_..
    "billing_hard_limit_reached", // OpenAI
    "billing_not_active", // OpenAI
    "request too large", // OpenAI: one request over the tokens of a minute
    "exceeded_current_quota", // Moonshot
    "insufficient balance", // Moonshot, Z.ai
    "free-models-per-day", // OpenRouter
    "limit: 0, model", // Gemini: a model that the plan does not have
    "perday",       // Gemini's quotaId; the retryDelay beside it is short and wrong
];

/// As [`FINAL`], for those that mean [`Scope::Model`].
const OF_ONE_MODEL: &[&str] = &[
    "for model ",                           // Groq
    ", model: claude",                      // Anthropic
    "this model",                           // Mistral, Together
    "permodel",                             // Gemini's quotaId
    "is temporarily rate-limited upstream", // OpenRouter
    "worker local total request limit",     // NVIDIA NIM, also through OpenRouter
];

/// The body of a refusal.
struct Body {
    /// All of it that is UTF-8, in lower case, whatever its format; of a compressed body next to nothing.
    text: String,
    /// The `error` of a JSON body; null if there is none.
    error: Value,
    /// What OpenRouter keeps in `error.metadata.headers`.
    headers: Headers,
}

impl Body {
    fn read(bytes: &[u8]) -> Self {
        let text =
            bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid()).to_ascii_lowercase();
        let mut json: Value = serde_json::from_slice(bytes).unwrap_or_default();
        // Gemini's compatible endpoint answers `[{"error": ..}]`.
        let root = if json.is_array() { json.get_mut(0) } else { Some(&mut json) };
        let error =
            root.and_then(|root| root.get_mut("error")).map(Value::take).unwrap_or_default();
        let mut headers = Headers::default();
        for (name, value) in error["metadata"]["headers"].as_object().into_iter().flatten() {
            match value {
                Value::String(text) => headers.push(name, text.as_bytes()),
                Value::Number(number) => headers.push(name, number.to_string().as_bytes()),
                _ => {}
            }
        }
        Self { text, error, headers }
    }

    fn names_a_daily_limit(&self) -> bool {
        let mut words = self.text.split(|c: char| !c.is_ascii_alphanumeric());
        self.text.contains("per day") || words.any(|word| matches!(word, "rpd" | "tpd" | "daily"))
    }

    fn scope(&self) -> Scope {
        // OpenAI: "Rate limit reached for gpt-4o in organization org-.."
        let named = self.text.contains("rate limit reached for ")
            && self.text.contains(" in organization ");
        match named || self.has(OF_ONE_MODEL) || self.has_quota_of_a_model() {
            true => Scope::Model,
            false => Scope::Provider,
        }
    }

    fn has(&self, phrases: &[&str]) -> bool {
        phrases.iter().any(|phrase| self.text.contains(phrase))
    }

    /// `google.rpc.QuotaFailure`, as JSON: `{"violations": [{"quotaDimensions": {"model": ..}, ..}]}`.
    fn has_quota_of_a_model(&self) -> bool {
        let mut violations =
            self.details().flat_map(|detail| detail["violations"].as_array().into_iter().flatten());
        violations.any(|violation| violation["quotaDimensions"]["model"].is_string())
    }

    fn details(&self) -> impl Iterator<Item = &Value> {
        self.error["details"].as_array().into_iter().flatten()
    }

    fn wait(&self, now: UnixTime) -> Option<Duration> {
        // Gemini cuts the fraction off the delay and keeps it in the message: the longer is the right one.
        let longer = || [self.retry_info(), self.wait_in_text()].into_iter().flatten().max();
        retry_after(&self.headers, now).or_else(longer)
    }

    /// `google.rpc.RetryInfo`, as JSON: `{"@type": "..RetryInfo", "retryDelay": "34.4s"}`.
    fn retry_info(&self) -> Option<Duration> {
        let delay = self.details().find_map(|detail| detail["retryDelay"].as_str())?;
        time::go_duration(delay).filter(believable)
    }

    fn wait_in_text(&self) -> Option<Duration> {
        let phrases = ["try again in ", "try again after ", "retry in ", "retry after "];
        let ends = phrases
            .iter()
            .flat_map(|phrase| self.text.match_indices(phrase).map(|(at, _)| at + phrase.len()));
        ends.filter_map(|end| time::leading_duration(&self.text[end..]))
            .map(|(wait, _)| wait)
            .find(believable)
    }
}

#[cfg(test)]
mod tests;
