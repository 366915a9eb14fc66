//! What a request is for: one match on method and path, after the gateway's own authorization.

use std::borrow::Cow;
use std::pin::Pin;
use std::rc::Rc;

use super::Gateway;
use super::caller::{Caller, Gone};
use super::cors::{self, Cors};
use super::lifecycle::Watch;
use super::proxy;
use super::request_body::Body;
use super::target;
use super::token::presents;
use crate::admin;
use crate::error::Error;
use crate::heap::pinned;
use crate::http1::RequestHead;
use crate::openai;

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// `POST /v1/...`, to a provider.
    Forward,
    /// Nowhere.
    Ours(Ours),
}

/// What the gateway answers itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ours {
    /// A browser's question before a request of a page.
    Preflight,
    /// `GET /v1/models`
    Models,
    /// `GET /v1/models/{id}`, decoded.
    Model(String),
    /// `GET /admin/health`
    Health,
    /// `GET /admin/stats`
    Stats,
    /// `GET /admin/queue`, so many of each line at most.
    Queue(usize),
    /// `GET /admin/requests`, so many at most.
    Requests(usize),
    /// `GET /metrics`, or `/admin/stats` for who wants it so.
    Metrics,
    /// `GET /admin/`
    Page,
    /// `GET /admin`, which is no folder.
    ToPage,
}

/// Decides from the head alone, so that a refusal comes before the body.
pub fn route(gateway: &Gateway, head: &RequestHead, cors: &Cors) -> Result<Route, Error> {
    if cors.is_preflight(head) {
        return Ok(Route::Ours(Ours::Preflight));
    }
    let (path, query) = head.target.split_once('?').unwrap_or((&head.target, ""));
    let path = path.split('#').next().unwrap_or_default();
    // The page is the same for everybody; what it shows it has to ask for.
    if !matches!(path, "/admin/health" | "/admin" | "/admin/") {
        authorize(gateway, head)?;
    }
    if path.starts_with("/v1/") {
        check_api(path, head)?;
    }
    let route = Route::Ours(match path {
        "/admin/health" => Ours::Health,
        "/admin/stats" if asks_for_metrics(head) => Ours::Metrics,
        "/admin/stats" => Ours::Stats,
        "/admin/queue" => Ours::Queue(limit(query)),
        "/admin/requests" => Ours::Requests(limit(query)),
        "/admin/" => Ours::Page,
        "/admin" => Ours::ToPage,
        "/metrics" => Ours::Metrics,
        "/v1/models" => Ours::Models,
        _ => match path.strip_prefix("/v1/models/") {
            Some(id) => Ours::Model(percent_decode(id).into_owned()),
            None if path.len() > 4 && path.starts_with("/v1/") => return forwarded(path, head),
            None => return Err(Error::UnknownPath { path: path.into() }),
        },
    });
    allowed("GET, HEAD", head).map(|()| route)
}

/// Whether a request is answered where there is no room for others.
pub fn is_for_the_operator(head: &RequestHead) -> bool {
    let path = head.target.split(['?', '#']).next().unwrap_or_default();
    matches!(&*head.method, "GET" | "HEAD") && matches!(path, "/admin/health" | "/metrics")
}

/// What no path of the API takes, whatever its method.
fn check_api(path: &str, head: &RequestHead) -> Result<(), Error> {
    if head.headers.items("upgrade").any(is_websocket) {
        return Err(Error::WebSocketNotSupported);
    }
    if let Some(base) = target::doubled_endpoint(path) {
        return Err(Error::DoubledEndpoint { path: path.into(), base: base.into() });
    }
    Ok(())
}

/// Whether an item of Upgrade names WebSocket, with a version or without (RFC 9110 section 7.8).
fn is_websocket(item: &[u8]) -> bool {
    let name = item.split(|byte| *byte == b'/').next().unwrap_or_default();
    name.eq_ignore_ascii_case(b"websocket")
}

fn forwarded(path: &str, head: &RequestHead) -> Result<Route, Error> {
    allowed("POST", head)?;
    if climbs(path) {
        return Err(Error::UnknownPath { path: path.into() });
    }
    let is_coding = |item: &&[u8]| !item.is_empty() && !item.eq_ignore_ascii_case(b"identity");
    if let Some(coding) = head.headers.items("content-encoding").find(is_coding) {
        let coding = String::from_utf8_lossy(coding).into_owned();
        return Err(Error::UnsupportedContentEncoding { coding });
    }
    Ok(Route::Forward)
}

fn allowed(methods: &'static str, head: &RequestHead) -> Result<(), Error> {
    if methods.split(", ").any(|method| method == &*head.method) {
        return Ok(());
    }
    Err(Error::MethodNotAllowed { method: head.method.to_string(), allow: methods })
}

