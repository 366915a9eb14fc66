//! Everything that limitrate itself refuses or reports to a caller, in one enum.
//!
//! Status, JSON and extra headers of a refusal are decided here and nowhere else, in the shapes of the API that the caller
//! speaks. Does not know about sockets.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;

/// Text that a caller chose is cut to this many characters inside a message.
const QUOTE_LIMIT_CHARS: usize = 200;
/// The same for what a parser, the resolver or OpenSSL says: long enough for the reason at the end of a TLS error.
const DETAIL_LIMIT_CHARS: usize = 400;
/// openai-node ignores a longer Retry-After and hammers on with its own fast backoff, so past this we forbid the retry.
const OBEYED_RETRY_AFTER_SECONDS: u64 = 60;
/// A connection frees up as soon as any exchange ends.
const CONNECTION_RETRY_AFTER: Duration = Duration::from_secs(1);
/// About the time that a supervisor takes to start the successor.
const RESTART_RETRY_AFTER: Duration = Duration::from_secs(5);

/// In whose shapes a caller is spoken to: those of the API that it called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error":{"message","type","param","code"}}`, and events without a name.
    OpenAi,
    /// OpenAI's Responses: the same objects, and named events that a stream ends with.
    Responses,
    /// `{"type":"error","error":{"type","message"}}`, and named events.
    Anthropic,
}

impl Dialect {
    /// That of a request with this target, by the API that begins its path.
    pub fn of(target: &str) -> Dialect {
        let is_below = |api: &str| {
            let rest = target.strip_prefix(api);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?', '#']))
        };
        match target {
            _ if is_below("/v1/messages") => Dialect::Anthropic,
            _ if is_below("/v1/responses") => Dialect::Responses,
            _ => Dialect::OpenAi,
        }
    }

    /// The header that its SDK reads the id of an answer from.
    pub fn request_id_header(self) -> &'static str {
        match self {
            Dialect::OpenAi | Dialect::Responses => "x-request-id",
            Dialect::Anthropic => "request-id",
        }
    }
}

/// What a request that waits too long waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitsFor {
    /// A connection to the provider: the slot is open.
    Connection,
    /// The end of a pause that the provider has asked for.
    Cooldown,
    /// Room under this limit, named as in the configuration.
    Limit(&'static str),
}

impl WaitsFor {
    fn clause(self, provider: &str, for_whom: &str) -> String {
        let provider = quote(provider);
        match self {
            WaitsFor::Connection => format!("No connection to the provider {provider} stands yet"),
            WaitsFor::Cooldown => format!("The provider {provider} has asked for a pause"),
            WaitsFor::Limit(limit) => {
                format!("The queue of {provider} is too long{for_whom} (limit: {limit})")
            }
        }
    }
}

