//! Frames on the disk: lengths and checksums around a header and the data of its entries.
//!
//! ```text
//! "CLF1"  length of header u32  length of data u64  CRC-32 of those and the header u32  header  data
//! ```
//! Numbers are little-endian. Each entry's data has a checksum of its own in the header, so that damage is known by model.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use prost::Message as _;

use super::messages::Header;

/// What a log begins with.
pub(super) const MAGIC: &[u8; 8] = b"candlog1";
/// What a frame begins with.
const MARK: &[u8; 4] = b"CLF1";
/// Bytes before the header.
const PREFIX: usize = 20;
/// Longest header that is believed: ids of transactions take most of it.
const MOST_HEADER: u32 = 64 << 20;
/// Bytes looked at together while searching.
const PIECE: usize = 1 << 20;

/// A frame found in a log.
#[derive(Debug)]
pub(super) struct Found {
    /// Its header.
    pub(super) header: Header,
    /// Where its data begins.
    pub(super) data: u64,
    /// Where the next frame begins.
    pub(super) end: u64,
}

/// What stands at an offset.
#[derive(Debug)]
pub(super) enum Next {
    /// A frame whose header is whole and whose data lies within the file.
    Frame(Found),
    /// The end of the file.
    End,
    /// Neither.
    Damage,
}

/// The bytes before the data.
pub(super) fn encode(header: &Header, data: u64) -> Vec<u8> {
    let encoded = header.encode_to_vec();
    let mut bytes = Vec::with_capacity(PREFIX + encoded.len());
    bytes.extend_from_slice(MARK);
    bytes.extend_from_slice(&u32::try_from(encoded.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(&data.to_le_bytes());
    bytes.extend_from_slice(&checksum(&bytes[4..16], &encoded).to_le_bytes());
    bytes.extend_from_slice(&encoded);
    bytes
}

fn checksum(lengths: &[u8], header: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(lengths);
    hasher.update(header);
    hasher.finalize()
}

/// Reads the frame at `offset`; `length` is that of the file.
pub(super) fn read(file: &File, offset: u64, length: u64) -> std::io::Result<Next> {
    if offset == length {
        return Ok(Next::End);
    }
    let mut prefix = [0; PREFIX];
    if offset + PREFIX as u64 > length {
        return Ok(Next::Damage);
    }
    file.read_exact_at(&mut prefix, offset)?;
    let [
        m0,
        m1,
        m2,
        m3,
        h0,
        h1,
        h2,
        h3,
        d0,
        d1,
        d2,
        d3,
        d4,
        d5,
        d6,
        d7,
        c0,
        c1,
        c2,
        c3,
    ] = prefix;
    let header = u32::from_le_bytes([h0, h1, h2, h3]);
    let data = u64::from_le_bytes([d0, d1, d2, d3, d4, d5, d6, d7]);
    let start = offset + PREFIX as u64 + u64::from(header);
    let end = start.checked_add(data).filter(|end| *end <= length);
    let (true, true, Some(end)) = ([m0, m1, m2, m3] == *MARK, header <= MOST_HEADER, end) else {
        return Ok(Next::Damage);
    };
    let mut encoded = vec![0; header as usize];
    file.read_exact_at(&mut encoded, offset + PREFIX as u64)?;
    if checksum(&prefix[4..16], &encoded) != u32::from_le_bytes([c0, c1, c2, c3]) {
        return Ok(Next::Damage);
    }
    let Ok(header) = Header::decode(encoded.as_slice()) else {
        return Ok(Next::Damage);
    };
    let total = header
        .entries
        .iter()
        .try_fold(0u64, |sum, entry| sum.checked_add(entry.bytes));
    Ok(match total == Some(data) {
        true => Next::Frame(Found {
            header,
            data: start,
            end,
        }),
        false => Next::Damage,
    })
}

/// The first frame behind `offset`, for going on after damage.
pub(super) fn search(file: &File, offset: u64, length: u64) -> std::io::Result<Option<u64>> {
    let mut piece = vec![0; PIECE + MARK.len() - 1];
    let mut at = offset + 1;
    while at < length {
        let size = piece.len().min(usize::try_from(length - at).unwrap_or(usize::MAX));
        file.read_exact_at(&mut piece[..size], at)?;
        let marks = piece[..size].windows(MARK.len()).enumerate();
        for (index, _) in marks.filter(|(_, window)| *window == MARK) {
            if let Next::Frame(_) = read(file, at + index as u64, length)? {
                return Ok(Some(at + index as u64));
            }
        }
        at += PIECE as u64;
    }
    Ok(None)
}
