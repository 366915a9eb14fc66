//! How many tokens an answer says it used. Knows bodies, not streams.

use serde::Deserialize;

/// The tokens of a JSON answer, input and output together: `usage.total_tokens`, or the sum of its parts.
///
/// Takes the field names of chat completions, completions and embeddings (`prompt_tokens`, `completion_tokens`) and those
/// of the Responses API (`input_tokens`, `output_tokens`), whose stream events keep `usage` inside `response`. `None`
/// where the body is no such JSON or counts nothing.
pub fn usage_total(body: &[u8]) -> Option<u64> {
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let usage = answer.usage.or_else(|| answer.response?.usage)?;
    usage.total()
}

#[derive(Deserialize)]
struct Answer {
    usage: Option<Usage>,
    response: Option<Response>,
}

#[derive(Deserialize)]
struct Response {
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(alias = "prompt_tokens")]
    input_tokens: Option<u64>,
    #[serde(alias = "completion_tokens")]
    output_tokens: Option<u64>,
    total_tokens: Option<u64>,
}

impl Usage {
    fn total(&self) -> Option<u64> {
        if self.total_tokens.is_some() {
            return self.total_tokens;
        }
        match (self.input_tokens, self.output_tokens) {
            (None, None) => None,
            (input, output) => Some(input.unwrap_or(0).saturating_add(output.unwrap_or(0))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals() {
        for (body, total) in [
            (r#"{"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":9}}"#, Some(9)),
            (r#"{"usage":{"prompt_tokens":3,"completion_tokens":4}}"#, Some(7)),
            (r#"{"usage":{"prompt_tokens":3,"total_tokens":null}}"#, Some(3)),
            (r#"{"usage":{"input_tokens":3,"output_tokens":4},"response":null}"#, Some(7)),
            (
                r#"{"type":"response.completed","response":{"id":"r","usage":{"input_tokens":1,"output_tokens":2}}}"#,
                Some(3),
            ),
            (r#"{"usage":{"prompt_tokens":18446744073709551615,"completion_tokens":1}}"#, Some(u64::MAX)),
            (r#"{"choices":[{"usage":{"total_tokens":9}}],"usage":{"total_tokens":2}}"#, Some(2)),
            (r#"{"usage":{}}"#, None),
            (r#"{"usage":null}"#, None),
            (r#"{"response":{"usage":null}}"#, None),
            (r#"{"usage":{"total_tokens":-1}}"#, None),
            (r#"{"usage":{"total_tokens":"9"}}"#, None),
            (r#"{"usage":{"total_tokens":9}"#, None),
            (r#"{"choices":[{"usage":{"total_tokens":9}}]}"#, None),
            ("", None),
            ("<html>", None),
        ] {
            assert_eq!(usage_total(body.as_bytes()), total, "{body}");
        }
    }
}
