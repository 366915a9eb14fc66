//! Which provider gets a request, under which path and model name, and what the model list says.

mod support;

use std::time::Instant;

use serde_json::json;
use support::{
    Gateway, PATIENCE, Reply, UNSHAPED, Upstream, get, post, provider_at, provider_yaml,
};

/// Two providers: `a` serves `only-a`, `shared` and `b/tricky`; `b` serves `shared`, `tricky` and the alias `fast`.
struct Pair {
    a: Upstream,
    b: Upstream,
    gateway: Gateway,
}

fn pair() -> Pair {
    let (a, b) = (Upstream::start([Reply::ok()]), Upstream::start([Reply::ok()]));
    let gateway = Gateway::start(
        &[
            provider_yaml("a", a.addr(), &["only-a", "shared", "b/tricky"], UNSHAPED, ""),
            provider_yaml(
                "b",
                b.addr(),
                &["shared", "tricky", "{id: fast, upstream: meta/llama-3.1-8b}"],
                UNSHAPED,
                "",
            ),
        ]
        .concat(),
    );
    Pair { a, b, gateway }
}

/// Sends `body` through a gateway whose only model is the alias `fast`, and returns what the provider got.
fn spliced(body: &str) -> String {
    let upstream = Upstream::start([Reply::ok()]);
    let models = ["{id: fast, upstream: meta/llama-3.1-8b}"];
    let gateway = Gateway::start(&provider_yaml("p", upstream.addr(), &models, UNSHAPED, ""));
    assert_eq!(post(gateway.addr(), "/v1/chat/completions", body).status, 200, "{body}");
    upstream.wait_requests(1, PATIENCE)[0].text()
}

#[test]
fn only_the_model_changes_in_a_body_and_every_other_byte_stays() {
    let before = "\r\n { \"b\" : 1E400,\t\"a\":123456789012345678901234567890.10, \"b\":\"\\u00e9\\/\u{e9}\\ud83d\", \"model\" :\n";
    let after = " , \"messages\":[{\"model\":\"fast\",\"content\":\"\\\"model\\\":\\\"fast\\\"\"}] ,\"z\":-0.0,\"a\":[ ] }\n\n";
    assert_eq!(
        spliced(&format!("{before}\"fast\"{after}")),
        format!("{before}\"meta/llama-3.1-8b\"{after}")
    );
}

