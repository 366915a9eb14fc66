//! Typed reading of one mapping, key by key.
//!
//! A key is known because it was asked for: [`Section::finish`] reports those that nobody asked for. Every reader notes a
//! fault and goes on with a default, so that one walk finds all faults; a configuration with any fault is dropped as a
//! whole. Does not know which keys there are.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use super::expand::expand;
use super::nearest::nearest;
use super::tree::{Kind, Node};
use super::{Env, Secret};

/// The longest time that makes sense here, a year; far below what `Duration` and timers can take.
pub(super) const SECONDS_MAX: f64 = 365.0 * 86_400.0;
/// The shortest time that is not zero: timers are no finer.
pub(super) const SECONDS_MIN: f64 = 0.001;
/// Longer texts are cut where a fault shows them.
const SHOWN_CHARS: usize = 40;

/// What is wrong with one node: `problem` is a sentence with its remedy, `path` the key it is about.
#[derive(Debug)]
pub(super) struct Fault {
    pub node: usize,
    pub path: String,
    pub problem: String,
}

/// What a walk through one file needs and gathers.
pub(super) struct Walk<'e> {
    pub env: Env<'e>,
    /// Where relative paths in the file start from.
    pub folder: &'e Path,
    pub faults: Vec<Fault>,
}

impl<'e> Walk<'e> {
    pub fn new(env: Env<'e>, folder: &'e Path) -> Self {
        Walk { env, folder, faults: Vec::new() }
    }

    /// Notes a fault of the value `at`.
    pub fn fault(&mut self, at: &Found<'_>, problem: impl Into<String>) {
        self.faults.push(Fault {
            node: at.node.id,
            path: at.path.clone(),
            problem: problem.into(),
        });
    }

    /// `at` as a text, expanded.
    pub fn text(&mut self, at: &Found<'_>) -> Option<Text> {
        let problem = match &at.node.kind {
            Kind::Text(raw) => match expand(raw, self.env) {
                Ok(value) => {
                    return Some(Text { shown: shown(raw, &value), value });
                }
                Err(problem) => problem,
            },
            Kind::Null => "is empty; write a value after the colon".into(),
            other @ (Kind::Bool(_) | Kind::Number(_)) => {
                format!("must be a text, not {}; put it in quotes", other.noun())
            }
            other => format!("must be a text, not {}; write one value", other.noun()),
        };
        self.fault(at, problem);
        None
    }

    /// `at` as a name that shows on one line: not empty, no control characters.
    pub fn word(&mut self, at: &Found<'_>) -> Option<String> {
        let text = self.text(at)?;
        let problem = if text.value.is_empty() {
            "is empty; write a name"
        } else if text.value.chars().any(char::is_control) {
            "holds a line break or control character; write the name on one line"
        } else {
            return Some(text.value);
        };
        self.fault(at, problem);
        None
    }

    /// Notes `name` as seen, or a fault of `at` if it was.
    pub fn once(&mut self, at: &Found<'_>, name: &str, seen: &mut Vec<String>, problem: &str) {
        if seen.iter().any(|other| other == name) {
            self.fault(at, problem);
        }
        seen.push(name.to_owned());
    }

    /// `at` as a text that goes into a header as it is.
    pub fn secret(&mut self, at: &Found<'_>) -> Option<Secret> {
        let text = self.text(at)?;
        if let Some(problem) = unsendable(&text.value) {
            self.fault(at, problem);
            return None;
        }
        Some(Secret::new(text.value))
    }

