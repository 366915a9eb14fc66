//! (skeleton)

pub mod limiter;