/// A refusal or a failure, as the caller gets to see it. No variant may hold a secret.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// A request head or body framing that RFC 9112 forbids or that we refuse for safety: 400.
    MalformedRequest {
        /// What is wrong, as a sentence without a full stop.
        detail: String,
    },
    /// The head is larger than `server.max_head_bytes`: 431.
    HeadTooLarge {
        /// The limit in bytes.
        limit_bytes: usize,
    },
    /// More header fields than the parser takes: 431.
    TooManyHeaders {
        /// The limit.
        limit: usize,
    },
    /// Neither HTTP/1.1 nor HTTP/1.0: 505.
    UnsupportedVersion,
    /// A method that HTTP does not register: 501.
    UnknownMethod {
        /// As sent.
        method: String,
    },
    /// A Transfer-Encoding other than exactly `chunked`: 501 (RFC 9112 section 6.1).
    UnsupportedTransferEncoding {
        /// As sent.
        value: String,
    },
    /// The body is larger than `server.max_body_bytes`: 413.
    BodyTooLarge {
        /// The limit in bytes.
        limit_bytes: u64,
    },
    /// The caller stopped sending in the middle of a head or body: 408.
    RequestTimeout {
        /// `head` or `body`.
        part: &'static str,
        /// The deadline that passed.
        waited: Duration,
    },
    /// The body is no JSON object: 400.
    InvalidJson {
        /// What the parser says.
        detail: String,
    },
    /// The body has no string `model`: 400.
    MissingModel,
    /// A header of ours has a value that it can't have: 400.
    InvalidHeader {
        /// The header.
        name: &'static str,
        /// As sent.
        value: String,
        /// What it may be.
        wanted: &'static str,
    },
    /// No provider lists this model: 404.
    ModelNotFound {
        /// As asked for.
        model: String,
        /// Known names that look alike, best first; may be empty.
        nearest: Vec<String>,
    },
    /// No such path: 404.
    UnknownPath {
        /// As asked for, without the query.
        path: String,
    },
    /// The path holds one endpoint behind another, since a base URL ends in an endpoint: 404.
    DoubledEndpoint {
        /// As asked for, without the query.
        path: String,
        /// What of it the base URL ends in, e.g. `/v1/chat/completions`.
        base: String,
    },
    /// The path exists under other methods: 405.
    MethodNotAllowed {
        /// As sent.
        method: String,
        /// The value of Allow.
        allow: &'static str,
    },
    /// An upgrade to WebSocket is asked for: 426.
    WebSocketNotSupported,
    /// The body is compressed: 415 (RFC 9110 section 15.5.16).
    UnsupportedContentEncoding {
        /// The coding, as sent.
        coding: String,
    },
    /// `server.auth_token` is set and was not sent: 401.
    InvalidApiKey,
    /// A web page of an origin that may not call, without `server.auth_token`: 403.
    OriginNotAllowed {
        /// As the browser sent it.
        origin: String,
    },
    /// A Host that could be a stranger's name for this machine (DNS rebinding), without
    /// `server.auth_token`: 403.
    HostNotAllowed {
        /// As sent.
        host: String,
    },
    /// Waiting would take (or took) longer than `max_wait_seconds`: 503.
    QueueWaitExceeded {
        /// The provider's name.
        provider: String,
        /// Place in the queue, from 1.
        position: usize,
        /// How long the wait would be.
        expected_wait: Duration,
        /// The limit.
        max_wait: Duration,
        /// The cause.
        waits_for: WaitsFor,
        /// When to come back.
        retry_after: Duration,
    },
    /// `max_queue` requests wait already: 503.
    QueueFull {
        /// The provider's name.
        provider: String,
        /// The limit.
        max_queue: usize,
        /// When to come back.
        retry_after: Duration,
    },
    /// As many of the client's requests wait as its `max_queue` allows: 503.
    ClientQueueFull {
        /// The provider's name.
        provider: String,
        /// The client's name.
        client: String,
        /// The limit.
        max_queue: usize,
        /// When to come back.
        retry_after: Duration,
    },
    /// The caller gives up, as it said, before its slot comes (or gave up): 503.
    DeadlineExceeded {
        /// The provider's name.
        provider: String,
        /// Place in the queue, from 1.
        position: usize,
        /// How long the wait would be.
        expected_wait: Duration,
        /// How long the caller waits.
        patience: Duration,
        /// What of that is left for the provider's response.
        response_time: Duration,
        /// The cause.
        waits_for: WaitsFor,
        /// When to come back.
        retry_after: Duration,
    },
    /// The provider's budget for the day is spent: 503.
    DailyLimit {
        /// The provider's name.
        provider: String,
        /// When there is a new one.
        resets_in: Duration,
    },
    /// `server.max_connections` are open: 503.
    TooManyConnections {
        /// The limit.
        max_connections: usize,
    },
    /// The client has `server.max_connections_per_client` open: 503.
    ClientConnectionsFull {
        /// The limit.
        limit: usize,
    },
    /// The bodies of waiting requests fill `server.max_buffered_bytes`: 503.
    BuffersFull {
        /// The limit in bytes.
        limit_bytes: u64,
    },
    /// The bodies of the client's requests fill `server.max_buffered_bytes_per_client`: 503.
    ClientBuffersFull {
        /// The limit in bytes.
        limit_bytes: u64,
    },
    /// Plain HTTP on a port that speaks TLS: 400.
    PlainHttp,
    /// The gateway is shutting down: 503.
    ShuttingDown,
    /// DNS, TCP or TLS to the provider failed: 502.
    UpstreamUnreachable {
        /// The provider's name.
        provider: String,
        /// Which step failed and how.
        reason: String,
    },
    /// No response head in time: 504.
    UpstreamTimeout {
        /// The provider's name.
        provider: String,
        /// The deadline that passed.
        waited: Duration,
    },
    /// The provider closed or broke the connection before or inside its answer: 502, or an event in a stream.
    UpstreamDisconnected {
        /// The provider's name.
        provider: String,
        /// What happened and how much had come.
        detail: String,
    },
    /// The provider's answer breaks HTTP: 502.
    UpstreamInvalidResponse {
        /// The provider's name.
        provider: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The provider's answer was no stream, and the caller's stream had begun already: 502, as an event.
    UpstreamRefused {
        /// The provider's name.
        provider: String,
        /// Its status.
        status: u16,
        /// What its body says.
        detail: String,
    },
    /// A fault of limitrate's own: 500.
    Internal,
}

