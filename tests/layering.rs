//! The house has floors and imports run downwards only (`src/lib.rs`); one room alone speaks HTTP's wire crates.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// Rooms from the ground up. A room may name rooms of lower floors, and itself.
const FLOORS: [&[&str]; 8] = [
    &["aside", "deadline", "edits", "error", "heap", "log", "socket", "stale_errors"],
    &["config", "tls"],
    &["http1", "openai", "shaping"],
    &["registry", "state", "telemetry", "upstream"],
    &["provider"],
    &["admin", "demo", "dispatch"],
    &["server"],
    &["cli"],
];

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let expand = |path: PathBuf| if path.is_dir() { sources(&path) } else { vec![path] };
    entries
        .flat_map(expand)
        .filter(|path| path.extension().is_some_and(|ext| ext == "rs"))
        .collect()
}

fn room_of(source: &Path, root: &Path) -> String {
    let inside = source.strip_prefix(root).unwrap();
    inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// The code of a file without its comments.
fn code(source: &Path) -> String {
    let text = fs::read_to_string(source).unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// Every room that a file names as `crate::room` or inside `crate::{...}`.
fn named_rooms(code: &str) -> Vec<String> {
    let after = code.split("crate::").skip(1);
    after
        .flat_map(|rest| match rest.strip_prefix('{') {
            Some(group) => {
                let group = group.split('}').next().unwrap();
                group
                    .split(',')
                    .map(|item| item.trim().split("::").next().unwrap().to_owned())
                    .collect()
            }
            None => vec![
                rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_owned(),
            ],
        })
        .collect()
}

#[test]
fn imports_run_downwards_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    for source in sources(&root) {
        let room = room_of(&source, &root);
        let Some(here) = floor(&room) else {
            assert!(
                ["lib", "main"].contains(&room.as_str()),
                "{room} has no floor in tests/layering.rs"
            );
            continue;
        };
        for named in named_rooms(&code(&source)) {
            let Some(there) = floor(&named) else { continue };
            seen += 1;
            assert!(
                there < here || named == room,
                "{}: {room} must not know {named}",
                source.display()
            );
        }
    }
    assert!(seen > 40, "the scan found only {seen} imports: it no longer sees them");
}

#[test]
fn only_http1_names_the_wire_crates() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for source in sources(&root) {
        let (room, code) = (room_of(&source, &root), code(&source));
        let named = ["async_h1", "http_types", "httparse"].iter().any(|name| code.contains(name));
        assert!(!named || room == "http1", "{} names a wire crate", source.display());
    }
}

#[test]
fn no_pure_room_looks_at_the_clock() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for source in sources(&root) {
        let path = source.to_str().unwrap();
        let pure = [
            "shaping/limiter",
            "shaping/queue",
            "shaping/lane",
            "shaping/line",
            "shaping/terms",
            "shaping/walk",
            "shaping/books",
            "shaping/observed",
            "upstream/verdict",
            "/http1/",
            "/openai",
            "registry.rs",
            "/state.rs",
            "/config/",
        ];
        let body = code(&source);
        let outside_tests = body.split("#[cfg(test)]").next().unwrap();
        if pure.iter().any(|name| path.contains(name)) && !path.ends_with("/tests.rs") {
            assert!(!outside_tests.contains("::now()"), "{path} looks at the clock");
        }
    }
}

#[test]
fn one_place_alone_is_unsafe() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut places = Vec::new();
    for source in sources(&root) {
        let code = code(&source);
        for word in ["unsafe_code", "unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"] {
            let file = source.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            places.extend(code.matches(word).map(|word| (file.clone(), word.to_owned())));
        }
    }
    // ARCHITECTURE.md and SECURITY.md promise this.
    let known = ["unsafe_code", "unsafe {"].map(|word| ("tls/client.rs".into(), word.into()));
    assert_eq!(places, known);
}
