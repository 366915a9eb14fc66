//! The callers: each lives through one session after the other, of manners drawn by its seed, and judges every answer.
//!
//! A well-behaved request has to be answered exactly once. By a reliable provider: with 200 and its own bytes. By a
//! broken one: with these, with an OpenAI error object, or with a beginning of its own bytes and an abort, which in a
//! stream follows an error event. The one refusal besides is that of the provider whose line is bounded by the
//! operator.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde_json::Value;
use smol::future;

use crate::ask::{Ask, Limit, Manners};
use crate::garbage::{self, Garbage};
use crate::pause;
use crate::provider::Desk;
use crate::tally::Tally;
use crate::wire::{End, Framing, Wire};

/// Of 100 sessions, how many are of which manners.
const MANNERS: [(u32, Manner); 11] = [
    (22, Manner::Plain),
    (18, Manner::Stream),
    (5, Manner::Http10),
    (10, Manner::Pipeline),
    (5, Manner::Upload),
    (6, Manner::SlowReader),
    (8, Manner::SlowLoris),
    (12, Manner::HangUp),
    (4, Manner::HalfClose),
    (8, Manner::Garbage),
    (2, Manner::Dawdler),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Requests one after the other on one connection.
    Plain,
    /// The same, asking for streams.
    Stream,
    /// HTTP/1.0, one request.
    Http10,
    /// Several requests in one packet.
    Pipeline,
    /// A large body: chunked, after `100 Continue`, or in pieces.
    Upload,
    /// Takes a large answer a few KiB at a time.
    SlowReader,
    /// Sends a request in small pieces, in good time.
    SlowLoris,
    /// Leaves at a random moment, by FIN or RST.
    HangUp,
    /// Sends FIN behind its request, which counts as gone.
    HalfClose,
    /// Sends something that has to be refused.
    Garbage,
    /// Stops in the middle of a head.
    Dawdler,
}

impl Manner {
    fn name(self) -> &'static str {
        match self {
            Manner::Plain => "plain",
            Manner::Stream => "stream",
            Manner::Http10 => "HTTP/1.0",
            Manner::Pipeline => "pipeline",
            Manner::Upload => "upload",
            Manner::SlowReader => "slow reader",
            Manner::SlowLoris => "slow loris",
            Manner::HangUp => "hang-up",
            Manner::HalfClose => "half-close",
            Manner::Garbage => "garbage",
            Manner::Dawdler => "dawdler",
        }
    }
}

/// One caller.
pub struct Client {
    pub gateway: SocketAddr,
    pub desks: Rc<Vec<Rc<Desk>>>,
    pub tally: Rc<Tally>,
    pub rng: fastrand::Rng,
    /// How long the gateway waits for a request head.
    pub patience: Duration,
    /// Sessions under way, of all callers.
    pub sessions: Rc<Cell<usize>>,
}

/// A request and who has to answer it.
struct Asked {
    ask: Ask,
    desk: Rc<Desk>,
}

/// An answer as it came.
struct Answer {
    status: u16,
    head: String,
    retry_after: bool,
    body: Vec<u8>,
    /// `None`: as its framing promised.
    broken: Option<End>,
    closes: bool,
}

impl Client {
    /// Begins sessions until `until` and ends the last one in its own time.
    pub async fn live(mut self, until: Instant) {
        // Not all in the same millisecond.
        self.pause(0..200).await;
        while Instant::now() < until {
            self.sessions.set(self.sessions.get() + 1);
            let manner = match self.manner() {
                // Nobody else would be there any more.
                Manner::Dawdler
                    if until.saturating_duration_since(Instant::now()) < self.patience =>
                {
                    Manner::Plain
                }
                manner => manner,
            };
            if let Err(fault) = self.session(manner).await {
                self.tally.fail(manner.name(), fault);
            }
            self.sessions.set(self.sessions.get() - 1);
        }
    }