impl Error {
    /// The HTTP status.
    pub fn status(&self) -> u16 {
        self.class().0
    }

    /// `error.type` of the OpenAI error object.
    pub fn kind(&self) -> &'static str {
        self.class().1
    }

    /// `error.code` of the OpenAI error object: stable, and a different one for each variant.
    pub fn code(&self) -> &'static str {
        self.class().2
    }

    /// `error.param` of the OpenAI error object: the request field at fault.
    pub fn param(&self) -> Option<&'static str> {
        match self {
            Error::MissingModel | Error::ModelNotFound { .. } => Some("model"),
            _ => None,
        }
    }

    /// What happened and, where there is one, the remedy: English sentences on one line, without control characters.
    /// Foreign text is cut to a bounded length.
    pub fn message(&self) -> String {
        match self {
            Error::MalformedRequest { detail } => format!("The request is not valid HTTP/1.1: {}.", clip(detail)),
            Error::HeadTooLarge { limit_bytes } => {
                format!("The request line and headers are larger than {limit_bytes} bytes (server.max_head_bytes).")
            }
            Error::TooManyHeaders { limit } => format!("The request has more than {limit} header fields."),
            Error::UnsupportedVersion => "Only HTTP/1.1 and HTTP/1.0 are spoken here.".into(),
            Error::UnknownMethod { method } => format!("The method {} is not known.", quote(method)),
            Error::UnsupportedTransferEncoding { value } => format!(
                "The transfer encoding {} is not supported. Send the body as `chunked` or with a Content-Length.",
                quote(value)
            ),
            Error::BodyTooLarge { limit_bytes } => {
                format!("The request body is larger than {limit_bytes} bytes (server.max_body_bytes).")
            }
            Error::RequestTimeout { part, waited } => {
                format!("The request {part} did not arrive in time; the limit is {}.", seconds(*waited))
            }
            Error::InvalidJson { detail } => format!("The request body is not a valid JSON object: {}.", clip(detail)),
            Error::MissingModel => {
                "The request body has no `model` that is a string. GET /v1/models lists the names.".into()
            }
            Error::InvalidHeader { name, value, wanted } => {
                format!("The header {name} has to be {wanted}, not {}.", quote(value))
            }
            Error::ModelNotFound { model, nearest } => {
                format!("The model {} does not exist. {}", quote(model), suggest(nearest))
            }
            Error::UnknownPath { path } => format!(
                "There is nothing at {}. The API is below /v1, for example POST /v1/chat/completions.",
                quote(path)
            ),
            Error::DoubledEndpoint { path, base } => format!(
                "The path {} holds two endpoints, because the client's base URL ends in {}. Write a base \
                 URL that ends in /v1, for example http://localhost:8080/v1.",
                quote(path),
                quote(base)
            ),
            Error::MethodNotAllowed { method, allow } => {
                format!("The method {} is not allowed here. Use {allow}.", quote(method))
            }
            Error::WebSocketNotSupported => {
                "WebSocket is not served here. Send the same request over HTTP, for example POST \
                 /v1/responses with `stream` set to true."
                    .into()
            }
            Error::UnsupportedContentEncoding { coding } => format!(
                "The request body has the content encoding {}, which is not supported. Send the body \
                 uncompressed.",
                quote(coding)
            ),
            // No list can name it: the pages of all local files and sandboxes have it.
            Error::OriginNotAllowed { origin } if origin == "null" => {
                "Web pages without an origin (`null`), such as local files, may not use this gateway. Set \
                 server.auth_token, or allow every page with server.cors_origins: [\"*\"]."
                    .into()
            }
            Error::OriginNotAllowed { origin } => format!(
                "Web pages of the origin {} may not use this gateway. Add the origin to \
                 server.cors_origins, or set server.auth_token.",
                quote(origin)
            ),
            Error::HostNotAllowed { host } => format!(
                "The gateway does not know the host name {} as its own. Add the name to server.hosts, or \
                 set server.auth_token.",
                quote(host)
            ),
            Error::InvalidApiKey => {
                "The API key is missing or wrong. Send the gateway's own key as `Authorization: Bearer KEY` or \
                 `x-api-key: KEY`."
                    .into()
            }
            Error::QueueWaitExceeded {
                provider,
                position,
                expected_wait,
                max_wait,
                waits_for,
                ..
            } => format!(
                "{}: at position {position} the wait would be {}, and max_wait_seconds allows {}. \
                 Try again later.",
                waits_for.clause(provider, ""),
                seconds(*expected_wait),
                seconds(*max_wait)
            ),
            Error::QueueFull { provider, max_queue, .. } => format!(
                "The queue of {} is full: {max_queue} requests wait already (max_queue). Try again later.",
                quote(provider)
            ),
            Error::ClientQueueFull { provider, client, max_queue, .. } => format!(
                "{max_queue} requests of the client {} wait for {} already (its max_queue). Try again later.",
                quote(client),
                quote(provider)
            ),
            Error::DeadlineExceeded {
                provider,
                position,
                expected_wait,
                patience,
                response_time,
                waits_for,
                ..
            } => format!(
                "{}: at position {position} the wait would be {}, and the caller waits {}. {}\
                 Try again later, or with a longer timeout.",
                waits_for.clause(provider, " for this caller's timeout"),
                seconds(*expected_wait),
                seconds(*patience),
                usually(*response_time)
            ),
            Error::DailyLimit { provider, resets_in } => format!(
                "The budget of {} for this day (rpd) is spent; there is a new one in {}.",
                quote(provider),
                seconds(*resets_in)
            ),
            Error::TooManyConnections { max_connections } => format!(
                "{max_connections} connections are open already (server.max_connections). Close idle ones, or try again."
            ),
            Error::ClientConnectionsFull { limit } => format!(
                "This client has {limit} connections open already (server.max_connections_per_client). Close idle ones, or \
                 try again."
            ),
            Error::ClientBuffersFull { limit_bytes } => format!(
                "The bodies of this client's requests fill its share of memory: {limit_bytes} bytes \
                 (server.max_buffered_bytes_per_client). Try again later."
            ),
            Error::BuffersFull { limit_bytes } => format!(
                "The bodies of the requests that wait fill all memory set aside for them: {limit_bytes} bytes \
                 (server.max_buffered_bytes). Try again later."
            ),
            Error::PlainHttp => "This port speaks https, not plain http. Use https:// in the address.".into(),
            Error::ShuttingDown => "The gateway is shutting down. Try again in a few seconds.".into(),
            Error::UpstreamUnreachable { provider, reason } => {
                format!("The provider {} cannot be reached: {}.", quote(provider), clip(reason))
            }
            Error::UpstreamTimeout { provider, waited } => {
                format!("The provider {} did not start to answer within {}.", quote(provider), seconds(*waited))
            }
            Error::UpstreamDisconnected { provider, detail } => format!(
                "The connection to the provider {} broke before the answer was complete: {}.",
                quote(provider),
                clip(detail)
            ),
            Error::UpstreamInvalidResponse { provider, detail } => {
                format!("The answer of the provider {} is not valid HTTP/1.1: {}.", quote(provider), clip(detail))
            }
            Error::UpstreamRefused { provider, status, detail } => {
                format!("The provider {} answered {status}: {}.", quote(provider), clip(detail))
            }
            Error::Internal => "The gateway failed on this request; its log says why.".into(),
        }
    }

    /// The response body, in the shape of the dialect.
    pub fn to_json(&self, dialect: Dialect) -> String {
        let message = self.message();
        let body = match dialect {
            Dialect::OpenAi | Dialect::Responses => Body::OpenAi {
                error: OpenAiError {
                    message,
                    kind: self.kind(),
                    param: self.param(),
                    code: self.code(),
                },
            },
            Dialect::Anthropic => Body::Anthropic {
                kind: "error",
                error: AnthropicError { kind: self.anthropic_kind(), message },
            },
        };
        serde_json::to_string(&body).expect("a struct of strings has a JSON form")
    }

    /// The same object as whole events, for a stream whose head is out already. The SDKs raise an `APIError` on it:
    /// OpenAI's by the `error` in the data, Anthropic's by the event's name. It has to start at an event boundary.
    pub fn to_sse_event(&self, dialect: Dialect) -> String {
        match dialect {
            Dialect::OpenAi => format!("data: {}\n\n", self.to_json(dialect)),
            Dialect::Anthropic => format!("event: error\ndata: {}\n\n", self.to_json(dialect)),
            Dialect::Responses => {
                let message = self.message();
                responses_events(&message, Some(self.kind()), Some(self.code()), self.param())
            }
        }
    }

    /// The response headers that this error needs beyond Content-Type, Content-Length and Connection.
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let retry_after = match self {
            Error::QueueWaitExceeded { retry_after, .. }
            | Error::QueueFull { retry_after, .. }
            | Error::ClientQueueFull { retry_after, .. }
            | Error::DeadlineExceeded { retry_after, .. } => *retry_after,
            Error::DailyLimit { resets_in, .. } => *resets_in,
            Error::TooManyConnections { .. }
            | Error::ClientConnectionsFull { .. }
            | Error::BuffersFull { .. }
            | Error::ClientBuffersFull { .. } => CONNECTION_RETRY_AFTER,
            Error::ShuttingDown => RESTART_RETRY_AFTER,
            Error::MethodNotAllowed { allow, .. } => return vec![("Allow", (*allow).to_owned())],
            Error::InvalidApiKey => return vec![("WWW-Authenticate", "Bearer".to_owned())],
            Error::WebSocketNotSupported => return vec![("Upgrade", "HTTP/1.1".to_owned())],
            Error::UnsupportedContentEncoding { .. } => {
                return vec![("Accept-Encoding", "identity".to_owned())];
            }
            _ => return Vec::new(),
        };
        come_back_after(retry_after)
    }

    /// Whether the connection has to end with this answer: nobody knows any more where the next request would start, or
    /// the gateway needs the connection back.
    pub fn closes_connection(&self) -> bool {
        matches!(
            self,
            Error::MalformedRequest { .. }
                | Error::HeadTooLarge { .. }
                | Error::TooManyHeaders { .. }
                | Error::UnsupportedVersion
                | Error::UnknownMethod { .. }
                | Error::UnsupportedTransferEncoding { .. }
                | Error::BodyTooLarge { .. }
                | Error::RequestTimeout { .. }
                | Error::TooManyConnections { .. }
                | Error::ClientConnectionsFull { .. }
                | Error::BuffersFull { .. }
                | Error::ClientBuffersFull { .. }
                | Error::PlainHttp
                | Error::ShuttingDown
                | Error::Internal
        )
    }

    /// Status, type and code, side by side.
    fn class(&self) -> (u16, &'static str, &'static str) {
        const INVALID: &str = "invalid_request_error";
        const AUTH: &str = "authentication_error";
        const PERMISSION: &str = "permission_error";
        const RATE: &str = "rate_limit_error";
        const API: &str = "api_error";
        match self {
            Error::MalformedRequest { .. } => (400, INVALID, "malformed_request"),
            Error::HeadTooLarge { .. } => (431, INVALID, "head_too_large"),
            Error::TooManyHeaders { .. } => (431, INVALID, "too_many_headers"),
            Error::UnsupportedVersion => (505, INVALID, "unsupported_version"),
            Error::UnknownMethod { .. } => (501, INVALID, "unknown_method"),
            Error::UnsupportedTransferEncoding { .. } => {
                (501, INVALID, "unsupported_transfer_encoding")
            }
            Error::BodyTooLarge { .. } => (413, INVALID, "body_too_large"),
            Error::RequestTimeout { .. } => (408, INVALID, "request_timeout"),
            Error::InvalidJson { .. } => (400, INVALID, "invalid_json"),
            Error::MissingModel => (400, INVALID, "missing_model"),
            Error::InvalidHeader { .. } => (400, INVALID, "invalid_header"),
            Error::ModelNotFound { .. } => (404, INVALID, "model_not_found"),
            Error::UnknownPath { .. } => (404, INVALID, "unknown_path"),
            Error::DoubledEndpoint { .. } => (404, INVALID, "doubled_endpoint"),
            Error::MethodNotAllowed { .. } => (405, INVALID, "method_not_allowed"),
            Error::WebSocketNotSupported => (426, INVALID, "websocket_not_supported"),
            Error::UnsupportedContentEncoding { .. } => {
                (415, INVALID, "unsupported_content_encoding")
            }
            Error::InvalidApiKey => (401, AUTH, "invalid_api_key"),
            Error::OriginNotAllowed { .. } => (403, PERMISSION, "origin_not_allowed"),
            Error::HostNotAllowed { .. } => (403, PERMISSION, "host_not_allowed"),
            Error::QueueWaitExceeded { .. } => (503, RATE, "queue_wait_exceeded"),
            Error::QueueFull { .. } => (503, RATE, "queue_full"),
            Error::ClientQueueFull { .. } => (503, RATE, "client_queue_full"),
            Error::DeadlineExceeded { .. } => (503, RATE, "deadline_exceeded"),
            Error::DailyLimit { .. } => (503, RATE, "daily_limit_reached"),
            Error::TooManyConnections { .. } => (503, RATE, "too_many_connections"),
            Error::ClientConnectionsFull { .. } => (503, RATE, "client_connections_full"),
            Error::BuffersFull { .. } => (503, RATE, "buffers_full"),
            Error::ClientBuffersFull { .. } => (503, RATE, "client_buffers_full"),
            Error::PlainHttp => (400, INVALID, "plain_http"),
            Error::ShuttingDown => (503, API, "shutting_down"),
            Error::UpstreamUnreachable { .. } => (502, API, "upstream_unreachable"),
            Error::UpstreamTimeout { .. } => (504, API, "upstream_timeout"),
            Error::UpstreamDisconnected { .. } => (502, API, "upstream_disconnected"),
            Error::UpstreamInvalidResponse { .. } => (502, API, "upstream_invalid_response"),
            Error::UpstreamRefused { .. } => (502, API, "upstream_refused"),
            Error::Internal => (500, API, "internal_error"),
        }
    }

    /// `error.type` in Anthropic's dialect, which has no `code`: more types, each with its status
    /// (<https://docs.anthropic.com/en/api/errors>). A status that it does not list takes the type of its class there.
    fn anthropic_kind(&self) -> &'static str {
        match (self.status(), self) {
            (404, _) => "not_found_error",
            (413, _) => "request_too_large",
            (504, _) => "timeout_error",
            (503, Error::DailyLimit { .. }) => "rate_limit_error",
            // Not for this caller's doing, and soon over: what the 529 says there.
            (503, _) => "overloaded_error",
            _ => self.kind(),
        }
    }
}

