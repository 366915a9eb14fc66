//! A line that stands still until the test lets it move: one request at a time is at the provider, which answers when it is
//! told to. Who goes next does not depend on how fast anybody is.

use super::{Client, Ending, Gate, Gateway, PATIENCE, Reply, Upstream, provider_yaml};

/// A gateway with one provider `p` and its model `m`, where a first request, `first`, is under way.
pub struct Line {
    pub gateway: Gateway,
    pub upstream: Upstream,
    gate: Gate,
    first: Option<Client>,
}

impl Line {
    /// With further lines for `server:` and for the provider.
    pub fn start(server: &str, extras: &str) -> Line {
        let gate = Gate::closed();
        let answer =
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
        let reply = Reply::Pieces {
            pieces: vec![answer.to_vec()],
            gate: gate.clone(),
            ending: Ending::Complete,
        };
        let upstream = Upstream::start([reply]);
        let limit = "{mode: burst, rpm: 600000, capacity: 1000, max_concurrent: 1}";
        let provider = provider_yaml("p", upstream.addr(), &["m"], limit, extras);
        let gateway = Gateway::start_with(server, &provider, &[]);
        let mut line = Line { gateway, upstream, gate, first: None };
        line.first = Some(line.send(Client::connect(line.gateway.addr()), "", "first"));
        line.upstream.wait_requests(1, PATIENCE);
        line
    }

    /// Asks, with these header lines (each with its CRLF) and a body that has this tag.
    pub fn send(&self, mut client: Client, headers: &str, tag: &str) -> Client {
        client.post_json_with("/v1/chat/completions", headers, body(tag));
        client
    }

    /// The same, and waits until the request is in line.
    pub fn join(&self, client: Client, headers: &str, tag: &str) -> Client {
        let queued = self.queued();
        let client = self.send(client, headers, tag);
        self.gateway.wait_queued(queued + 1);
        client
    }

    /// [`Line::join`] from the usual address.
    pub fn ask(&self, headers: &str, tag: &str) -> Client {
        self.join(Client::connect(self.gateway.addr()), headers, tag)
    }

    /// Somebody hangs up.
    pub fn leave(&self, client: Client) {
        let queued = self.queued();
        drop(client);
        self.gateway.wait_queued(queued - 1);
    }

    /// How many wait.
    pub fn queued(&self) -> u64 {
        self.gateway.stats()["providers"][0]["queued_ahead"].as_u64().expect("a number")
    }

    /// The tags of those who wait, as they are let go.
    pub fn order(&self) -> String {
        let waiting = self.queued();
        let mut sent = self.upstream.requests().len();
        let end = sent + waiting as usize;
        // Whose turn is near has a connection, beside the one of the request under way: nobody overtakes who makes one.
        let near = self.gateway.wait_queued(waiting)["waiting_in_acquire"]
            .as_u64()
            .expect("a number") as usize;
        self.upstream.wait_open(1 + near, PATIENCE);
        while sent < end {
            self.gateway.stats();
            self.gate.release(1);
            sent += 1;
            self.upstream.wait_requests(sent, PATIENCE);
        }
        let requests = self.upstream.requests();
        let tag =
            |request: &super::Recorded| request.json()["tag"].as_str().expect("a tag").to_owned();
        requests[end - waiting as usize..].iter().map(tag).collect::<Vec<_>>().join(" ")
    }

    /// Lets `n` requests be answered.
    pub fn answer(&self, n: usize) {
        self.gate.release(n);
    }
}

/// What [`Line::send`] sends.
fn body(tag: &str) -> String {
    format!(r#"{{"model":"m","tag":"{tag}"}}"#)
}
