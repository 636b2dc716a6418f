//! Evaluations in the data folder: a file each, `evaluations/ID`, listed only when whole.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_compute_proto::v1;
use prost::Message as _;

use crate::commit_log::FileChange;
use crate::data_folder::{self, DataFolder, Staged};
use crate::error::{Error, Result};

/// The folder, below the data folder.
const FOLDER: &str = "evaluations";

/// Bytes before the message: its CRC-32, little-endian.
const CHECKSUM: usize = size_of::<u32>();

/// The published evaluations.
#[derive(Debug)]
pub(crate) struct EvaluationStore {
    folder: Arc<DataFolder>,
    next: AtomicU64,
    published: Mutex<BTreeMap<u64, v1::Evaluation>>,
}

/// An evaluation that was written but not published.
#[derive(Debug)]
pub(crate) struct StagedEvaluation {
    row: Box<v1::Evaluation>,
    file: Staged,
}

impl StagedEvaluation {
    /// Its id.
    pub(crate) fn id(&self) -> u64 {
        self.row.id
    }

    /// Its row.
    pub(crate) fn row(&self) -> &v1::Evaluation {
        &self.row
    }
}

impl EvaluationStore {
    /// Finds the evaluations of `folder`. Those that are not whole are left alone and not listed.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(crate) fn open(folder: Arc<DataFolder>) -> Result<Self> {
        let failed = |error| Error::io("reading the evaluations", error);
        let mut published = BTreeMap::new();
        let mut last = 0;
        for entry in std::fs::read_dir(folder.path(FOLDER)).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let id = path.file_name().and_then(|name| name.to_str()?.parse::<u64>().ok());
            let Some(id) = id else { continue };
            last = last.max(id);
            match decode(&std::fs::read(&path).map_err(failed)?).filter(|row| row.id == id) {
                Some(row) => drop(published.insert(id, row)),
                None => tracing::warn!(path = %path.display(), "a damaged evaluation is not listed"),
            }
        }
        Ok(Self {
            folder,
            next: AtomicU64::new(last + 1),
            published: Mutex::new(published),
        })
    }

    /// The published evaluations in the order of their ids.
    pub(crate) fn list(&self) -> Vec<v1::Evaluation> {
        self.lock().values().cloned().collect()
    }

    /// Whether an evaluation is published.
    pub(crate) fn contains(&self, id: u64) -> bool {
        self.lock().contains_key(&id)
    }

    /// Gives an evaluation its id and writes it: durable once it is published.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn stage(&self, mut row: v1::Evaluation) -> Result<StagedEvaluation> {
        row.id = self.next.fetch_add(1, Ordering::Relaxed);
        let message = row.encode_to_vec();
        let mut bytes = crc32fast::hash(&message).to_le_bytes().to_vec();
        bytes.extend(message);
        let file = self.folder.stage();
        data_folder::write_new(file.path(), &bytes).map_err(|error| Error::io("writing an evaluation", error))?;
        let row = Box::new(row);
        Ok(StagedEvaluation { row, file })
    }

    /// Publishes an evaluation: durable when this returns.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn publish(&self, staged: &StagedEvaluation) -> Result<()> {
        let id = staged.id();
        data_folder::rename(staged.file.path(), &self.folder.path(relative_path(id)))
            .map_err(|error| Error::io(format!("publishing the evaluation {id}"), error))?;
        self.lock().insert(id, staged.row().clone());
        Ok(())
    }

    /// Takes a published evaluation away. Its file is deleted when the returned value is dropped; until then
    /// [`publish`](Self::publish) brings it back.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    pub(crate) fn remove(&self, id: u64) -> Result<StagedEvaluation> {
        let row = self.lock().get(&id).cloned().ok_or_else(|| not_found(id))?;
        let file = self.folder.stage();
        data_folder::rename(&self.folder.path(relative_path(id)), file.path())
            .map_err(|error| Error::io(format!("deleting the evaluation {id}"), error))?;
        self.lock().remove(&id);
        let row = Box::new(row);
        Ok(StagedEvaluation { row, file })
    }

    /// A staged evaluation in the commit log's form.
    pub(crate) fn creation(&self, staged: &StagedEvaluation) -> FileChange {
        FileChange {
            model: staged.row.model.clone(),
            step: staged.id(),
            staged: self.folder.relative(staged.file.path()),
            path: relative_path(staged.id()),
        }
    }

    /// The deletion of an evaluation in the commit log's form.
    pub(crate) fn deletion(&self, id: u64) -> FileChange {
        FileChange {
            step: id,
            path: relative_path(id),
            ..FileChange::default()
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, v1::Evaluation>> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a path below the data folder is an evaluation's.
pub(crate) fn holds(path: &str) -> bool {
    path.strip_prefix(FOLDER).is_some_and(|rest| rest.starts_with('/'))
}

/// The error for an evaluation that there is not.
pub(crate) fn not_found(id: u64) -> Error {
    Error::NotFound {
        kind: "evaluation",
        name: id.to_string(),
    }
}

fn relative_path(id: u64) -> String {
    format!("{FOLDER}/{id}")
}

fn decode(bytes: &[u8]) -> Option<v1::Evaluation> {
    let (checksum, message) = bytes.split_at_checked(CHECKSUM)?;
    let whole = crc32fast::hash(message).to_le_bytes() == *checksum;
    whole.then(|| v1::Evaluation::decode(message).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evaluations_survive_a_restart_and_damage_is_left_out() {
        let root = tempfile::tempdir().unwrap();
        let evaluation = |model: &str| v1::Evaluation {
            model: model.to_owned(),
            loss: Some(1.5),
            ..Default::default()
        };
        {
            let store = EvaluationStore::open(Arc::new(DataFolder::open(root.path()).unwrap())).unwrap();
            for model in ["a", "b", "c"] {
                store.publish(&store.stage(evaluation(model)).unwrap()).unwrap();
            }
            // Never published, and deleted.
            drop(store.stage(evaluation("d")).unwrap());
            drop(store.remove(1).unwrap());
            assert!(matches!(store.remove(1), Err(Error::NotFound { .. })));
            let back = store.remove(2).unwrap();
            store.publish(&back).unwrap();
        }
        let path = root.path().join("evaluations/3");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let store = EvaluationStore::open(Arc::new(DataFolder::open(root.path()).unwrap())).unwrap();
        let rows = store.list();
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].id, rows[0].model.as_str(), rows[0].loss), (2, "b", Some(1.5)));
        // The damaged one keeps its id.
        assert_eq!(store.stage(evaluation("e")).unwrap().id(), 4);
        assert!(holds("evaluations/4") && !holds("checkpoints/evaluations/4") && !holds("evaluationsx/4"));
    }
}
