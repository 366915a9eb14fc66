//! Each error as a caller gets it in either dialect, byte by byte, against `tests/golden/errors/CODE.json`.
//!
//! `UPDATE_GOLDEN=1 cargo test --test golden_errors` writes the files anew; the diff is then to be read.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use limitrate::error::{Dialect, Error, WaitsFor};

/// One sample of each variant. The match makes a variant without a sample a compile error.
macro_rules! samples {
    ($($variant:ident $fields:tt)*) => {
        fn samples() -> Vec<Error> {
            let all = vec![$(Error::$variant $fields),*];
            for error in &all {
                match error {
                    $(Error::$variant { .. } => {})*
                }
            }
            all
        }
    };
}

samples! {
    MalformedRequest { detail: "the header `Content-Length` came twice".into() }
    HeadTooLarge { limit_bytes: 32_768 }
    TooManyHeaders { limit: 128 }
    UnsupportedVersion {}
    UnknownMethod { method: "BREW".into() }
    UnsupportedTransferEncoding { value: "gzip, chunked".into() }
    BodyTooLarge { limit_bytes: 33_554_432 }
    RequestTimeout { part: "body", waited: Duration::from_secs(60) }
    InvalidJson { detail: "expected `,` or `}` at line 1 column 14".into() }
    MissingModel {}
    InvalidHeader { name: "X-Limitrate-Priority", value: "urgent".into(), wanted: "high, normal or low" }
    ModelNotFound { model: "gpt4\"o\n".into(), nearest: vec!["gpt-4o".into(), "openai/gpt-4o".into()] }
    UnknownPath { path: "/v2/chat".into() }
    DoubledEndpoint {
        path: "/v1/chat/completions/chat/completions".into(),
        base: "/v1/chat/completions".into(),
    }
    MethodNotAllowed { method: "PUT".into(), allow: "GET, HEAD" }
    WebSocketNotSupported {}
    UnsupportedContentEncoding { coding: "zstd".into() }
    InvalidApiKey {}
    OriginNotAllowed { origin: "https://chat.example.com".into() }
    HostNotAllowed { host: "gateway.example.com:8080".into() }
    QueueWaitExceeded {
        provider: "nim".into(),
        position: 42,
        expected_wait: Duration::from_millis(63_000),
        max_wait: Duration::from_millis(1_500),
        waits_for: WaitsFor::Limit("rpm"),
        retry_after: Duration::from_millis(61_500),
    }
    QueueFull { provider: "nim".into(), max_queue: 1000, retry_after: Duration::from_millis(1_001) }
    ClientQueueFull {
        provider: "nim".into(),
        client: "batch".into(),
        max_queue: 20,
        retry_after: Duration::from_millis(900),
    }
    DeadlineExceeded {
        provider: "nim".into(),
        position: 9,
        expected_wait: Duration::from_millis(25_000),
        patience: Duration::from_secs(10),
        response_time: Duration::from_millis(2_500),
        waits_for: WaitsFor::Limit("tpm"),
        retry_after: Duration::from_millis(15_000),
    }
    DailyLimit { provider: "openrouter".into(), resets_in: Duration::from_secs(3_661) }
    TooManyConnections { max_connections: 1024 }
    ClientConnectionsFull { limit: 512 }
    BuffersFull { limit_bytes: 268_435_456 }
    ClientBuffersFull { limit_bytes: 134_217_728 }
    PlainHttp {}
    ShuttingDown {}
    UpstreamUnreachable { provider: "nim".into(), reason: "connection refused (127.0.0.1:9)".into() }
    UpstreamTimeout { provider: "nim".into(), waited: Duration::from_secs(600) }
    UpstreamDisconnected { provider: "nim".into(), detail: "it closed after 512 bytes of the body".into() }
    UpstreamInvalidResponse { provider: "nim".into(), detail: "the status line is broken".into() }
    UpstreamRefused { provider: "nim".into(), status: 404, detail: "<html>no such page</html>".into() }
    Internal {}
}

#[test]
fn every_error_looks_like_its_golden_file_and_no_file_is_left_over() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1");
    let mut expected = BTreeSet::new();
    for error in samples() {
        let name = format!("{}.json", error.code());
        let path = folder().join(&name);
        let rendered = render(&error);
        if update {
            fs::write(&path, &rendered).expect("the golden folder takes files");
        }
        let golden = fs::read_to_string(&path).unwrap_or_else(|fault| panic!("{name}: {fault}"));
        assert_eq!(rendered, golden, "{name} (UPDATE_GOLDEN=1 rewrites it)");
        assert!(expected.insert(name), "two errors share the code {}", error.code());
    }
    let files: BTreeSet<String> = fs::read_dir(folder())
        .expect("the golden folder is there")
        .map(|entry| {
            entry.expect("it lists").file_name().into_string().expect("the names are ASCII")
        })
        .collect();
    assert_eq!(files, expected);
}

#[test]
fn every_body_is_an_error_object_of_its_dialect() {
    let fields = |object: &serde_json::Value| -> Vec<String> {
        object
            .as_object()
            .unwrap_or_else(|| panic!("{object} is no object"))
            .keys()
            .cloned()
            .collect()
    };
    for error in samples() {
        assert!(matches!(error.status(), 400..=599));
        for (dialect, name, outer, inner) in [
            (Dialect::OpenAi, "", &["error"][..], &["code", "message", "param", "type"][..]),
            (Dialect::Anthropic, "event: error\n", &["error", "type"], &["message", "type"]),
        ] {
            let json = error.to_json(dialect);
            let body: serde_json::Value = serde_json::from_str(&json).expect("the body is JSON");
            assert_eq!(fields(&body), outer, "{error}");
            assert_eq!(fields(&body["error"]), inner, "{error}");
            assert_eq!(body["error"]["message"], error.to_string());
            assert_eq!(error.to_sse_event(dialect), format!("{name}data: {json}\n\n"));
        }
        assert_eq!(error.to_json(Dialect::Responses), error.to_json(Dialect::OpenAi));
    }
}

fn folder() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", "errors"].iter().collect()
}

/// The bodies stand in it as they go out, byte by byte.
fn render(error: &Error) -> String {
    let headers: Vec<String> =
        error.headers().iter().map(|(name, value)| format!("{name:?}: {value:?}")).collect();
    let connection = if error.closes_connection() { "close" } else { "keep-alive" };
    format!(
        "{{\n  \"status\": {},\n  \"headers\": {{{}}},\n  \"connection\": \"{connection}\",\n  \"openai\": {},\n  \"anthropic\": {}\n}}\n",
        error.status(),
        headers.join(", "),
        error.to_json(Dialect::OpenAi),
        error.to_json(Dialect::Anthropic)
    )
}