/// An error inside a stream of OpenAI's Responses: `error`, which the SDKs raise, and `response.failed`, which ends the
/// stream for Codex. Codex repeats a request five times unless that has the code `invalid_prompt`, and then shows only
/// the message.
pub fn responses_events(
    message: &str,
    kind: Option<&str>,
    code: Option<&str>,
    param: Option<&str>,
) -> String {
    let error = json!({
        "type": "error", "sequence_number": 0, "code": code, "message": message, "param": param,
        "error": {"type": kind, "code": code, "message": message, "param": param},
    });
    let failed = json!({
        "type": "response.failed", "sequence_number": 1,
        "response": {
            "id": "resp_limitrate", "object": "response", "created_at": 0, "model": "",
            "status": "failed", "output": [], "incomplete_details": null, "usage": null,
            "error": {"code": "invalid_prompt", "message": message},
        },
    });
    format!("event: error\ndata: {error}\n\nevent: response.failed\ndata: {failed}\n\n")
}

/// `Retry-After` in whole seconds, at least one, and where that is longer than SDKs wait, the word not to try by themselves.
pub fn come_back_after(wait: Duration) -> Vec<(&'static str, String)> {
    let seconds = whole_seconds(wait);
    let mut headers = vec![("Retry-After", seconds.to_string())];
    if seconds > OBEYED_RETRY_AFTER_SECONDS {
        headers.push(("x-should-retry", "false".to_owned()));
    }
    headers
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message())
    }
}

