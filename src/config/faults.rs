//! How the faults of a configuration file are printed: one a line, in the order of the file.

use std::fmt;
use std::path::{Path, PathBuf};

use super::section::Fault;
use super::tree::{self, SyntaxFault};

/// Past this many, the rest is only counted: nobody reads more at once, and each costs a look for its line.
const SHOWN_LIMIT: usize = 50;

/// Everything that is wrong with a configuration file; never empty, and never with a secret in it.
///
/// Displayed as `file:line: key: problem; remedy`, one fault a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults {
    file: PathBuf,
    lines: Vec<Line>,
    /// How many more there are than `lines` tells.
    more: usize,
}

/// One fault, placed. `line` and `column` count from 1; `text` is `key: problem; remedy`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    line: Option<usize>,
    column: Option<usize>,
    text: String,
}

impl Faults {
    /// A fault of the file as such.
    pub(super) fn whole_file(file: &Path, problem: String) -> Self {
        Self::only(file, Line { line: None, column: None, text: problem })
    }

    pub(super) fn at_line(file: &Path, line: usize, problem: &str) -> Self {
        Self::only(file, Line { line: Some(line), column: None, text: problem.into() })
    }

    /// The text is no YAML; there is only ever one such fault.
    pub(super) fn syntax(file: &Path, fault: SyntaxFault) -> Self {
        let (line, column) = fault.position.unzip();
        Self::only(file, Line { line, column, text: fault.problem })
    }

    /// What a walk through the tree of `text` found.
    pub(super) fn gathered(file: &Path, text: &str, faults: Vec<Fault>) -> Self {
        let more = faults.len().saturating_sub(SHOWN_LIMIT);
        let place = |fault: Fault| Line {
            line: tree::line_of(text, fault.node),
            column: None,
            text: if fault.path.is_empty() { fault.problem } else { format!("{}: {}", fault.path, fault.problem) },
        };
        let mut lines: Vec<Line> = faults.into_iter().take(SHOWN_LIMIT).map(place).collect();
        lines.sort_by_key(|line| line.line);
        Faults { file: file.into(), lines, more }
    }

    fn only(file: &Path, line: Line) -> Self {
        Faults { file: file.into(), lines: vec![line], more: 0 }
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Line { line, column, text }) in self.lines.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{}:", self.file.display())?;
            for number in [line, column].into_iter().flatten() {
                write!(f, "{number}:")?;
            }
            write!(f, " {text}")?;
        }
        match self.more {
            0 => Ok(()),
            more => write!(f, "\n{}: and {more} more; mend these first", self.file.display()),
        }
    }
}

impl std::error::Error for Faults {}
