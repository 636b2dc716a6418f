//! Zip archives, as numpy and PyTorch write them: members stored or deflated, each checked against its declared size.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use zip::{CompressionMethod, ZipArchive};

use super::files::{invalid, io_error, open};
use super::inflate::{Inflate, Section};
use crate::error::{Error, Result};

/// Most members of an archive.
const MAX_MEMBERS: usize = 1 << 16;
/// Deflate makes at most 1032 bytes out of one; a member that declares more is a trap.
const MAX_RATIO: u64 = 1032;

/// A member of an archive; its data lies inside the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member {
    deflated: bool,
    start: u64,
    compressed: u64,
    /// Bytes it has when inflated.
    pub(super) size: u64,
    crc: u32,
}

/// An open archive.
#[derive(Debug)]
pub(super) struct Archive {
    pub(super) path: PathBuf,
    file: File,
    pub(super) members: BTreeMap<String, Member>,
}

impl Archive {
    /// Opens an archive and checks its directory.
    ///
    /// # Errors
    /// `InvalidFile` for a truncated or damaged archive, repeated names, members that overlap or declare more than they
    /// can hold; `Unsupported` for encryption and for other methods than stored and deflated.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let (file, length) = open(path)?;
        let damaged = |error: zip::result::ZipError| invalid(path, format!("it is no whole zip archive: {error}"));
        let mut archive = ZipArchive::new(BufReader::new(&file)).map_err(damaged)?;
        if archive.has_duplicate_names() {
            return Err(invalid(path, "two members of the archive have the same name"));
        }
        if archive.len() > MAX_MEMBERS {
            let count = archive.len();
            return Err(invalid(
                path,
                format!("it has {count} members; at most {MAX_MEMBERS} are read"),
            ));
        }
        let mut members = BTreeMap::new();
        for index in 0..archive.len() {
            let entry = archive.by_index_raw(index).map_err(damaged)?;
            let name = entry.name().map_err(damaged)?.into_owned();
            if entry.is_dir() {
                continue;
            }
            let deflated = match entry.compression() {
                _ if entry.encrypted() => {
                    return Err(Error::Unsupported(format!("{name} in {} is encrypted", path.display())));
                }
                CompressionMethod::Stored => false,
                method if method == CompressionMethod::DEFLATE => true,
                other => {
                    return Err(Error::Unsupported(format!(
                        "{name} in {} is compressed by {other}; stored and deflated members are read",
                        path.display()
                    )));
                }
            };
            let start = entry.data_start();
            let start = start.ok_or_else(|| invalid(path, format!("{name} has no place in the archive")))?;
            let member = Member {
                deflated,
                start,
                compressed: entry.compressed_size(),
                size: entry.size(),
                crc: entry.crc32(),
            };
            member.check(path, &name, length)?;
            members.insert(name, member);
        }
        check_overlap(path, &members)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            members,
        })
    }

    /// A member's contents from the first byte.
    pub(super) fn reader(&self, member: &Member) -> Box<dyn Read + '_> {
        let section = Section::new(&self.file, member.start, member.start + member.compressed);
        match member.deflated {
            true => Box::new(Inflate::new(section).take(member.size)),
            false => Box::new(section),
        }
    }

    /// A whole small member, its checksum verified.
    ///
    /// # Errors
    /// `InvalidFile` if it is longer than `limit` or damaged.
    pub(super) fn read(&self, name: &str, member: &Member, limit: u64) -> Result<Vec<u8>> {
        if member.size > limit {
            let size = member.size;
            return Err(invalid(
                &self.path,
                format!("{name} has {size} bytes; at most {limit} are read"),
            ));
        }
        let mut bytes = vec![0; member.size as usize];
        self.fill(name, member, &mut [], &mut bytes)?;
        Ok(bytes)
    }

    /// Reads `head`, then `rest`, which together are the whole member, and verifies its checksum.
    pub(super) fn fill(&self, name: &str, member: &Member, head: &mut [u8], rest: &mut [u8]) -> Result<()> {
        let mut reader = self.reader(member);
        let mut checksum = crc32fast::Hasher::new();
        for part in [head, rest] {
            for piece in part.chunks_mut(1 << 20) {
                reader.read_exact(piece).map_err(|error| self.failed(name, error))?;
                checksum.update(piece);
            }
        }
        if checksum.finalize() != member.crc {
            return Err(invalid(&self.path, format!("{name} is damaged: its CRC-32 differs")));
        }
        Ok(())
    }

    /// Reads a part of a stored member.
    ///
    /// # Errors
    /// `Unsupported` for a deflated one, `InvalidFile` for a part that lies outside.
    pub(super) fn read_at(&self, name: &str, member: &Member, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if member.deflated {
            return Err(Error::Unsupported(format!(
                "{name} in {} is deflated",
                self.path.display()
            )));
        }
        if offset
            .checked_add(buffer.len() as u64)
            .is_none_or(|end| end > member.size)
        {
            return Err(invalid(&self.path, format!("{name} has only {} bytes", member.size)));
        }
        self.file
            .read_exact_at(buffer, member.start + offset)
            .map_err(|error| io_error(&self.path, error))
    }

    /// The error of reading a member.
    pub(super) fn failed(&self, name: &str, error: std::io::Error) -> Error {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::InvalidData => {
                invalid(&self.path, format!("{name} is truncated or damaged: {error}"))
            }
            _ => io_error(&self.path, error),
        }
    }
}

impl Member {
    fn check(&self, path: &Path, name: &str, length: u64) -> Result<()> {
        if self.start.checked_add(self.compressed).is_none_or(|end| end > length) {
            return Err(invalid(
                path,
                format!(
                    "{name} needs {} bytes at {} of a file of {length} bytes: the archive is truncated",
                    self.compressed, self.start
                ),
            ));
        }
        let most = match self.deflated {
            true => self.compressed.saturating_mul(MAX_RATIO),
            false => self.compressed,
        };
        if self.size > most || (!self.deflated && self.size != self.compressed) {
            return Err(invalid(
                path,
                format!(
                    "{name} declares {} bytes, which its {} in the archive cannot be",
                    self.size, self.compressed
                ),
            ));
        }
        Ok(())
    }
}

fn check_overlap(path: &Path, members: &BTreeMap<String, Member>) -> Result<()> {
    let mut ranges: Vec<_> = members
        .iter()
        .map(|(name, member)| (member.start, member.compressed, name))
        .collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if let [(start, length, first), (next, _, second)] = pair
            && start + length > *next
        {
            return Err(invalid(path, format!("{first} and {second} overlap in the archive")));
        }
    }
    Ok(())
}
