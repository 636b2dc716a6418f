//! The data folder: its layout, its lock, and writes that survive a power failure.
//!
//! ```text
//! DATA_DIR/lock                          held while a server runs
//! DATA_DIR/checkpoints/MODEL/STEP/       published checkpoints
//! DATA_DIR/evaluations/ID                published evaluations
//! DATA_DIR/tokenizers/NAME/tokenizer.json
//! DATA_DIR/commits/                      the log of committed inputs, see `commit_log`
//! DATA_DIR/staging/                      what no transaction has published; emptied at startup
//! ```

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// The data folder, locked by this process.
#[derive(Debug)]
pub(crate) struct DataFolder {
    root: PathBuf,
    next: AtomicU64,
    /// Held for its lock.
    _lock: File,
}

impl DataFolder {
    /// Makes the folders that are missing and takes the lock.
    ///
    /// # Errors
    /// When another server uses the folder, or it cannot be written.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let what = || format!("data folder {}", root.display());
        fs::create_dir_all(root).map_err(|error| Error::io(what(), error))?;
        let root = root.canonicalize().map_err(|error| Error::io(what(), error))?;
        let lock = File::create(root.join("lock")).map_err(|error| Error::io(what(), error))?;
        if lock.try_lock().is_err() {
            return Err(Error::invalid(format!("{} is used by another server", what())));
        }
        let folder = Self {
            root,
            next: AtomicU64::new(0),
            _lock: lock,
        };
        for name in ["checkpoints", "evaluations", "tokenizers", "staging"] {
            fs::create_dir_all(folder.path(name)).map_err(|error| Error::io(what(), error))?;
        }
        Ok(folder)
    }

    /// A path below the folder.
    pub(crate) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// The part of `path` below the folder.
    pub(crate) fn relative(&self, path: &Path) -> String {
        let relative = path.strip_prefix(&self.root).unwrap_or(path);
        relative.display().to_string()
    }

    /// A new name in `staging`; nothing is made. What is made there is removed when the value is dropped, unless it has
    /// been moved away.
    pub(crate) fn stage(&self) -> Staged {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Staged {
            path: self.path("staging").join(number.to_string()),
        }
    }

    /// Removes what earlier servers left in `staging`.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn clear_staging(&self) -> Result<()> {
        let staging = self.path("staging");
        let clear = || -> std::io::Result<()> {
            for entry in fs::read_dir(&staging)? {
                let path = entry?.path();
                if path.is_dir() {
                    fs::remove_dir_all(path)?
                } else {
                    fs::remove_file(path)?
                }
            }
            Ok(())
        };
        clear().map_err(|error| Error::io("emptying the staging folder", error))
    }
}

/// A file or folder that is not yet, or no longer, part of the published state.
#[derive(Debug)]
pub(crate) struct Staged {
    path: PathBuf,
}

impl Staged {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let removed = if self.path.is_dir() {
            fs::remove_dir_all(&self.path)
        } else {
            fs::remove_file(&self.path)
        };
        if let Err(error) = removed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "a staged file was not removed; the next start will");
        }
    }
}

/// Renames and makes the rename durable. The folder of `to` is made when missing.
pub(crate) fn rename(from: &Path, to: &Path) -> std::io::Result<()> {
    if let Some(parent) = to.parent() {
        make_durable_folder(parent)?;
    }
    fs::rename(from, to)?;
    for folder in [from.parent(), to.parent()].into_iter().flatten() {
        sync_folder(folder)?;
    }
    Ok(())
}

/// Writes `bytes` to a new file, durable but for its name.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Writes `bytes` to `path` by way of a file aside, so that `path` is never seen half-written.
pub(crate) fn write_file(staged: &Staged, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    write_new(staged.path(), bytes)?;
    rename(staged.path(), path)
}

/// Makes `to` a folder with the same files as `from`, which share their bytes.
pub(crate) fn link_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::hard_link(entry.path(), to.join(entry.file_name()))?;
    }
    sync_folder(to)
}

/// Makes a folder that is there after a power failure.
pub(crate) fn make_durable_folder(folder: &Path) -> std::io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(folder)?;
    folder.parent().map_or(Ok(()), sync_folder)
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_locked_and_staging_is_emptied() {
        let root = tempfile::tempdir().unwrap();
        let folder = DataFolder::open(root.path()).unwrap();
        assert!(
            DataFolder::open(root.path())
                .unwrap_err()
                .to_string()
                .contains("another server")
        );
        let staged = folder.stage();
        fs::create_dir(staged.path()).unwrap();
        std::mem::forget(staged);
        drop(folder);
        let folder = DataFolder::open(root.path()).unwrap();
        folder.clear_staging().unwrap();
        assert_eq!(fs::read_dir(folder.path("staging")).unwrap().count(), 0);
    }

    #[test]
    fn staged_files_disappear_unless_they_are_renamed() {
        let root = tempfile::tempdir().unwrap();
        let folder = DataFolder::open(root.path()).unwrap();
        let (kept, dropped) = (folder.stage(), folder.stage());
        write_file(&kept, &folder.path("tokenizers/a/x"), b"1").unwrap();
        fs::write(dropped.path(), b"2").unwrap();
        let gone = dropped.path().to_owned();
        drop((kept, dropped));
        assert_eq!(fs::read(folder.path("tokenizers/a/x")).unwrap(), b"1");
        assert!(!gone.exists());
    }
}
