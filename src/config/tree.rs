//! YAML text -> a tree of numbered nodes, and back from a number to a line.
//!
//! serde_yaml tells a position only with an error. So the tree counts its nodes as it is built, and [`position_of`] builds it
//! again with an error raised at one number: the position is the parser's own, whatever the style of the file.
//! Knows no key of the configuration.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, Visitor};

/// More values than any real file has; aliases of aliases would otherwise grow the tree without bound.
const NODE_LIMIT: usize = 100_000;

/// One value or one key of the file.
#[derive(Debug)]
pub(super) struct Node {
    /// Its place in reading order, for [`position_of`].
    pub id: usize,
    /// What it is.
    pub kind: Kind,
}

/// What a node holds. Duplicate keys are kept, so that each can be reported.
#[derive(Debug)]
pub(super) enum Kind {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Node, Node)>),
}

impl Kind {
    /// For "must be a number, not ...".
    pub fn noun(&self) -> &'static str {
        match self {
            Kind::Null => "empty",
            Kind::Bool(_) => "true or false",
            Kind::Number(_) => "a number",
            Kind::Text(_) => "a text",
            Kind::List(_) => "a list",
            Kind::Map(_) => "a mapping",
        }
    }
}

/// Why a text is no YAML.
#[derive(Debug, PartialEq)]
pub(super) struct SyntaxFault {
    /// Line and column from 1, where the parser knows them.
    pub position: Option<(usize, usize)>,
    /// What is wrong, and the remedy. Repeats nothing of the text.
    pub problem: String,
}

/// The tree of the only document in `text`; an empty text is `Null`.
pub(super) fn parse(text: &str) -> Result<Node, SyntaxFault> {
    if let Some(fault) = forbidden_character(text) {
        return Err(fault);
    }
    build(text, None).map_err(|error| SyntaxFault {
        position: error.location().map(|at| (at.line(), at.column())),
        problem: explain(&error, text),
    })
}

impl Node {
    /// The node `id` in the tree below this one, and whether it is a key.
    pub fn find(&self, id: usize) -> Option<(&Node, bool)> {
        if self.id == id {
            return Some((self, false));
        }
        match &self.kind {
            Kind::List(items) => items.iter().find_map(|item| item.find(id)),
            Kind::Map(entries) => entries.iter().find_map(|(key, value)| {
                if key.id == id {
                    Some((key, true))
                } else {
                    key.find(id).or_else(|| value.find(id))
                }
            }),
            Kind::Null | Kind::Bool(_) | Kind::Number(_) | Kind::Text(_) => None,
        }
    }
}

/// Where node `id` of the tree of `text` begins: line and column, from 1, the column in characters. A node behind an alias
/// begins at its anchor.
pub(super) fn position_of(text: &str, id: usize) -> Option<(usize, usize)> {
    build(text, Some(id)).err()?.location().map(|at| (at.line(), at.column()))
}

fn build(text: &str, stop_at: Option<usize>) -> Result<Node, serde_yaml::Error> {
    let count = Cell::new(0);
    let builder = Builder { count: &count, stop_at };
    builder.deserialize(serde_yaml::Deserializer::from_str(text))
}

/// Builds the node at hand; the count is shared by the whole tree.
#[derive(Clone, Copy)]
struct Builder<'a> {
    count: &'a Cell<usize>,
    stop_at: Option<usize>,
}

impl Builder<'_> {
    /// The number of the node that begins here; must come before those of its children.
    fn begin<E: Error>(self) -> Result<usize, E> {
        let id = self.count.replace(self.count.get() + 1);
        if self.stop_at == Some(id) {
            return Err(E::custom("here"));
        }
        if id >= NODE_LIMIT {
            return Err(E::custom("too many values"));
        }
        Ok(id)
    }

    fn leaf<E: Error>(self, kind: Kind) -> Result<Node, E> {
        Ok(Node { id: self.begin()?, kind })
    }
}

