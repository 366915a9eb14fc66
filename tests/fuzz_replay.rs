//! The fuzz targets over their committed inputs: seeds, which the fuzzer starts from, and regressions, which broke something
//! once. Finding new ones is `fuzz/run`'s.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

#[path = "../fuzz/src/lib.rs"]
mod targets;

/// The files of a folder that may be missing, in order.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn seeds_and_regressions_hold() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    for (name, target) in targets::TARGETS {
        let seeds = entries(&fuzz.join("seeds").join(name));
        assert!(!seeds.is_empty(), "{name} has no seeds");
        for path in seeds.into_iter().chain(entries(&fuzz.join("regressions").join(name))) {
            let input = fs::read(&path).unwrap();
            assert!(catch_unwind(|| target(&input)).is_ok(), "{}", path.display());
        }
    }
}

#[test]
fn every_target_has_a_binary_and_nothing_else_has_inputs() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let stems = |folder: &str| -> Vec<String> {
        let paths = entries(&fuzz.join(folder));
        paths.iter().map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
    };
    let names = targets::TARGETS.map(|(name, _)| name);
    assert_eq!(stems("src/bin"), names);
    assert_eq!(stems("seeds"), names);
    for name in stems("regressions") {
        assert!(names.contains(&name.as_str()), "fuzz/regressions/{name} is no target's");
    }
}
