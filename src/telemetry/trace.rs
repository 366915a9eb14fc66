//! What becomes known of a request on its way.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Instant, SystemTime};

use super::Record;
use crate::http1::RequestHead;
use crate::openai::Usage;

/// nginx's status for a caller that hung up before it was answered.
const CALLER_GONE_STATUS: u16 = 499;

/// The error of a caller that hung up.
const CALLER_GONE: &str = "caller_gone";

/// A longer name or path is cut: it is one that nobody here gave.
const SHOWN_CHARS: usize = 120;

/// One request after the other of one connection, each written by whoever does something for it.
pub struct Trace(RefCell<Known>);

struct Known {
    since: Instant,
    id: Rc<str>,
    /// Of the connection.
    peer: Rc<str>,
    /// Of the request.
    address: Rc<str>,
    /// Of the configuration.
    client: Option<Rc<str>>,
    method: Option<Rc<str>>,
    path: String,
    asked_for: Option<Rc<str>>,
    route: Option<(Rc<str>, Rc<str>)>,
    stream: bool,
    bytes_in: u64,
    bytes_out: u64,
    sends: u32,
    sent: Option<Instant>,
    answered: Option<Instant>,
    status: Option<u16>,
    error: Option<&'static str>,
    usage: Usage,
    is_delivered: bool,
}

impl Trace {
    /// Of a caller at that address.
    pub fn new(peer: Rc<str>) -> Trace {
        Trace(RefCell::new(Known::new(peer, Rc::default(), Instant::now())))
    }

    /// A new request begins.
    pub fn begins(&self, id: &Rc<str>) {
        let mut known = self.0.borrow_mut();
        *known = Known::new(known.peer.clone(), id.clone(), known.since);
    }

    /// Whom it comes from, by address.
    pub fn comes_from(&self, client: &Rc<str>) {
        self.0.borrow_mut().address = client.clone();
    }

    /// Its first bytes are there: until it is complete, times count from here.
    pub fn arrives(&self, now: Instant) {
        self.0.borrow_mut().since = now;
    }

    /// What it asks for. A query may hold a key and is left out.
    pub fn has_head(&self, head: &RequestHead) {
        let mut known = self.0.borrow_mut();
        let path = head.target.split(['?', '#']).next().unwrap_or_default();
        (known.method, known.path) = (Some(head.method.clone()), cut(path).to_owned());
    }

    /// It is complete, with so many bytes of a body: times count from here.
    pub fn is_complete(&self, bytes: usize, now: Instant) {
        let mut known = self.0.borrow_mut();
        (known.bytes_in, known.since) = (bytes as u64, now);
    }

    /// For which model, and whether as a stream.
    pub fn asks(&self, model: &str, stream: bool) {
        let mut known = self.0.borrow_mut();
        (known.asked_for, known.stream) = (Some(cut(model).into()), stream);
    }

    /// It is a configured client's.
    pub fn is_of(&self, client: &Rc<str>) {
        self.0.borrow_mut().client = Some(client.clone());
    }

    /// It is offered to this provider as its model of that id.
    pub fn goes_to(&self, provider: &Rc<str>, model: &Rc<str>) {
        let mut known = self.0.borrow_mut();
        known.route = Some((provider.clone(), model.clone()));
        known.sent = None;
    }

    /// It was sent.
    pub fn sent(&self, now: Instant) {
        let mut known = self.0.borrow_mut();
        known.sends += 1;
        known.sent = Some(now);
    }

    /// Nobody saw the last send.
    pub fn unseen(&self) {
        let mut known = self.0.borrow_mut();
        known.sends -= 1;
        known.sent = None;
    }

    /// Its answer is about to go out.
    pub fn answered(&self, now: Instant) {
        self.0.borrow_mut().answered = Some(now);
    }

    /// Its caller is told this status.
    pub fn says(&self, status: u16) {
        self.0.borrow_mut().status = Some(status);
    }

    /// Its caller is told of this error.
    pub fn failed(&self, code: &'static str) {
        self.0.borrow_mut().error = Some(code);
    }

    /// Its answer said so.
    pub fn used(&self, usage: Usage) {
        self.0.borrow_mut().usage = usage;
    }

    /// So many bytes went out for it.
    pub fn wrote(&self, bytes: usize) {
        self.0.borrow_mut().bytes_out += bytes as u64;
    }

    /// Everything that its client waits for has been written: the last event of a stream, or the last byte of a body.
    pub fn set_delivered(&self) {
        self.0.borrow_mut().is_delivered = true;
    }

    /// See [`Trace::set_delivered`]. A client that closes from here on has its response.
    pub fn is_delivered(&self) -> bool {
        self.0.borrow().is_delivered
    }

    /// It is over; `gone`: because its caller is. `None` where there was nothing.
    pub fn ends(&self, gone: bool, now: Instant) -> Option<Record> {
        let known = &mut *self.0.borrow_mut();
        let nothing = Known::new(known.peer.clone(), known.id.clone(), known.since);
        let ended = std::mem::replace(known, nothing);
        let gone = gone && !ended.is_delivered;
        let hung_up = gone && ended.method.is_some();
        let status = ended.status.or(hung_up.then_some(CALLER_GONE_STATUS))?;
        let since_then = |at: Instant| at.saturating_duration_since(ended.since);
        let total = since_then(now);
        let queued = match ended.sent {
            Some(sent) => Some(since_then(sent)),
            // Whoever waited in vain waited until now.
            None => ended.route.is_some().then_some(total),
        };
        Some(Record {
            ended: SystemTime::now(),
            id: ended.id,
            named: ended.client.is_some(),
            client: ended.client.unwrap_or(ended.address),
            method: ended.method,
            path: ended.path,
            asked_for: ended.asked_for,
            route: ended.route,
            stream: ended.stream,
            status,
            error: ended.error.or(gone.then_some(CALLER_GONE)),
            sends: ended.sends,
            reached: ended.sent.is_some(),
            queued,
            first_byte: ended.answered.map_or(total, since_then),
            total,
            bytes_in: ended.bytes_in,
            bytes_out: ended.bytes_out,
            usage: ended.usage,
        })
    }
}

impl Known {
    fn new(peer: Rc<str>, id: Rc<str>, since: Instant) -> Known {
        Known {
            since,
            id,
            address: peer.clone(),
            peer,
            client: None,
            method: None,
            path: String::new(),
            asked_for: None,
            route: None,
            stream: false,
            bytes_in: 0,
            bytes_out: 0,
            sends: 0,
            sent: None,
            answered: None,
            status: None,
            error: None,
            usage: Usage::default(),
            is_delivered: false,
        }
    }
}

fn cut(text: &str) -> &str {
    if text.len() <= SHOWN_CHARS {
        return text;
    }
    text.char_indices().nth(SHOWN_CHARS).map_or(text, |(end, _)| &text[..end])
}
