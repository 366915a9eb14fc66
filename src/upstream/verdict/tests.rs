use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use proptest::prelude::*;

use super::Verdict::{Exhausted, PassOn, Repeat};
use super::*;
use crate::http1::parse_response_head;

/// 15:15:32 GMT on 2 June 2025, the Date of the fixtures.
const NOW: Duration = Duration::from_secs(1_748_877_332);

fn provider(millis: u64) -> Verdict {
    Verdict::CoolDown { wait: Some(Duration::from_millis(millis)), scope: Scope::Provider }
}

fn model(millis: u64) -> Verdict {
    Verdict::CoolDown { wait: Some(Duration::from_millis(millis)), scope: Scope::Model }
}

const PROVIDER_BACKOFF: Verdict = Verdict::CoolDown { wait: None, scope: Scope::Provider };
const MODEL_BACKOFF: Verdict = Verdict::CoolDown { wait: None, scope: Scope::Model };

fn folder() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", "refusals"].iter().collect()
}

#[test]
fn providers() {
    let table = [
        ("anthropic_of_a_model", model(16_000)),
        ("anthropic_overloaded", Repeat),
        ("anthropic_overloaded_for_a_while", provider(5_000)),
        ("anthropic_rate_limit", provider(16_000)),
        ("anthropic_resets_only", provider(16_000)),
        ("anthropic_spend_limit", Exhausted),
        ("azure_retry_after", provider(7_000)),
        ("azure_text_only", provider(2_000)),
        ("azure_unknown_reset", PROVIDER_BACKOFF),
        ("cloudflare_ban", provider(30_000)),
        ("deepseek_balance", PassOn),
        ("deepseek_overloaded", Repeat),
        ("gemini_delay_only", model(34_400)),
        ("gemini_not_in_plan", Exhausted),
        ("gemini_per_day", Exhausted),
        (
            "gemini_per_minute",
            Verdict::CoolDown {
                wait: Some(Duration::from_nanos(58_217_843_437)),
                scope: Scope::Model,
            },
        ),
        ("groq_requests_of_the_day_spent", Exhausted),
        ("groq_tokens_per_day_far", Exhausted),
        ("groq_tokens_per_day_refilling", model(578_016)),
        ("groq_tokens_per_minute", model(18_000)),
        ("mistral", PROVIDER_BACKOFF),
        ("mistral_capacity", MODEL_BACKOFF),
        ("moonshot", provider(1_000)),
        ("moonshot_tokens_per_day", Exhausted),
        ("nvidia_nim", PROVIDER_BACKOFF),
        ("nvidia_nim_busy", Repeat),
        ("nvidia_nim_worker", MODEL_BACKOFF),
        ("ollama_busy", Repeat),
        ("openai_insufficient_quota", Exhausted),
        ("openai_request_too_large", Exhausted),
        ("openai_requests_per_day_refilling", model(86_400)),
        ("openai_resets_only", provider(1_000)),
        ("openai_spend_limit", Exhausted),
        ("openai_text_only", model(6_596)),
        ("openai_tokens_per_minute", model(644)),
        ("openrouter_free_per_day", Exhausted),
        ("openrouter_free_per_minute", provider(28_000)),
        ("openrouter_upstream", model(17_000)),
        ("openrouter_upstream_balance", Exhausted),
        ("proxy_bad_gateway", Repeat),
        ("proxy_maintenance", provider(90_000)),
        ("together_model", model(850)),
        ("vertex_no_hint", PROVIDER_BACKOFF),
        ("zai_balance", Exhausted),
    ];
    for (name, verdict) in table {
        let bytes = fs::read(folder().join(format!("{name}.http"))).unwrap();
        let (head, end) = parse_response_head(&bytes, false).unwrap().unwrap();
        // A clock that is years behind changes nothing: the answers carry the provider's.
        for now in [UNIX_EPOCH + NOW, UNIX_EPOCH] {
            assert_eq!(judge(head.status, &head.headers, &bytes[end..], now), verdict, "{name}");
        }
    }
    let tested: BTreeSet<_> = table.iter().map(|(name, _)| format!("{name}.http")).collect();
    let there = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(tested, there.collect());
}

