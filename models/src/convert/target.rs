//! The target: written aside, flushed to the disk, renamed.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Bytes that are gathered before they are written.
const BUFFER: usize = 1 << 20;

/// A target that is not yet there.
pub(super) struct Target {
    path: PathBuf,
    partial: PathBuf,
    parent: PathBuf,
    published: bool,
}

impl Target {
    /// Prepares `path`, a folder or a file.
    ///
    /// # Errors
    /// `FailedPrecondition` if it exists; `NotFound` if its parent does not.
    pub(super) fn begin(path: &Path, folder: bool) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            let message = format!("{} exists already and is not overwritten", path.display());
            return Err(Error::FailedPrecondition(message));
        }
        let Some(name) = path.file_name() else {
            return Err(Error::InvalidArgument(format!(
                "{} is no name for a target",
                path.display()
            )));
        };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new(".")).to_owned();
        if !parent.is_dir() {
            return Err(Error::NotFound(format!("there is no folder {}", parent.display())));
        }
        let mut partial_name = std::ffi::OsString::from(".");
        partial_name.push(name);
        partial_name.push(".partial");
        let partial = parent.join(partial_name);
        let io = |error| Error::io(&partial, error);
        // What an earlier run left that was killed.
        match partial.symlink_metadata() {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&partial).map_err(io)?,
            Ok(_) => fs::remove_file(&partial).map_err(io)?,
            Err(_) => {}
        }
        if folder {
            fs::create_dir(&partial).map_err(io)?;
        }
        Ok(Self {
            path: path.to_owned(),
            partial,
            parent,
            published: false,
        })
    }

    /// Where it is written.
    pub(super) fn partial(&self) -> &Path {
        &self.partial
    }

    /// Makes it appear under its own name.
    pub(super) fn publish(mut self) -> Result<()> {
        if self.path.symlink_metadata().is_ok() {
            let message = format!("{} has appeared meanwhile and is not overwritten", self.path.display());
            return Err(Error::FailedPrecondition(message));
        }
        if self.partial.is_dir() {
            sync_folder(&self.partial)?;
        }
        fs::rename(&self.partial, &self.path).map_err(|error| Error::io(&self.path, error))?;
        self.published = true;
        sync_folder(&self.parent)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        // The error that is reported is the one that came first.
        let _ = match self.partial.is_dir() {
            true => fs::remove_dir_all(&self.partial),
            false => fs::remove_file(&self.partial),
        };
    }
}

fn sync_folder(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| Error::io(path, error))
}

/// A file that is being written.
pub(super) struct OutputFile {
    path: PathBuf,
    file: BufWriter<File>,
    /// Bytes so far.
    pub(super) bytes: u64,
}

impl OutputFile {
    /// Makes a file that must not exist.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = File::create_new(path).map_err(|error| Error::io(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::with_capacity(BUFFER, file),
            bytes: 0,
        })
    }

    /// Appends bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|error| Error::io(&self.path, error))
    }

    /// Flushes to the disk itself.
    pub(super) fn finish(self) -> Result<u64> {
        let path = self.path;
        let file = self
            .file
            .into_inner()
            .map_err(|error| Error::io(&path, error.into_error()))?;
        file.sync_all().map_err(|error| Error::io(&path, error))?;
        Ok(self.bytes)
    }
}

/// Writes a small file whole.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<u64> {
    let mut file = OutputFile::create(path)?;
    file.write(bytes)?;
    file.finish()
}
