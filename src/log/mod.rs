//! What limitrate says while it runs: one line an event on standard error, for a terminal or the journal.
//!
//! Owns the level, the format and the way out. Until [`start`] a person reads: plain words, warnings and errors only.
//! Never called with a secret, nor with a body.

mod line;
mod writer;

use std::fmt::Arguments;

pub use line::{Field, Format, is_harmful};
pub use writer::{change, flush, start};

/// How much an event matters; each level is shown with all that matter more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something does not work, and somebody has to act.
    Error,
    /// Something does not work as it should; the program helps itself.
    Warn,
    /// What happens in the ordinary course, each request among it.
    Info,
    /// The operator's own questions too (`/admin/`, health checks).
    Debug,
}

impl Level {
    /// The word in the file and in the lines.
    pub fn name(self) -> &'static str {
        match self {
            Level::Error => "error",
            Level::Warn => "warn",
            Level::Info => "info",
            Level::Debug => "debug",
        }
    }
}

/// `log:` of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// What is shown, and all that matters more.
    pub level: Level,
    /// How a line is written.
    pub format: Format,
}

/// Something does not work, and somebody has to act.
pub fn error(message: Arguments<'_>) {
    writer::write(Level::Error, &message.to_string(), &[]);
}

/// Something does not work as it should; the program helps itself.
pub fn warn(message: Arguments<'_>) {
    writer::write(Level::Warn, &message.to_string(), &[]);
}

/// What happens in the ordinary course.
pub fn info(message: Arguments<'_>) {
    writer::write(Level::Info, &message.to_string(), &[]);
}

/// An event with particulars, each of which has a name that no other has.
pub fn event(level: Level, message: &str, fields: &[(&str, Field<'_>)]) {
    writer::write(level, message, fields);
}

/// Whether an event of this level would be shown: who has to gather its particulars first asks.
pub fn shows(level: Level) -> bool {
    writer::shows(level)
}