impl<'de> DeserializeSeed<'de> for Builder<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Integers become `f64` as well: every bound of the configuration lies far below 2^53.
impl<'de> Visitor<'de> for Builder<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_unit<E: Error>(self) -> Result<Node, E> {
        self.leaf(Kind::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Node, E> {
        self.leaf(Kind::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Node, E> {
        self.leaf(Kind::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Node, E> {
        self.leaf(Kind::Number(value as f64))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Node, E> {
        self.leaf(Kind::Number(value as f64))
    }

    fn visit_i128<E: Error>(self, value: i128) -> Result<Node, E> {
        self.leaf(Kind::Number(value as f64))
    }

    fn visit_u128<E: Error>(self, value: u128) -> Result<Node, E> {
        self.leaf(Kind::Number(value as f64))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Node, E> {
        self.leaf(Kind::Number(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Node, E> {
        self.leaf(Kind::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let id = self.begin()?;
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Node { id, kind: Kind::List(items) })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let id = self.begin()?;
        let mut entries = Vec::new();
        while let Some(entry) = access.next_entry_seed(self, self)? {
            entries.push(entry);
        }
        Ok(Node { id, kind: Kind::Map(entries) })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<Node, A::Error> {
        Err(A::Error::custom("a YAML tag"))
    }
}

/// libyaml refuses these without a line, so they are looked for beforehand (YAML 1.2 section 5.1).
fn forbidden_character(text: &str) -> Option<SyntaxFault> {
    let allowed = |c: char| {
        matches!(c, '\t' | '\n' | '\r' | '\u{85}' | '\u{feff}')
            || !(c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'))
    };
    let (at, character) = text.char_indices().find(|(_, c)| !allowed(*c))?;
    let before = &text[..at];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    Some(SyntaxFault {
        position: Some((
            before.matches('\n').count() + 1,
            before[line_start..].chars().count() + 1,
        )),
        problem: format!("has the control character U+{:04X}; delete it", character as u32),
    })
}

/// The parser's words where they quote nothing of the file, and what to do about them.
fn explain(error: &serde_yaml::Error, text: &str) -> String {
    let full = error.to_string();
    let line = error.location().and_then(|at| text.lines().nth(at.line() - 1)).unwrap_or("");
    let indentation = &line[..line.len() - line.trim_start().len()];
    if indentation.contains('\t') {
        return "has a tab in its indentation; indent with spaces".into();
    }
    let explained = |(sign, words): &(&str, &str)| full.contains(sign).then(|| (*words).to_owned());
    EXPLANATIONS.iter().find_map(explained).unwrap_or_else(|| {
        "is no valid YAML; check the indentation, quotes and brackets here and in the line above".into()
    })
}

/// A part of the parser's message, and what it means to somebody who does not know YAML's grammar.
const EXPLANATIONS: [(&str, &str); 14] = [
    ("too many values", "has too many values; remove the aliases that repeat each other"),
    ("repetition limit", "has too many values; remove the aliases that repeat each other"),
    ("recursion limit", "is nested too deeply; remove brackets or aliases that contain themselves"),
    (
        "a YAML tag",
        "has a YAML tag (a word that begins with !); remove it, or put the value in quotes",
    ),
    (
        "invalid value",
        "has a YAML tag (a word that begins with !) that does not fit its value; remove the tag",
    ),
    ("more than one document", "holds more than one document; remove the lines that are only ---"),
    (
        "unknown anchor",
        "has an alias (a word that begins with *) without its anchor; put the value in quotes if it is no alias",
    ),
    (
        "cannot start any token",
        "has a value that begins with a special character; put the value in quotes",
    ),
    (
        "mapping values are not allowed",
        "has a `: ` where none can be; put the value in quotes, or line the key up with its neighbours",
    ),
    (
        "could not find expected ':'",
        "has a key without `: `; write the key, a colon, a space and the value",
    ),
    ("found unexpected end of stream", "has a quote that is never closed; close it"),
    (
        "did not find expected ',' or",
        "has a bracket that is never closed, or a value with { } [ ] or , inside brackets; put such values in quotes",
    ),
    (
        "did not find expected key",
        "does not line up; indent the keys of one section equally, and put values that begin with a quote or bracket in quotes whole",
    ),
    (
        "did not find expected '-'",
        "does not line up; begin each entry of this list with - at the same indentation",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The line of the first node, in reading order, that holds this text or number.
    fn line(text: &str, wanted: &str) -> usize {
        fn find<'n>(node: &'n Node, wanted: &str) -> Option<&'n Node> {
            match &node.kind {
                Kind::Text(text) => (text.trim() == wanted).then_some(node),
                Kind::Number(number) => (number.to_string() == wanted).then_some(node),
                Kind::List(items) => items.iter().find_map(|item| find(item, wanted)),
                Kind::Map(entries) => entries
                    .iter()
                    .find_map(|(key, value)| find(key, wanted).or_else(|| find(value, wanted))),
                Kind::Null | Kind::Bool(_) => None,
            }
        }
        let tree = parse(text).unwrap();
        position_of(text, find(&tree, wanted).unwrap().id).unwrap().0
    }

    #[test]
    fn lines_in_block_style() {
        let text = "# a comment\n\na:\n  - x: 1\n    y: 2 # x: 3\n\n  - z:\n      4\n";
        for (wanted, expected) in [("a", 3), ("x", 4), ("1", 4), ("2", 5), ("z", 7), ("4", 8)] {
            assert_eq!(line(text, wanted), expected, "{wanted}");
        }
    }

    #[test]
    fn lines_in_flow_style() {
        let text = "a: {x: 1,\n  y: [2,\n 3], 'z':\n\n 4}\nb: 5";
        for (wanted, expected) in
            [("x", 1), ("2", 2), ("3", 3), ("z", 3), ("4", 5), ("b", 6), ("5", 6)]
        {
            assert_eq!(line(text, wanted), expected, "{wanted}");
        }
    }

    #[test]
    fn lines_around_strings_of_many_lines() {
        let text = "a: |\n  one\n\n  two: 2\nb: \"x\n  y\"\nc: plain\n  and on\nd: 1\r\ne: 9\n";
        for (wanted, expected) in
            [("a", 1), ("b", 5), ("x y", 5), ("plain and on", 7), ("1", 9), ("9", 10)]
        {
            assert_eq!(line(text, wanted), expected, "{wanted}");
        }
    }

    #[test]
    fn an_alias_lies_at_its_anchor() {
        let text = "a: &one\n  x: 1\nb: *one\nc: 2\n";
        let tree = parse(text).unwrap();
        let Kind::Map(entries) = &tree.kind else { panic!("{tree:?}") };
        let line = |node: &Node| position_of(text, node.id).map(|at| at.0);
        let lines: Vec<_> = entries.iter().map(|(key, value)| (line(key), line(value))).collect();
        assert_eq!(lines, [(Some(1), Some(1)), (Some(3), Some(1)), (Some(4), Some(4))]);
    }

    #[test]
    fn duplicate_keys_are_kept() {
        let tree = parse("a: 1\na: 2\n").unwrap();
        assert!(matches!(&tree.kind, Kind::Map(entries) if entries.len() == 2), "{tree:?}");
    }

    #[test]
    fn an_empty_text_is_null() {
        for text in ["", "\n", "# only a comment\n", "---\n", "\u{feff}", "~"] {
            assert!(matches!(parse(text).unwrap().kind, Kind::Null), "{text:?}");
        }
    }

    #[test]
    fn syntax_faults_have_a_place_and_a_remedy() {
        for (text, position, words) in [
            ("a:\n\tb: 1", Some((2, 1)), "tab"),
            ("a:\n  b: 1\n\tc: 1", Some((3, 1)), "tab"),
            ("a: @x", Some((1, 4)), "special character"),
            ("a: `x`", Some((1, 4)), "special character"),
            ("a: b: c", Some((1, 5)), "a `: ` where none can be"),
            ("a: 1\n  b: 2", Some((2, 4)), "a `: ` where none can be"),
            ("a: 1\nb\nc: 2", Some((3, 1)), "a key without `: `"),
            ("a: \"x\nb: 1\n", Some((3, 1)), "quote that is never closed"),
            ("a: [x, y\nb: 1\n", Some((2, 2)), "bracket that is never closed"),
            ("a: {k: ${V}}", Some((1, 9)), "inside brackets"),
            ("a:\n   b: 1\n  c: 2", Some((3, 3)), "does not line up"),
            ("a:\n  - b\n  c: 1", Some((3, 3)), "does not line up"),
            ("a: *x", Some((1, 4)), "alias"),
            ("a: !x y", Some((1, 4)), "YAML tag"),
            ("a: !!int secret", Some((1, 4)), "does not fit"),
            ("a: 1\n---\nb: 2", None, "more than one document"),
            ("a: x\nb: \u{7}", Some((2, 4)), "U+0007"),
        ] {
            let fault = parse(text).expect_err(text);
            assert!(fault.problem.contains(words), "{text:?}: {fault:?}");
            assert_eq!(fault.position, position, "{text:?}: {fault:?}");
            assert!(!fault.problem.contains("secret"), "{fault:?}");
        }
    }

    #[test]
    fn every_character_is_taken_or_refused_with_its_line() {
        for c in ('\0'..='\u{2100}').chain('\u{d700}'..='\u{10100}').chain(['\u{10ffff}']) {
            let text = format!("a: 1\nb: \"x{c}\"\n");
            if let Err(fault) = parse(&text) {
                let line = fault.position.map(|(line, _)| line);
                assert!(line >= Some(2), "{c:?}: {fault:?}");
            }
        }
    }

    #[test]
    fn trees_that_would_explode_are_refused() {
        let wide = format!("a: &a [{}]\nb: [{}]", "1,".repeat(2000), "*a,".repeat(2000));
        let deep = "[".repeat(1000);
        let own = "&a [*a]";
        for (text, words) in [
            (wide.as_str(), "too many values"),
            (&deep, "nested too deeply"),
            (own, "nested too deeply"),
        ] {
            let fault = parse(text).expect_err("refused");
            assert!(fault.problem.contains(words), "{fault:?}");
        }
    }
}
