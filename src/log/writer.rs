//! The way out: from [`start`] on lines are written by a thread of their own, since a pipe that nobody reads must not
//! stop the thread that serves.
//!
//! Lines gather in one buffer while the thread writes the one before: no allocation for a line, and one write for all that
//! came meanwhile. It is bounded; lines that find it full are lost, and counted.

use std::io::Write;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use super::line::{self, Field, Format, Reader};
use super::{Level, Settings};

/// What may wait for a reader of standard error.
const BACKLOG_BYTES: usize = 256 * 1024;

/// How long the thread lets lines gather: waking it and writing for each alone would cost a busy gateway more than the line.
const GATHER: Duration = Duration::from_millis(10);

/// How long [`flush`] waits for a reader of standard error.
const FLUSH: Duration = Duration::from_millis(500);

static OUT: Mutex<Out> = Mutex::new(Out {
    level: Level::Warn,
    style: None,
    background: false,
    pending: String::new(),
    lost: 0,
    writing: false,
});
/// There is something to write.
static FILLED: Condvar = Condvar::new();
/// All is written.
static EMPTIED: Condvar = Condvar::new();

struct Out {
    level: Level,
    /// `None`: words for a person.
    style: Option<(Format, Reader)>,
    /// Whether the thread is there.
    background: bool,
    pending: String,
    lost: u64,
    /// Whether the thread writes at the moment.
    writing: bool,
}

/// From now on lines are written for machines, in the background. Without a thread to be had, they are written where they
/// arise.
pub fn start(settings: Settings) {
    let mut out = out();
    (out.level, out.style) = (settings.level, Some((settings.format, reader())));
    out.background = thread::Builder::new().name("log".into()).spawn(write_all).is_ok();
}

/// Goes on with other settings. Before [`start`] there is nothing to change.
pub fn change(settings: Settings) {
    let mut out = out();
    if let Some((_, reader)) = out.style {
        (out.level, out.style) = (settings.level, Some((settings.format, reader)));
    }
}

/// Waits, for a moment at most, until the lines so far are written.
pub fn flush() {
    drop(EMPTIED.wait_timeout_while(out(), FLUSH, |out| {
        out.background && (out.writing || !out.pending.is_empty())
    }));
}

pub(super) fn shows(level: Level) -> bool {
    level <= out().level
}

/// A standard error that is closed or stuck is nobody's problem: the line is lost.
pub(super) fn write(level: Level, message: &str, fields: &[(&str, Field<'_>)]) {
    let mut out = out();
    if level > out.level {
        return;
    }
    let Out { style, background, pending, lost, .. } = &mut *out;
    if pending.len() > BACKLOG_BYTES {
        *lost += 1;
        return;
    }
    let idle = pending.is_empty();
    match *style {
        None => line::append_words(pending, message),
        // What is laid out over several lines stays so.
        Some(style) => {
            for message in message.lines() {
                line::append(pending, style, SystemTime::now(), level, message, fields);
            }
        }
    }
    if !*background {
        put(pending);
        pending.clear();
    } else if idle {
        FILLED.notify_one();
    }
}

/// The thread: writes what has gathered, for ever.
fn write_all() {
    let mut taken = String::new();
    loop {
        drop(FILLED.wait_while(out(), |out| out.pending.is_empty()));
        thread::sleep(GATHER);
        let (lost, style) = {
            let mut out = out();
            std::mem::swap(&mut out.pending, &mut taken);
            out.writing = true;
            (std::mem::take(&mut out.lost), out.style)
        };
        if let (1.., Some(style)) = (lost, style) {
            let message = format!("{lost} lines were lost here: nobody read them fast enough");
            line::append(&mut taken, style, SystemTime::now(), Level::Warn, &message, &[]);
        }
        put(&taken);
        taken.clear();
        out().writing = false;
        EMPTIED.notify_all();
    }
}

fn put(lines: &str) {
    let _ = std::io::stderr().lock().write_all(lines.as_bytes());
}

/// Nothing that is done under the lock leaves it half done.
fn out() -> MutexGuard<'static, Out> {
    OUT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether standard error is the journal's: systemd names the journal's stream (systemd.exec(5)), and a redirection of it
/// would be another one.
fn reader() -> Reader {
    let stream = std::env::var("JOURNAL_STREAM").ok();
    let stderr = rustix::fs::fstat(std::io::stderr()).ok();
    match (stream, stderr) {
        (Some(stream), Some(stderr))
            if stream == format!("{}:{}", stderr.st_dev, stderr.st_ino) =>
        {
            Reader::Journal
        }
        _ => Reader::Plain,
    }
}
