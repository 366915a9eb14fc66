//! What is asked and what has to be answered: both follow from a request's id, so that either end can check every byte.

use std::time::Duration;

use serde_json::Value;

/// One provider of the gateway's configuration.
pub struct Spec {
    pub name: &'static str,
    pub models: &'static [Model],
    pub limit: Limit,
    pub manners: Manners,
    /// Further lines of its entry.
    pub extras: &'static str,
    /// Of 100 sessions, how many ask it.
    pub share: u32,
}

/// A model as callers ask for it, as the provider knows it, and its own cadence.
pub struct Model {
    pub id: &'static str,
    pub upstream: &'static str,
    pub interval: Option<Duration>,
}

/// The provider's own limit.
#[derive(Debug, Clone, Copy)]
pub enum Limit {
    /// A capacity of 1 is `mode: spaced`.
    Bucket { interval: Duration, capacity: u32 },
    /// In any 60 s; whoever would wait longer than a second is refused.
    Window { rpm: u32 },
}

/// How a provider behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manners {
    /// At once, in every framing.
    Prompt,
    /// After a while, in small pieces.
    Slow,
    /// 429 with Retry-After now and then, and to everybody until that time is over.
    Strict,
    /// HTTP/1.0 as it was: bodies end with the connection, which also closes unannounced after others.
    Old,
    /// Whatever can go wrong.
    Broken,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Ask {
    pub id: u64,
    pub model: String,
    pub stream: bool,
    /// Bytes of text in the answer.
    pub size: usize,
    /// Bytes of text in the request.
    pub pad: usize,
}

impl Ask {
    pub fn body(&self) -> Vec<u8> {
        let Ask { id, model, stream, size, pad } = self;
        let text = String::from_utf8(filler(!id, *pad)).expect("filler is ASCII");
        format!(r#"{{"model":"{model}","stream":{stream}, "user":"{id:016x}","size":{size},"pad":"{text}"}}"#).into()
    }

    /// The request that `body` is, byte by byte.
    pub fn parse(body: &[u8]) -> Option<Ask> {
        let value: Value = serde_json::from_slice(body).ok()?;
        let ask = Ask {
            id: u64::from_str_radix(value["user"].as_str()?, 16).ok()?,
            model: value["model"].as_str()?.to_owned(),
            stream: value["stream"].as_bool()?,
            size: value["size"].as_u64()?.try_into().ok()?,
            pad: value["pad"].as_str()?.len(),
        };
        (ask.body() == body).then_some(ask)
    }

    /// The answer's body, in the pieces in which a provider makes it.
    pub fn answer(&self) -> Vec<Vec<u8>> {
        let text = filler(self.id, self.size);
        if !self.stream {
            let begin = format!(r#"{{"id":"{:016x}","object":"chat.completion","text":""#, self.id)
                .into_bytes();
            let pieces = text.chunks(self.size / 3 + 1).map(<[u8]>::to_vec);
            return [begin].into_iter().chain(pieces).chain([b"\"}\n".to_vec()]).collect();
        }
        let event = |(n, part): (usize, &[u8])| {
            let part = String::from_utf8_lossy(part);
            format!("data: {{\"id\":\"{:016x}\",\"n\":{n},\"text\":\"{part}\"}}\n\n", self.id)
                .into_bytes()
        };
        let events = text.chunks(self.size / 12 + 1).enumerate().map(event);
        events.chain([b"data: [DONE]\n\n".to_vec()]).collect()
    }
}

/// `length` letters of which no two ids have the same, and that repeat with a prime.
fn filler(id: u64, length: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(id);
    let block: Vec<u8> = (0..length.min(997)).map(|_| rng.alphanumeric() as u8).collect();
    block.iter().copied().cycle().take(length).collect()
}
