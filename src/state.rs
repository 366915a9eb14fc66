//! The state file: what the limiters of all providers remember from one run to the next.
//!
//! Owns the file's format, and that it is whole at every moment: a new version takes the place of the old one at once. Does not
//! know what a memory says (`shaping`), nor when the file is due. Reading and writing block.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::shaping::books::BooksMemory;
use crate::shaping::limiter::{Learned, Memory};

const VERSION: u64 = 1;
/// No file is larger: a send takes about five bytes, and only those of a rolling day are many.
const LIMIT_BYTES: u64 = 64 * 1024 * 1024;

/// The content of the file.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct State {
    version: u64,
    /// Unix time in milliseconds, rounded up: the time since is never told too long.
    saved_at: u64,
    /// Whether nothing was sent afterwards.
    clean: bool,
    /// By name.
    providers: BTreeMap<String, Vec<Lane>>,
}

/// What is remembered of one API key.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
struct Lane {
    key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    learned: Option<Learned>,
    shared: Memory,
    models: BTreeMap<String, Memory>,
}

/// Why there is no state. Its `Display` goes behind the file's name in the log, and shows nothing of what the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unknown {
    /// There is no such file.
    Missing,
    /// It cannot be read, or says what this version does not write.
    Damaged {
        /// In words.
        reason: String,
    },
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unknown::Missing => f.write_str("does not exist yet"),
            Unknown::Damaged { reason } => f.write_str(reason),
        }
    }
}

impl State {
    /// A state without a provider. `clean` says that nothing will be sent after `now`.
    pub fn new(now: SystemTime, clean: bool) -> State {
        let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let saved_at = since_epoch.as_nanos().div_ceil(1_000_000).try_into().unwrap_or(u64::MAX);
        State { version: VERSION, saved_at, clean, providers: BTreeMap::new() }
    }

    /// Adds a provider's next key: its [`fingerprint`], and what its books remember of these models.
    pub fn push<'a>(
        &mut self,
        provider: &str,
        fingerprint: &str,
        models: impl IntoIterator<Item = &'a str>,
        memory: BooksMemory,
    ) {
        let models = models.into_iter().map(str::to_owned).zip(memory.models).collect();
        let lane = Lane {
            key: fingerprint.to_owned(),
            learned: memory.learned,
            shared: memory.shared,
            models,
        };
        self.providers.entry(provider.to_owned()).or_default().push(lane);
    }

    /// Takes out what is remembered of a provider's key, for these models in their order; of a model that is not in the file that
    /// is nothing. `None` where the key is not in the file. Of two keys with one fingerprint the first comes first.
    pub fn take<'a>(
        &mut self,
        provider: &str,
        fingerprint: &str,
        models: impl IntoIterator<Item = &'a str>,
    ) -> Option<BooksMemory> {
        let lanes = self.providers.get_mut(provider)?;
        let index = lanes.iter().position(|lane| lane.key == fingerprint)?;
        let mut lane = lanes.remove(index);
        let models =
            models.into_iter().map(|model| lane.models.remove(model).unwrap_or_default()).collect();
        Some(BooksMemory { shared: lane.shared, models, learned: lane.learned })
    }

    /// Whether nothing was sent after this was written: the gateway ended in order.
    pub fn is_clean(&self) -> bool {
        self.clean
    }

    /// How much time has passed since; none where the clock shows an earlier one, as that of a machine without a battery does
    /// after its start.
    pub fn elapsed(&self, now: SystemTime) -> Duration {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        now.saturating_sub(Duration::from_millis(self.saved_at))
    }

    /// Reads a file that [`State::write`] has written.
    pub fn read(path: &Path) -> Result<State, Unknown> {
        let damaged = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Unknown::Missing,
            _ => Unknown::Damaged { reason: format!("cannot be read: {error}") },
        };
        // Asked before it is opened: opening a pipe would wait for its writer.
        if !fs::metadata(path).map_err(damaged)?.is_file() {
            return Err(Unknown::Damaged { reason: "is not a regular file".to_owned() });
        }
        let mut json = Vec::new();
        File::open(path)
            .and_then(|file| file.take(LIMIT_BYTES + 1).read_to_end(&mut json))
            .map_err(damaged)?;
        if json.len() as u64 > LIMIT_BYTES {
            return Err(Unknown::Damaged { reason: format!("is larger than {LIMIT_BYTES} bytes") });
        }
        State::parse(&json)
    }

    /// The state that a file's content says.
    pub fn parse(json: &[u8]) -> Result<State, Unknown> {
        /// Told apart first: what else a later version says is not known.
        #[derive(Deserialize)]
        struct Version {
            version: u64,
        }
        let Version { version } =
            serde_json::from_slice(json).map_err(|error| damaged_at(&error))?;
        if version != VERSION {
            let reason =
                format!("is of version {version}, and this limitrate reads version {VERSION}");
            return Err(Unknown::Damaged { reason });
        }
        serde_json::from_slice(json).map_err(|error| damaged_at(&error))
    }

    /// Puts this into the file, for its owner's eyes only. Whatever happens, there is the old version or the new one, and
    /// nothing beside it but, after a crash, a `.new` that the next write replaces. A link that leads to a file is followed; one
    /// that leads nowhere is replaced.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let path = match fs::canonicalize(path) {
            Ok(real) if !real.is_file() => return Err(invalid("is not a regular file")),
            Ok(real) => real,
            Err(_) => path.to_owned(),
        };
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(invalid("is not a file's name"));
        };
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let mut new_name = name.to_owned();
        new_name.push(".new");
        let new = folder.join(new_name);
        let replaced = self.write_new(&new).and_then(|()| fs::rename(&new, &path));
        if replaced.is_err() {
            let _ = fs::remove_file(&new);
        }
        replaced?;
        // The name is on the disk only when the folder is.
        File::open(folder)?.sync_all()
    }

    fn write_new(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // A file of our own, with our own mode, and never through somebody's link.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()
    }
}

