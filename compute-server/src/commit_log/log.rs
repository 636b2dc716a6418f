//! The log of a running server.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message as _;

use super::file::LogFile;
use super::frame::{self, MAGIC};
use super::messages::{Entry, FileChange, Header, Kind, LogBase, Published, origin};
use super::reading::{self, Recovered};
use super::rewriting;
use super::tracking::Tracks;
use crate::config::LogLimits;
use crate::data_folder::{self, DataFolder};
use crate::error::{Error, Result};

/// Published transactions that a rewritten log remembers.
const REMEMBERED: usize = 4096;
/// A log shorter than this is not worth rewriting.
const LEAST_REWRITTEN: u64 = 1 << 20;
/// A checkpoint becomes a model's base when it saves this fraction of what a base may leave to be replayed.
const WORTHWHILE: u64 = 16;

/// What a frame says about a model.
#[derive(Debug)]
pub(crate) enum Item {
    /// Where its replay begins; everything up to frame `through` is included.
    Base {
        /// The model's number.
        model: u64,
        /// The base.
        base: Box<LogBase>,
        /// The last frame that it includes; `None`: all before this one.
        through: Option<u64>,
    },
    /// What a transaction changed.
    Changes {
        /// The model's number.
        model: u64,
        /// The encoded changes.
        data: Vec<u8>,
        /// Tokens that a replay has to compute.
        tokens: u64,
    },
    /// It was unloaded.
    Drop {
        /// The model's number.
        model: u64,
    },
    /// Damage concerns it.
    Lost {
        /// The model's number.
        model: u64,
        /// What happened.
        reason: String,
    },
}

/// The log.
#[derive(Debug)]
pub(crate) struct CommitLog {
    folder: Arc<DataFolder>,
    state: Mutex<State>,
    limits: LogLimits,
    simd: String,
}

#[derive(Debug)]
struct State {
    file: LogFile,
    next: u64,
    tracks: Tracks,
    published: VecDeque<Published>,
    /// Length from which on a rewrite is considered.
    rewrite_at: u64,
}

impl CommitLog {
    /// Opens the log of a data folder, or begins one, and says what it holds.
    ///
    /// # Errors
    /// `Io`; `Internal` for a file that is no log.
    pub(crate) fn open(folder: &Arc<DataFolder>, limits: LogLimits) -> Result<(Self, Recovered)> {
        let failed = |error| Error::io("opening the commit log", error);
        let path = folder.path("commits/log");
        data_folder::make_durable_folder(&folder.path("commits/bases")).map_err(failed)?;
        if !path.exists() {
            data_folder::write_file(&folder.stage(), &path, MAGIC).map_err(failed)?;
        }
        let recovered = reading::scan(&Arc::new(fs::File::open(&path).map_err(failed)?))?;
        let mut tracks = Tracks::default();
        let mut folders = Some(Vec::new());
        for model in &recovered.models {
            let folder = model.folder();
            match (&folder, &mut folders) {
                (Ok(folder), Some(folders)) => folders.extend(folder.clone()),
                _ => folders = None,
            }
            let (base, changes) = model.sizes();
            tracks.base(
                model.id,
                (model.base_number, model.through),
                base,
                folder.ok().flatten(),
            );
            changes.for_each(|(number, bytes, tokens)| tracks.change(model.id, number, bytes, tokens));
        }
        let log = Self {
            folder: Arc::clone(folder),
            state: Mutex::new(State {
                file: LogFile::open(&path, recovered.length).map_err(failed)?,
                next: recovered.number + 1,
                tracks,
                published: VecDeque::new(),
                rewrite_at: LEAST_REWRITTEN,
            }),
            limits,
            simd: candle_kernels_cpu::simd::level().to_string(),
        };
        let published = recovered.published.iter();
        published.for_each(|(transaction, writes)| log.lock().remember(transaction, *writes));
        if let Some(used) = folders {
            log.remove_unused(&used);
        }
        let lost: Vec<Item> = recovered
            .newly_lost
            .iter()
            .map(|(model, reason)| Item::Lost {
                model: *model,
                reason: reason.clone(),
            })
            .collect();
        if !lost.is_empty() {
            log.append("", 0, lost, Vec::new())?;
        }
        Ok((log, recovered))
    }

