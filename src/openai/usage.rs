//! How many tokens an answer says it used. Knows JSON objects, not streams.

use memchr::memmem;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

/// The most that is parsed to find it.
const PARSED_BYTES: usize = 256 * 1024;

/// The `usage` of an answer, or of an event in a stream.
///
/// Takes the field names of chat completions, completions and embeddings (`prompt_tokens`, `completion_tokens`) and those
/// of OpenAI's Responses and Anthropic's Messages (`input_tokens`, `output_tokens`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct Usage {
    #[serde(alias = "prompt_tokens")]
    input_tokens: Option<u64>,
    /// Anthropic's: not part of `input_tokens`. Tokens read from the cache are in neither and count for no limit of
    /// its current models (<https://docs.anthropic.com/en/api/rate-limits>).
    cache_creation_input_tokens: Option<u64>,
    #[serde(alias = "completion_tokens")]
    output_tokens: Option<u64>,
    total_tokens: Option<u64>,
}

impl Usage {
    /// Looks where answers keep it, and where events do: inside `response` (Responses) or `message` (Messages). Counting the
    /// tokens of a message (`{"input_tokens": N}`) uses none. `None` where a whole body is no such JSON; one that broke off may
    /// be misread. Of a body over 256 KiB only the end is read: to parse all of it may take 10 ms per MiB.
    pub fn of(json: &[u8]) -> Option<Usage> {
        let at_the_end = Usage::at_the_end(json);
        at_the_end.or_else(|| (json.len() <= PARSED_BYTES).then(|| Usage::anywhere(json))?)
    }