fn headers(fields: &[(&str, &str)]) -> Headers {
    let mut headers = Headers::default();
    for (name, value) in fields {
        headers.push(name, value.as_bytes());
    }
    headers
}

fn judge_now(status: u16, fields: &[(&str, &str)], body: &str) -> Verdict {
    judge(status, &headers(fields), body.as_bytes(), UNIX_EPOCH + NOW)
}

#[test]
fn the_first_sane_wait_counts() {
    let text = r#"{"error":{"message":"try again in 9s"}}"#;
    for (fields, verdict) in [
        (&[("Retry-After-Ms", "1500"), ("Retry-After", "2")][..], provider(1_500)),
        (&[("retry-after-ms", "nan"), ("retry-after", "2.5")], provider(2_500)),
        (&[("retry-after-ms", "-1"), ("retry-after", "0")], provider(0)),
        (&[("retry-after", "Mon, 02 Jun 2025 15:15:42 GMT")], provider(10_000)),
        (&[("retry-after", "Monday, 02-Jun-25 15:15:42 GMT")], provider(10_000)),
        (&[("retry-after", "Mon Jun  2 15:15:42 2025")], provider(10_000)),
        (&[("retry-after", "Mon, 02 Jun 2025 15:15:22 GMT")], provider(0)),
        (&[("retry-after", "604800")], provider(604_800_000)),
        (&[("retry-after", "604801")], provider(9_000)),
        (&[("retry-after", "1748877342")], provider(9_000)),
        (&[("retry-after", "inf")], provider(9_000)),
        (&[("retry-after", "1e3")], provider(9_000)),
        (&[("retry-after", "-5")], provider(9_000)),
        (&[("retry-after", "")], provider(9_000)),
        (&[("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "4")], provider(9_000)),
    ] {
        assert_eq!(judge_now(429, fields, text), verdict, "{fields:?}");
    }
}

#[test]
fn only_spent_limits_count_and_the_last_of_them() {
    let requests = "x-ratelimit-remaining-requests";
    let tokens = "x-ratelimit-remaining-tokens";
    let resets = [("x-ratelimit-reset-requests", "1m30s"), ("x-ratelimit-reset-tokens", "2s")];
    for (remaining, verdict) in [
        ([(requests, "0"), (tokens, "7")], provider(90_000)),
        ([(requests, "7"), (tokens, "0")], provider(2_000)),
        ([(requests, "0"), (tokens, "0")], provider(90_000)),
        ([(requests, "7"), (tokens, "7")], PROVIDER_BACKOFF),
    ] {
        assert_eq!(judge_now(429, &[remaining, resets].concat(), ""), verdict, "{remaining:?}");
    }
}

#[test]
fn a_far_reset_is_a_spent_quota_and_a_stated_wait_is_not() {
    for (fields, body, verdict) in [
        (&[("x-ratelimit-reset", "3600")][..], "", provider(3_600_000)),
        (&[("x-ratelimit-reset", "3601")], "", Exhausted),
        (&[("x-ratelimit-reset", "604801")], "", PROVIDER_BACKOFF),
        (&[("retry-after", "3601")], "", provider(3_601_000)),
        (&[("retry-after", "3600")], "250 requests per day", provider(3_600_000)),
        (&[("retry-after", "3601")], "250 requests per day", Exhausted),
        (&[], "250 requests per day", Exhausted),
        (&[], "org-tpdrpd7 is over its limit", PROVIDER_BACKOFF),
    ] {
        assert_eq!(judge_now(429, fields, body), verdict, "{fields:?} {body}");
    }
}

#[test]
fn statuses() {
    let body =
        r#"{"error":{"code":"insufficient_quota","message":"for model `m`, try again in 3s"}}"#;
    for status in 100..=999 {
        let (hinted, bare) =
            (judge_now(status, &[("retry-after", "3")], body), judge_now(status, &[], body));
        let expected = match status {
            429 => (Exhausted, Exhausted),
            503 | 529 => (model(3_000), Repeat),
            500 | 502 | 504 => (Repeat, Repeat),
            _ => (PassOn, PassOn),
        };
        assert_eq!((hinted, bare), expected, "{status}");
        let refused = [hinted, bare].iter().any(|verdict| !matches!(verdict, PassOn | Repeat));
        assert_eq!(may_be_refusal(status), refused, "{status}");
    }
}

#[test]
fn bodies_that_cannot_be_read_leave_the_headers() {
    let cut =
        br#"{"error":{"message":"Rate limit reached for model `m`. Please try again in 20s. Vis"#;
    let zip = b"\x1f\x8b\x08\x00\x00 tpd insufficient_quota try again in 1s";
    let fields = headers(&[("retry-after", "3")]);
    let nested = "[".repeat(65_536);
    assert_eq!(judge(429, &fields, zip, UNIX_EPOCH), provider(3_000));
    assert_eq!(judge(429, &Headers::default(), zip, UNIX_EPOCH), PROVIDER_BACKOFF);
    assert_eq!(judge(429, &Headers::default(), cut, UNIX_EPOCH), model(20_000));
    assert_eq!(judge(429, &fields, nested.as_bytes(), UNIX_EPOCH), provider(3_000));
    for odd in
        ["[]", "[[]]", "null", "7", r#"{"error":"x"}"#, r#"{"error":{"details":{},"metadata":[]}}"#]
    {
        assert_eq!(judge_now(429, &[], odd), PROVIDER_BACKOFF, "{odd}");
    }
}

/// Names and values from the dialects, and anything else.
fn any_field() -> impl Strategy<Value = (String, Vec<u8>)> {
    let known = LIMITS.iter().flatten().copied().chain(["retry-after", "retry-after-ms", "date"]);
    let name = prop_oneof![9 => proptest::sample::select(known.collect::<Vec<_>>()).prop_map(str::to_owned), 1 => ".*"];
    let value = prop_oneof![
        4 => "-?[0-9]{1,40}(\\.[0-9]{0,30})?[a-zµ ]{0,3}".prop_map(String::into_bytes),
        2 => "[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([zZ]|[+-][0-9]{2}:[0-9]{2})".prop_map(String::into_bytes),
        2 => "[A-Z][a-z]{2}, [0-9]{2} (Jan|Feb|Dec) [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT".prop_map(String::into_bytes),
        1 => proptest::collection::vec(any::<u8>(), 0..40),
    ];
    (name, value)
}

fn any_body() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => r#"(\{|\}|\[|\]|,|:|"error"|"metadata"|"headers"|"details"|"retryDelay"|"Retry-After"|"violations")"#,
        2 => r#"(try again in |retry after )?[0-9]{1,40}(\.[0-9]{0,30})?(ms|s|m|h| days)?"#,
        1 => "\\PC{0,8}",
    ];
    let text =
        proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat().into_bytes());
    prop_oneof![9 => text, 1 => proptest::collection::vec(any::<u8>(), 0..200)]
}

proptest! {
    #[test]
    fn any_answer_is_judged_and_every_wait_bounded(
        status in prop_oneof![9 => proptest::sample::select(vec![429u16, 503, 529]), 1 => any::<u16>()],
        fields in proptest::collection::vec(any_field(), 0..6),
        body in any_body(),
        now: u64,
    ) {
        let mut headers = Headers::default();
        for (name, value) in &fields {
            headers.push(name, value);
        }
        let now = UNIX_EPOCH.checked_add(Duration::from_secs(now)).unwrap_or(UNIX_EPOCH);
        let verdict = judge(status, &headers, &body, now);
        prop_assert!(status != 429 || !matches!(verdict, PassOn | Repeat));
        if let Verdict::CoolDown { wait: Some(wait), .. } = verdict {
            prop_assert!(wait <= MAX_WAIT, "{wait:?}");
        }
    }
}
