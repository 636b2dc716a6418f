//! Checkpoints in the data folder: `checkpoints/MODEL/STEP/`, listed only when whole.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_compute_proto::v1;
use candle_models::training::checkpoint::{self, FileEntry, Library};

use crate::app::App;
use crate::commit_log::FileChange;
use crate::data_folder::{self, DataFolder, Staged};
use crate::error::{Error, Result};
use crate::evaluations;
use crate::names::{self, ModelKey};
use crate::owner::ModelHandle;
use crate::tokenizers;

/// Model or adapter ([`ModelKey::to_text`]) and step: what a checkpoint is known by.
pub(crate) type Key = (String, u64);

/// Holds the model's name, which the folder's own name cannot always tell.
const NAME_FILE: &str = "model_name";

/// The published checkpoints.
#[derive(Debug)]
pub(crate) struct CheckpointStore {
    folder: Arc<DataFolder>,
    published: Mutex<BTreeMap<Key, Published>>,
}

/// A published checkpoint.
#[derive(Debug, Clone)]
struct Published {
    row: v1::Checkpoint,
    /// What its manifest lists.
    listed: Arc<[FileEntry]>,
}

/// A checkpoint that was written but not published.
#[derive(Debug)]
pub(crate) struct StagedCheckpoint {
    /// Its row, with the path that it will have.
    pub(crate) row: v1::Checkpoint,
    /// What its manifest lists.
    listed: Arc<[FileEntry]>,
    /// Where it lies.
    pub(crate) files: Staged,
}

impl StagedCheckpoint {
    /// What it will be known by.
    pub(crate) fn key(&self) -> Key {
        (self.row.model.clone(), self.row.step)
    }
}

