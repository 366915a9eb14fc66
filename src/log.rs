//! What limitrate says while it runs: one line an event on standard error, for a terminal or the journal.
//!
//! No levels and no file: what nobody has to act on is counted in `/admin/stats` instead. Never called with a secret.

use std::fmt::Arguments;
use std::io::Write;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

/// Lines that may wait for a reader of standard error; further ones are lost.
const BACKLOG: usize = 256;

/// How long [`flush`] waits for a reader of standard error.
const FLUSH: Duration = Duration::from_millis(500);

static WRITER: OnceLock<SyncSender<Item>> = OnceLock::new();

enum Item {
    Line(String),
    Flushed(SyncSender<()>),
}

/// From now on lines are written by a thread of their own: a pipe that nobody reads must not stop the thread that
/// serves. Without a thread to be had, lines are written where they arise.
pub fn in_background() {
    let (sender, items) = sync_channel(BACKLOG);
    if thread::Builder::new().name("log".into()).spawn(move || write_all(items)).is_ok() {
        let _ = WRITER.set(sender);
    }
}

/// Writes one line. A standard error that is closed or stuck is nobody's problem: the line is lost.
pub fn line(message: Arguments<'_>) {
    let line = format!("limitrate: {message}\n");
    match WRITER.get() {
        Some(writer) => drop(writer.try_send(Item::Line(line))),
        None => write(&line),
    }
}

/// Waits, for a moment at most, until the lines so far are written.
pub fn flush() {
    let Some(writer) = WRITER.get() else { return };
    let (done, flushed) = sync_channel(1);
    if writer.try_send(Item::Flushed(done)).is_ok() {
        let _ = flushed.recv_timeout(FLUSH);
    }
}

fn write_all(items: Receiver<Item>) {
    for item in items {
        match item {
            Item::Line(line) => write(&line),
            Item::Flushed(done) => drop(done.try_send(())),
        }
    }
}

fn write(line: &str) {
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}