    /// The entries of the list `at`; `remedy` follows the fault that it is none.
    pub fn items<'n>(&mut self, at: &Found<'n>, remedy: &str) -> Vec<Found<'n>> {
        let Kind::List(items) = &at.node.kind else {
            self.fault(at, format!("must be a list, not {}; {remedy}", at.node.kind.noun()));
            return Vec::new();
        };
        let item = |(index, node)| Found { node, path: format!("{}[{index}]", at.path) };
        items.iter().enumerate().map(item).collect()
    }

    /// `at` as a whole number within `bounds`; `remedy` follows every fault of it.
    pub fn whole<T: Display + PartialOrd + TryFrom<u64>>(
        &mut self,
        at: &Found<'_>,
        bounds: RangeInclusive<T>,
        remedy: &str,
    ) -> Option<T> {
        let (value, shown) = self.any_number(at, remedy)?;
        // The cast saturates; what is no whole number is sorted out first.
        let whole = Some(value).filter(|value| value.fract() == 0.0 && *value >= 0.0);
        let whole = whole
            .and_then(|value| T::try_from(value as u64).ok())
            .filter(|whole| bounds.contains(whole));
        if whole.is_none() {
            let (least, most) = (bounds.start(), bounds.end());
            self.fault(
                at,
                format!("must be a whole number from {least} to {most}, not {shown}; {remedy}"),
            );
        }
        whole
    }

    /// A number, plain or as a text after expansion, and how to show it.
    fn any_number(&mut self, at: &Found<'_>, remedy: &str) -> Option<(f64, String)> {
        let not = match &at.node.kind {
            Kind::Number(value) => return Some((*value, plain(*value))),
            Kind::Text(_) => {
                let text = self.text(at)?;
                match text.value.trim().parse() {
                    Ok(value) => return Some((value, text.shown)),
                    Err(_) => text.shown,
                }
            }
            other => other.noun().to_owned(),
        };
        self.fault(at, format!("must be a number, not {not}; {remedy}"));
        None
    }

    /// `at` as a mapping; `blamed` is the node that a missing key is reported at.
    pub fn section<'n>(&mut self, at: &Found<'n>, blamed: usize) -> Option<Section<'_, 'e, 'n>> {
        let Kind::Map(pairs) = &at.node.kind else {
            self.fault(
                at,
                format!(
                    "must be a mapping, not {}; write lines of `key: value`",
                    at.node.kind.noun()
                ),
            );
            return None;
        };
        let mut entries: Vec<Entry<'n>> = Vec::new();
        for (key, value) in pairs {
            let Kind::Text(name) = &key.kind else {
                let whole = Found { node: key, path: at.path.clone() };
                self.fault(
                    &whole,
                    format!(
                        "has a key that is {}; write a word, in quotes if need be",
                        key.kind.noun()
                    ),
                );
                continue;
            };
            let entry = Entry { name, key, value };
            if entries.iter().any(|other| other.name == name) {
                self.fault(
                    &Found { node: key, path: join(&at.path, name) },
                    "is written twice; keep one of them",
                );
                continue;
            }
            entries.push(entry);
        }
        Some(Section { walk: self, blamed, path: at.path.clone(), entries, known: Vec::new() })
    }
}

/// A value and the path of keys that leads to it.
#[derive(Debug, Clone)]
pub(super) struct Found<'n> {
    pub node: &'n Node,
    pub path: String,
}

/// A text after expansion; without Debug, since it may be a key.
pub(super) struct Text {
    pub value: String,
    /// For faults: as written, so that what a variable holds stays unseen.
    pub shown: String,
}

struct Entry<'n> {
    name: &'n str,
    key: &'n Node,
    value: &'n Node,
}

/// One mapping being read. End with [`Section::finish`].
pub(super) struct Section<'w, 'e, 'n> {
    pub walk: &'w mut Walk<'e>,
    blamed: usize,
    path: String,
    entries: Vec<Entry<'n>>,
    known: Vec<&'static str>,
}

impl<'w, 'e, 'n> Section<'w, 'e, 'n> {
    /// Reports the keys that nobody asked for.
    pub fn finish(self) -> &'w mut Walk<'e> {
        for entry in self.entries.iter().filter(|entry| !self.known.contains(&entry.name)) {
            let remedy = match nearest(entry.name, &self.known) {
                Some(name) => format!("did you mean {name}?"),
                None => format!("use one of {}", self.known.join(", ")),
            };
            let path = join(&self.path, entry.name);
            self.walk.faults.push(Fault {
                node: entry.key.id,
                path,
                problem: format!("is no known key; {remedy}"),
            });
        }
        self.walk
    }

    /// What `key` holds, an empty value included.
    pub fn find(&mut self, key: &'static str) -> Option<Found<'n>> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        let entry = self.entries.iter().find(|entry| entry.name == key)?;
        Some(Found { node: entry.value, path: join(&self.path, key) })
    }

