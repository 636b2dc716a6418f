//! Reads the header of a GGUF file. Every length is checked against the bytes that are left before it is believed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::element_type::ElementType;
use super::metadata::{GgufMetadata, MetadataValue};
use crate::error::{Error, Result};
use crate::formats::files::{invalid, io_error};
use crate::formats::values::ByteRange;

const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Most dimensions of a tensor, as in ggml.
const MAX_DIMENSIONS: u32 = 4;
/// Most elements of all metadata arrays together: far above what the largest vocabulary needs. In memory an element
/// takes more than the one byte that it may take in the file.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 25;
/// Most tensors and most metadata entries.
const MAX_ENTRIES: u64 = 1 << 20;

/// A tensor as the header describes it; the range is inside the file.
#[derive(Debug, Clone)]
pub(super) struct GgufEntry {
    pub(super) element_type: ElementType,
    /// Row-major, the outermost dimension first (the file has it the other way round).
    pub(super) shape: Vec<usize>,
    pub(super) range: ByteRange,
}

/// What the header says.
pub(super) struct GgufHeader {
    pub(super) metadata: GgufMetadata,
    pub(super) entries: BTreeMap<String, GgufEntry>,
}

/// Reads and checks the header of a file of `length` bytes.
pub(super) fn read_header(path: &Path, file: &File, length: u64) -> Result<GgufHeader> {
    let mut reader = HeaderReader {
        path,
        input: BufReader::with_capacity(1 << 16, file),
        position: 0,
        length,
        elements_left: MAX_ARRAY_ELEMENTS,
    };
    if reader.array::<4>()? != MAGIC {
        return Err(invalid(path, "it is not a GGUF file: it does not begin with GGUF"));
    }
    match reader.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => {
            return Err(invalid(path, "it is big-endian; only little-endian files are read"));
        }
        version => {
            return Err(invalid(
                path,
                format!("it is GGUF version {version}; versions 2 and 3 are read"),
            ));
        }
    }
    let tensor_count = reader.count("tensors")?;
    let metadata_count = reader.count("metadata entries")?;
    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(invalid(path, format!("metadata {key} is given twice")));
        }
    }
    let metadata = GgufMetadata::new(path, metadata);
    let mut raw = BTreeMap::new();
    for _ in 0..tensor_count {
        let (name, entry) = reader.tensor()?;
        if raw.insert(name.clone(), entry).is_some() {
            return Err(invalid(path, format!("tensor {name} is described twice")));
        }
    }
    let alignment = metadata.unsigned("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(invalid(
            path,
            format!("general.alignment is {alignment}, which is no power of two up to 1048576"),
        ));
    }
    let data = DataSection {
        path,
        start: reader.position.next_multiple_of(alignment),
        alignment,
        length,
    };
    let entries = raw
        .into_iter()
        .map(|(name, raw)| Ok((name.clone(), data.check(&name, raw)?)))
        .collect::<Result<_>>()?;
    check_overlap(path, &entries)?;
    Ok(GgufHeader { metadata, entries })
}

/// A tensor as written.
struct RawEntry {
    dimensions: Vec<u64>,
    kind: u32,
    offset: u64,
}

/// The part of the file after the header.
struct DataSection<'a> {
    path: &'a Path,
    start: u64,
    alignment: u64,
    length: u64,
}

impl DataSection<'_> {
    fn check(&self, name: &str, raw: RawEntry) -> Result<GgufEntry> {
        let refuse = |reason: String| Err(invalid(self.path, format!("tensor {name} {reason}")));
        let element_type = ElementType::from_code(raw.kind, name, self.path)?;
        let elements = raw
            .dimensions
            .iter()
            .try_fold(1u64, |product, &size| product.checked_mul(size));
        let Some(elements) = elements.filter(|&elements| elements > 0 && elements < 1 << 48) else {
            return refuse(format!("has the impossible shape {:?}", raw.dimensions));
        };
        let columns = raw.dimensions.first().copied().unwrap_or(1);
        let block = element_type.block_elements() as u64;
        if !columns.is_multiple_of(block) {
            return refuse(format!(
                "has rows of {columns} elements, which blocks of {block} do not divide"
            ));
        }
        if !raw.offset.is_multiple_of(self.alignment) {
            return refuse(format!(
                "begins at {}, which is not aligned to {}",
                raw.offset, self.alignment
            ));
        }
        let bytes = elements / block * element_type.block_bytes() as u64;
        let end = self
            .start
            .checked_add(raw.offset)
            .and_then(|start| start.checked_add(bytes));
        if end.is_none_or(|end| end > self.length) {
            return refuse(format!(
                "needs {bytes} bytes at {} of a file of {} bytes: the file is truncated or damaged",
                self.start.saturating_add(raw.offset),
                self.length
            ));
        }
        let shape = raw.dimensions.iter().rev().map(|&size| size as usize).collect();
        let range = ByteRange {
            start: self.start + raw.offset,
            length: bytes as usize,
        };
        Ok(GgufEntry {
            element_type,
            shape,
            range,
        })
    }
}

