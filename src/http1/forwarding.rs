//! Which fields of a head go on: not those for one hop, and of a provider's response not those that
//! would steer a proxy or a browser in front of the gateway. Names only; values pass as they are.

use super::Headers;

/// A set of field names: single ones, and families that begin alike. Compared as [`same_name`]
/// does.
pub struct FieldNames {
    names: &'static [&'static str],
    families: &'static [&'static str],
}

impl FieldNames {
    /// These names, and all that begin with one of `families`.
    pub const fn new(
        names: &'static [&'static str],
        families: &'static [&'static str],
    ) -> FieldNames {
        FieldNames { names, families }
    }

    /// Whether the name is in the set.
    pub fn contain(&self, name: &str) -> bool {
        self.names.iter().any(|known| same_name(name, known))
            || self.families.iter().any(|family| {
                let start = name.as_bytes().get(..family.len());
                start.is_some_and(|start| same_bytes(start, family.as_bytes()))
            })
    }
}

/// Whether two field names are one and the same to some recipient: case is ignored, and `_` counts
/// as `-`, since CGI, WSGI and some proxies turn both into `_`.
pub fn same_name(name: &str, other: &str) -> bool {
    same_bytes(name.as_bytes(), other.as_bytes())
}

fn same_bytes(name: &[u8], other: &[u8]) -> bool {
    let plain = |byte: &u8| if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    name.len() == other.len() && name.iter().map(plain).eq(other.iter().map(plain))
}

/// What is for the next hop only (RFC 9110 section 7.6.1), about a proxy's credentials, or the
/// framing of one message.
const ONE_HOP: FieldNames = FieldNames::new(
    &[
        "connection",
        "content-length",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ],
    &[],
);

/// What a provider must not say to those in front of the gateway. Proxies obey most of it: nginx,
/// Apache, lighttpd and LiteSpeed send files that it names, Envoy takes the gateway out of service,
/// caches run ESI. The rest makes browsers treat the gateway's address as the provider's.
const OF_PROVIDERS_ALONE: FieldNames = FieldNames::new(
    &[
        "alt-svc",
        "clear-site-data",
        "expect-ct",
        "nel",
        "public-key-pins",
        "report-to",
        "reporting-endpoints",
        "strict-transport-security",
        "surrogate-control",
        "timing-allow-origin",
        "x-envoy-degraded",
        "x-envoy-immediate-health-check-fail",
        "x-envoy-local-overloaded",
        "x-envoy-overloaded",
        "x-envoy-ratelimited",
    ],
    &[
        "access-control-",
        "x-accel-",
        "x-lighttpd-",
        "x-limitrate-",
        "x-litespeed-",
        "x-reproxy-",
        "x-sendfile",
    ],
);

/// The fields that go on, in either direction. Those for one hop are left out, and those that
/// `Connection` names. So is Content-Length: whoever writes the message frames it.
pub fn end_to_end(headers: &Headers) -> impl Iterator<Item = (&str, &[u8])> {
    let listed = headers.items("connection");
    // What it says nearly always names no field.
    let named: Vec<&[u8]> = listed
        .filter(|item| {
            ![&b"keep-alive"[..], b"close"].iter().any(|word| item.eq_ignore_ascii_case(word))
        })
        .collect();
    headers.iter().filter(move |(name, _)| {
        !ONE_HOP.contain(name) && !named.iter().any(|item| same_bytes(item, name.as_bytes()))
    })
}

/// The fields of a provider's response that go on to a client.
pub fn of_response(headers: &Headers) -> impl Iterator<Item = (&str, &[u8])> {
    end_to_end(headers).filter(|(name, _)| !OF_PROVIDERS_ALONE.contain(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a field of that name goes on, beside others, by `rule`.
    fn goes_on<'h, I: Iterator<Item = (&'h str, &'h [u8])>>(
        rule: fn(&'h Headers) -> I,
        came: &'h mut Headers,
        fields: &[(&str, &str)],
        name: &str,
    ) -> bool {
        let others = fields.iter().copied().chain([(name, "1"), ("Content-Type", "x")]);
        others.for_each(|(name, value)| came.push(name, value.as_bytes()));
        let names: Vec<&str> = rule(came).map(|(name, _)| name).collect();
        assert!(names.contains(&"Content-Type"), "{names:?}");
        names.contains(&name)
    }

    #[test]
    fn which_fields_end_at_a_hop() {
        let passes = |fields: &[(&str, &str)], name: &str| {
            goes_on(end_to_end, &mut Headers::default(), fields, name)
        };
        let listing = [("Connection", "close, X-Hop"), ("connection", "Other")];
        for name in [
            "Connection",
            "keep-alive",
            "TE",
            "Trailer",
            "Transfer-Encoding",
            "upgrade",
            "Proxy-Connection",
            "Content-Length",
        ] {
            assert!(!passes(&[], name) && !passes(&listing, name), "{name}");
        }
        for name in ["x-hop", "OTHER", "x_hop"] {
            assert!(!passes(&listing, name) && passes(&[], name), "{name}");
            assert!(passes(&[("Connection", "keep-alive")], name), "{name}");
        }
    }

    #[test]
    fn names_with_underscores_imitate_nothing() {
        for name in [
            "Transfer_Encoding",
            "content_length",
            "CONTENT_LENGTH",
            "keep_alive",
            "proxy_authorization",
        ] {
            assert!(!goes_on(end_to_end, &mut Headers::default(), &[], name), "{name}");
        }
        for name in ["user_id", "x_request_id", "content_type", "transfer__encoding", "_te", "te_"]
        {
            assert!(goes_on(end_to_end, &mut Headers::default(), &[], name), "{name}");
        }
    }

    #[test]
    fn nothing_of_a_provider_steers_proxies_or_browsers_in_front() {
        for name in [
            "X-Accel-Redirect",
            "x-accel-buffering",
            "X_Accel_Redirect",
            "X-Sendfile",
            "x-sendfile2",
            "X-SENDFILE-TEMPORARY",
            "X-LIGHTTPD-send-file",
            "X-LiteSpeed-Location",
            "x-litespeed-cache-control",
            "X-Reproxy-URL",
            "x-reproxy-file",
            "x-envoy-immediate-health-check-fail",
            "Surrogate-Control",
            "Alt-Svc",
            "Strict-Transport-Security",
            "Clear-Site-Data",
            "NEL",
            "Report-To",
            "Access-Control-Allow-Origin",
            "access_control_allow_origin",
            "Timing-Allow-Origin",
            "x-limitrate-provider",
            "X_Limitrate_Queued_Ms",
            "Connection",
        ] {
            assert!(!goes_on(of_response, &mut Headers::default(), &[], name), "{name}");
        }
        for name in [
            "X-Accelerated",
            "x-envoy-upstream-service-time",
            "x-ratelimit-remaining-requests",
            "Set-Cookie",
            "Cache-Control",
            "Access",
            "x",
        ] {
            assert!(goes_on(of_response, &mut Headers::default(), &[], name), "{name}");
        }
    }
}
