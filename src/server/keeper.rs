//! What a restart has to know: reads the state file at the start, writes it while the gateway runs and at its end.
//!
//! The format is `state`'s, what is remembered is `shaping`'s; here is when, and what is said about it in the log.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use futures_lite::future;

use super::reload::Front;
use crate::config::{self, Secret};
use crate::deadline::within;
use crate::log;
use crate::provider::Provider;
use crate::shaping::lane::Past;
use crate::state::{State, Unknown, fingerprint};

/// Between two writes, if there is something to write.
const WRITE_EVERY: Duration = Duration::from_secs(5);

/// What may have been sent without being in the file at an end without warning: since the last write, and while a slow disk
/// took its time.
const UNSAVED: Duration = Duration::from_secs(10);

/// Keeps the file.
pub struct Keeper {
    path: PathBuf,
    /// How often each provider had changed at the last write.
    written: Vec<Option<u64>>,
    complained: bool,
}

impl Keeper {
    /// Reads the file and says what it means for each provider's keys. A file that says nothing is put aside: it may be
    /// somebody's own. Blocks for as long as the disk does.
    pub fn open(
        path: &Path,
        providers: &[config::Provider],
    ) -> io::Result<(Keeper, Vec<Vec<Past>>)> {
        let (mut state, problem) = match State::read(path) {
            Ok(state) if state.is_clean() => (Some(state), None),
            Ok(state) => (Some(state), Some("was not written at an orderly end".to_owned())),
            Err(Unknown::Missing) => (None, Some(Unknown::Missing.to_string())),
            Err(damaged) => {
                let aside = put_aside(path).map_err(|error| unwritable(path, &error))?;
                (None, Some(format!("{damaged}; it is now {}", aside.display())))
            }
        };
        if let Some(problem) = problem {
            log::warn(format_args!(
                "the state file {} {problem}: assuming that the limits of the minute are used up",
                path.display()
            ));
        }
        let pasts = providers.iter().map(|provider| pasts(state.as_mut(), provider)).collect();
        Ok((Keeper { path: path.to_owned(), written: Vec::new(), complained: false }, pasts))
    }

    /// Writes for the first time, before anything is sent: from now on the former file would tell too little.
    pub async fn begin(&mut self, front: &Front) -> io::Result<()> {
        self.write(front, false).await.map_err(|error| unwritable(&self.path, &error))
    }

    /// Does the work, and writes what changes meanwhile.
    pub async fn keep(&mut self, front: &Front, work: impl Future<Output = ()>) {
        let (over, ends) = async_channel::bounded::<Infallible>(1);
        let work = async {
            work.await;
            drop(over);
        };
        // A write is never left alone: it might end after the last one.
        let keep = async {
            while within(WRITE_EVERY, ends.recv()).await.is_none() {
                if changes(&front.all_providers()).await != self.written {
                    self.try_to_write(front, false).await;
                }
            }
        };
        future::zip(work, keep).await;
    }

    /// Writes for the last time: nobody sends any more.
    pub async fn end(mut self, front: &Front) {
        front.all_providers().iter().for_each(|provider| provider.close());
        self.try_to_write(front, true).await;
    }

    async fn try_to_write(&mut self, front: &Front, clean: bool) {
        let written = self.write(front, clean).await;
        if let Err(error) = &written
            && !self.complained
        {
            log::warn(format_args!("{}; trying on", unwritable(&self.path, error)));
        }
        self.complained = written.is_err();
    }

    async fn write(&mut self, front: &Front, clean: bool) -> io::Result<()> {
        let providers = &front.all_providers();
        let changes = changes(providers).await;
        let mut state = State::new(SystemTime::now(), clean);
        for provider in providers {
            let memories = provider.memory().await.unwrap_or_default();
            let setup = provider.setup();
            for (lane, memory) in memories.into_iter().enumerate() {
                let key = fingerprint(setup.key(lane).map(Secret::reveal));
                state.push(provider.name(), &key, setup.model_ids(), memory);
            }
        }
        let path = self.path.clone();
        smol::unblock(move || state.write(&path)).await?;
        self.written = changes;
        Ok(())
    }
}

async fn changes(providers: &[Rc<Provider>]) -> Vec<Option<u64>> {
    let mut changes = Vec::with_capacity(providers.len());
    for provider in providers {
        changes.push(provider.changes().await);
    }
    changes
}

fn put_aside(path: &Path) -> io::Result<PathBuf> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    fs::rename(path, &aside)?;
    Ok(aside.into())
}

fn unwritable(path: &Path, error: &io::Error) -> io::Error {
    io::Error::other(format!("the state file {} can't be written: {error}", path.display()))
}

fn pasts(state: Option<&mut State>, provider: &config::Provider) -> Vec<Past> {
    let lanes = 0..provider.api_keys.len().max(1);
    let Some(state) = state else { return lanes.map(|_| Past::Lost).collect() };
    let (elapsed, unsaved) =
        (state.elapsed(SystemTime::now()), (!state.is_clean()).then_some(UNSAVED));
    let ids = || provider.models.iter().map(|model| model.id.as_str());
    let past = |lane| {
        let key = fingerprint(provider.api_keys.get(lane).map(Secret::reveal));
        match state.take(&provider.name, &key, ids()) {
            Some(memory) => Past::Remembered { memory, elapsed, unsaved },
            None => Past::Lost,
        }
    };
    lanes.map(past).collect()
}
