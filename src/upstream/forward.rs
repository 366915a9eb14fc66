//! What of a caller's request goes on to the provider.
//!
//! The path after `/v1`, the query, the body and every header go on, but for hop-by-hop headers (RFC 9110 section
//! 7.6.1) and whatever identifies the caller: the provider sees the operator's key, never the caller's, and nothing of whom
//! proxies in front of the gateway speak for.

use crate::config::{Provider, Secret};
use crate::error::Dialect;
use crate::http1::{self, FieldNames, RequestHead, same_name};
use crate::openai::RequestBody;

/// The client's headers that stop here, beside those for one hop: its credentials, who asked a proxy
/// in front (in all the ways that proxies say it), what the gateway writes itself, and what is said
/// to the gateway alone.
const KEPT_BACK: FieldNames = FieldNames::new(
    &[
        "host",
        "expect",
        "authorization",
        "x-api-key",
        "api-key",
        "x-goog-api-key",
        "cookie",
        "forwarded",
        "x-real-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "true-client-ip",
        "cf-connecting-ip",
        "via",
    ],
    &["x-limitrate-", "x-forwarded-"],
);

/// A request as it goes on the wire. Not `Debug`: its head holds the provider's key.
pub struct Outgoing {
    /// The request head, complete.
    pub head: Vec<u8>,
    /// The body, already under the provider's own model name.
    pub body: RequestBody,
}

impl Outgoing {
    /// Builds what `provider` gets for a caller's request below `/v1`, with this API key. Where the answer has
    /// to come `plain`, no compression is asked for.
    pub fn new(
        provider: &Provider,
        key: Option<&Secret>,
        request: &RequestHead,
        body: RequestBody,
        plain: bool,
    ) -> Outgoing {
        let base = &provider.base_url;
        let below = request.target.strip_prefix("/v1").unwrap_or(&request.target);
        let target = [&base.path, below].concat();
        let ours = |name: &str| provider.headers.iter().any(|(own, _)| same_name(own, name));
        let key = key.and_then(|key| key_field(Dialect::of(&request.target), key.reveal(), ours));

        let passed = http1::end_to_end(&request.headers).filter(|(name, _)| {
            let kept_back = plain && same_name(name, "accept-encoding");
            !kept_back && !KEPT_BACK.contain(name) && !ours(name)
        });
        let own =
            provider.headers.iter().map(|(name, value)| (name.as_str(), value.reveal().as_bytes()));
        let key = key.as_ref().map(|(name, value)| (*name, value.as_bytes()));

        let mut head = Vec::with_capacity(1024);
        let length = Some(body.len() as u64);
        http1::write_request_head(
            &mut head,
            &request.method,
            &target,
            base.authority(),
            key.into_iter().chain(own).chain(passed),
            length,
        );
        Outgoing { head, body }
    }
}

/// The field that shows `key` to a provider as the API of the request has it; none where the provider's own headers, asked
/// for by name, do that already.
fn key_field(
    dialect: Dialect,
    key: &str,
    ours: impl Fn(&str) -> bool,
) -> Option<(&'static str, String)> {
    match dialect {
        _ if ours("authorization") => None,
        Dialect::OpenAi | Dialect::Responses => Some(("Authorization", ["Bearer ", key].concat())),
        Dialect::Anthropic if ours("x-api-key") => None,
        Dialect::Anthropic => Some(("x-api-key", key.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_goes_where_the_api_has_it_unless_the_operator_put_one_there() {
        let bearer = Some(("Authorization", "Bearer k".to_owned()));
        let plain = Some(("x-api-key", "k".to_owned()));
        for (own, openai, anthropic) in [
            (&[][..], &bearer, &plain),
            (&["x-team"], &bearer, &plain),
            (&["x-api-key"], &bearer, &None),
            (&["authorization"], &None, &None),
        ] {
            let ours = |name: &str| own.contains(&name);
            assert_eq!(&key_field(Dialect::OpenAi, "k", ours), openai, "{own:?}");
            assert_eq!(&key_field(Dialect::Anthropic, "k", ours), anthropic, "{own:?}");
        }
    }
}
