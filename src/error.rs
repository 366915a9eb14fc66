//! Everything that limitrate itself refuses or reports to a caller, in one enum.
//!
//! Status, JSON and extra headers of a refusal are decided here and nowhere else. Does not know about sockets.

use std::time::Duration;

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
    /// The path exists under other methods: 405.
    MethodNotAllowed {
        /// As sent.
        method: String,
        /// The value of Allow.
        allow: &'static str,
    },
    /// `server.auth_token` is set and was not sent: 401.
    InvalidApiKey,
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
    /// `server.max_connections` are open: 503.
    TooManyConnections {
        /// The limit.
        max_connections: usize,
    },
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
    /// A fault of limitrate's own: 500.
    Internal,
}
