//! The path that a request asks for, as it was meant: base URLs end in `/`, in `//`, in `/v1/v1` or
//! in an endpoint.
//!
//! Slashes and segments are taken out, nothing is decoded or put in, and the query stays byte for
//! byte.

/// The path that keeps the slash at its end.
const PAGE: &str = "/admin/";

/// Below it is the API; clients put it in front of a base URL that has it already.
const VERSION: &str = "v1";

/// What a base URL ends in by mistake.
const BASES: [&str; 5] = ["chat/completions", "completions", "embeddings", "messages", "responses"];

/// What clients put behind a base URL. A model may be called like one of these, so `models` is no
/// base.
const ENDPOINTS: [&str; 11] = [
    "audio/speech",
    "audio/transcriptions",
    "chat/completions",
    "completions",
    "embeddings",
    "images/generations",
    "messages",
    "models",
    "moderations",
    "rerank",
    "responses",
];

/// Both a list of models at OpenRouter and a doubled endpoint; taken for the former.
const LIST_OF_EMBEDDINGS: (&str, &str) = ("embeddings", "models");

/// Makes each `//` a `/` and `/v1/v1` a `/v1`, and cuts a slash at the end.
pub fn tidy(target: &mut String) {
    let end = target.find('?').unwrap_or(target.len());
    let path = &target[..end];
    let is_tidy = !path.as_bytes().windows(2).any(|pair| pair == b"//")
        && !path.starts_with("/v1/v1")
        && (!path.ends_with('/') || path.len() == 1 || path == PAGE);
    if is_tidy {
        return;
    }
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let doubled = segments.windows(2).take_while(|pair| *pair == [VERSION, VERSION]).count();
    let tidied = match segments[doubled..] {
        [] => "/".to_owned(),
        ["admin"] if path.ends_with('/') => PAGE.to_owned(),
        ref segments => segments.iter().flat_map(|segment| ["/", segment]).collect(),
    };
    target.replace_range(..end, &tidied);
}

/// The base URL's end of a path that goes on with another endpoint, e.g. `/v1/chat/completions`.
/// What lies below an endpoint by its API (`/v1/messages/count_tokens`,
/// `/v1/responses/ID/input_items`) is no endpoint of the list.
pub fn doubled_endpoint(path: &str) -> Option<&str> {
    let below = path.strip_prefix("/v1/")?;
    BASES.iter().find_map(|base| {
        let rest = below.strip_prefix(base)?.strip_prefix('/')?;
        let rest = rest.strip_prefix("v1/").unwrap_or(rest);
        let is_endpoint = |endpoint: &&str| {
            let behind = rest.strip_prefix(endpoint);
            behind.is_some_and(|behind| behind.is_empty() || behind.starts_with('/'))
        };
        let endpoint = ENDPOINTS.iter().find(|endpoint| is_endpoint(endpoint))?;
        let end = path.len() - below.len() + base.len();
        ((*base, *endpoint) != LIST_OF_EMBEDDINGS).then(|| &path[..end])
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tidied(target: &str) -> String {
        let mut target = target.to_owned();
        tidy(&mut target);
        target
    }

    #[test]
    fn a_path_is_what_it_was_meant_to_be() {
        for (target, want) in [
            ("/v1//chat/completions", "/v1/chat/completions"),
            ("//v1/chat/completions", "/v1/chat/completions"),
            ("///v1///chat//completions//", "/v1/chat/completions"),
            ("/v1/v1/chat/completions", "/v1/chat/completions"),
            ("/v1/v1/v1/messages", "/v1/messages"),
            ("/v1//v1/messages/", "/v1/messages"),
            ("/v1/v1", "/v1"),
            ("/v1/chat/completions/", "/v1/chat/completions"),
            ("/v1/chat/completions/?a=//b/&c=%2F", "/v1/chat/completions?a=//b/&c=%2F"),
            ("/v1/?//", "/v1?//"),
            ("/v1/models/", "/v1/models"),
            ("/v1/models/a//b/", "/v1/models/a/b"),
            ("/admin//", "/admin/"),
            ("//admin/stats/", "/admin/stats"),
            ("//", "/"),
            ("//?x", "/?x"),
        ] {
            assert_eq!(tidied(target), want, "{target}");
        }
    }

    #[test]
    fn a_path_that_is_right_stays_byte_for_byte() {
        for target in [
            "/",
            "*",
            "/v1",
            "/admin",
            "/admin/",
            "/admin/?x",
            "/v1/chat/completions",
            "/v1/chat%2F%2Fcompletions?x=//",
            "/v1/v1beta/models",
            "/v1/models/v1/v1",
            "/v1/a/../b",
            "/V1/V1",
        ] {
            assert_eq!(tidied(target), target);
        }
    }

    #[test]
    fn a_doubled_endpoint_is_told_from_what_lies_below_one() {
        for (path, base) in [
            ("/v1/chat/completions/chat/completions", "/v1/chat/completions"),
            ("/v1/chat/completions/models", "/v1/chat/completions"),
            ("/v1/chat/completions/models/vendor/name", "/v1/chat/completions"),
            ("/v1/chat/completions/embeddings", "/v1/chat/completions"),
            ("/v1/chat/completions/v1/messages", "/v1/chat/completions"),
            ("/v1/completions/chat/completions", "/v1/completions"),
            ("/v1/embeddings/embeddings", "/v1/embeddings"),
            ("/v1/responses/responses", "/v1/responses"),
            ("/v1/responses/v1/responses", "/v1/responses"),
            ("/v1/messages/messages/count_tokens", "/v1/messages"),
            ("/v1/messages/v1/messages", "/v1/messages"),
        ] {
            assert_eq!(doubled_endpoint(path), Some(base), "{path}");
        }
        for path in [
            "/v1/chat/completions",
            "/v1/chat/completions/chatcmpl-1",
            "/v1/chat/completions/chatcmpl-1/messages",
            "/v1/responses/resp_1",
            "/v1/responses/resp_1/input_items",
            "/v1/responses/input_tokens",
            "/v1/messages/count_tokens",
            "/v1/messages/batches",
            "/v1/messages/batches/1/results",
            "/v1/models/x/embeddings",
            "/v1/models/chat/completions",
            "/v1/models/models/models",
            "/v1/embeddings/models",
            "/v1/chat/completions/modelsx",
            "/v1/xchat/completions/models",
            "/v1",
            "/",
        ] {
            assert_eq!(doubled_endpoint(path), None, "{path}");
        }
    }

    proptest! {
        #[test]
        fn what_was_tidied_is_tidy_and_its_query_is_the_same(target in "(/|/|v1|v1|admin|a|%2F|\\.){0,12}(\\?[/a?]{0,6})?") {
            let target = format!("/{target}");
            let once = tidied(&target);
            prop_assert_eq!(tidied(&once), once.clone());
            let parts = |target: &str| target.split_once('?').map(|(path, query)| (path.to_owned(), query.to_owned()));
            prop_assert_eq!(parts(&once).map(|parts| parts.1), parts(&target).map(|parts| parts.1));
            let path = once.split('?').next().unwrap();
            prop_assert!(path.starts_with('/') && !path.contains("//") && !path.starts_with("/v1/v1/"), "{}", path);
            let letters = |text: &str| text.split('?').next().unwrap().split('/').filter(|part| !part.is_empty() && *part != "v1").collect::<Vec<_>>().join("/");
            prop_assert_eq!(letters(&once), letters(&target), "nothing but slashes and versions is taken out");
        }
    }
}