fn check_overlap(path: &Path, entries: &BTreeMap<String, GgufEntry>) -> Result<()> {
    let mut ranges: Vec<_> = entries
        .iter()
        .map(|(name, entry)| (entry.range.start, entry.range.length, name))
        .collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let [(start, length, first), (next, _, second)] = pair else {
            continue;
        };
        if start + *length as u64 > *next {
            return Err(invalid(path, format!("tensors {first} and {second} overlap")));
        }
    }
    Ok(())
}

/// Reads little-endian values and knows how many bytes are left.
struct HeaderReader<'a> {
    path: &'a Path,
    input: BufReader<&'a File>,
    position: u64,
    length: u64,
    elements_left: u64,
}

impl HeaderReader<'_> {
    fn need(&self, bytes: u64) -> Result<()> {
        if bytes > self.length - self.position {
            return Err(invalid(
                self.path,
                format!(
                    "its header needs {bytes} bytes at {} of a file of {} bytes: the file is truncated or damaged",
                    self.position, self.length
                ),
            ));
        }
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.need(buffer.len() as u64)?;
        self.input
            .read_exact(buffer)
            .map_err(|error| io_error(self.path, error))?;
        self.position += buffer.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut buffer = [0; N];
        self.fill(&mut buffer)?;
        Ok(buffer)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn count(&mut self, what: &str) -> Result<u64> {
        let count = self.u64()?;
        // The smallest entry takes 13 bytes: an empty name, a kind, one byte of value.
        if count > MAX_ENTRIES || count * 13 > self.length - self.position {
            return Err(invalid(
                self.path,
                format!("it claims {count} {what}, which it cannot hold"),
            ));
        }
        Ok(count)
    }

    fn string(&mut self) -> Result<String> {
        let length = self.u64()?;
        self.need(length)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes)
            .map_err(|_| invalid(self.path, format!("a text before byte {} is not UTF-8", self.position)))
    }

    fn tensor(&mut self) -> Result<(String, RawEntry)> {
        let name = self.string()?;
        let count = self.u32()?;
        if count > MAX_DIMENSIONS {
            return Err(invalid(
                self.path,
                format!("tensor {name} has {count} dimensions; at most {MAX_DIMENSIONS} are allowed"),
            ));
        }
        let dimensions = (0..count).map(|_| self.u64()).collect::<Result<_>>()?;
        Ok((
            name,
            RawEntry {
                dimensions,
                kind: self.u32()?,
                offset: self.u64()?,
            },
        ))
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<MetadataValue> {
        Ok(match kind {
            0..=5 | 10 | 11 => MetadataValue::Integer(self.integer(kind)?),
            6 | 12 => MetadataValue::Float(self.float(kind)?),
            7 => MetadataValue::Boolean(self.boolean(key)?),
            8 => MetadataValue::String(self.string()?),
            9 => self.array_value(key)?,
            _ => return Err(self.unknown_kind(kind, key)),
        })
    }

    fn array_value(&mut self, key: &str) -> Result<MetadataValue> {
        let kind = self.u32()?;
        let count = self.u64()?;
        let least_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => {
                return Err(Error::Unsupported(format!(
                    "metadata {key} in {} is an array of arrays",
                    self.path.display()
                )));
            }
            _ => return Err(self.unknown_kind(kind, key)),
        };
        if count > self.elements_left {
            return Err(invalid(
                self.path,
                format!("metadata {key} has {count} elements; at most {MAX_ARRAY_ELEMENTS} are read in all"),
            ));
        }
        self.elements_left -= count;
        self.need(count * least_bytes)?;
        Ok(match kind {
            6 | 12 => MetadataValue::Floats((0..count).map(|_| self.float(kind)).collect::<Result<_>>()?),
            7 => MetadataValue::Booleans((0..count).map(|_| self.boolean(key)).collect::<Result<_>>()?),
            8 => MetadataValue::Strings((0..count).map(|_| self.string()).collect::<Result<_>>()?),
            _ => MetadataValue::Integers(
                (0..count)
                    .map(|_| self.array_integer(kind, key))
                    .collect::<Result<_>>()?,
            ),
        })
    }

    fn integer(&mut self, kind: u32) -> Result<i128> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array()?).into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => u32::from_le_bytes(self.array()?).into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            10 => u64::from_le_bytes(self.array()?).into(),
            _ => i64::from_le_bytes(self.array()?).into(),
        })
    }

    fn array_integer(&mut self, kind: u32, key: &str) -> Result<i64> {
        let value = self.integer(kind)?;
        i64::try_from(value)
            .map_err(|_| invalid(self.path, format!("metadata {key} holds {value}, which is too large")))
    }

    fn float(&mut self, kind: u32) -> Result<f64> {
        if kind == 6 {
            Ok(f32::from_le_bytes(self.array()?).into())
        } else {
            Ok(f64::from_le_bytes(self.array()?))
        }
    }

    fn boolean(&mut self, key: &str) -> Result<bool> {
        match self.array::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(invalid(
                self.path,
                format!("metadata {key} holds {other} where a boolean belongs"),
            )),
        }
    }

    fn unknown_kind(&self, kind: u32, key: &str) -> Error {
        invalid(self.path, format!("metadata {key} is of unknown kind {kind}"))
    }
}
