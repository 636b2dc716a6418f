//! A file of the server's options that counts as it is now: it is read again when it has changed.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// A file that was written this lately may be written again without its times telling.
const SETTLED: Duration = Duration::from_secs(2);

/// A file, and what it was when it was read last.
#[derive(Debug)]
pub(crate) struct WatchedFile {
    path: PathBuf,
    /// What it is, for errors: `token file`.
    what: &'static str,
    seen: Option<Seen>,
    /// Whether it was told that the file cannot be read.
    unreadable: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Debug)]
struct Seen {
    stamp: Stamp,
    /// Whether the file could not have changed since without another stamp.
    settled: bool,
    digest: [u8; 32],
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    fn is_settled(&self) -> bool {
        let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(self.changed.0).unwrap_or(0));
        changed.elapsed().is_ok_and(|age| age > SETTLED)
    }
}

impl WatchedFile {
    /// A file that has not been read yet.
    pub(crate) fn new(path: PathBuf, what: &'static str) -> Self {
        Self {
            path,
            what,
            seen: None,
            unreadable: false,
        }
    }

    /// Its text, if it has changed since this was called last.
    ///
    /// # Errors
    /// `Io` when it cannot be read, once until it can be again.
    pub(crate) fn changed(&mut self) -> Result<Option<String>> {
        let (stamp, text) = match self.read() {
            Ok(Some(changed)) => changed,
            Ok(None) => return Ok(None),
            Err(error) => {
                let told = std::mem::replace(&mut self.unreadable, true);
                self.seen = None;
                return match told {
                    true => Ok(None),
                    false => Err(Error::io(self.to_string(), error)),
                };
            }
        };
        self.unreadable = false;
        let seen = Seen {
            settled: stamp.is_settled(),
            stamp,
            digest: Sha256::digest(text.as_bytes()).into(),
        };
        let same = self.seen.as_ref().is_some_and(|known| known.digest == seen.digest);
        self.seen = Some(seen);
        Ok((!same).then_some(text))
    }

    fn read(&self) -> std::io::Result<Option<(Stamp, String)>> {
        let stamp = Stamp::of(&std::fs::metadata(&self.path)?);
        let seen = self.seen.as_ref();
        match seen.is_some_and(|seen| seen.settled && seen.stamp == stamp) {
            true => Ok(None),
            false => Ok(Some((stamp, std::fs::read_to_string(&self.path)?))),
        }
    }
}

/// What it is and where it lies.
impl std::fmt::Display for WatchedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the {} {}", self.what, self.path.display())
    }
}
