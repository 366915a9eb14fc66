//! A request body as far as routing has to know it. Does not judge the rest: the provider does.

use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::outline::Outline;
use crate::aside::Buffer;
use crate::error::Error;

/// What [`peek`] finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peek {
    /// The value of `model`, escapes decoded.
    pub model: String,
    /// Where that value stands in the body, in bytes, its quotes included.
    pub model_span: Range<usize>,
    /// The most tokens that the answer may have: `max_completion_tokens` (chat), `max_output_tokens` (responses) or
    /// `max_tokens` (Anthropic's messages, legacy); 0 where none of them is a whole number.
    pub max_tokens: u64,
    /// Whether `stream` is `true`.
    pub stream: bool,
}

impl Peek {
    /// What a request may cost, before the answer tells: a token for each four bytes of the body, and the whole answer that
    /// it allows.
    pub fn estimated_tokens(&self, body: &[u8]) -> u64 {
        (body.len() as u64 / BYTES_PER_TOKEN).saturating_add(self.max_tokens)
    }
}

/// OpenAI's rule of thumb for English text.
const BYTES_PER_TOKEN: u64 = 4;

/// Reads `model`, `stream` and the limit on the answer of a JSON object without building a tree. One pass, no recursion: nesting may be of any depth.
///
/// Of duplicate keys the last one counts, as for most JSON parsers, so that the gateway and the provider see the same.
///
/// # Errors
/// [`Error::InvalidJson`] where the body is anything but one JSON object in UTF-8 (RFC 8259), without a byte order mark;
/// [`Error::MissingModel`] where the object has no `model` that is a string.
pub fn peek(body: &[u8]) -> Result<Peek, Error> {
    let outline = Outline::of(body);
    // serde_json does not look at the UTF-8 of what it ignores.
    if !outline.is_ascii()
        && let Err(error) = std::str::from_utf8(body)
    {
        return Err(invalid_json(format_args!("it is not UTF-8 at byte {}", error.valid_up_to())));
    }
    if body.starts_with("\u{feff}".as_bytes()) {
        return Err(invalid_json("it starts with a byte order mark"));
    }
    let fields: Fields = serde_json::from_slice(outline.json()).map_err(|error| {
        // That names a place in the outline; who sent the body has to find it there.
        invalid_json(serde_json::from_slice::<Fields>(body).err().unwrap_or(error))
    })?;
    let raw = fields
        .model
        .map(RawValue::get)
        .filter(|raw| raw.starts_with('"'))
        .ok_or(Error::MissingModel)?;
    let start = raw.as_ptr() as usize - outline.json().as_ptr() as usize;
    let model_span = outline.place(start)..outline.place(start + raw.len());
    Ok(Peek {
        // A value can pass as JSON and still not decode: "\ud800" is half a character.
        model: serde_json::from_slice(&body[model_span.clone()])
            .map_err(|error| invalid_json(format_args!("in `model`: {error}")))?,
        model_span,
        max_tokens: fields.max_tokens.and_then(|raw| raw.get().parse().ok()).unwrap_or(0),
        stream: fields.stream.is_some_and(|raw| raw.get() == "true"),
    })
}

/// A request body whose `model` may have another value than it came with. No byte of it moves for that: it
/// may be large.
#[derive(Debug, Clone)]
pub struct RequestBody {
    bytes: Rc<Buffer>,
    new_model: Option<Rc<NewModel>>,
}

#[derive(Debug)]
struct NewModel {
    /// Where the value stands that it replaces.
    span: Range<usize>,
    json: Vec<u8>,
}

impl RequestBody {
    /// The body as it came.
    pub fn new(bytes: Buffer) -> RequestBody {
        RequestBody { bytes: Rc::new(bytes), new_model: None }
    }

    /// The body as it came, but for another model name where [`peek`] found one.
    pub fn with_model(&self, span: Range<usize>, model: &str) -> RequestBody {
        let json = serde_json::to_vec(model).expect("a string has a JSON form");
        RequestBody { bytes: self.bytes.clone(), new_model: Some(Rc::new(NewModel { span, json })) }
    }

