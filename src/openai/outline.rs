//! A JSON document without the insides of its texts: what people write to models is long, and the fields that matter are few.
//!
//! A parser reads every byte of what it passes over. Here texts are crossed in the widest steps that the processor has, and the
//! parser gets what is left. Judges nothing: an outline is JSON exactly where its document is.

use std::borrow::Cow;

use memchr::{memchr, memchr2};

/// What stays of a run of plain bytes: enough for the digits of an escape (`\u` and four) in front of it.
const KEPT_BYTES: usize = 4;

/// To cut out less would cost more than to read it.
const WORTH_A_CUT_BYTES: usize = 16;

/// A shorter document is its own outline: read as soon as cut.
const WORTH_AN_OUTLINE_BYTES: usize = 4 * 1024;

/// The room that an outline begins with: a few messages.
const LIKELY_BYTES: usize = 512;
const LIKELY_CUTS: usize = 8;

/// So much is looked for an end and judged at a time: what the processor has at hand. Small in tests, whose texts are short.
const STEP_BYTES: usize = if cfg!(test) { 16 } else { 8 * 1024 };

/// What is left of a document.
#[derive(Debug)]
pub struct Outline<'d> {
    json: Cow<'d, [u8]>,
    cuts: Cuts,
    cuts_are_ascii: bool,
}

/// In front of which byte of an outline something is missing, and how much is up to there.
type Cuts = Vec<(usize, usize)>;

impl<'d> Outline<'d> {
    /// Of a document in UTF-8; of any other it is just as little JSON. Keys, and texts with a control character, which no JSON has,
    /// stay whole.
    pub fn of(document: &'d [u8]) -> Outline<'d> {
        let is_long = document.len() >= WORTH_AN_OUTLINE_BYTES;
        match is_long.then(|| Drawing::of(document)).flatten() {
            Some(drawing) => drawing.into(),
            None => {
                Outline { json: Cow::Borrowed(document), cuts: Vec::new(), cuts_are_ascii: true }
            }
        }
    }

    /// Whether all of the document is ASCII.
    pub fn is_ascii(&self) -> bool {
        self.cuts_are_ascii && self.json.is_ascii()
    }

    /// What is left.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// Where in the document stands what stands there in the outline, outside of texts.
    pub fn place(&self, at: usize) -> usize {
        let before = self.cuts.partition_point(|(place, _)| *place < at);
        at + before.checked_sub(1).map_or(0, |last| self.cuts[last].1)
    }
}

struct Drawing {
    json: Vec<u8>,
    cuts: Cuts,
    cuts_are_ascii: bool,
}

impl From<Drawing> for Outline<'_> {
    fn from(Drawing { json, cuts, cuts_are_ascii }: Drawing) -> Self {
        Outline { json: Cow::Owned(json), cuts, cuts_are_ascii }
    }
}

impl Drawing {
    /// `None` where it would not be much smaller than the document, the places of its cuts included: that is no saving.
    fn of(document: &[u8]) -> Option<Drawing> {
        // Room for what is left of most.
        let json = Vec::with_capacity(document.len().min(LIKELY_BYTES));
        let mut drawing =
            Drawing { json, cuts: Vec::with_capacity(LIKELY_CUTS), cuts_are_ascii: true };
        let mut at = 0;
        while let Some(quote) = memchr(b'"', &document[at..]) {
            let text = at + quote + 1;
            drawing.json.extend_from_slice(&document[at..text]);
            at = drawing.text(document, text);
            let size = drawing.json.len() + drawing.cuts.len() * size_of::<(usize, usize)>();
            if at > WORTH_AN_OUTLINE_BYTES && size > at / 2 {
                return None;
            }
        }
        drawing.json.extend_from_slice(&document[at..]);
        Some(drawing)
    }

