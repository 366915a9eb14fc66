//! Foreign cases: what real clients and providers do, as public reports and measurements tell it.
//!
//! `README.md` beside this file is the table: one row a case, with its source, what holds here, and the test that
//! proves it. A new report becomes a row first and a fix second. This file checks the table.

#![allow(clippy::unwrap_used)] // these are tests, helpers included

mod clients;
mod heartbeats;
mod http_edges;
mod providers;
#[path = "../support/mod.rs"]
mod support;
mod uploads;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const TABLE: &str = include_str!("README.md");

/// Where the source of a row may come from if it is no public report.
const MEASURED: &str = "measured";

struct Row<'t> {
    source: &'t str,
    /// `file::name`: the test `name` in a file of that stem below `tests/` or `src/`.
    test: (&'t str, &'t str),
}

fn rows() -> Vec<Row<'static>> {
    let lines =
        TABLE.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| source "));
    lines
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
            let [source, seen, holds, test] = cells[..] else { panic!("four cells a row: {line}") };
            assert!(!seen.is_empty() && !holds.is_empty(), "{line}");
            let test = test
                .trim_matches('`')
                .split_once("::")
                .unwrap_or_else(|| panic!("file::name: {line}"));
            Row { source, test }
        })
        .collect()
}

/// Rust and Python and JavaScript files below `folder`, without what package managers put there.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        let is_installed = path.ends_with("node_modules") || path.ends_with(".venv");
        if path.is_dir() && !is_installed {
            sources(&path, found);
        } else if path
            .extension()
            .is_some_and(|extension| ["rs", "py", "mjs"].iter().any(|known| extension == *known))
        {
            found.push(path);
        }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_row_has_a_source() {
    for Row { source, test } in rows() {
        for part in source.split(", ") {
            let report = part.split_once('#').is_some_and(|(repository, number)| {
                repository.split('/').filter(|name| !name.is_empty()).count() == 2
                    && number.bytes().all(|byte| byte.is_ascii_digit())
            });
            assert!(
                report || part == MEASURED,
                "{test:?}: {part} is neither owner/repo#number nor `{MEASURED}`"
            );
        }
    }
}

#[test]
fn every_row_has_its_test() {
    let mut files = Vec::new();
    ["tests", "src"].iter().for_each(|folder| sources(&root().join(folder), &mut files));
    for Row { test: (file, name), .. } in rows() {
        let of_that_name =
            files.iter().filter(|path| path.file_stem().is_some_and(|stem| stem == file));
        let is_there = of_that_name.map(|path| fs::read_to_string(path).unwrap()).any(|text| {
            text.contains(&format!("fn {name}("))
                || text.contains(&format!("def {name}("))
                || text.contains(&format!("test('{name}'"))
        });
        assert!(is_there, "there is no {file}::{name}");
    }
}

#[test]
fn every_test_of_this_folder_has_its_row() {
    let known: BTreeSet<&str> = rows().iter().map(|row| row.test.1).collect();
    let mut files = Vec::new();
    sources(&root().join("tests/foreign"), &mut files);
    for path in files.iter().filter(|path| !path.ends_with("main.rs")) {
        let text = fs::read_to_string(path).unwrap();
        let tests = text.split("#[test]\nfn ").skip(1).filter_map(|rest| rest.split('(').next());
        for name in tests {
            assert!(
                known.contains(name),
                "{}: {name} has no row in tests/foreign/README.md",
                path.display()
            );
        }
    }
}
