//! TLS by OpenSSL: sessions in both directions, what a client trusts, and plain words for what
//! fails.
//!
//! | file | owns |
//! |---|---|
//! | [`session`] | one session: its handshake, and its bytes as the socket gets ready |
//! | [`client`] | contexts for sessions with servers: the trusted CAs, the sessions to resume |
//! | [`problem`] | why a session failed, without OpenSSL's source lines |
//!
//! Knows sockets and OpenSSL, and neither HTTP nor the configuration.

pub mod client;
pub mod problem;
pub mod session;

pub use client::ClientContext;
pub use problem::{Advice, Problem};
pub use session::Session;