impl CheckpointStore {
    /// Finds the checkpoints of `folder`. Those that are not whole are left alone and not listed.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(crate) fn open(folder: Arc<DataFolder>) -> Result<Self> {
        let store = Self {
            folder,
            published: Mutex::default(),
        };
        let root = store.folder.path("checkpoints");
        let failed = |error| Error::io("reading the checkpoints", error);
        for model in subfolders(&root).map_err(failed)? {
            let Ok(name) = std::fs::read_to_string(model.join(NAME_FILE)) else {
                continue;
            };
            for path in subfolders(&model).map_err(failed)? {
                match read_row(&name, &path) {
                    Ok((mut row, listed)) => {
                        row.path = store.relative_path(&name, row.step);
                        let key = (name.clone(), row.step);
                        store.lock().insert(key, Published { row, listed });
                    }
                    Err(reason) => {
                        tracing::warn!(path = %path.display(), reason, "a damaged checkpoint is not listed");
                    }
                }
            }
        }
        Ok(store)
    }

    /// The published checkpoints in the order of model and step.
    pub(crate) fn list(&self) -> Vec<v1::Checkpoint> {
        let published: Vec<Published> = self.lock().values().cloned().collect();
        let with_shared = |published: Published| v1::Checkpoint {
            shared_bytes: shared_bytes(&self.folder.path(&published.row.path), &published.listed),
            ..published.row
        };
        published.into_iter().map(with_shared).collect()
    }

    /// The files that a new checkpoint may share.
    pub(crate) fn library(&self) -> Library {
        let mut library = Library::default();
        for published in self.lock().values() {
            library.add(&self.folder.path(&published.row.path), &published.listed);
        }
        library
    }

    /// Whether a checkpoint is published.
    pub(crate) fn contains(&self, key: &Key) -> bool {
        self.lock().contains_key(key)
    }

    /// The folder of a published checkpoint.
    pub(crate) fn path(&self, key: &Key) -> Option<PathBuf> {
        self.contains(key)
            .then(|| self.folder.path(self.relative_path(&key.0, key.1)))
    }

    /// A place for a checkpoint that is about to be written.
    pub(crate) fn stage(&self) -> Staged {
        self.folder.stage()
    }

    /// The checkpoint that was written to `files`.
    ///
    /// # Errors
    /// `Internal` when what was written cannot be read.
    pub(crate) fn describe(&self, model: &str, files: Staged) -> Result<StagedCheckpoint> {
        let (mut row, listed) = read_row(model, files.path()).map_err(Error::Internal)?;
        row.path = self.relative_path(model, row.step);
        row.shared_bytes = shared_bytes(files.path(), &listed);
        Ok(StagedCheckpoint { row, listed, files })
    }

    /// Does what could make publishing a checkpoint fail for want of space.
    pub(crate) fn prepare(&self, staged: &StagedCheckpoint) -> Result<()> {
        let row = &staged.row;
        make_parent(&self.folder, &row.path, &row.model).map_err(|error| publishing(row, error))
    }

    /// Publishes a checkpoint: durable when this returns.
    pub(crate) fn publish(&self, staged: &StagedCheckpoint) -> Result<()> {
        let row = &staged.row;
        self.prepare(staged)?;
        data_folder::rename(staged.files.path(), &self.folder.path(&row.path))
            .map_err(|error| publishing(row, error))?;
        let published = Published {
            row: row.clone(),
            listed: Arc::clone(&staged.listed),
        };
        self.lock().insert(staged.key(), published);
        Ok(())
    }

    /// A staged checkpoint in the commit log's form.
    pub(crate) fn creation(&self, staged: &StagedCheckpoint) -> FileChange {
        FileChange {
            model: staged.row.model.clone(),
            step: staged.row.step,
            staged: self.folder.relative(staged.files.path()),
            path: staged.row.path.clone(),
        }
    }

    /// The deletion of a checkpoint in the commit log's form.
    pub(crate) fn deletion(&self, key: &Key) -> FileChange {
        FileChange {
            model: key.0.clone(),
            step: key.1,
            staged: String::new(),
            path: self.relative_path(&key.0, key.1),
        }
    }

    /// Takes a published checkpoint away. Its files are deleted when the returned value is dropped; until then
    /// [`publish`](Self::publish) brings it back.
    pub(crate) fn remove(&self, key: &Key) -> Result<StagedCheckpoint> {
        let published = self.lock().get(key).cloned();
        let Published { row, listed } = published.ok_or_else(|| not_found(key))?;
        let files = self.folder.stage();
        data_folder::rename(&self.folder.path(&row.path), files.path())
            .map_err(|error| Error::io(format!("deleting the checkpoint {}", row.path), error))?;
        self.lock().remove(key);
        Ok(StagedCheckpoint { row, listed, files })
    }

    fn relative_path(&self, model: &str, step: u64) -> String {
        format!("checkpoints/{}/{step}", names::encode(model))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Key, Published>> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes of a checkpoint's files that have other names, too.
fn shared_bytes(folder: &Path, listed: &[FileEntry]) -> u64 {
    let shared = listed.iter().filter(|file| {
        let data = std::fs::metadata(folder.join(&file.name));
        data.is_ok_and(|data| data.nlink() > 1)
    });
    shared.map(|file| file.bytes).sum()
}

/// Makes the folder of a model's checkpoints, with the model's name in it.
fn make_parent(folder: &DataFolder, path: &str, model: &str) -> std::io::Result<()> {
    match folder.path(path).parent() {
        Some(parent) if !parent.join(NAME_FILE).exists() => {
            data_folder::make_durable_folder(parent)?;
            data_folder::write_file(&folder.stage(), &parent.join(NAME_FILE), model.as_bytes())
        }
        _ => Ok(()),
    }
}

fn publishing(row: &v1::Checkpoint, error: std::io::Error) -> Error {
    Error::io(format!("publishing the checkpoint {}", row.path), error)
}

/// Finishes what a committed transaction does to checkpoints, evaluations and tokenizers, should a crash have come in between. Called before staging is
/// emptied.
///
/// # Errors
/// `Io`.
pub(crate) fn finish(folder: &DataFolder, changes: &[FileChange]) -> Result<()> {
    for change in changes {
        let (staged, target) = (folder.path(&change.staged), folder.path(&change.path));
        let finished = match (change.staged.is_empty(), target.exists()) {
            // It replaces the one that there is.
            (false, _) if staged.exists() && tokenizers::holds(&change.path) => data_folder::rename(&staged, &target),
            (false, false) if staged.exists() && evaluations::holds(&change.path) => {
                data_folder::rename(&staged, &target)
            }
            (false, false) if staged.exists() => {
                make_parent(folder, &change.path, &change.model).and_then(|()| data_folder::rename(&staged, &target))
            }
            (true, true) if evaluations::holds(&change.path) => std::fs::remove_file(&target),
            (true, true) => std::fs::remove_dir_all(&target),
            _ => continue,
        };
        finished.map_err(|error| Error::io(format!("finishing the commit of {}", change.path), error))?;
        tracing::info!(
            path = change.path,
            "finished what a committed transaction does to a file"
        );
    }
    Ok(())
}

/// The error for a checkpoint that there is not.
pub(crate) fn not_found(key: &Key) -> Error {
    Error::NotFound {
        kind: "checkpoint",
        name: format!("{}/{}", key.0.replace('\n', "/"), key.1),
    }
}

/// The error for a checkpoint that there is already.
pub(crate) fn taken(key: &Key) -> Error {
    Error::NameTaken {
        kind: "checkpoint",
        name: format!("{}/{}", key.0.replace('\n', "/"), key.1),
    }
}

/// A row of the store as clients see it.
pub(crate) fn published_row(row: v1::Checkpoint) -> v1::Checkpoint {
    let ModelKey { model, adapter } = ModelKey::from_text(&row.model);
    v1::Checkpoint {
        model,
        adapter: adapter.unwrap_or_default(),
        ..row
    }
}

fn subfolders(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(path)?.collect::<std::io::Result<Vec<_>>>()?;
    Ok(entries
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect())
}

/// Reads a checkpoint's manifest and checks that every file is there with its size. Contents are checked when it is
/// restored.
fn read_row(model: &str, path: &Path) -> Result<(v1::Checkpoint, Arc<[FileEntry]>), String> {
    let (manifest, saved) = checkpoint::read_manifest(path).map_err(|error| error.to_string())?;
    for file in &manifest.files {
        let found = std::fs::metadata(path.join(&file.name))
            .map_err(|error| format!("{}: {error}", file.name))?
            .len();
        if found != file.bytes {
            return Err(format!("{} has {found} bytes, not {}", file.name, file.bytes));
        }
    }
    let row = v1::Checkpoint {
        model: model.to_owned(),
        tag: manifest.tag,
        step: manifest.step,
        bytes: saved.bytes,
        sha256: saved.sha256,
        path: String::new(),
        adapter: String::new(),
        created_at: Some(prost_types::Timestamp {
            seconds: manifest.created_at,
            nanos: 0,
        }),
        shared_bytes: 0,
    };
    Ok((row, manifest.files.into()))
}

impl App {
    /// The files that a new checkpoint of a model may share: those of all checkpoints, and of the model's base in the commit
    /// log.
    pub(crate) fn library(&self, model: &ModelHandle) -> Library {
        let mut library = self.checkpoints.library();
        if let Some(folder) = self.log.as_ref().and_then(|log| log.base_of(model.id()))
            && let Ok((manifest, _)) = checkpoint::read_manifest(&folder)
        {
            library.add(&folder, &manifest.files);
        }
        library
    }
}