    /// One request while the gateway is told to stop: it has to be answered, or refused for that reason.
    pub async fn last_request(mut self) {
        let asked = self.asked(Manner::Plain);
        let outcome = async {
            let mut wire = self.connect().await?;
            send(&mut wire, &request(&asked.ask)).await?;
            let answer = read_answer(&mut wire)
                .await
                .map_err(|end| format!("no answer but {end:?} to {asked}"))?;
            match answer.status {
                503 if answer.code() == Some("shutting_down".into()) && answer.retry_after => {
                    Ok("refused")
                }
                // The provider's last word to a request that would have gone again.
                429 if asked.desk.spec.manners == Manners::Strict && answer.retry_after => {
                    Ok("refused")
                }
                _ => asked.judge(&answer),
            }
        };
        match outcome.await {
            Ok(outcome) => self.tally.count("at SIGTERM", outcome),
            Err(fault) => self.tally.fail("at SIGTERM", fault),
        }
    }

    async fn session(&mut self, manner: Manner) -> Result<(), String> {
        match manner {
            Manner::Plain | Manner::Stream => self.in_turn(manner).await,
            Manner::Pipeline => self.pipeline().await,
            Manner::Upload => self.upload().await,
            Manner::Http10 | Manner::SlowReader | Manner::SlowLoris => self.single(manner).await,
            Manner::HangUp => self.hang_up().await,
            Manner::HalfClose => self.half_close().await,
            Manner::Garbage => self.garbage().await,
            Manner::Dawdler => self.dawdle().await,
        }
    }

    async fn in_turn(&mut self, manner: Manner) -> Result<(), String> {
        let mut wire = self.connect().await?;
        for n in 1..=self.rng.usize(1..6) {
            let asked = self.asked(manner);
            send(&mut wire, &request(&asked.ask)).await?;
            let over = self.answered(manner, &mut wire, &asked).await;
            if over.map_err(|fault| format!("request {n} of its connection: {fault}"))? {
                return nothing_more(&mut wire).await;
            }
            if self.rng.bool() {
                self.pause(0..100).await;
            }
        }
        wire.half_close();
        nothing_more(&mut wire).await
    }

    async fn pipeline(&mut self) -> Result<(), String> {
        let mut wire = self.connect().await?;
        let all: Vec<Asked> =
            (0..self.rng.usize(2..5)).map(|_| self.asked(Manner::Pipeline)).collect();
        let bytes: Vec<u8> = all.iter().flat_map(|asked| request(&asked.ask)).collect();
        send(&mut wire, &bytes).await?;
        for (n, asked) in all.iter().enumerate() {
            if self.answered(Manner::Pipeline, &mut wire, asked).await? {
                // Those behind know that they have to come again.
                (n + 1..all.len())
                    .for_each(|_| self.tally.count(Manner::Pipeline.name(), "told to close"));
                return nothing_more(&mut wire).await;
            }
        }
        wire.half_close();
        nothing_more(&mut wire).await
    }

    async fn single(&mut self, manner: Manner) -> Result<(), String> {
        let mut wire = self.connect().await?;
        let asked = self.asked(manner);
        let bytes = request(&asked.ask);
        match manner {
            Manner::Http10 => {
                let (line, rest) = bytes.split_at(POST.len());
                send(&mut wire, &[line, b"0", &rest[1..]].concat()).await?;
            }
            Manner::SlowLoris => {
                for piece in bytes.chunks(bytes.len() / 9) {
                    send(&mut wire, piece).await?;
                    self.pause(5..40).await;
                }
            }
            _ => {
                wire.read_slowly(8 * 1024, Duration::from_millis(self.rng.u64(1..6)));
                send(&mut wire, &bytes).await?;
            }
        }
        if !self.answered(manner, &mut wire, &asked).await? {
            wire.half_close();
        }
        nothing_more(&mut wire).await
    }

