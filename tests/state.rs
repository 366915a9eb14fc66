//! The state file on a real file system: whole at every moment, for its owner only, and nothing beside it.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use limitrate::shaping::books::BooksMemory;
use limitrate::state::{State, Unknown};

/// An empty folder of this name under the build directory.
fn folder(name: &str) -> PathBuf {
    let folder =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("state-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names.into_iter().map(|name| name.into_string().unwrap()).collect()
}

/// A state that its time tells apart from others, of a length that varies.
fn version(n: u64) -> State {
    let mut state = State::new(UNIX_EPOCH + Duration::from_millis(n), n.is_multiple_of(2));
    (0..n * 7 % 50).for_each(|lane| {
        state.push(&format!("provider-{lane}"), "none", [], BooksMemory::default())
    });
    state
}

fn number(state: &State) -> u64 {
    1_000_000 - state.elapsed(UNIX_EPOCH + Duration::from_millis(1_000_000)).as_millis() as u64
}

fn reason(path: &Path) -> String {
    match State::read(path) {
        Err(Unknown::Damaged { reason }) => reason,
        other => panic!("{}: {other:?}", path.display()),
    }
}

#[test]
fn what_is_written_is_read_and_is_the_owners() {
    let folder = folder("written");
    let path = folder.join("state.json");
    assert_eq!(State::read(&path), Err(Unknown::Missing));
    version(3).write(&path).unwrap();
    assert_eq!(State::read(&path), Ok(version(3)));
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    version(4).write(&path).unwrap();
    assert_eq!(State::read(&path), Ok(version(4)));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(names(&folder), ["state.json"]);
}

#[test]
fn a_reader_never_sees_anything_but_a_whole_version() {
    let path = folder("atomic").join("state.json");
    version(0).write(&path).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| (1..=1000).for_each(|n| version(n).write(&path).unwrap()));
        let (mut last, mut seen) = (0, 0);
        while !writer.is_finished() {
            let state = State::read(&path).unwrap();
            let n = number(&state);
            assert_eq!(state, version(n));
            assert!(n >= last, "{n} after {last}");
            seen += u64::from(n > last);
            last = n;
        }
        assert!(seen > 1, "nothing was seen to change");
    });
    assert_eq!(State::read(&path), Ok(version(1000)));
}

#[test]
fn what_a_crash_left_behind_is_replaced_and_a_link_in_its_place_is_not_followed() {
    let folder = folder("left");
    let (path, new, other) =
        (folder.join("state.json"), folder.join("state.json.new"), folder.join("other"));
    fs::write(&new, "half a st").unwrap();
    version(1).write(&path).unwrap();
    fs::write(&other, "somebody else's").unwrap();
    symlink(&other, &new).unwrap();
    version(2).write(&path).unwrap();
    assert_eq!(State::read(&path), Ok(version(2)));
    assert_eq!(fs::read_to_string(&other).unwrap(), "somebody else's");
    assert_eq!(names(&folder), ["other", "state.json"]);
}

#[test]
fn a_link_to_a_file_stays_one() {
    let folder = folder("link");
    fs::create_dir(folder.join("disk")).unwrap();
    let (path, real) = (folder.join("state.json"), folder.join("disk/real.json"));
    version(1).write(&real).unwrap();
    symlink("disk/real.json", &path).unwrap();
    version(2).write(&path).unwrap();
    assert_eq!((State::read(&real), State::read(&path)), (Ok(version(2)), Ok(version(2))));
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
    assert_eq!(names(&folder.join("disk")), ["real.json"]);
    // One that leads nowhere is replaced.
    fs::remove_file(&real).unwrap();
    version(3).write(&path).unwrap();
    assert_eq!(State::read(&path), Ok(version(3)));
    assert!(!fs::symlink_metadata(&path).unwrap().is_symlink());
}

#[test]
fn what_cannot_be_written_is_an_error_and_changes_nothing() {
    let folder = folder("unwritable");
    let (socket, inner) = (folder.join("socket"), folder.join("inner"));
    let _listener = UnixListener::bind(&socket).unwrap();
    fs::create_dir(&inner).unwrap();
    // A folder stands in the way of the new version.
    let blocked = folder.join("blocked.json");
    version(1).write(&blocked).unwrap();
    fs::create_dir(folder.join("blocked.json.new")).unwrap();
    for (path, kind) in [
        (socket.clone(), Some(ErrorKind::InvalidInput)),
        (inner, Some(ErrorKind::InvalidInput)),
        (PathBuf::from("/"), Some(ErrorKind::InvalidInput)),
        (folder.join("missing/state.json"), Some(ErrorKind::NotFound)),
        (blocked.clone(), None),
    ] {
        let error = version(2).write(&path).unwrap_err();
        assert!(kind.is_none_or(|kind| error.kind() == kind), "{}: {error:?}", path.display());
    }
    assert_eq!(State::read(&blocked), Ok(version(1)));
    assert_eq!(names(&folder), ["blocked.json", "blocked.json.new", "inner", "socket"]);
}

#[test]
fn what_cannot_be_read_says_why() {
    let folder = folder("unreadable");
    let file = |name: &str, content: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let whole = serde_json::to_vec(&version(9)).unwrap();
    assert_eq!(State::read(&file("whole", &whole)), Ok(version(9)));
    assert!(reason(&file("cut", &whole[..whole.len() - 1])).starts_with("ends too early"));
    assert!(reason(&file("empty", b"")).starts_with("ends too early"));
    let long = file("long", &whole);
    File::options().write(true).open(&long).unwrap().set_len(64 * 1024 * 1024 + 1).unwrap();
    assert_eq!(reason(&long), "is larger than 67108864 bytes");
    assert_eq!(reason(&folder), "is not a regular file");
    let _listener = UnixListener::bind(folder.join("socket")).unwrap();
    assert_eq!(reason(&folder.join("socket")), "is not a regular file");
    assert!(reason(&folder.join("whole/state.json")).starts_with("cannot be read: "));
    symlink("loop", folder.join("loop")).unwrap();
    assert!(reason(&folder.join("loop")).starts_with("cannot be read: "));
}
