//! Cross-origin requests of web pages (WHATWG Fetch, section 3.3): who may, and the headers that say so.
//!
//! The gateway's own word only: what a provider says of it is about the provider's address, and
//! never passes (`http1::forwarding`).

use crate::config::Origins;
use crate::http1::{self, Headers, RequestHead};

/// How long a browser may remember a preflight, in seconds: Chromium's own limit.
const MAX_AGE_SECONDS: &str = "7200";

/// What any path takes.
const METHODS: &str = "GET, HEAD, POST";

/// What a page may read of an answer beside its body. `*` would not cover requests with credentials.
const EXPOSED: &[u8] = b"request-id, x-request-id, retry-after, retry-after-ms, x-should-retry, \
    x-limitrate-provider, x-limitrate-queued-ms, openai-organization, openai-processing-ms, openai-version, \
    x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, \
    x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, \
    anthropic-organization-id, \
    anthropic-ratelimit-requests-limit, anthropic-ratelimit-requests-remaining, anthropic-ratelimit-requests-reset, \
    anthropic-ratelimit-tokens-limit, anthropic-ratelimit-tokens-remaining, anthropic-ratelimit-tokens-reset, \
    anthropic-ratelimit-input-tokens-limit, anthropic-ratelimit-input-tokens-remaining, \
    anthropic-ratelimit-input-tokens-reset, anthropic-ratelimit-output-tokens-limit, \
    anthropic-ratelimit-output-tokens-remaining, anthropic-ratelimit-output-tokens-reset";

/// What the answer to a request says of pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Cors {
    /// Nothing: `cors_origins` is not set.
    #[default]
    Off,
    /// That it depends on the origin, and no more.
    Denied,
    /// That this origin may have it; `*`: every one.
    Granted(String),
}

impl Cors {
    /// For a request with these headers.
    pub fn of(origins: &Origins, headers: &Headers) -> Cors {
        if *origins == Origins::Unset {
            return Cors::Off;
        }
        let origin = headers.get("origin").and_then(|origin| std::str::from_utf8(origin).ok());
        match (origins, origin) {
            (Origins::Any, Some(_)) => Cors::Granted("*".to_owned()),
            (Origins::Listed(known), Some(origin)) if known.iter().any(|known| known == origin) => {
                Cors::Granted(origin.to_owned())
            }
            _ => Cors::Denied,
        }
    }

    /// Whether a browser asks for a page, beforehand, what it may send. It shows no key yet.
    pub fn is_preflight(&self, head: &RequestHead) -> bool {
        let asks = &*head.method == "OPTIONS"
            && head.headers.get("access-control-request-method").is_some();
        asks && matches!(self, Cors::Granted(_))
    }

    /// The fields of every answer.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let vary = (*self != Cors::Off).then_some(("Vary", b"Origin".as_slice()));
        let granted = match self {
            Cors::Granted(origin) => Some(("Access-Control-Allow-Origin", origin.as_bytes())),
            Cors::Off | Cors::Denied => None,
        };
        let exposed = granted.map(|_| ("Access-Control-Expose-Headers", EXPOSED));
        [vary, granted, exposed].into_iter().flatten()
    }
}

/// The further fields of the answer to a preflight. All headers that are asked for may be sent, if they can be.
pub fn preflight_fields(head: &RequestHead) -> Vec<(&'static str, String)> {
    let lines = head.headers.get_all("access-control-request-headers");
    let names = lines.flat_map(|line| line.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
    let tokens = names.filter(|name| http1::is_token(name)).map(String::from_utf8_lossy);
    let allowed = tokens.collect::<Vec<_>>().join(", ");
    let mut fields = vec![
        ("Access-Control-Allow-Methods", METHODS.to_owned()),
        ("Access-Control-Max-Age", MAX_AGE_SECONDS.to_owned()),
    ];
    if !allowed.is_empty() {
        fields.push(("Access-Control-Allow-Headers", allowed));
    }
    fields
}