    async fn upload(&mut self) -> Result<(), String> {
        let mut wire = self.connect().await?;
        let asked = self.asked(Manner::Upload);
        let body = asked.ask.body();
        let length = format!("Content-Length: {}", body.len());
        match self.rng.u8(..3) {
            0 => {
                send(&mut wire, &post("Transfer-Encoding: chunked")).await?;
                for piece in body.chunks(100_000) {
                    send(
                        &mut wire,
                        &[format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat(),
                    )
                    .await?;
                }
                send(&mut wire, b"0\r\n\r\n").await?;
            }
            1 => {
                send(&mut wire, &post(&format!("{length}\r\nExpect: 100-continue"))).await?;
                let head =
                    wire.head().await.map_err(|end| format!("no 100 but {end:?} to {asked}"))?;
                if !head.start.starts_with("HTTP/1.1 100 ") {
                    return Err(format!("no 100 but {head:?} to {asked}"));
                }
                send(&mut wire, &body).await?;
            }
            _ => {
                send(&mut wire, &post(&length)).await?;
                for piece in body.chunks(50_000) {
                    send(&mut wire, piece).await?;
                    self.pause(0..5).await;
                }
            }
        }
        if !self.answered(Manner::Upload, &mut wire, &asked).await? {
            wire.half_close();
        }
        nothing_more(&mut wire).await
    }

    async fn hang_up(&mut self) -> Result<(), String> {
        let mut wire = self.connect().await?;
        let mut asked = self.asked(Manner::HangUp);
        asked.ask.stream = self.rng.bool();
        let bytes = request(&asked.ask);
        let sent = if self.rng.u8(..5) == 0 { self.rng.usize(..bytes.len()) } else { bytes.len() };
        send(&mut wire, &bytes[..sent]).await?;
        let leave = self.pause(0..400);
        if self.rng.bool() {
            let read = async {
                wire.rest().await;
            };
            future::or(leave, read).await;
        } else {
            leave.await;
        }
        if self.rng.bool() {
            wire.reset_on_close();
        }
        self.tally.count(Manner::HangUp.name(), "left");
        Ok(())
    }

    async fn half_close(&mut self) -> Result<(), String> {
        let mut wire = self.connect().await?;
        let asked = self.asked(Manner::HalfClose);
        send(&mut wire, &request(&asked.ask)).await?;
        self.pause(0..20).await;
        wire.half_close();
        let outcome = match read_answer(&mut wire).await {
            Ok(Answer { broken: Some(_), .. }) => "aborted",
            Ok(answer) => asked.judge(&answer)?,
            Err(End::Closed | End::Reset) => "left",
            Err(end) => return Err(format!("{end:?} after a half-close")),
        };
        self.tally.count(Manner::HalfClose.name(), outcome);
        Ok(())
    }

    async fn garbage(&mut self) -> Result<(), String> {
        let Garbage { bytes, status, ends } = garbage::make(&mut self.rng);
        let shown = || String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
        let mut wire = self.connect().await?;
        send(&mut wire, &bytes).await?;
        if ends {
            wire.half_close();
        }
        let answer = read_answer(&mut wire)
            .await
            .map_err(|end| format!("no answer but {end:?} to {:?}", shown()))?;
        if status.is_some_and(|status| status != answer.status)
            || answer.code().is_none()
            || answer.status < 400
        {
            return Err(format!(
                "wanted {status:?} and an error object for {:?}, got {}",
                shown(),
                answer.shown()
            ));
        }
        self.tally.count(Manner::Garbage.name(), "refused");
        wire.half_close();
        nothing_more(&mut wire).await
    }

    async fn dawdle(&mut self) -> Result<(), String> {
        let mut wire = self.connect().await?;
        send(&mut wire, &post("Content-Le")[..POST.len() + self.rng.usize(2..50)]).await?;
        let answer = read_answer(&mut wire).await.map_err(|end| format!("no 408 but {end:?}"))?;
        if answer.status != 408 || answer.code().is_none() {
            return Err(format!("no 408 but {}", answer.shown()));
        }
        self.tally.count(Manner::Dawdler.name(), "refused");
        wire.half_close();
        nothing_more(&mut wire).await
    }

    /// Reads the answer to a well-behaved request, judges and counts it. Says whether the connection is over.
    async fn answered(
        &mut self,
        manner: Manner,
        wire: &mut Wire,
        asked: &Asked,
    ) -> Result<bool, String> {
        let sent = Instant::now();
        let answer = read_answer(wire).await;
        let answer = answer.map_err(|end| {
            format!("no answer but {end:?} after {:?} to {asked}", sent.elapsed())
        })?;
        let outcome = asked.judge(&answer)?;
        self.tally.count(manner.name(), outcome);
        if outcome == "refused" {
            // As an SDK would.
            self.pause(50..300).await;
        }
        Ok(answer.closes || answer.broken.is_some())
    }

    async fn connect(&self) -> Result<Wire, String> {
        Wire::connect(self.gateway).await.map_err(|error| format!("cannot connect: {error}"))
    }

    fn pause(&mut self, millis: std::ops::Range<u64>) -> impl Future<Output = ()> + use<> {
        pause(Duration::from_millis(self.rng.u64(millis)))
    }

    fn manner(&mut self) -> Manner {
        let shares = MANNERS.map(|(share, _)| share);
        MANNERS[self.draw(&shares)].1
    }

    /// The place of a random share.
    fn draw(&mut self, shares: &[u32]) -> usize {
        let mut at = self.rng.u32(..shares.iter().sum::<u32>());
        for (n, &share) in shares.iter().enumerate() {
            if at < share {
                return n;
            }
            at -= share;
        }
        unreachable!("`at` is below the sum of the shares");
    }

    fn asked(&mut self, manner: Manner) -> Asked {
        let desks = self.desks.clone();
        let desk = match manner {
            Manner::Upload => {
                desks.iter().find(|desk| desk.spec.name == "uploads").expect("it is configured")
            }
            _ => &desks[self.draw(&desks.iter().map(|desk| desk.spec.share).collect::<Vec<_>>())],
        };
        let models = desk.spec.models;
        let size = match manner {
            Manner::SlowReader => self.rng.usize(100_000..400_000),
            _ if self.rng.u8(..) < 8 => self.rng.usize(..200_000),
            _ => self.rng.usize(..4000),
        };
        // Below 16 KiB the gateway sends head and body in one packet, whose time is then exact.
        let pad = if manner == Manner::Upload {
            self.rng.usize(200_000..1_500_000)
        } else {
            self.rng.usize(..4000)
        };
        let model = models[self.rng.usize(..models.len())].id.to_owned();
        let stream = match manner {
            Manner::Stream => true,
            Manner::Plain | Manner::Upload => false,
            _ => self.rng.bool(),
        };
        Asked { ask: Ask { id: self.rng.u64(..), model, stream, size, pad }, desk: desk.clone() }
    }
}

impl Asked {
    /// The outcome, or how the answer breaks the gateway's promises.
    fn judge(&self, answer: &Answer) -> Result<&'static str, String> {
        let wrong = |what: &str| Err(format!("{what}: {} to {self}", answer.shown()));
        if answer.status != 200 {
            let code = answer.code();
            return match (code.as_deref(), self.desk.spec.limit) {
                (None, _) => wrong("a refusal that is no error object"),
                (Some("queue_wait_exceeded"), Limit::Window { .. }) if answer.retry_after => {
                    Ok("refused")
                }
                (Some(_), _) if !self.desk.is_reliable() && answer.status >= 500 => Ok("error"),
                _ => wrong("a refusal without a reason"),
            };
        }
        let want = self.ask.answer().concat();
        match &answer.broken {
            None if answer.body != want => return wrong("a tidy end of a wrong body"),
            None if !self.desk.is_reliable() => return Ok("answered"),
            None => {}
            Some(_) if self.desk.is_reliable() => {
                return wrong("an abort that is not the provider's");
            }
            Some(End::Silent | End::Malformed(_)) => return wrong("neither an end nor an abort"),
            Some(_) => return self.judge_abort(answer, &want),
        }
        match self.desk.deliveries(self.ask.id) {
            1 => Ok("answered"),
            n => Err(format!("the provider was asked {n} times: {self}")),
        }
    }