#[test]
fn a_model_written_with_escapes_is_the_same_model() {
    assert_eq!(spliced(r#"{"model":"f\u0061st"}"#), r#"{"model":"meta/llama-3.1-8b"}"#);
    assert_eq!(spliced(r#"{"mod\u0065l":"fast"}"#), r#"{"mod\u0065l":"meta/llama-3.1-8b"}"#);
}

#[test]
fn a_model_inside_another_value_is_not_the_model() {
    assert_eq!(
        spliced(r#"{"x":{"model":"no"},"model":"fast"}"#),
        r#"{"x":{"model":"no"},"model":"meta/llama-3.1-8b"}"#
    );
}

#[test]
fn a_body_whose_model_keeps_its_name_passes_byte_by_byte() {
    let Pair { a, gateway, .. } = pair();
    let body = "{ \"model\":\"only\\u002da\" , \"n\":1.0e+2}";
    assert_eq!(post(gateway.addr(), "/v1/chat/completions", body).status, 200);
    assert_eq!(a.wait_requests(1, PATIENCE)[0].text(), body);
}

#[test]
fn each_model_goes_to_its_provider_under_the_name_that_is_known_there() {
    for (model, to_a, sent) in [
        ("only-a", true, "only-a"),
        ("shared", true, "shared"),
        ("b/shared", false, "shared"),
        ("a/shared", true, "shared"),
        ("tricky", false, "tricky"),
        // An exact name comes before the prefix.
        ("b/tricky", true, "b/tricky"),
        ("a/b/tricky", true, "b/tricky"),
        ("fast", false, "meta/llama-3.1-8b"),
        ("b/fast", false, "meta/llama-3.1-8b"),
    ] {
        let Pair { a, b, gateway } = pair();
        let answer =
            post(gateway.addr(), "/v1/chat/completions", json!({ "model": model }).to_string());
        assert_eq!(answer.status, 200, "{model}: {answer:?}");
        let (right, wrong) = if to_a { (&a, &b) } else { (&b, &a) };
        assert_eq!(right.wait_requests(1, PATIENCE)[0].json()["model"], sent, "{model}");
        assert!(wrong.requests().is_empty(), "{model}");
        assert_eq!(
            answer.header("x-limitrate-provider").as_deref(),
            Some(if to_a { "a" } else { "b" }),
            "{model}"
        );
    }
}

#[test]
fn an_unknown_model_is_refused_with_the_nearest_names() {
    let Pair { a, b, gateway } = pair();
    for (model, nearest) in [
        ("sharde", "shared"),
        ("b/shard", "b/shared"),
        ("onlya", "only-a"),
        ("meta/llama-3.1-8b", ""),
    ] {
        let refused =
            post(gateway.addr(), "/v1/chat/completions", json!({ "model": model }).to_string());
        assert_eq!((refused.status, refused.code().as_str()), (404, "model_not_found"), "{model}");
        let message = refused.error()["message"].as_str().unwrap().to_owned();
        assert!(message.contains(model) && message.contains(nearest), "{message}");
    }
    assert!(a.requests().is_empty() && b.requests().is_empty());
}

#[test]
fn the_model_list_has_each_name_once_and_both_full_names_where_two_share_one() {
    let Pair { gateway, .. } = pair();
    let list = get(gateway.addr(), "/v1/models").json();
    assert_eq!(list["object"], "list");
    let models = list["data"].as_array().unwrap();
    for model in models {
        assert_eq!(model["object"], "model");
        assert!(model["created"].is_u64() && model["owned_by"].is_string(), "{model}");
    }
    let owners: Vec<_> = models
        .iter()
        .map(|model| (model["id"].as_str().unwrap(), model["owned_by"].as_str().unwrap()))
        .collect();
    let mut sorted = owners.clone();
    sorted.sort_unstable();
    assert_eq!(
        sorted,
        [
            ("a/shared", "a"),
            ("b/shared", "b"),
            ("b/tricky", "a"),
            ("fast", "b"),
            ("only-a", "a"),
            ("shared", "a"),
            ("tricky", "b"),
        ]
    );
    assert_eq!(owners[0], ("only-a", "a"), "the order is the file's");
}

#[test]
fn every_listed_model_can_be_retrieved_with_raw_and_with_escaped_slashes() {
    let Pair { gateway, .. } = pair();
    let list = get(gateway.addr(), "/v1/models").json();
    for model in list["data"].as_array().unwrap() {
        let id = model["id"].as_str().unwrap();
        for path in
            [id.to_owned(), id.replace('/', "%2F"), id.replace('/', "%2f"), format!("{id}?x=1")]
        {
            let answer = get(gateway.addr(), &format!("/v1/models/{path}"));
            assert_eq!((answer.status, &answer.json()), (200, model), "{path}");
        }
    }
    assert_eq!(get(gateway.addr(), "/v1/models/nobody").code(), "model_not_found");
}

#[test]
fn the_path_and_the_query_go_to_any_base_url() {
    for base in ["", "/", "/v1", "/v1/", "/api/paas/v4", "/v1beta/openai/"] {
        let upstream = Upstream::start([Reply::ok()]);
        let base_url = format!("http://{}{base}", upstream.addr());
        let gateway = Gateway::start(&provider_at("p", &base_url, &["m"], UNSHAPED, ""));
        for path in [
            "/chat/completions",
            "/embeddings?x=%20a&y=1/2?",
            "/audio/some%2Fthing/deeper",
            "/rerank/v1",
            "/responses",
        ] {
            assert_eq!(
                post(gateway.addr(), &format!("/v1{path}"), r#"{"model":"m"}"#).status,
                200,
                "{base}{path}"
            );
            let requests = upstream.requests();
            let request = requests.last().unwrap();
            assert_eq!(request.target, format!("{}{path}", base.trim_end_matches('/')));
            assert_eq!(request.method, "POST");
            assert_eq!(request.header("host"), Some(upstream.addr().to_string()));
        }
    }
}

#[test]
fn the_health_page_tells_the_version_and_the_whole_seconds_since_the_start() {
    let before = Instant::now();
    let Pair { gateway, .. } = pair();
    let answer = get(gateway.addr(), "/admin/health");
    assert_eq!(
        (answer.status, answer.header("content-type").as_deref()),
        (200, Some("application/json"))
    );
    let mut health = answer.json();
    let uptime = health["uptime_seconds"].take();
    assert!(
        uptime.as_u64().is_some_and(|seconds| seconds <= before.elapsed().as_secs()),
        "{uptime}"
    );
    assert_eq!(
        health,
        json!({"status": "ok", "version": env!("CARGO_PKG_VERSION"), "uptime_seconds": null})
    );
}

#[test]
fn a_path_cannot_climb_out_of_the_base_url() {
    let Pair { a, gateway, .. } = pair();
    for path in ["/v1/../admin", "/v1/x/%2e%2E/y", "/v1/./x"] {
        assert_eq!(post(gateway.addr(), path, r#"{"model":"only-a"}"#).status, 404, "{path}");
    }
    assert!(a.requests().is_empty());
}
