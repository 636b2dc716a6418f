//! The file that frames are appended to.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::Path;

use crate::error::{Error, Result};

/// What is attempted when something goes wrong here.
const WRITING: &str = "writing to the commit log";

/// A file that is appended to; what could not be written whole is taken back.
#[derive(Debug)]
pub(super) struct LogFile {
    pub(super) file: File,
    /// Bytes of whole frames.
    pub(super) length: u64,
    /// Set when the end of the file is not known any more.
    broken: bool,
}

impl LogFile {
    /// Opens the log at `path`, whose first `length` bytes are whole. What follows them is cut off.
    pub(super) fn open(path: &Path, length: u64) -> std::io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        if file.metadata()?.len() != length {
            file.set_len(length)?;
            file.sync_all()?;
        }
        file.seek(SeekFrom::Start(length))?;
        Ok(Self {
            file,
            length,
            broken: false,
        })
    }

    /// Appends `pieces` and flushes them to the disk.
    ///
    /// # Errors
    /// `Io`; the log is as it was then. Should even that be impossible, every later call fails too.
    pub(super) fn append<'a>(&mut self, pieces: impl Iterator<Item = &'a [u8]>) -> Result<()> {
        if self.broken {
            let message = "an earlier failure left the end of the log unknown; restart the server";
            return Err(Error::io(WRITING, std::io::Error::other(message)));
        }
        let mut written = 0;
        let write = || -> std::io::Result<()> {
            for piece in pieces {
                self.file.write_all(piece)?;
                written += piece.len() as u64;
            }
            Ok(())
        };
        if let Err(error) = write() {
            self.cut();
            return Err(Error::io(WRITING, error));
        }
        if let Err(error) = self.file.sync_data() {
            // The kernel may have dropped what it could not write: what is on the disk is not known.
            self.cut();
            self.broken = error.kind() != std::io::ErrorKind::StorageFull || self.broken;
            return Err(Error::io(WRITING, error));
        }
        self.length += written;
        Ok(())
    }

    /// Takes back what was written behind the whole frames.
    fn cut(&mut self) {
        let length = self.length;
        let cut = self
            .file
            .set_len(length)
            .and_then(|()| self.file.seek(SeekFrom::Start(length)));
        if let Err(error) = cut.map(drop).and_then(|()| self.file.sync_all()) {
            tracing::error!(%error, "the commit log could not be cut back; nothing can be committed until a restart");
            self.broken = true;
        }
    }
}