    /// What `key` holds; an empty value (`null`) counts as an absent key.
    pub fn optional(&mut self, key: &'static str) -> Option<Found<'n>> {
        self.find(key).filter(|found| !matches!(found.node.kind, Kind::Null))
    }

    /// What `key` has to hold; its lack is a fault that `remedy` mends.
    pub fn required(&mut self, key: &'static str, remedy: &str) -> Option<Found<'n>> {
        let found = self.optional(key);
        if found.is_none() {
            let node = self.key_id(key).unwrap_or(self.blamed);
            let problem = format!("is missing; {remedy}");
            self.walk.faults.push(Fault { node, path: join(&self.path, key), problem });
        }
        found
    }

    /// Notes a fault of the mapping itself.
    pub fn fault(&mut self, problem: &str) {
        self.walk.faults.push(Fault {
            node: self.blamed,
            path: self.path.clone(),
            problem: problem.into(),
        });
    }

    /// Notes `problem` if `key` is there.
    pub fn refuse(&mut self, key: &'static str, problem: &str) {
        if let Some(found) = self.optional(key) {
            self.walk.fault(&found, problem);
        }
    }

    /// The mapping under `key`; an empty one where there is none, so that its defaults are read by the same code.
    pub fn section(&mut self, key: &'static str) -> Option<Section<'_, 'e, 'n>> {
        let blamed = self.key_id(key).unwrap_or(self.blamed);
        match self.optional(key) {
            Some(found) => self.walk.section(&found, blamed),
            None => {
                let path = join(&self.path, key);
                Some(Section {
                    walk: self.walk,
                    blamed,
                    path,
                    entries: Vec::new(),
                    known: Vec::new(),
                })
            }
        }
    }

    /// The entries of the list under `key`, at least one.
    pub fn list(&mut self, key: &'static str, remedy: &str) -> Vec<Found<'n>> {
        let Some(found) = self.required(key, remedy) else {
            return Vec::new();
        };
        if matches!(&found.node.kind, Kind::List(items) if items.is_empty()) {
            self.walk.fault(&found, format!("is empty; {remedy}"));
        }
        self.walk.items(&found, remedy)
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)], default: T) -> T {
        let Some(found) = self.optional(key) else {
            return default;
        };
        let Some(text) = self.walk.text(&found) else {
            return default;
        };
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text.value) {
            return *value;
        }
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        self.walk.fault(&found, format!("must be one of {}, not {}", known.join(", "), text.shown));
        default
    }

    /// `true` or `false`, plain or as a text after expansion.
    pub fn flag(&mut self, key: &'static str, default: bool) -> bool {
        let Some(found) = self.optional(key) else {
            return default;
        };
        let not = match &found.node.kind {
            Kind::Bool(value) => return *value,
            Kind::Text(_) => match self.walk.text(&found) {
                None => return default,
                Some(text) => match text.value.trim().parse() {
                    Ok(value) => return value,
                    Err(_) => text.shown,
                },
            },
            other => other.noun().to_owned(),
        };
        self.walk
            .fault(&found, format!("must be true or false, not {not}; write {key}: {default}"));
        default
    }

    /// `on` or `off`, or `true` or `false`, plain or as a text after expansion.
    pub fn switch(&mut self, key: &'static str, default: bool) -> bool {
        let Some(found) = self.optional(key) else { return default };
        let not = match &found.node.kind {
            Kind::Bool(value) => return *value,
            Kind::Text(_) => match self.walk.text(&found) {
                None => return default,
                Some(text) => match text.value.trim() {
                    "on" | "true" => return true,
                    "off" | "false" => return false,
                    _ => text.shown,
                },
            },
            other => other.noun().to_owned(),
        };
        let word = if default { "off" } else { "on" };
        self.walk.fault(&found, format!("must be on or off, not {not}; write {key}: {word}"));
        default
    }

    /// A finite number within `bounds`. `remedy` follows every fault of it.
    pub fn number(
        &mut self,
        key: &'static str,
        bounds: RangeInclusive<f64>,
        remedy: &str,
    ) -> Option<f64> {
        let found = self.optional(key)?;
        let (value, shown) = self.walk.any_number(&found, remedy)?;
        let (least, most) = (*bounds.start(), *bounds.end());
        let problem = if !value.is_finite() {
            "must be a finite number".to_owned()
        } else if value <= 0.0 && least > 0.0 {
            "must be more than 0".to_owned()
        } else if value < least {
            format!("must be at least {least}")
        } else if value > most {
            format!("must be at most {most}")
        } else {
            return Some(value);
        };
        self.walk.fault(&found, format!("{problem}, not {shown}; {remedy}"));
        None
    }

    /// A whole number within `bounds`.
    pub fn integer<T: Display + PartialOrd + TryFrom<u64>>(
        &mut self,
        key: &'static str,
        default: T,
        bounds: RangeInclusive<T>,
    ) -> T {
        self.whole(key, bounds, &format!("write e.g. {key}: {default}")).unwrap_or(default)
    }

    /// A whole number within `bounds`, without a default. `remedy` follows every fault of it.
    pub fn whole<T: Display + PartialOrd + TryFrom<u64>>(
        &mut self,
        key: &'static str,
        bounds: RangeInclusive<T>,
        remedy: &str,
    ) -> Option<T> {
        let found = self.optional(key)?;
        self.walk.whole(&found, bounds, remedy)
    }

    /// A time in seconds, at least `least` of them.
    pub fn seconds(&mut self, key: &'static str, default: f64, least: f64) -> Duration {
        let remedy = format!("write seconds, e.g. {key}: {default}");
        Duration::from_secs_f64(self.number(key, least..=SECONDS_MAX, &remedy).unwrap_or(default))
    }

    /// A secret that is sent as a header; present but empty is a fault that `remedy` mends.
    pub fn secret(&mut self, key: &'static str, remedy: &str) -> Option<Secret> {
        let found = self.find(key)?;
        if matches!(found.node.kind, Kind::Null) {
            self.walk.fault(&found, format!("is empty; {remedy}"));
            return None;
        }
        let secret = self.walk.secret(&found)?;
        if secret.reveal().is_empty() {
            self.walk.fault(&found, format!("is empty; {remedy}"));
            return None;
        }
        Some(secret)
    }

    fn key_id(&self, key: &str) -> Option<usize> {
        self.entries.iter().find(|entry| entry.name == key).map(|entry| entry.key.id)
    }
}

/// Why `value` cannot be sent as a header's value (RFC 9110 section 5.5), or would not arrive as it is.
fn unsendable(value: &str) -> Option<&'static str> {
    if value.ends_with(['\n', '\r']) {
        return Some(
            "ends in a line break, which no header can carry (from a file?); cut it off, in YAML with |- instead of |",
        );
    }
    if value.chars().any(|c| c.is_ascii_control()) {
        return Some(
            "holds a line break or control character, which no header can carry; copy the value anew",
        );
    }
    if !value.is_ascii() {
        return Some(
            "holds a character outside ASCII, which no header can carry; copy the value anew",
        );
    }
    if value.trim() != value {
        return Some("begins or ends with a space, which is lost in a header; cut it off");
    }
    None
}

/// `section.key`, the key in quotes where it is no plain word.
pub(super) fn join(path: &str, key: &str) -> String {
    let plain =
        !key.is_empty() && key.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-'));
    let key = if plain && key.len() <= SHOWN_CHARS { key.to_owned() } else { quoted(key) };
    if path.is_empty() { key } else { format!("{path}.{key}") }
}

/// How a fault shows a text: as written, or by the variables it is made from.
fn shown(raw: &str, value: &str) -> String {
    if raw == value { quoted(raw) } else { format!("what {} holds", quoted(raw)) }
}

fn quoted(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((cut, _)) => format!("{:?}...", &text[..cut]),
        None => format!("{text:?}"),
    }
}

/// A number as somebody would have written it; `Display` alone writes 1e300 with all its zeros.
fn plain(number: f64) -> String {
    let usual = number == 0.0 || !number.is_finite() || (1e-6..1e15).contains(&number.abs());
    if usual { number.to_string() } else { format!("{number:e}") }
}