    /// In bytes.
    pub fn len(&self) -> usize {
        self.pieces().iter().map(|piece| piece.len()).sum()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it consists of, in order; some may be empty.
    pub fn pieces(&self) -> [&[u8]; 3] {
        let bytes = &self.bytes.0;
        match self.new_model.as_deref() {
            None => [bytes, b"", b""],
            Some(NewModel { span, json }) => [&bytes[..span.start], json, &bytes[span.end..]],
        }
    }
}

fn invalid_json(detail: impl fmt::Display) -> Error {
    Error::InvalidJson { detail: detail.to_string() }
}

/// The raw values, still inside the body that they were found in.
#[derive(Default)]
struct Fields<'a> {
    model: Option<&'a RawValue>,
    max_tokens: Option<&'a RawValue>,
    stream: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Key {
    Model,
    #[serde(alias = "max_completion_tokens", alias = "max_output_tokens")]
    MaxTokens,
    Stream,
    #[serde(other)]
    Other,
}

// Not derived: a derived one refuses duplicate keys and takes arrays for objects.
impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Fields::default();
        while let Some(key) = map.next_key()? {
            match key {
                Key::Model => fields.model = Some(map.next_value()?),
                Key::MaxTokens => fields.max_tokens = Some(map.next_value()?),
                Key::Stream => fields.stream = Some(map.next_value()?),
                Key::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// The body with another model name in the place that was found.
    fn spliced(body: &[u8], span: Range<usize>, model: &str) -> Vec<u8> {
        let body = RequestBody::new(Buffer(body.to_vec()));
        let renamed = body.with_model(span.clone(), "in between").with_model(span, model);
        assert_eq!(renamed.len(), renamed.pieces().concat().len());
        assert_eq!(body.pieces().concat(), body.bytes.0, "the other one stays");
        renamed.pieces().concat()
    }

    fn found(body: &str) -> (String, &str) {
        let peek = peek(body.as_bytes()).unwrap_or_else(|error| panic!("{body}: {error}"));
        (peek.model, &body[peek.model_span])
    }

    #[test]
    fn the_estimate_is_a_quarter_of_the_bytes_and_the_longest_answer() {
        for (limit, want) in [
            (r#""max_tokens":100"#, 100),
            (r#""max_completion_tokens":7"#, 7),
            (r#""max_output_tokens":9"#, 9),
            (r#""max_tokens":"many""#, 0),
            (r#""max_tokens":null"#, 0),
            (r#""max_tokens":-1"#, 0),
            (r#""min_tokens":5"#, 0),
        ] {
            let body = format!(r#"{{"model":"m",{limit}}}"#);
            let peek = peek(body.as_bytes()).unwrap();
            assert_eq!(peek.max_tokens, want, "{body}");
            assert_eq!(
                peek.estimated_tokens(body.as_bytes()),
                body.len() as u64 / 4 + want,
                "{body}"
            );
        }
    }

    #[test]
    fn finds_the_value_and_its_bytes() {
        for (body, model, span) in [
            (r#"{"model":"m"}"#, "m", r#""m""#),
            (" \r\n\t{ \"model\" :\n \"a/b\" , \"stream\" : true }\n ", "a/b", r#""a/b""#),
            (
                r#"{"stream":true,"model":"\u0067pt\n\"\ud83d\ude00é"}"#,
                "gpt\n\"😀é",
                r#""\u0067pt\n\"\ud83d\ude00é""#,
            ),
            (r#"{"mod\u0065l":"m","\u0073tream":true}"#, "m", r#""m""#),
            (r#"{"é":"é","model":"m"}"#, "m", r#""m""#),
            (r#"{"model":""}"#, "", r#""""#),
            // The last one counts.
            (r#"{"model":"a","model":"b"}"#, "b", r#""b""#),
            (r#"{"model":null,"model":"b","stream":true,"stream":false}"#, "b", r#""b""#),
            (r#"{"model":"a","mod\u0065l":"b","stream":0,"stream":true}"#, "b", r#""b""#),
            // Only the outermost object counts, and only these two names.
            (r#"{"x":{"model":"a","stream":true},"model":"b","y":[{"model":"c"}]}"#, "b", r#""b""#),
            (r#"{"Model":"a","model ":"c","model":"b","Stream":true}"#, "b", r#""b""#),
            // What the provider may judge.
            (r#"{"model":"m","stream":"true"}"#, "m", r#""m""#),
            (r#"{"model":"m","stream":1}"#, "m", r#""m""#),
            (r#"{"model":"m","stream":[true]}"#, "m", r#""m""#),
            (r#"{"model":"m","n":1e999,"s":"\ud800"}"#, "m", r#""m""#),
        ] {
            assert_eq!(found(body), (model.to_owned(), span), "{body}");
        }
    }

    #[test]
    fn an_object_without_a_string_is_missing_its_model() {
        for body in [
            "{}",
            r#"{"model":null}"#,
            r#"{"model":7}"#,
            r#"{"model":["m"]}"#,
            r#"{"model":{"model":"m"}}"#,
            r#"{"model":"m","model":null}"#,
        ] {
            assert_eq!(peek(body.as_bytes()), Err(Error::MissingModel), "{body}");
        }
    }

    #[test]
    fn anything_but_one_object_is_refused_with_the_place() {
        for (body, says) in [
            (&b""[..], "EOF"),
            (b"  ", "EOF"),
            (b"[]", "expected an object"),
            (br#"[{"model":"m"}]"#, "expected an object"),
            (br#""model""#, "expected an object"),
            (b"null", "expected an object"),
            (br#"{"model":"m""#, "EOF"),
            (br#"{"model":"m",}"#, "trailing comma at line 1 column 14"),
            (br#"{"model":"m"}x"#, "trailing characters at line 1 column 14"),
            (br#"{"model":"m"}{"model":"n"}"#, "trailing characters"),
            (br#"{'model':'m'}"#, "key must be a string"),
            (br#"{"model":"m","x":01}"#, "invalid number"),
            (b"{\"model\":\"a\nb\"}", "control character"),
            (br#"{"model":"\ud800"}"#, "in `model`: "),
            (b"\xef\xbb\xbf{\"model\":\"m\"}", "byte order mark"),
            (b"{\"model\":\"m\",\"x\":\"\xff\"}", "not UTF-8 at byte 18"),
            (b"{\"model\":\"m\"}\xc3", "not UTF-8 at byte 13"),
            (
                &[b"{\"model\":\"m\",\"x\":\"", &[b'y'; 5000][..], b"\xff\"}"].concat(),
                "not UTF-8 at byte 5018",
            ),
            (
                &[b"{\"model\":\"m\",\"x\":\"yyyy", &[b'\x80'; 5000][..], b"\"}"].concat(),
                "not UTF-8 at byte 22",
            ),
            (
                format!("{{\"model\":\"m\",\"x\":[\"{0}\\n{0}\",]}}", "y".repeat(3000)).as_bytes(),
                "expected value at line 1 column 6024",
            ),
        ] {
            let shown = String::from_utf8_lossy(body);
            let Err(Error::InvalidJson { detail }) = peek(body) else {
                panic!("{shown} was taken")
            };
            assert!(detail.contains(says), "{shown}: {detail}");
        }
    }

    #[test]
    fn depth_costs_no_stack() {
        const DEPTH: usize = 1_000_000;
        let (open, close) = ("[".repeat(DEPTH), "]".repeat(DEPTH));
        assert_eq!(found(&format!(r#"{{"messages":{open}{close},"model":"m"}}"#)).0, "m");
        assert_eq!(
            peek(format!(r#"{{"model":{open}{close}}}"#).as_bytes()),
            Err(Error::MissingModel)
        );
        let unclosed = peek(format!(r#"{{"model":"m","messages":{open}"#).as_bytes());
        assert!(matches!(unclosed, Err(Error::InvalidJson { .. })), "{unclosed:?}");
    }

    #[test]
    fn splicing_touches_nothing_else() {
        let body = "{ \"a\":1.0e+2,\"model\" : \"old\\u0021\" ,\"model\":\t\"p/old\" , \"big\":12345678901234567890123 }\r\n";
        let span = peek(body.as_bytes()).unwrap().model_span;
        let spliced = spliced(body.as_bytes(), span, "new \"q\" \n");
        assert_eq!(
            String::from_utf8(spliced).unwrap(),
            "{ \"a\":1.0e+2,\"model\" : \"old\\u0021\" ,\"model\":\t\"new \\\"q\\\" \\n\" , \"big\":12345678901234567890123 }\r\n"
        );
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(key(), inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn key() -> impl Strategy<Value = String> {
        prop_oneof![Just("model".to_owned()), Just("stream".to_owned()), any::<String>()]
    }

    /// A member as text: keys plain or escaped, blanks around every token.
    fn member() -> impl Strategy<Value = String> {
        let name = prop_oneof![
            3 => Just(r#""model""#.to_owned()),
            1 => Just(r#""\u006dodel""#.to_owned()),
            2 => Just(r#""stream""#.to_owned()),
            2 => any::<String>().prop_map(|name| Value::from(name).to_string()),
        ];
        let value = prop_oneof![
            2 => json().prop_map(|value| value.to_string()),
            2 => any::<String>().prop_map(|name| Value::from(name).to_string()),
            1 => Just(r#""\u00e9\/\ud83d\ude00""#.to_owned()),
            1 => Just("true".to_owned()),
        ];
        (name, value, "[ \t\r\n]{0,3}", "[ \t\r\n]{0,3}")
            .prop_map(|(name, value, a, b)| format!("{a}{name}{b}:{a}{value}{b}"))
    }

    fn object() -> impl Strategy<Value = String> {
        prop::collection::vec(member(), 0..6)
            .prop_map(|members| format!("{{{}}}", members.join(",")))
    }

    /// With a text in front that is long enough for the body to be outlined.
    fn made_long(body: &str) -> String {
        format!(
            "{{\"text\":\"{}\"{}",
            "a \\n é ".repeat(1000),
            if body.starts_with("{}") { "" } else { "," }
        ) + &body[1..]
    }

    proptest! {
        #[test]
        fn a_long_body_is_read_as_a_short_one(body in object()) {
            let long = made_long(&body);
            let shift = long.len() - body.len();
            let expected = peek(body.as_bytes()).map(|found| {
                let Range { start, end } = found.model_span;
                Peek { model_span: start + shift..end + shift, ..found }
            });
            prop_assert_eq!(peek(long.as_bytes()), expected);
        }

        #[test]
        fn agrees_with_a_full_parser(body in object()) {
            let tree: Value = serde_json::from_str(&body).unwrap();
            match (tree["model"].as_str(), peek(body.as_bytes())) {
                (Some(model), Ok(peek)) => {
                    prop_assert_eq!(&peek.model, model);
                    prop_assert_eq!(serde_json::from_str::<String>(&body[peek.model_span]).unwrap(), model);
                }
                (None, Err(Error::MissingModel)) => {}
                (model, peek) => prop_assert!(false, "{:?} but {:?}", model, peek),
            }
        }

        #[test]
        fn a_spliced_body_differs_in_its_model_only(body in object(), new: String) {
            let Ok(Peek { model_span, .. }) = peek(body.as_bytes()) else { return Ok(()) };
            let spliced = spliced(body.as_bytes(), model_span.clone(), &new);
            let grown = spliced.len() + model_span.len() - body.len();
            prop_assert_eq!(&spliced[..model_span.start], &body.as_bytes()[..model_span.start]);
            prop_assert_eq!(&spliced[model_span.start + grown..], &body.as_bytes()[model_span.end..]);

            let mut tree: Value = serde_json::from_str(&body).unwrap();
            tree["model"] = Value::from(new);
            prop_assert_eq!(serde_json::from_slice::<Value>(&spliced).unwrap(), tree);
        }

        #[test]
        fn any_bytes_get_an_answer(body: Vec<u8>) {
            // Three random bytes are an object only by chance: what matters is that nothing panics.
            let parsed = serde_json::from_slice::<Value>(&body);
            prop_assert!(parsed.is_ok() || peek(&body).is_err());
        }
    }
}