    /// Variant of the kernels in use.
    pub(crate) fn simd(&self) -> &str {
        &self.simd
    }

    /// Appends a frame and flushes it to the disk; returns its number. Blocks.
    ///
    /// # Errors
    /// `Io`; nothing has changed then.
    pub(crate) fn append(
        &self,
        transaction: &str,
        writes: u64,
        items: Vec<Item>,
        files: Vec<FileChange>,
    ) -> Result<u64> {
        let mut state = self.lock();
        let number = state.next;
        let (entries, data): (Vec<Entry>, Vec<Cow<'_, [u8]>>) = items.iter().map(|item| item.encode(number)).unzip();
        let header = Header {
            number,
            transaction: transaction.to_owned(),
            writes,
            simd: self.simd.clone(),
            entries,
            files,
            earlier: Vec::new(),
        };
        let bytes = data.iter().map(|data| data.len() as u64).sum();
        let first = frame::encode(&header, bytes);
        let pieces = std::iter::once(first.as_slice()).chain(data.iter().map(AsRef::as_ref));
        state.file.append(pieces)?;
        state.next += 1;
        if !transaction.is_empty() {
            state.remember(transaction, writes);
        }
        let unused: Vec<String> = items.iter().filter_map(|item| state.track(item, number)).collect();
        self.rewrite_if_due(&mut state, number);
        drop(state);
        unused.iter().for_each(|folder| self.remove_base(folder));
        Ok(number)
    }

    /// The folder for a new base of a model.
    pub(crate) fn base_folder(&self, model: u64) -> (String, PathBuf) {
        let name = format!("{model}.{}", self.lock().next);
        let path = self.folder.path("commits/bases").join(&name);
        (name, path)
    }

    /// The folder of the base called `name`.
    pub(crate) fn base_path(&self, name: &str) -> PathBuf {
        self.folder.path("commits/bases").join(name)
    }

    /// The folder of a model's base, if that is a saved state.
    pub(crate) fn base_of(&self, model: u64) -> Option<PathBuf> {
        let name = self.lock().tracks.0.get(&model)?.folder.clone()?;
        Some(self.base_path(&name))
    }

    /// Deletes the folder of a base.
    pub(crate) fn remove_base(&self, name: &str) {
        let path = self.base_path(name);
        if let Err(error) = fs::remove_dir_all(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "a base that is not needed any more was not removed; the next start will");
        }
    }

    /// Whether it is time to save a new base of a model, so that the replay stays short. Only one caller is told so until
    /// it calls [`saved`](Self::saved).
    pub(crate) fn is_due(&self, model: u64) -> bool {
        let mut state = self.lock();
        let (bytes, tokens) = state.tracks.since_base(model);
        let due = bytes > self.limits.bytes || tokens > self.limits.tokens;
        let Some(track) = state.tracks.0.get_mut(&model).filter(|track| due && !track.saving) else {
            return false;
        };
        track.saving = true;
        true
    }

    /// Whether a checkpoint of a model, made for another reason, shortens the replay by enough to become its base. As
    /// [`is_due`](Self::is_due) otherwise.
    pub(crate) fn is_worthwhile(&self, model: u64) -> bool {
        let mut state = self.lock();
        let (bytes, tokens) = state.tracks.since_base(model);
        let enough = bytes > self.limits.bytes / WORTHWHILE || tokens > self.limits.tokens / WORTHWHILE;
        let Some(track) = state.tracks.0.get_mut(&model).filter(|track| enough && !track.saving) else {
            return false;
        };
        track.saving = true;
        true
    }

    /// Ends what [`is_due`](Self::is_due) began.
    pub(crate) fn saved(&self, model: u64) {
        if let Some(track) = self.lock().tracks.0.get_mut(&model) {
            track.saving = false;
        }
    }

    /// Whether a model has changes that its base does not include.
    pub(crate) fn has_changes(&self, model: u64) -> bool {
        self.lock().tracks.since_base(model).0 > 0
    }

    /// Whether a model is in the log.
    pub(crate) fn knows(&self, model: u64) -> bool {
        self.lock().tracks.0.contains_key(&model)
    }

