//! The back: connections to one provider and the exchanges on them.
//!
//! [`connect`] makes a connection (DNS, TCP, TLS), [`pool`] keeps idle ones, [`forward`] says what of a caller's request
//! goes on, [`wire`] writes a request while
//! reading, [`client`] makes one exchange, [`verdict`] reads what a refusal says. Knows nothing of queues beyond the permit that every
//! send consumes.

pub mod client;
pub mod connect;
pub mod forward;
pub mod pool;
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
