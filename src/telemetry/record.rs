//! A request that is over.

use std::rc::Rc;
use std::time::{Duration, SystemTime};

use crate::log::{self, Field, Level};
use crate::openai::Usage;

/// What there is to tell of it. All times count from when the request was complete.
#[derive(Debug, Clone)]
pub struct Record {
    /// When it was over.
    pub ended: SystemTime,
    /// The id that its caller got.
    pub id: Rc<str>,
    /// A configured client's name, or an address.
    pub client: Rc<str>,
    /// Whether it is a configured client's name.
    pub named: bool,
    /// `None` where the head could not be read.
    pub method: Option<Rc<str>>,
    /// Without its query.
    pub path: String,
    /// The model as the caller wrote it.
    pub asked_for: Option<Rc<str>>,
    /// The provider that it came to last, and the `id` of the model there.
    pub route: Option<(Rc<str>, Rc<str>)>,
    /// Whether a stream was asked for.
    pub stream: bool,
    /// What the caller was told; 499 for one that hung up before.
    pub status: u16,
    /// The code of the error that the caller got, in a stream as well; `caller_gone` for one that hung up.
    pub error: Option<&'static str>,
    /// How often it was sent.
    pub sends: u32,
    /// Whether it was sent to the provider that it came to last.
    pub reached: bool,
    /// Until it was sent last, or was over without; `None` where it never waited.
    pub queued: Option<Duration>,
    /// Until its answer began.
    pub first_byte: Duration,
    /// Until its answer was over.
    pub total: Duration,
    /// Of its body.
    pub bytes_in: u64,
    /// Of all that was written to its caller.
    pub bytes_out: u64,
    /// As far as the answer told.
    pub usage: Usage,
}

impl Record {
    /// Whether it is one of the operator's own, which count nowhere.
    pub fn is_operators(&self) -> bool {
        self.path == "/metrics" || self.path == "/admin" || self.path.starts_with("/admin/")
    }

    /// One line. What does not apply is left out.
    pub(super) fn log(&self) {
        let level = if self.is_operators() { Level::Debug } else { Level::Info };
        if !log::shows(level) {
            return;
        }
        let mut fields = Vec::with_capacity(18);
        fields.extend([("id", Field::Text(&self.id)), ("client", Field::Text(&self.client))]);
        if let Some(method) = &self.method {
            fields.extend([("method", Field::Text(method)), ("path", Field::Text(&self.path))]);
        }
        fields.extend(self.route.as_ref().map(|(provider, _)| ("provider", Field::Text(provider))));
        fields.extend(self.asked_for.as_ref().map(|model| ("model", Field::Text(model))));
        fields.push(("status", Field::Count(self.status.into())));
        fields.extend(self.error.map(|error| ("error", Field::Text(error))));
        fields.extend(self.stream.then_some(("stream", Field::Flag(true))));
        fields.extend(self.queued.map(|queued| ("queued_ms", Field::Millis(queued))));
        fields.extend([
            ("ttfb_ms", Field::Millis(self.first_byte)),
            ("total_ms", Field::Millis(self.total)),
        ]);
        fields.extend([
            ("bytes_in", Field::Count(self.bytes_in)),
            ("bytes_out", Field::Count(self.bytes_out)),
        ]);
        fields.extend(self.usage.input().map(|tokens| ("tokens_in", Field::Count(tokens))));
        fields.extend(self.usage.output().map(|tokens| ("tokens_out", Field::Count(tokens))));
        fields
            .extend((self.sends > 1).then(|| ("retries", Field::Count(u64::from(self.sends) - 1))));
        log::event(level, "request", &fields);
    }
}
