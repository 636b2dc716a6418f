//! Rewriting the log without what nobody needs any more.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::frame::{self, MAGIC, Next};
use super::messages::{Entry, Header, Kind, Published};
use super::tracking::Tracks;

/// Bytes copied at a time.
const PIECE: u64 = 1 << 20;

/// Writes to `target` what of `source`, of `length` bytes, the models in `tracks` need, flushed to the disk. The frame
/// numbered `last` is kept in any case: what it does to checkpoints may not have happened yet. Returns the new length.
pub(super) fn rewrite(
    source: &File,
    length: u64,
    tracks: &Tracks,
    earlier: Vec<Published>,
    last: u64,
    target: &Path,
) -> std::io::Result<u64> {
    let mut output = BufWriter::with_capacity(PIECE as usize, File::create(target)?);
    output.write_all(MAGIC)?;
    let ids = Header {
        earlier,
        ..Default::default()
    };
    let first = frame::encode(&ids, 0);
    output.write_all(&first)?;
    let mut written = (MAGIC.len() + first.len()) as u64;
    let mut offset = MAGIC.len() as u64;
    while offset < length {
        let found = match frame::read(source, offset, length)? {
            Next::Frame(found) => found,
            Next::End => break,
            // Models that it concerned are marked as lost by now.
            Next::Damage => match frame::search(source, offset, length)? {
                Some(next) => {
                    offset = next;
                    continue;
                }
                None => break,
            },
        };
        let number = found.header.number;
        let mut data = found.data;
        let mut kept: Vec<(Entry, u64)> = Vec::new();
        for entry in &found.header.entries {
            if is_needed(entry, number, tracks) {
                kept.push((*entry, data));
            }
            data += entry.bytes;
        }
        offset = found.end;
        if kept.is_empty() && number != last {
            continue;
        }
        let header = Header {
            entries: kept.iter().map(|(entry, _)| *entry).collect(),
            earlier: Vec::new(),
            files: match number == last {
                true => found.header.files,
                false => Vec::new(),
            },
            ..found.header
        };
        let bytes = kept.iter().map(|(entry, _)| entry.bytes).sum();
        let encoded = frame::encode(&header, bytes);
        output.write_all(&encoded)?;
        written += encoded.len() as u64 + bytes;
        for (entry, from) in kept {
            copy(source, from, entry.bytes, &mut output)?;
        }
    }
    output.into_inner()?.sync_all()?;
    Ok(written)
}

fn is_needed(entry: &Entry, number: u64, tracks: &Tracks) -> bool {
    let Some(track) = tracks.0.get(&entry.model) else {
        return false;
    };
    match Kind::try_from(entry.kind) {
        Ok(Kind::Changes) => number > track.through,
        Ok(Kind::Base) => number == track.base_number,
        Ok(Kind::Lost) => true,
        Ok(Kind::Drop) | Err(_) => false,
    }
}

fn copy(source: &File, mut from: u64, bytes: u64, output: &mut impl std::io::Write) -> std::io::Result<()> {
    let end = from + bytes;
    let mut piece = vec![0; usize::try_from(PIECE.min(bytes)).unwrap_or_default()];
    while from < end {
        let size = usize::try_from(PIECE.min(end - from)).unwrap_or_default();
        source.read_exact_at(&mut piece[..size], from)?;
        output.write_all(&piece[..size])?;
        from += size as u64;
    }
    Ok(())
}