    /// Takes over a text that begins at `start`, its closing quote included; returns where that is behind it.
    fn text(&mut self, document: &[u8], start: usize) -> usize {
        let (json, cuts) = (self.json.len(), self.cuts.len());
        let mut run = start;
        loop {
            let Some((length, bytes)) = Bytes::of_run(&document[run..]) else {
                // It never ends: no JSON.
                self.json.extend_from_slice(&document[run..]);
                return document.len();
            };
            let end = run + length;
            self.run(&document[run..end], bytes);
            let is_escape = document[end] == b'\\';
            let next = document.len().min(if is_escape { end + 2 } else { end + 1 });
            self.json.extend_from_slice(&document[end..next]);
            if is_escape {
                run = next;
                continue;
            }
            if document[next..].trim_ascii_start().starts_with(b":") {
                self.json.truncate(json);
                self.cuts.truncate(cuts);
                self.json.extend_from_slice(&document[start..next]);
            }
            return next;
        }
    }

    /// Takes over plain bytes of a text.
    fn run(&mut self, bytes: &[u8], among: Bytes) {
        if bytes.len() < KEPT_BYTES + WORTH_A_CUT_BYTES || among.least < b' ' {
            return self.json.extend_from_slice(bytes);
        }
        self.cuts_are_ascii &= among.greatest.is_ascii();
        let is_inside_a_character = |byte: &u8| byte & 0b1100_0000 == 0b1000_0000;
        let rest = bytes[KEPT_BYTES..]
            .iter()
            .position(|byte| !is_inside_a_character(byte))
            .unwrap_or_default();
        let (kept, cut) = bytes.split_at(KEPT_BYTES + rest);
        self.json.extend_from_slice(kept);
        let missing = self.cuts.last().map_or(0, |(_, missing)| *missing);
        self.cuts.push((self.json.len(), missing + cut.len()));
    }
}

/// Between which bytes those of a text are.
#[derive(Clone, Copy)]
struct Bytes {
    least: u8,
    greatest: u8,
}

impl Bytes {
    /// How long the run is that `text` begins with, up to a quote or an escape, and what it consists of.
    fn of_run(text: &[u8]) -> Option<(usize, Bytes)> {
        let mut bytes = Bytes { least: u8::MAX, greatest: 0 };
        let mut length = 0;
        for step in text.chunks(STEP_BYTES) {
            let end = memchr2(b'"', b'\\', step);
            let run = &step[..end.unwrap_or(step.len())];
            bytes = bytes.and(run);
            length += run.len();
            if end.is_some() {
                return Some((length, bytes));
            }
        }
        None
    }

