//! How the faults of a configuration file are printed: in the order of the file, each with its line.

use std::fmt;
use std::path::{Path, PathBuf};

use super::excerpt::{self, Excerpt};
use super::section::Fault;
use super::tree::{self, Node, SyntaxFault};

/// Past this many, the rest is only counted: nobody reads more at once, and each costs a look for its line.
const SHOWN_LIMIT: usize = 50;

/// Everything that is wrong with a configuration file; never empty, and never with a secret in it.
///
/// Displayed as a compiler does: `file:line:column: key: problem`, and below it the line, with what to write instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults {
    file: PathBuf,
    faults: Vec<Placed>,
    /// How many more there are than `faults` tells.
    more: usize,
}

/// One fault and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Placed {
    /// From 1.
    line: Option<usize>,
    /// In characters, from 1.
    column: Option<usize>,
    /// `key: problem; remedy`
    text: String,
    excerpt: Option<Excerpt>,
}

impl Faults {
    /// A fault of the file as such.
    pub(super) fn whole_file(file: &Path, problem: String) -> Self {
        Self::only(file, Placed { line: None, column: None, text: problem, excerpt: None })
    }

    pub(super) fn at_line(file: &Path, line: usize, problem: &str) -> Self {
        Self::only(
            file,
            Placed { line: Some(line), column: None, text: problem.into(), excerpt: None },
        )
    }

    /// The text is no YAML; there is only ever one such fault.
    pub(super) fn syntax(file: &Path, text: &str, fault: SyntaxFault) -> Self {
        let excerpt = fault.position.and_then(|position| excerpt::of_syntax(text, position));
        let (line, column) = fault.position.unzip();
        Self::only(file, Placed { line, column, text: fault.problem, excerpt })
    }

    /// What a walk through `tree`, the one of `text`, found.
    pub(super) fn gathered(file: &Path, text: &str, tree: &Node, faults: Vec<Fault>) -> Self {
        let more = faults.len().saturating_sub(SHOWN_LIMIT);
        let place = |fault: Fault| {
            let position = tree::position_of(text, fault.node);
            let found = position.zip(tree.find(fault.node));
            let excerpt = found.and_then(|(position, (node, is_key))| {
                excerpt::of_node(text, position, node, is_key, &fault.path)
            });
            let (line, column) = position.unzip();
            let text = if fault.path.is_empty() {
                fault.problem
            } else {
                format!("{}: {}", fault.path, fault.problem)
            };
            Placed { line, column, text, excerpt }
        };
        let mut faults: Vec<Placed> = faults.into_iter().take(SHOWN_LIMIT).map(place).collect();
        faults.sort_by_key(|fault| (fault.line, fault.column));
        Faults { file: file.into(), faults, more }
    }

    fn only(file: &Path, fault: Placed) -> Self {
        Faults { file: file.into(), faults: vec![fault], more: 0 }
    }

    /// Each on one line, `file:line:column: key: problem; remedy`, for a log.
    pub fn in_brief(&self) -> impl Iterator<Item = String> {
        let told = self.faults.iter().map(|fault| format!("{}{}", self.place(fault), fault.text));
        told.chain(self.the_others())
    }

    fn place(&self, fault: &Placed) -> String {
        let numbers =
            [fault.line, fault.column].into_iter().flatten().map(|number| format!(":{number}"));
        format!("{}{}: ", self.file.display(), numbers.collect::<String>())
    }

    fn the_others(&self) -> Option<String> {
        (self.more > 0)
            .then(|| format!("{}: and {} more; mend these first", self.file.display(), self.more))
    }

    fn explained(&self, fault: &Placed) -> String {
        let place = self.place(fault);
        let (Some(line), Some(excerpt)) = (fault.line, &fault.excerpt) else {
            return place + &fault.text;
        };
        let (problem, remedy) = parted(&fault.text);
        let Excerpt { line: shown, carets } = excerpt;
        let below = format!("{carets} {remedy}");
        format!("{place}{problem}\n{line:>5} | {shown}\n      | {}", below.trim_end())
    }
}

/// A problem and its remedy, which may be empty: parted at the first `; ` outside of quotes, where the file's own words are.
fn parted(text: &str) -> (&str, &str) {
    let (mut quoted, mut escaped) = (false, false);
    let end = text.char_indices().find(|(at, c)| {
        quoted ^= *c == '"' && !escaped;
        escaped = *c == '\\' && quoted && !escaped;
        !quoted && text[*at..].starts_with("; ")
    });
    end.map_or((text, ""), |(at, _)| (&text[..at], &text[at + 2..]))
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told = self.faults.iter().map(|fault| self.explained(fault)).chain(self.the_others());
        f.write_str(&told.collect::<Vec<_>>().join("\n"))
    }
}

impl std::error::Error for Faults {}