/// Tells a provider's keys apart in the file, also after they were put into another order: 16 bits of FNV-1a, folded. So many keys
/// have the same one that it says nothing about the key. `none` where there is no key.
pub fn fingerprint(key: Option<&str>) -> String {
    let Some(key) = key else { return "none".to_owned() };
    let hash = key
        .bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    format!("{:04x}", (hash >> 16) ^ (hash & 0xffff))
}

/// Without the parser's words, which quote the file.
fn damaged_at(error: &serde_json::Error) -> Unknown {
    let what = if error.is_eof() {
        "ends too early"
    } else {
        "says something that limitrate does not write"
    };
    Unknown::Damaged {
        reason: format!("{what} (line {}, column {})", error.line(), error.column()),
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn at(millis: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(millis)
    }

    /// A memory that differs from those of other numbers.
    fn memory(cooldown_ms: u64) -> Memory {
        serde_json::from_value(json!({"cooldown_ms": cooldown_ms, "window": [1, 2]})).unwrap()
    }

    fn books(shared: u64, models: &[u64]) -> BooksMemory {
        let models = models.iter().copied().map(memory).collect();
        BooksMemory { shared: memory(shared), models, learned: None }
    }

    fn sample() -> State {
        let mut state = State::new(at(1_700_000_000_000), true);
        state.push("groq", &fingerprint(Some("sk-1")), ["a", "b"], books(1, &[2, 3]));
        state.push("groq", &fingerprint(Some("sk-2")), ["a", "b"], books(4, &[5, 6]));
        state.push("local", &fingerprint(None), [], books(7, &[]));
        state
    }

    fn reason(json: &[u8]) -> String {
        match State::parse(json) {
            Err(Unknown::Damaged { reason }) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_format_stands() {
        let mut state = State::new(at(5), false);
        let mut memory = books(8, &[0]);
        memory.learned =
            Some(serde_json::from_value(json!({"rate_ppm": 500_000, "quiet_in_ms": 9})).unwrap());
        state.push("groq", "1f2e", ["m"], memory);
        let file = json!({
            "version": 1,
            "saved_at": 5,
            "clean": false,
            "providers": {"groq": [{
                "key": "1f2e",
                "learned": {"rate_ppm": 500_000, "quiet_in_ms": 9},
                "shared": {"cooldown_ms": 8, "window": [1, 2]},
                "models": {"m": {"window": [1, 2]}},
            }]},
        });
        assert_eq!(serde_json::to_value(&state).unwrap(), file);
        assert_eq!(State::parse(file.to_string().as_bytes()), Ok(state));
    }

    #[test]
    fn a_key_finds_its_own_memory_in_whatever_order_it_comes() {
        let mut state = sample();
        let two = fingerprint(Some("sk-2"));
        let found = state.take("groq", &two, ["b", "new", "a"]).unwrap();
        assert_eq!(
            found,
            BooksMemory { models: vec![memory(6), Memory::default(), memory(5)], ..books(4, &[]) }
        );
        assert_eq!(state.take("groq", &two, ["a"]), None, "it is taken once");
        assert_eq!(state.take("groq", "none", ["a"]), None);
        assert_eq!(state.take("unknown", "none", ["a"]), None);
        assert_eq!(state.take("groq", &fingerprint(Some("sk-1")), ["a"]), Some(books(1, &[2])));
        assert_eq!(state.take("local", &fingerprint(None), []), Some(books(7, &[])));
    }

    #[test]
    fn keys_with_one_fingerprint_keep_their_order() {
        let mut state = State::new(at(0), true);
        (1..3).for_each(|n| state.push("p", "beef", [], books(n, &[])));
        let shared = [(); 3].map(|()| state.take("p", "beef", []).map(|books| books.shared));
        assert_eq!(shared, [Some(memory(1)), Some(memory(2)), None]);
    }

    #[test]
    fn fingerprints_are_stable_and_short() {
        // FNV-1a's own vectors, folded: 811c9dc5, e40c292c, bf9cf968.
        for (key, want) in
            [(None, "none"), (Some(""), "1cd9"), (Some("a"), "cd20"), (Some("foobar"), "46f4")]
        {
            assert_eq!(fingerprint(key), want, "{key:?}");
        }
    }

    #[test]
    fn the_time_since_is_never_too_long_and_never_negative() {
        let nanos = Duration::from_nanos;
        for (saved, now, want) in [
            (at(1000), at(1500), Duration::from_millis(500)),
            (at(1000) + nanos(1), at(1500), Duration::from_millis(499)),
            (at(1000), at(1000) + nanos(7), nanos(7)),
            (at(1000), at(999), Duration::ZERO),
            (at(1000), UNIX_EPOCH - nanos(1), Duration::ZERO),
            (UNIX_EPOCH - nanos(1), at(3), Duration::from_millis(3)),
        ] {
            assert_eq!(State::new(saved, true).elapsed(now), want, "{saved:?} {now:?}");
        }
        let far = r#"{"version":1,"saved_at":18446744073709551615,"clean":true,"providers":{}}"#;
        assert_eq!(State::parse(far.as_bytes()).unwrap().elapsed(at(5)), Duration::ZERO);
    }

    #[test]
    fn what_it_does_not_understand_is_damaged() {
        let whole = serde_json::to_value(sample()).unwrap();
        let with = |pointer: &str, value: Value| {
            let mut json = whole.clone();
            *json.pointer_mut(pointer).unwrap() = value;
            reason(json.to_string().as_bytes())
        };
        let strange = "says something that limitrate does not write (line 1, column ";
        for (pointer, value) in [
            ("/saved_at", json!(-1)),
            ("/saved_at", json!(1.5)),
            ("/clean", json!("sk-secret")),
            ("/providers/local/0/key", json!(7)),
            ("/providers/local/0/shared", json!({"windw": [1]})),
            ("/providers/local/0/shared/window/1", json!(-2)),
            ("/providers/local/0/shared/window", json!("sk-secret")),
            ("/providers/groq/0/models/a", json!({"tokens": [[1, 2, 3]]})),
            ("/providers/groq/0/models/a", json!({"cadence": {"missing_ns": 1}})),
        ] {
            let reason = with(pointer, value);
            assert!(
                reason.starts_with(strange) && !reason.contains("secret"),
                "{pointer}: {reason}"
            );
        }
        let later = with("/version", json!(2));
        assert_eq!(later, "is of version 2, and this limitrate reads version 1");
        let later = reason(br#"{"version":2,"unheard":[]}"#);
        assert_eq!(later, "is of version 2, and this limitrate reads version 1");
        assert_eq!(reason(b""), "ends too early (line 1, column 0)");
        for garbage in [&b"\0\0\0\0"[..], b"[]", b"version: 1\n", &[b'['; 100_000]] {
            assert!(reason(garbage).starts_with(strange));
        }
    }

    proptest! {
        /// Cut short anywhere it is damaged; with bytes changed it is damaged or another state, and never a panic.
        #[test]
        fn a_mutated_file_is_damaged_or_a_state(
            cut: prop::sample::Index, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut json = serde_json::to_vec(&sample()).unwrap();
            reason(&json[..cut.index(json.len())]);
            for (index, byte) in changes {
                let index = index.index(json.len());
                json[index] = byte;
            }
            if let Ok(mut state) = State::parse(&json) {
                state.elapsed(at(1_800_000_000_000));
                state.take("groq", &fingerprint(Some("sk-1")), ["a", "b", "c"]);
            }
        }
    }
}