impl std::error::Error for Error {}

#[derive(Serialize)]
#[serde(untagged)]
enum Body {
    OpenAi {
        error: OpenAiError,
    },
    Anthropic {
        #[serde(rename = "type")]
        kind: &'static str,
        error: AnthropicError,
    },
}

#[derive(Serialize)]
struct OpenAiError {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'static str>,
    code: &'static str,
}

#[derive(Serialize)]
struct AnthropicError {
    #[serde(rename = "type")]
    kind: &'static str,
    message: String,
}

/// A duration as Retry-After takes it: whole seconds, rounded up so that nobody comes early, and never 0.
fn whole_seconds(wait: Duration) -> u64 {
    let started = u64::from(wait.subsec_nanos() > 0);
    wait.as_secs().saturating_add(started).max(1)
}

/// `90 s`, `1.5 s`: to a tenth.
fn seconds(duration: Duration) -> String {
    let minutes = duration.as_secs() / 60;
    if minutes >= 60 {
        return format!("{} h {} min", minutes / 60, minutes % 60);
    }
    let tenths = (duration.as_millis() + 50) / 100;
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} s"),
        (whole, tenth) => format!("{whole}.{tenth} s"),
    }
}

/// What of a client's time a response takes; nothing where that is next to nothing.
fn usually(response_time: Duration) -> String {
    let text = seconds(response_time);
    if text == "0 s" { String::new() } else { format!("The response usually takes {text}. ") }
}