/// Answers a routed request. On the heap, so that a connection without a request does not hold the room for one.
pub fn answer<'a>(
    gateway: &'a Gateway,
    route: Route,
    address: &'a Rc<str>,
    head: &'a RequestHead,
    body: Body,
    caller: &'a mut Caller,
    abort: &'a mut Watch,
) -> Pin<Box<dyn Future<Output = Result<(), Gone>> + 'a>> {
    match route {
        Route::Forward => pinned(|| proxy::forward(gateway, address, head, body, caller, abort)),
        Route::Ours(ours) => pinned(|| answer_ourselves(gateway, ours, head, caller)),
    }
}

async fn answer_ourselves(
    gateway: &Gateway,
    ours: Ours,
    head: &RequestHead,
    caller: &mut Caller,
) -> Result<(), Gone> {
    let created = gateway.created;
    let models = || gateway.registry.models();
    match ours {
        Ours::Preflight => caller.no_content(&cors::preflight_fields(head)).await,
        Ours::Health => caller.json(200, &admin::UNFRAMED, &admin::health(gateway.started)).await,
        Ours::Stats => {
            let stats = admin::stats(
                &gateway.config,
                &gateway.providers,
                &gateway.telemetry,
                gateway.started,
            )
            .await;
            caller.json(200, &VARIES, &stats).await
        }
        Ours::Metrics => {
            let metrics =
                admin::metrics(&gateway.providers, &gateway.telemetry, gateway.started).await;
            caller.whole(200, admin::METRICS_TYPE, &VARIES, &metrics).await
        }
        Ours::Queue(limit) => {
            let queue = admin::queue(&gateway.providers, limit).await;
            caller.json(200, &LIVE, &queue).await
        }
        Ours::Requests(limit) => {
            caller.json(200, &LIVE, &admin::requests(&gateway.telemetry, limit)).await
        }
        Ours::Page => {
            caller.whole(200, "text/html; charset=utf-8", &admin::PAGE_HEADERS, admin::PAGE).await
        }
        Ours::ToPage => {
            let [options, policy] = admin::UNFRAMED;
            let headers = [("Location", "admin/"), options, policy];
            caller.whole(308, "text/plain", &headers, b"It is at /admin/\n").await
        }
        Ours::Models => caller.json(200, &[], &openai::model_list(models(), created)).await,
        Ours::Model(id) => match gateway.registry.get(&id) {
            Ok(model) => caller.json(200, &[], &openai::model_object(model, created)).await,
            Err(error) => caller.error(&error).await,
        },
    }
}

const NO_STORE: (&str, &str) = ("Cache-Control", "no-store");

/// Of what changes from moment to moment.
const LIVE: [(&str, &str); 3] = [NO_STORE, admin::UNFRAMED[0], admin::UNFRAMED[1]];

/// The same with two forms.
const VARIES: [(&str, &str); 4] = [LIVE[0], LIVE[1], LIVE[2], ("Vary", "Accept")];

fn asks_for_metrics(head: &RequestHead) -> bool {
    head.headers
        .get("accept")
        .is_some_and(|accept| admin::wants_metrics(&String::from_utf8_lossy(accept)))
}

/// `limit` of a query; without a sensible one, all.
fn limit(query: &str) -> usize {
    query
        .split('&')
        .find_map(|pair| pair.strip_prefix("limit=")?.parse().ok())
        .unwrap_or(usize::MAX)
}

/// `server.auth_token`, if one is set, or the token of a client.
fn authorize(gateway: &Gateway, head: &RequestHead) -> Result<(), Error> {
    let Some(token) = &gateway.config.auth_token else { return Ok(()) };
    let mut tokens =
        std::iter::once(token).chain(gateway.config.clients.iter().map(|client| &client.token));
    if tokens.any(|token| presents(head, token)) { Ok(()) } else { Err(Error::InvalidApiKey) }
}

/// Whether a path has dot segments, however written: they could lead out of the provider's base_url with the provider's
/// key. `\` counts as `/`, since some servers take it for that.
fn climbs(path: &str) -> bool {
    percent_decode(path).split(['/', '\\']).any(|segment| matches!(segment, "." | ".."))
}

/// RFC 3986 section 2.1. What is no escape, or gives no UTF-8, stays or is replaced: it will be no model's name.
fn percent_decode(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let (bytes, mut decoded, mut at) = (text.as_bytes(), Vec::with_capacity(text.len()), 0);
    while at < bytes.len() {
        let escaped = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&decoded).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_decoded_and_nothing_else() {
        for (text, want) in
            [("z-ai%2Fglm-5.1", "z-ai/glm-5.1"), ("a%2", "a%2"), ("%zz%41", "%zzA"), ("é%é", "é%é")]
        {
            assert_eq!(percent_decode(text), want, "{text}");
        }
    }

    #[test]
    fn dot_segments_are_seen_in_every_spelling() {
        for path in [
            "/v1/../x",
            "/v1/a/..",
            "/v1/./a",
            "/v1/%2e%2E/x",
            "/v1/.%2e",
            "/v1/a%2f..%2Fb",
            "/v1/..\\b",
            "/v1/%5c..",
        ] {
            assert!(climbs(path), "{path}");
        }
        assert!(!climbs("/v1/chat.completions/..."));
    }
}