    fn judge_abort(&self, answer: &Answer, want: &[u8]) -> Result<&'static str, String> {
        const EVENT: &[u8] = b"data: {\"error\":";
        let event = answer.body.windows(EVENT.len()).position(|window| window == EVENT);
        let (got, event) = answer.body.split_at(event.unwrap_or(answer.body.len()));
        // Our event needs an empty line in front, which may not be the provider's.
        if !want.starts_with(got.trim_ascii_end()) {
            return Err(format!("a wrong body, aborted: {} to {self}", answer.shown()));
        }
        let data = event.trim_ascii().strip_prefix(b"data: ");
        match (self.ask.stream, data.and_then(error_code)) {
            (true, Some(_)) => Ok("error event"),
            (false, None) => Ok("aborted"),
            _ => Err(format!(
                "an abort, but not as this answer's kind asks for: {} to {self}",
                answer.shown()
            )),
        }
    }
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Ask { id, model, stream, size, pad } = &self.ask;
        write!(f, "{id:016x} (model {model}, stream {stream}, {pad} bytes up, {size} down)")
    }
}

impl Answer {
    /// The code of an OpenAI error object, which a refusal has to be; an empty one for null.
    fn code(&self) -> Option<String> {
        self.broken.is_none().then(|| error_code(&self.body)).flatten()
    }