fn suggest(nearest: &[String]) -> String {
    if nearest.is_empty() {
        return "GET /v1/models lists the names.".into();
    }
    let names: Vec<String> = nearest.iter().map(|name| quote(name)).collect();
    format!("Did you mean {}? GET /v1/models lists all names.", names.join(" or "))
}

/// A caller's text in backticks.
fn quote(text: &str) -> String {
    format!("`{}`", printable(text, QUOTE_LIMIT_CHARS))
}

fn clip(detail: &str) -> String {
    printable(detail, DETAIL_LIMIT_CHARS)
}

/// The first `limit` characters, with a mark where some are missing. Messages go to logs too, where a line feed of a
/// caller's choice would forge a line, so control characters are replaced.
fn printable(text: &str, limit: usize) -> String {
    let mut chars = text.chars();
    let mut out: String = chars
        .by_ref()
        .take(limit)
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    if chars.next().is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue_full(retry_after: Duration) -> Error {
        Error::QueueFull { provider: "p".into(), max_queue: 3, retry_after }
    }

    #[test]
    fn retry_after_is_whole_seconds_rounded_up_and_at_least_one() {
        for (wait, header) in [
            (Duration::ZERO, "1"),
            (Duration::from_nanos(1), "1"),
            (Duration::from_secs(1), "1"),
            (Duration::from_nanos(1_000_000_001), "2"),
            (Duration::from_secs(60), "60"),
        ] {
            assert_eq!(
                queue_full(wait).headers(),
                [("Retry-After", header.to_owned())],
                "{wait:?}"
            );
        }
        assert_eq!(queue_full(Duration::MAX).headers()[0].1, u64::MAX.to_string());
    }

    #[test]
    fn past_sixty_seconds_the_retry_is_forbidden() {
        let headers = queue_full(Duration::from_millis(60_001)).headers();
        assert_eq!(
            headers,
            [("Retry-After", "61".to_owned()), ("x-should-retry", "false".to_owned())]
        );
    }

    #[test]
    fn foreign_text_is_cut_and_cannot_forge_a_line() {
        let model = format!("a\n\u{1b}[31m\"{}", "é".repeat(1000));
        let error = Error::ModelNotFound { model, nearest: Vec::new() };
        let message = error.message();
        assert!(message.starts_with("The model `a\u{fffd}\u{fffd}[31m\"ééé"), "{message}");
        assert!(message.contains("é…`"), "{message}");
        assert!(message.chars().count() < QUOTE_LIMIT_CHARS + 100, "{message}");

        for (dialect, lines) in
            [(Dialect::OpenAi, 2), (Dialect::Anthropic, 3), (Dialect::Responses, 6)]
        {
            let json: serde_json::Value = serde_json::from_str(&error.to_json(dialect)).unwrap();
            assert_eq!(json["error"]["message"], message, "the quote is escaped");
            assert_eq!(
                error.to_sse_event(dialect).lines().count(),
                lines,
                "one data line and a blank one"
            );
        }
    }

    #[test]
    fn the_path_tells_the_dialect() {
        for target in [
            "/v1/messages",
            "/v1/messages/",
            "/v1/messages?beta=true",
            "/v1/messages/count_tokens?a=/b",
        ] {
            assert_eq!(Dialect::of(target), Dialect::Anthropic, "{target}");
        }
        for target in ["/v1/responses", "/v1/responses?a=b", "/v1/responses/resp_1/input_items"] {
            assert_eq!(Dialect::of(target), Dialect::Responses, "{target}");
        }
        for target in [
            "/v1/messagesx",
            "/v1/message",
            "/v1",
            "*",
            "",
            "/v1/chat/completions?/v1/messages",
            "/x/v1/messages",
        ] {
            assert_eq!(Dialect::of(target), Dialect::OpenAi, "{target}");
        }
    }

    #[test]
    fn text_of_just_the_limit_is_whole() {
        assert_eq!(printable("abc", 3), "abc");
        assert_eq!(printable("abcd", 3), "abc…");
        assert_eq!(printable("", 3), "");
    }

    #[test]
    fn suggestions_are_named() {
        let error = Error::ModelNotFound {
            model: "gpt4".into(),
            nearest: vec!["gpt-4".into(), "gpt-4o".into()],
        };
        assert!(error.message().contains("Did you mean `gpt-4` or `gpt-4o`?"), "{error}");
    }

    #[test]
    fn durations_read_to_a_tenth() {
        for (millis, text) in [
            (0, "0 s"),
            (40, "0 s"),
            (50, "0.1 s"),
            (1500, "1.5 s"),
            (1960, "2 s"),
            (90_000, "90 s"),
        ] {
            assert_eq!(seconds(Duration::from_millis(millis)), text);
        }
    }
}
