//! What no gateway may take, and the status it has to be refused with.

/// Owed an error object.
pub struct Garbage {
    pub bytes: Vec<u8>,
    /// Where it is certain.
    pub status: Option<u16>,
    /// Whether it becomes wrong only by ending there.
    pub ends: bool,
}

pub fn make(rng: &mut fastrand::Rng) -> Garbage {
    let post = |fields: &str, body: &str| {
        format!("POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\n{fields}\r\n\r\n{body}")
            .into_bytes()
    };
    let get = |fields: &str| {
        format!("GET /v1/models HTTP/1.1\r\nHost: gateway\r\n{fields}\r\n").into_bytes()
    };
    let (bytes, status) = match rng.u8(..28) {
        0 => (b"hello\r\n\r\n".to_vec(), Some(400)),
        1 => (b"GET /v1/models HTTP/1.1\r\n\r\n".to_vec(), Some(400)),
        2 => (b"GET /v1/models HTTP/2.0\r\nHost: gateway\r\n\r\n".to_vec(), Some(505)),
        3 => (b"BREW /pot HTTP/1.1\r\nHost: gateway\r\n\r\n".to_vec(), Some(501)),
        4 => (b"GET /nowhere HTTP/1.1\r\nHost: gateway\r\n\r\n".to_vec(), Some(404)),
        5 => (get("Host: another\r\n"), Some(400)),
        6 => (get("x-n\u{e4}me: x\r\n"), Some(400)),
        7 => (get(&format!("x-long: {}\r\n", "a".repeat(40_000))), Some(431)),
        8 => (get(&"x-many: 1\r\n".repeat(200)), Some(431)),
        9 => (get("no colon\r\n"), Some(400)),
        10 => (post("Content-Length: 3\r\nTransfer-Encoding: chunked", "0\r\n\r\n"), Some(400)),
        11 => (post("Content-Length: +3", "abc"), Some(400)),
        12 => (post("Content-Length: 3\r\nContent-Length: 4", "abcd"), Some(400)),
        13 => (post("Transfer-Encoding: gzip, chunked", "0\r\n\r\n"), Some(501)),
        14 => (post("Transfer-Encoding: chunked", "zz\r\nabc\r\n"), Some(400)),
        15 => return cut_off(post("Transfer-Encoding: chunked", "ff\r\ntoo short"), Some(400)),
        16 => return cut_off(post("Content-Length: 100", "too short"), Some(400)),
        17 => (post("Content-Length: 99999999999", ""), Some(413)),
        18 => (post("Content-Length: 12", "{\"model\":\"m\""), Some(400)),
        19 => (post("Content-Length: 18", "{\"model\":\"nobody\"}"), Some(404)),
        20 => (post("Transfer-Encoding: chunked", "0\r\nno colon\r\n\r\n"), Some(400)),
        21 => (post("Content-Length: 9\r\nOrigin: https://evil.example", "{"), Some(403)),
        22 => (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n".to_vec(), Some(403)),
        23 => (get("Upgrade: websocket\r\n"), Some(426)),
        24 => (post("Content-Length: 9\r\nContent-Encoding: gzip", "{"), Some(415)),
        25 => (b"GET /v1/responses/responses HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), Some(404)),
        _ => return cut_off(noise(rng), None),
    };
    Garbage { bytes, status, ends: false }
}

fn cut_off(bytes: Vec<u8>, status: Option<u16>) -> Garbage {
    Garbage { bytes, status, ends: true }
}

fn noise(rng: &mut fastrand::Rng) -> Vec<u8> {
    // Empty lines before a request are skipped and then there would be no request.
    let first = rng.u8(b' '..);
    [first].into_iter().chain((0..rng.usize(..2000)).map(|_| rng.u8(..))).collect()
}
