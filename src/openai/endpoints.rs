//! What is known of the API's endpoints by their paths.

/// Endpoints below `/v1` whose plain response is JSON, whatever the request asks for. Others may answer with audio, an
/// image or a file.
const JSON_ENDPOINTS: [&str; 9] = [
    "chat/completions",
    "completions",
    "embeddings",
    "images/generations",
    "messages",
    "messages/count_tokens",
    "moderations",
    "rerank",
    "responses",
];

/// Whether a plain response to a request with this target is JSON.
pub fn answers_in_json(target: &str) -> bool {
    let path = target.split(['?', '#']).next().unwrap_or_default();
    path.strip_prefix("/v1/").is_some_and(|endpoint| JSON_ENDPOINTS.contains(&endpoint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_endpoints_that_always_answer_in_json_are_known_to_do_so() {
        for target in ["/v1/chat/completions", "/v1/embeddings?x=y", "/v1/messages/count_tokens"] {
            assert!(answers_in_json(target), "{target}");
        }
        for target in
            ["/v1/audio/speech", "/v1/audio/transcriptions", "/v1/files/f/content", "/v1", ""]
        {
            assert!(!answers_in_json(target), "{target}");
        }
    }
}
