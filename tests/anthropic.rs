//! `/v1/messages` and below, for Anthropic's clients and a provider that speaks Anthropic's API: what differs from the rest
//! of `/v1` is where keys are, what our own errors look like, and how usage is told.

mod support;

use support::{
    Client, ClosedPort, Ended, Ending, Gate, Gateway, PATIENCE, Recorded, Reply, Response,
    UNSHAPED, Upstream, post, provider_at, provider_yaml, spaced,
};

const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";
const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"model":"m","max_tokens":1,"messages":[]}"#;

fn gateway(upstream: &Upstream, extras: &str) -> Gateway {
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, extras))
}

/// A gateway that keeps to 1000 tokens a minute and nothing else.
fn metered(upstream: &Upstream) -> Gateway {
    let limit = "{mode: burst, rpm: 600000, capacity: 1000, tpm: 1000}";
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], limit, ""))
}

/// One request with further header lines; what the provider got, and the answer.
fn exchange(
    extras: &str,
    path: &str,
    headers: &str,
    body: &str,
    reply: Reply,
) -> (Recorded, Response) {
    let upstream = Upstream::start([reply]);
    let gateway = gateway(&upstream, extras);
    let mut client = Client::connect(gateway.addr());
    client.post_json_with(path, headers, body);
    let response = client.read_response();
    (upstream.wait_requests(1, PATIENCE).remove(0), response)
}

/// Type and message of a refusal, after a check that it has the shape that Anthropic's SDK parses, and no other.
fn refusal(response: &Response) -> (String, String) {
    let body = response.json();
    let keys = |value: &serde_json::Value| {
        value.as_object().map(|object| object.keys().cloned().collect::<Vec<_>>())
    };
    assert_eq!(keys(&body), Some(vec!["error".into(), "type".into()]), "{response:?}");
    assert_eq!(keys(&body["error"]), Some(vec!["message".into(), "type".into()]), "{response:?}");
    assert_eq!(body["type"], "error", "{response:?}");
    assert_eq!(
        response.header("content-type").as_deref(),
        Some("application/json"),
        "{response:?}"
    );
    assert!(response.header("request-id").is_some_and(|id| id.starts_with("req_")), "{response:?}");
    let text = |name: &str| body["error"][name].as_str().unwrap_or_default().to_owned();
    (text("type"), text("message"))
}

#[track_caller]
fn assert_refused(response: &Response, status: u16, kind: &str, message_part: &str) {
    let (found, message) = refusal(response);
    assert_eq!((response.status, found.as_str()), (status, kind), "{response:?}");
    assert!(message.contains(message_part), "no {message_part:?} in {message:?}");
}

fn event(name: &str, data: &str) -> Vec<u8> {
    format!("event: {name}\ndata: {data}\n\n").into_bytes()
}

