//! What happened, counted, and what should not have happened, in words.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

/// Failures that are told in full.
const TOLD: usize = 30;

#[derive(Default)]
pub struct Tally {
    /// By manner and outcome.
    counts: RefCell<BTreeMap<(&'static str, &'static str), u64>>,
    told: RefCell<Vec<String>>,
    failed: Cell<u64>,
}

impl Tally {
    pub fn count(&self, manner: &'static str, outcome: &'static str) {
        *self.counts.borrow_mut().entry((manner, outcome)).or_default() += 1;
    }

    /// Notes a broken promise.
    pub fn fail(&self, who: &str, what: String) {
        self.failed.set(self.failed.get() + 1);
        if self.told.borrow().len() < TOLD {
            eprintln!("soak: FAILED: {who}: {what}");
            self.told.borrow_mut().push(format!("{who}: {what}"));
        }
    }

    pub fn failed(&self) -> u64 {
        self.failed.get()
    }

    pub fn total(&self) -> u64 {
        self.counts.borrow().values().sum()
    }

    /// The failures that are told.
    pub fn failures(&self) -> String {
        self.told.borrow().join("\n")
    }

    pub fn table(&self) -> String {
        let counts = self.counts.borrow();
        let outcomes: BTreeSet<_> = counts.keys().map(|&(_, outcome)| outcome).collect();
        let manners: BTreeSet<_> = counts.keys().map(|&(manner, _)| manner).collect();
        let row = |first: &str, cells: Vec<String>| {
            cells
                .into_iter()
                .fold(format!("{first:<14}"), |line, cell| line + &format!("{cell:>14}"))
                + "\n"
        };
        let cell =
            |manner, outcome| counts.get(&(manner, outcome)).map_or(String::new(), u64::to_string);
        let header = row("", outcomes.iter().map(ToString::to_string).collect());
        let rows = manners.iter().map(|manner| {
            row(manner, outcomes.iter().map(|outcome| cell(manner, outcome)).collect())
        });
        rows.fold(header, |table, row| table + &row)
    }
}