    fn and(self, more: &[u8]) -> Bytes {
        // Without a branch for each byte the compiler does many at a time.
        more.iter().fold(self, |Bytes { least, greatest }, byte| Bytes {
            least: least.min(*byte),
            greatest: greatest.max(*byte),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;
    use serde_json::value::RawValue;

    use super::*;

    /// However short the document is.
    fn outline(document: &str) -> Outline<'static> {
        Drawing::of(document.as_bytes()).expect("a short one is drawn whole").into()
    }

    #[test]
    fn texts_lose_their_insides_and_keys_do_not() {
        let (long, key) = ("x".repeat(1000), "k".repeat(1000));
        for (document, want) in [
            (format!(r#"{{"{key}":"{long}"}}"#), format!(r#"{{"{key}":"xxxx"}}"#)),
            (
                format!("{{\"{key}\" \r\n:[\"{long}\",\"{long}\"]}}"),
                format!("{{\"{key}\" \r\n:[\"xxxx\",\"xxxx\"]}}"),
            ),
            (
                format!(r#"["a\"{long}\n{long}\u00e9{long}\\"]"#),
                r#"["a\"xxxx\nxxxx\u00e9\\"]"#.to_owned(),
            ),
            (r#"["short","\u00e9",1]"#.to_owned(), r#"["short","\u00e9",1]"#.to_owned()),
            // None of these is JSON, and none becomes it.
            (format!("[\"{long}\n\"]"), format!("[\"{long}\n\"]")),
            (format!("[\"{long}"), format!("[\"{long}")),
            ("[\"\\".to_owned(), "[\"\\".to_owned()),
            (r#"["\"]"#.to_owned(), r#"["\"]"#.to_owned()),
        ] {
            assert_eq!(String::from_utf8_lossy(outline(&document).json()), want, "{document}");
        }
    }

    #[test]
    fn what_is_left_is_found_in_the_document() {
        let long = "x".repeat(100);
        let document = format!(r#"{{"a":"{long}\n{long}","b":1,"c":"{long}","d":2}}"#);
        let outline = outline(&document);
        let json = std::str::from_utf8(outline.json()).unwrap();
        for word in [r#""a""#, r#""b""#, "1", r#""c""#, r#""d""#, "2", "}"] {
            let start = json.find(word).unwrap();
            for end in [start, start + word.len()] {
                assert_eq!(
                    document[outline.place(end)..],
                    document[outline.place(start)..][end - start..],
                    "{word}"
                );
            }
            assert_eq!(outline.place(start), document.find(word).unwrap(), "{word}");
        }
        let text = json.find(":\"").unwrap() + 1..json.find(",\"b\"").unwrap();
        assert_eq!(
            document[outline.place(text.start)..outline.place(text.end)],
            format!(r#""{long}\n{long}""#)
        );
    }

    #[test]
    fn what_has_little_to_leave_out_is_its_own_outline() {
        let texts =
            |length: usize| format!("[{}1]", format!("\"{}\",", "x".repeat(length)).repeat(10_000));
        let lines =
            |length: usize| format!("[\"{}\"]", ("x".repeat(length) + "\\n").repeat(10_000));
        for (document, is_cut) in
            [(texts(19), false), (texts(100), true), (lines(20), false), (lines(60), true)]
        {
            let outline = Outline::of(document.as_bytes());
            assert_eq!(outline.json().len() < document.len(), is_cut, "{}", &document[..100]);
            assert!(outline.json.len() + 16 * outline.cuts.len() <= document.len());
        }
    }

    /// What documents consist of, and what spoils them.
    fn piece() -> impl Strategy<Value = String> {
        prop_oneof![
            6 => prop::sample::select(vec!["{", "}", "[", "]", ":", ",", "\"", "\"", "\"", " ", "\n"]).prop_map(str::to_owned),
            3 => prop::sample::select(vec!["\\n", "\\\"", "\\\\", "\\u00e9", "\\ud83d", "\\", "\\x", "\\u0"]).prop_map(str::to_owned),
            2 => prop::sample::select(vec!["\"key\":", "1", "-1.5e3", "true", "null", "\u{1}", "é", "日"]).prop_map(str::to_owned),
            2 => (1..60_usize).prop_map(|length| "text ".repeat(length)),
            2 => (0..6_usize, 1..20_usize).prop_map(|(shift, length)| "a".repeat(shift) + &"é日😀".repeat(length)),
        ]
    }

    fn is_json(document: &[u8]) -> bool {
        let is_json = serde_json::from_slice::<IgnoredAny>(document).is_ok();
        assert_eq!(serde_json::from_slice::<&RawValue>(document).is_ok(), is_json);
        is_json
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn an_outline_is_json_exactly_where_its_document_is(pieces in prop::collection::vec(piece(), 0..12)) {
            for document in [pieces.concat(), format!("[\"{}\"]", pieces.concat()), format!("{{\"{}\":1}}", pieces.concat())] {
                let outline = outline(&document);
                prop_assert_eq!(is_json(document.as_bytes()), is_json(outline.json()), "{:?} {:?}", document, outline);
                prop_assert_eq!(outline.place(outline.json().len()), document.len());
                prop_assert_eq!(outline.is_ascii(), document.is_ascii());
            }
        }
    }
}
