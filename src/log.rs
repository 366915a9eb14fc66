//! What limitrate says while it runs: one line an event on standard error, for a terminal or the journal.
//!
//! No levels and no file: what nobody has to act on is counted in `/admin/stats` instead. Never called with a secret.

use std::fmt::Arguments;
use std::io::Write;

/// Writes one line. A standard error that is closed or full is nobody's problem: the line is lost.
pub fn line(message: Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "limitrate: {message}");
}
