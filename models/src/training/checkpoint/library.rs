//! Files of checkpoints that are there already, so that a new one takes no space for what has not changed.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::manifest::FileEntry;

/// Weight files of other checkpoints on the same file system, by the digests of their contents.
#[derive(Clone, Debug, Default)]
pub struct Library {
    files: HashMap<String, PathBuf>,
    tensors: HashSet<String>,
}

impl Library {
    /// Adds the weight files of the checkpoint in `directory`, whose manifest lists `files`.
    pub fn add(&mut self, directory: &Path, files: &[FileEntry]) {
        for file in files.iter().filter(|file| !file.tensors.is_empty()) {
            self.files.insert(file.sha256.clone(), directory.join(&file.name));
            self.tensors
                .extend(file.tensors.iter().map(|tensor| tensor.sha256.clone()));
        }
    }

    /// Whether nothing can be shared.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Whether a tensor of these bytes is there: without, no file that has it can be.
    pub(super) fn has_tensor(&self, sha256: &str) -> bool {
        self.tensors.contains(sha256)
    }

    /// A file of these bytes.
    pub(super) fn file(&self, sha256: &str) -> Option<&Path> {
        self.files.get(sha256).map(PathBuf::as_path)
    }
}