fn message_start(input_tokens: u64) -> Vec<u8> {
    let usage = format!(
        r#"{{"input_tokens":{input_tokens},"cache_read_input_tokens":50000,"output_tokens":1}}"#
    );
    event(
        "message_start",
        &format!(r#"{{"type":"message_start","message":{{"id":"msg_1","usage":{usage}}}}}"#),
    )
}

fn delta(text: &str) -> Vec<u8> {
    let data = format!(
        r#"{{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":"{text}"}}}}"#
    );
    event("content_block_delta", &data)
}

fn stream(input_tokens: u64, output_tokens: u64) -> Vec<Vec<u8>> {
    let usage = format!(r#"{{"output_tokens":{output_tokens}}}"#);
    let end = format!(
        r#"{{"type":"message_delta","delta":{{"stop_reason":"end_turn"}},"usage":{usage}}}"#
    );
    let stop = event("message_stop", r#"{"type":"message_stop"}"#);
    vec![message_start(input_tokens), delta("Hi"), event("message_delta", &end), stop]
}

#[test]
fn a_message_passes_as_it_is_but_for_the_key() {
    let body = "{ \"max_tokens\":1e1,\n \"model\" : \"m\", \"messages\":[{\"role\":\"user\",\"content\":\"é\"}] }";
    let said = r#"{"type":"message","id":"msg_1","content":[] }"#;
    let sent = "x-api-key: of-the-caller\r\nAuthorization: Bearer of-the-caller\r\nanthropic-version: 2023-06-01\r\n\
                anthropic-beta: one-2025-01-01\r\nanthropic-beta: two-2025-01-01\r\n";
    for path in ["/v1/messages?beta=true", COUNT] {
        let reply =
            Reply::with_headers("request-id: req_theirs\r\nanthropic-organization-id: o\r\n", said);
        let (request, response) = exchange("api_key: sk-own", path, sent, body, reply);
        assert_eq!((request.target.as_str(), request.text().as_str()), (path, body));
        assert_eq!(request.headers.all("x-api-key"), ["sk-own"]);
        assert_eq!(request.header("authorization"), None);
        assert_eq!(request.header("anthropic-version").as_deref(), Some("2023-06-01"));
        assert_eq!(request.headers.all("anthropic-beta"), ["one-2025-01-01", "two-2025-01-01"]);
        assert_eq!((response.status, response.text().as_str()), (200, said));
        assert_eq!(response.header("request-id").as_deref(), Some("req_theirs"));
        assert_eq!(response.header("anthropic-organization-id").as_deref(), Some("o"));
        assert_eq!(response.header("x-request-id"), None);
    }
}

#[test]
fn the_key_goes_where_the_path_has_it_and_an_operators_header_goes_before() {
    let key = |extras: &str, path: &str| {
        let (request, _) = exchange(extras, path, "", BODY, Reply::ok());
        (request.header("authorization"), request.header("x-api-key"))
    };
    let (bearer, plain) = (Some("Bearer sk-own".to_owned()), Some("sk-own".to_owned()));
    assert_eq!(key("api_key: sk-own", MESSAGES), (None, plain));
    assert_eq!(key("api_key: sk-own", CHAT), (bearer, None));
    assert_eq!(key("api_key: sk-own", "/v1/messagesx").1, None);
    assert_eq!(key("", MESSAGES), (None, None));
    let other = Some("sk-other".to_owned());
    assert_eq!(
        key("api_key: sk-own\nheaders: {X-Api-Key: sk-other}", MESSAGES),
        (None, other.clone())
    );
    assert_eq!(key("headers: {authorization: sk-other}", MESSAGES), (other, None));
}

#[test]
fn the_gateways_token_is_taken_from_x_api_key_and_goes_no_further() {
    let upstream = Upstream::start([Reply::ok()]);
    let provider = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, "api_key: sk-own");
    let gateway = Gateway::start_with("auth_token: gate-token", &provider, &[]);
    let ask = |headers: &str| {
        let mut client = Client::connect(gateway.addr());
        client.post_json_with(MESSAGES, headers, BODY);
        client.read_response()
    };
    for wrong in ["", "x-api-key: gate-tokem\r\n", "Authorization: Bearer x\r\n"] {
        assert_refused(&ask(wrong), 401, "authentication_error", "x-api-key");
    }
    for right in ["x-api-key: gate-token\r\n", "Authorization: Bearer gate-token\r\n"] {
        assert_eq!(ask(right).status, 200, "{right}");
    }
    assert!(!format!("{:?}", upstream.requests()).contains("gate-token"));
}

#[test]
fn refusals_have_anthropics_shape_below_messages_and_openais_elsewhere() {
    let upstream = Upstream::start([Reply::ok()]);
    let provider = provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, "");
    let gateway = Gateway::start_with("max_body_bytes: 1000", &provider, &[]);
    let mut client = Client::connect(gateway.addr());
    for path in [MESSAGES, COUNT, "/v1/messages/", "/v1/messages?beta=true"] {
        client.post_json(path, r#"{"model":"n"}"#);
        assert_refused(&client.read_response(), 404, "not_found_error", "`n`");
        // On the same connection: what is meant is the request, not the caller.
        client.post_json(CHAT, r#"{"model":"n"}"#);
        assert_eq!(client.read_response().code(), "model_not_found");
        client.post_json(path, "{");
        assert_refused(&client.read_response(), 400, "invalid_request_error", "JSON");
        client.get(path);
        assert_refused(&client.read_response(), 405, "invalid_request_error", "POST");
    }
    assert_refused(
        &post(gateway.addr(), MESSAGES, "x".repeat(1001)),
        413,
        "request_too_large",
        "1000",
    );
    // Nobody knows what a head is for that could not be read.
    client.send(format!("POST {MESSAGES} HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"));
    assert_eq!(client.read_response().code(), "malformed_request");
    assert!(upstream.requests().is_empty());
}

#[test]
fn failures_of_the_provider_have_anthropics_shape_too() {
    let answer = |base_url: &str| {
        let extras = "request_timeout_seconds: 0.2";
        let gateway = Gateway::start(&provider_at("p", base_url, &["m"], UNSHAPED, extras));
        post(gateway.addr(), MESSAGES, BODY)
    };
    let closed = ClosedPort::new();
    assert_refused(
        &answer(&format!("http://{}/v1", closed.addr())),
        502,
        "api_error",
        "cannot be reached",
    );
    let upstream = Upstream::start([Reply::CloseBeforeAnswer, Reply::Stall]);
    let base_url = format!("http://{}/v1", upstream.addr());
    assert_refused(&answer(&base_url), 502, "api_error", "broke");
    assert_refused(&answer(&base_url), 504, "timeout_error", "0.2 s");
}

#[test]
fn a_full_queue_is_an_overload_with_retry_after() {
    let upstream = Upstream::start([Reply::ok()]);
    let gateway = Gateway::start(&provider_yaml(
        "p",
        upstream.addr(),
        &["m"],
        &spaced(3_600_000),
        "max_queue: 1",
    ));
    assert_eq!(post(gateway.addr(), MESSAGES, BODY).status, 200, "takes the hour's slot");
    // Counting tokens waits in the same line.
    let mut waiting = Client::connect(gateway.addr());
    waiting.post_json(COUNT, BODY);
    gateway.wait_queued(1);
    for path in [MESSAGES, COUNT] {
        let refused = post(gateway.addr(), path, BODY);
        assert_refused(&refused, 503, "overloaded_error", "max_queue");
        let retry_after: u64 =
            refused.header("retry-after").and_then(|value| value.parse().ok()).unwrap_or_default();
        assert!((3_500..=7_200).contains(&retry_after), "{refused:?}");
        assert_eq!(refused.header("x-should-retry").as_deref(), Some("false"));
    }
    assert_eq!(upstream.requests().len(), 1);
}

#[test]
fn a_stream_passes_as_it_comes() {
    let chunks = stream(25, 15);
    let (_, response) =
        exchange("", MESSAGES, "", BODY, Reply::stream(chunks.clone(), &Gate::open()));
    assert_eq!((response.status, response.ended), (200, Ended::Clean));
    assert_eq!(response.text().as_bytes(), chunks.concat());
    assert!(response.header("request-id").is_some_and(|id| id.starts_with("req_")), "{response:?}");
}

#[test]
fn a_stream_that_breaks_off_ends_in_an_error_event_and_no_tidy_end() {
    let came = [message_start(25), delta("Hi")];
    for ending in [Ending::Close, Ending::Reset] {
        let reply = Reply::Stream { chunks: came.to_vec(), gate: Gate::open(), ending };
        let (_, response) = exchange("", MESSAGES, "", BODY, reply);
        assert_eq!((response.status, response.ended), (200, Ended::Aborted), "{response:?}");
        let text = response.text();
        let event =
            text.strip_prefix(&*String::from_utf8_lossy(&came.concat())).map(str::trim_start);
        let data = event
            .and_then(|event| event.strip_prefix("event: error\ndata: ")?.strip_suffix("\n\n"));
        let data = data.unwrap_or_else(|| panic!("no error event at the end of {text:?}"));
        let error: serde_json::Value = serde_json::from_str(data).expect("its data is JSON");
        assert_eq!(
            (&error["type"], &error["error"]["type"]),
            (&"error".into(), &"api_error".into()),
            "{error}"
        );
        assert!(
            error["error"]["message"].as_str().is_some_and(|message| message.contains("`p`")),
            "{error}"
        );
    }
}

#[test]
fn a_429_is_waited_out_and_an_overload_passes_with_its_own_words() {
    let limited = r#"{"type":"error","error":{"type":"rate_limit_error","message":"slow down"},"request_id":"req_1"}"#;
    let overloaded =
        r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#;
    let refused = format!(
        "HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{limited}",
        limited.len()
    );
    let upstream = Upstream::start([
        Reply::Raw(refused.into_bytes()),
        Reply::ok(),
        Reply::Json(529, overloaded.to_owned()),
    ]);
    let gateway = gateway(&upstream, "retry: {attempts: 3}");
    let answer = post(gateway.addr(), MESSAGES, BODY);
    assert_eq!(answer.status, 200, "{answer:?}");
    let requests = upstream.wait_requests(2, PATIENCE);
    assert!(requests[1].arrived - requests[0].arrived >= std::time::Duration::from_secs(1));
    assert_eq!((requests[0].target.as_str(), &requests[0].body), (MESSAGES, &requests[1].body));
    let answer = post(gateway.addr(), MESSAGES, BODY);
    assert_eq!((answer.status, answer.text().as_str()), (529, overloaded));
}

#[test]
fn an_alias_is_spliced_into_a_message() {
    let upstream = Upstream::start([Reply::ok()]);
    let models = ["{id: fast, upstream: claude-haiku}"];
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &models, UNSHAPED, ""));
    assert_eq!(post(gateway.addr(), MESSAGES, r#"{"model":"fast","max_tokens":1}"#).status, 200);
    assert_eq!(upstream.requests()[0].text(), r#"{"model":"claude-haiku","max_tokens":1}"#);
}

#[test]
fn the_usage_of_a_stream_takes_the_place_of_what_was_reserved() {
    let gate = Gate::open();
    let upstream = Upstream::start([
        Reply::stream(stream(25, 15), &gate),
        Reply::stream(stream(600, 500), &gate),
    ]);
    let gateway = metered(&upstream);
    let ask = r#"{"model":"m","max_tokens":900}"#;
    assert_eq!(post(gateway.addr(), MESSAGES, ask).ended, Ended::Clean);
    // 40 are used; 900 have room beside them. Then 1140 are used, of which neither event tells more than 600.
    assert_eq!(post(gateway.addr(), MESSAGES, ask).ended, Ended::Clean);
    let mut third = Client::connect(gateway.addr());
    third.post_json(MESSAGES, BODY);
    let stats = gateway.wait_queued(1);
    assert_eq!(stats["held_by"], "tokens", "{stats:#}");
    assert_eq!(upstream.requests().len(), 2);
}

#[test]
fn counting_tokens_uses_none() {
    let upstream = Upstream::start([Reply::Json(200, r#"{"input_tokens":2095}"#.to_owned())]);
    let gateway = metered(&upstream);
    let long = format!(r#"{{"model":"m","messages":"{}"}}"#, "x".repeat(3_000));
    for _ in 0..5 {
        assert_eq!(post(gateway.addr(), COUNT, &long).status, 200);
    }
    assert_eq!(upstream.requests().len(), 5);
}