    fn shown(&self) -> String {
        let body = String::from_utf8_lossy(&self.body);
        let end: String =
            body.chars().rev().take(300).collect::<Vec<_>>().into_iter().rev().collect();
        format!("{} with {} bytes ending in {end:?}, {:?}", self.head, self.body.len(), self.broken)
    }
}

fn error_code(json: &[u8]) -> Option<String> {
    let error = serde_json::from_slice::<Value>(json).ok()?["error"].take();
    let fits =
        error["message"].is_string() && error["type"].is_string() && error.get("param").is_some();
    let code = error.get("code")?;
    (fits && (code.is_string() || code.is_null()))
        .then(|| code.as_str().unwrap_or_default().to_owned())
}

async fn read_answer(wire: &mut Wire) -> Result<Answer, End> {
    let head = wire.head().await?;
    let status = head.start.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let status = status.ok_or_else(|| End::Malformed(head.start.clone()))?;
    let framing = head.framing(Framing::UntilClose)?;
    let mut body = Vec::new();
    let broken = wire.body(framing, &mut body).await.err();
    Ok(Answer {
        status,
        retry_after: head.field("retry-after").is_some(),
        closes: head.field("connection") == Some("close") || framing == Framing::UntilClose,
        head: head.start,
        body,
        broken,
    })
}

/// After the last answer: no byte may come any more.
async fn nothing_more(wire: &mut Wire) -> Result<(), String> {
    match wire.rest().await {
        (0, End::Closed | End::Reset) => Ok(()),
        (0, end) => Err(format!("{end:?} instead of a close")),
        (n, _) => Err(format!("{n} bytes after the last answer")),
    }
}

const POST: &str = "POST /v1/chat/completions HTTP/1.";

fn post(framing: &str) -> Vec<u8> {
    format!("{POST}1\r\nHost: gateway\r\nContent-Type: application/json\r\n{framing}\r\n\r\n")
        .into_bytes()
}

fn request(ask: &Ask) -> Vec<u8> {
    let body = ask.body();
    [post(&format!("Content-Length: {}", body.len())), body].concat()
}

async fn send(wire: &mut Wire, bytes: &[u8]) -> Result<(), String> {
    wire.send(bytes).await.map_err(|error| format!("cannot send: {error}"))
}
