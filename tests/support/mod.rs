//! The harness of the integration tests: a scripted provider, the real gateway on a thread, a raw HTTP client.
//!
//! Everything speaks over real sockets on ports that the system chooses, with plain threads, so that a fault of the
//! gateway's runtime cannot hide in the tests. Nothing here sleeps until something is "probably" ready: readiness is a
//! condition that is waited for, with a bound that fails the test and says what was seen until then.

// Each test file compiles this module for itself and uses its own part of it.
#![allow(dead_code, unused_imports)]

mod client;
mod closed;
mod gateway;
mod identity;
mod line;
mod process;
mod proxy;
mod silent;
pub mod sse;
mod tls_server;
mod upstream;
mod wire;

pub use client::{Chunk, Client, Ended, Response, get, post, post_with};
pub use closed::ClosedPort;
pub use gateway::{Gateway, UNSHAPED, burst, provider_at, provider_yaml, spaced};
pub use identity::{Identity, localhost};
pub use line::Line;
pub use process::Process;
pub use proxy::{Manner, Proxy};
pub use silent::SilentPort;
pub use tls_server::{Handshake, Manners, Then, TlsServer};
pub use upstream::{Ending, Gate, Gone, Recorded, Reply, Upstream};
pub use wire::{Head, Headers};

use std::time::Duration;

/// The bound of every wait that is expected to end: long enough for a busy machine, short enough to fail a hang.
pub const PATIENCE: Duration = Duration::from_secs(10);