    /// Replaces the file by one without what nobody needs, where that at least halves it.
    fn rewrite_if_due(&self, state: &mut State, last: u64) {
        let length = state.file.length;
        if length < state.rewrite_at || state.tracks.needed() > length / 2 {
            return;
        }
        let rewrite = |state: &mut State| -> std::io::Result<()> {
            let (staged, path) = (self.folder.stage(), self.folder.path("commits/log"));
            let earlier = state.published.iter().cloned().collect();
            let written = rewriting::rewrite(&state.file.file, length, &state.tracks, earlier, last, staged.path())?;
            data_folder::rename(staged.path(), &path)?;
            state.file = LogFile::open(&path, written)?;
            Ok(())
        };
        match rewrite(state) {
            Ok(()) => state.rewrite_at = LEAST_REWRITTEN.max(2 * state.file.length),
            Err(error) => {
                // A full disk, for instance: the old log is as good as it was.
                tracing::warn!(%error, "the commit log could not be shortened");
                state.rewrite_at = 2 * length;
            }
        }
    }

    /// Removes folders of bases that a crash left behind.
    fn remove_unused(&self, used: &[String]) {
        let entries = fs::read_dir(self.folder.path("commits/bases"))
            .into_iter()
            .flatten()
            .flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names
            .filter(|name| !used.contains(name))
            .for_each(|name| self.remove_base(&name));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Moves a log that this server does not go on with out of the way, so that an old state never comes back unasked.
///
/// # Errors
/// `Io`.
pub(crate) fn set_aside(folder: &DataFolder) -> Result<()> {
    let present = folder.path("commits");
    if !present.exists() {
        return Ok(());
    }
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let name = format!("commits.set-aside.{}", seconds.unwrap_or_default().as_secs());
    data_folder::rename(&present, &folder.path(&name))
        .map_err(|error| Error::io("setting the commit log aside", error))?;
    tracing::warn!(
        folder = name,
        "with --durability checkpoint the commit log of an earlier server is not used; its folder can be deleted, or moved back"
    );
    Ok(())
}

impl State {
    fn remember(&mut self, transaction: &str, writes: u64) {
        self.published.push_back(Published {
            transaction: transaction.to_owned(),
            writes,
        });
        if self.published.len() > REMEMBERED {
            self.published.pop_front();
        }
    }

    /// Notes what was appended; returns the folder of a base that is not needed any more.
    fn track(&mut self, item: &Item, number: u64) -> Option<String> {
        match item {
            Item::Base { model, base, through } => {
                let folder = match base.origin.as_ref().and_then(|origin| origin.kind.as_ref()) {
                    Some(origin::Kind::Saved(folder)) => Some(folder.clone()),
                    _ => None,
                };
                let through = through.unwrap_or(number - 1);
                self.tracks
                    .base(*model, (number, through), base.encoded_len() as u64, folder)
            }
            Item::Changes { model, data, tokens } => {
                self.tracks.change(*model, number, data.len() as u64, *tokens);
                None
            }
            Item::Drop { model } => self.tracks.0.remove(model).and_then(|track| track.folder),
            Item::Lost { .. } => None,
        }
    }
}

impl Item {
    /// The entry of a frame, and its data.
    fn encode(&self, number: u64) -> (Entry, Cow<'_, [u8]>) {
        let (model, kind, data): (u64, Kind, Cow<'_, [u8]>) = match self {
            Self::Base { model, base, .. } => (*model, Kind::Base, base.encode_to_vec().into()),
            Self::Changes { model, data, .. } => (*model, Kind::Changes, data.as_slice().into()),
            Self::Drop { model } => (*model, Kind::Drop, Cow::default()),
            Self::Lost { model, reason } => (*model, Kind::Lost, reason.as_bytes().into()),
        };
        let entry = Entry {
            model,
            kind: kind.into(),
            bytes: data.len() as u64,
            checksum: crc32fast::hash(&data),
            tokens: match self {
                Self::Changes { tokens, .. } => *tokens,
                _ => 0,
            },
            through: match self {
                Self::Base { through, .. } => through.unwrap_or(number - 1),
                _ => 0,
            },
        };
        (entry, data)
    }
}