    /// Among the last fields of the whole, where servers put it behind all that they have to say: nothing in front of it
    /// is read.
    fn at_the_end(json: &[u8]) -> Option<Usage> {
        const KEY: &[u8] = br#""usage""#;
        let (front, key) = json.split_at(memmem::rfind(json, KEY)?);
        // After an escape it is part of a text.
        if !matches!(front.trim_ascii_end(), [.., b'{' | b',']) {
            return None;
        }
        let value = key[KEY.len()..].trim_ascii_start().strip_prefix(b":")?;
        let mut values = serde_json::Deserializer::from_slice(value).into_iter();
        let usage = values.next()?.ok()?;
        let rest = value[values.byte_offset()..].trim_ascii();
        // What makes an object of the rest of a whole body closes just the outermost one.
        let is_outermost = || {
            rest.len() <= PARSED_BYTES
                && rest.starts_with(b",")
                && serde_json::from_slice::<IgnoredAny>(&[br#"{"":0"#, rest].concat()).is_ok()
        };
        (rest == b"}" || is_outermost()).then_some(usage)
    }

    fn anywhere(json: &[u8]) -> Option<Usage> {
        let answer: Answer = serde_json::from_slice(json).ok()?;
        let inside = || {
            let event: Event =
                serde_json::from_str(answer.response.or(answer.message)?.get()).ok()?;
            event.usage
        };
        let none =
            || answer.input_tokens.map(|_| Usage { total_tokens: Some(0), ..Usage::default() });
        answer.usage.or_else(inside).or_else(none)
    }

    /// What holds after a later event of the same stream: its counts are running totals, and replace; what it does not
    /// tell again stays. Anthropic's `message_start` has the input, `message_delta` the output and at times all of it.
    pub(super) fn updated(self, later: Usage) -> Usage {
        Usage {
            input_tokens: later.input_tokens.or(self.input_tokens),
            cache_creation_input_tokens: later
                .cache_creation_input_tokens
                .or(self.cache_creation_input_tokens),
            output_tokens: later.output_tokens.or(self.output_tokens),
            total_tokens: later.total_tokens.or(self.total_tokens),
        }
    }

    /// What was read, as far as it counts for a limit.
    pub fn input(self) -> Option<u64> {
        [self.input_tokens, self.cache_creation_input_tokens]
            .into_iter()
            .flatten()
            .reduce(u64::saturating_add)
    }

    /// What was written.
    pub fn output(self) -> Option<u64> {
        self.output_tokens
    }

    /// `total_tokens`, or the sum of the parts; `None` where there is nothing.
    pub fn total(self) -> Option<u64> {
        let sum =
            [self.input(), self.output_tokens].into_iter().flatten().reduce(u64::saturating_add);
        self.total_tokens.or(sum)
    }
}

/// What is inside is read only where it is needed: `message` may be any text elsewhere.
#[derive(Deserialize)]
struct Answer<'a> {
    usage: Option<Usage>,
    #[serde(borrow)]
    response: Option<&'a RawValue>,
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    input_tokens: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Event {
    usage: Option<Usage>,
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
            (
                r#"{"usage":{"prompt_tokens":18446744073709551615,"completion_tokens":1}}"#,
                Some(u64::MAX),
            ),
            (r#"{"choices":[{"usage":{"total_tokens":9}}],"usage":{"total_tokens":2}}"#, Some(2)),
            (
                "{ \"usage\" : {\"total_tokens\":2} ,\"choices\":[{\"usage\":{\"total_tokens\":9}}]}",
                Some(2),
            ),
            ("{\"choices\":[] ,\r\n \"usage\" : {\"total_tokens\":2}\n}\n", Some(2)),
            (r#"{"usage":{"total_tokens":2},"say \"usage":{"total_tokens":9}}"#, Some(2)),
            (r#"{"usage":{"total_tokens":2},"say":"usage"}"#, Some(2)),
            (r#"{"usage":{"total_tokens":2},"say":["usage"]}"#, Some(2)),
            // Anthropic: what went into the cache counts, what came out of it does not.
            (
                r#"{"type":"message","usage":{"input_tokens":1,"cache_creation_input_tokens":20,"cache_read_input_tokens":400,
                    "output_tokens":3}}"#,
                Some(24),
            ),
            (
                r#"{"type":"message","usage":{"input_tokens":1,"cache_creation_input_tokens":null,"output_tokens":3}}"#,
                Some(4),
            ),
            (
                r#"{"type":"message_start","message":{"usage":{"input_tokens":25,"output_tokens":1}}}"#,
                Some(26),
            ),
            (r#"{"type":"message_delta","usage":{"output_tokens":15}}"#, Some(15)),
            (r#"{"input_tokens":2095}"#, Some(0)),
            (r#"{"message":"fine","usage":{"total_tokens":9}}"#, Some(9)),
            (r#"{"message":"fine","response":"too"}"#, None),
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
            assert_eq!(Usage::of(body.as_bytes()).and_then(Usage::total), total, "{body}");
        }
    }

    #[test]
    fn of_a_large_body_the_last_fields_are_read() {
        let data = "0.5,".repeat(PARSED_BYTES / 4);
        let usage = r#""usage":{"total_tokens":2}"#;
        for (body, total) in [
            (format!(r#"{{"data":[{data}0],{usage}}}"#), Some(2)),
            (
                format!(r#"{{"data":[{data}0],{usage},"service_tier":"default","x":{{"y":[]}}}}"#),
                Some(2),
            ),
            (format!(r#"{{"data":[{data}{{{usage},"x":1}}]}}"#), None),
            (format!(r#"{{"data":{{"x":[{data}0],{usage},"y":1}}}}"#), None),
            (format!(r#"{{"x":[{data}0],"y":{{{usage},"z":1}},"a":1}}"#), None),
            (format!(r#"{{{usage},"data":[{data}0]}}"#), None),
        ] {
            assert_eq!(Usage::of(body.as_bytes()).and_then(Usage::total), total);
        }
    }

    #[test]
    fn later_counts_replace_and_what_is_left_out_stays() {
        let usage = |json: &str| Usage::of(json.as_bytes()).unwrap();
        let start = usage(
            r#"{"message":{"usage":{"input_tokens":25,"cache_creation_input_tokens":100,"output_tokens":1}}}"#,
        );
        for (delta, total) in [
            (r#"{"usage":{"output_tokens":15}}"#, 140),
            (r#"{"usage":{"input_tokens":30,"output_tokens":15}}"#, 145),
            (
                r#"{"usage":{"input_tokens":30,"cache_creation_input_tokens":0,"cache_read_input_tokens":9,"output_tokens":15}}"#,
                45,
            ),
            (r#"{"usage":{}}"#, 126),
        ] {
            assert_eq!(start.updated(usage(delta)).total(), Some(total), "{delta}");
        }
    }
}
