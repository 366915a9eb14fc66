//! The back: connections to one provider and the exchanges on them.
//!
//! | file | owns |
//! |---|---|
//! | [`connect`] | making a connection: DNS, TCP, TLS |
//! | `tunnel` | the way through an HTTP proxy |
//! | [`stream`] | its bytes, with or without TLS |
//! | [`wire`] | writing a request while reading |
//! | [`pool`] | idle connections |
//! | [`forward`] | what of a caller's request goes on |
//! | [`client`] | one exchange |
//! | [`verdict`] | what a refusal says |
//!
//! Knows nothing of queues beyond the permit that every send consumes.

pub mod client;
pub mod connect;
pub mod forward;
pub mod pool;
pub mod stream;
mod tunnel;
pub mod verdict;
pub mod wire;

use std::time::Duration;

/// Why an exchange failed. [`crate::provider`] adds the provider's name and makes a [`crate::error::Error`] of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// No connection: which step failed and how.
    Unreachable(String),
    /// No response head within this time.
    Timeout(Duration),
    /// The connection broke or ended too early.
    Disconnected(String),
    /// The answer breaks HTTP.
    Invalid(String),
}
