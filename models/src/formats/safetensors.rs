//! One safetensors file: its header, checked against the length of the file.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::files::{invalid, io_error, open};
use super::values::{ByteRange, FloatType, read_dense};
use super::weight_file::{StoredType, TensorInfo, WeightFile};
use crate::error::{Error, Result};

/// Longest header read, in bytes; the reference implementation has the same limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;

/// A tensor as the header describes it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    dtype: String,
    pub(crate) shape: Vec<usize>,
    range: ByteRange,
}

impl Entry {
    fn info(&self) -> TensorInfo {
        let dtype = match self.dtype.as_str() {
            "F32" => StoredType::Float(FloatType::F32),
            "F16" => StoredType::Float(FloatType::F16),
            "BF16" => StoredType::Float(FloatType::Bf16),
            other => StoredType::Other(other.to_owned()),
        };
        TensorInfo {
            dtype,
            shape: self.shape.clone(),
            bytes: self.range.length as u64,
        }
    }

    /// The dtype, if weights may have it.
    fn float_dtype(&self, path: &Path, name: &str) -> Result<DType> {
        match self.dtype.as_str() {
            "F32" => Ok(DType::F32),
            "F16" => Ok(DType::F16),
            "BF16" => Ok(DType::BF16),
            other => Err(Error::Unsupported(format!(
                "tensor {name} in {} is stored as {other}; weights must be F32, F16 or BF16: convert them first",
                path.display()
            ))),
        }
    }
}

/// An open safetensors file.
#[derive(Debug)]
pub(crate) struct SafetensorsFile {
    path: PathBuf,
    file: File,
    pub(crate) entries: BTreeMap<String, Entry>,
}

impl SafetensorsFile {
    /// Opens a file and checks its header: no range outside the file, none overlapping another, none that contradicts
    /// shape and dtype.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let (file, file_length) = open(path)?;
        let mut prefix = [0; 8];
        file.read_exact_at(&mut prefix, 0)
            .map_err(|_| invalid(path, "it is shorter than the 8 bytes of a safetensors header length"))?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > MAX_HEADER_BYTES || header_length > file_length - 8 {
            return Err(invalid(
                path,
                format!(
                    "its header claims {header_length} bytes, but the file has {file_length} and at most \
                     {MAX_HEADER_BYTES} are allowed: it is truncated or no safetensors file"
                ),
            ));
        }
        let mut header = vec![0; header_length as usize];
        file.read_exact_at(&mut header, 8)
            .map_err(|error| io_error(path, error))?;
        let Header(raw) = serde_json::from_slice(&header)
            .map_err(|error| invalid(path, format!("its safetensors header is damaged: {error}")))?;
        let data_length = file_length - 8 - header_length;
        let mut entries = BTreeMap::new();
        for (name, raw) in raw {
            let entry = raw.check(path, &name, 8 + header_length, data_length)?;
            entries.insert(name, entry);
        }
        check_overlap(path, &entries)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            entries,
        })
    }

    /// Reads one tensor.
    pub(crate) fn load(&self, name: &str) -> Result<Tensor> {
        let missing = || Error::NotFound(format!("there is no tensor {name} in {}", self.path.display()));
        let entry = self.entries.get(name).ok_or_else(missing)?;
        let dtype = entry.float_dtype(&self.path, name)?;
        read_dense(&self.file, &self.path, name, dtype, &entry.shape, entry.range)
    }
}

impl WeightFile for SafetensorsFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensors(&self) -> Vec<(&str, TensorInfo)> {
        self.entries
            .iter()
            .map(|(name, entry)| (name.as_str(), entry.info()))
            .collect()
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        SafetensorsFile::load(self, name)
    }
}

fn check_overlap(path: &Path, entries: &BTreeMap<String, Entry>) -> Result<()> {
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

/// An entry as written in the header.
#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl RawEntry {
    fn check(self, path: &Path, name: &str, data_start: u64, data_length: u64) -> Result<Entry> {
        let [start, end] = self.data_offsets;
        if start > end || end > data_length {
            return Err(invalid(
                path,
                format!(
                    "tensor {name} lies at bytes {start} to {end}, but the file holds {data_length}: it is truncated \
                     or damaged"
                ),
            ));
        }
        if self.shape.len() > MAX_DIMENSIONS {
            let count = self.shape.len();
            return Err(invalid(
                path,
                format!("tensor {name} has {count} dimensions; at most {MAX_DIMENSIONS} are allowed"),
            ));
        }
        let bits = bits_of(&self.dtype)
            .ok_or_else(|| invalid(path, format!("tensor {name} has unknown dtype {}", self.dtype)))?;
        let expected = self
            .shape
            .iter()
            .try_fold(bits, |product, &size| product.checked_mul(size));
        if expected != (end - start).checked_mul(8) {
            return Err(invalid(
                path,
                format!(
                    "tensor {name} of shape {:?} and dtype {} does not fit {} bytes",
                    self.shape,
                    self.dtype,
                    end - start
                ),
            ));
        }
        let shape = self.shape.iter().map(|&size| size as usize).collect();
        let range = ByteRange {
            start: data_start + start,
            length: (end - start) as usize,
        };
        Ok(Entry {
            dtype: self.dtype,
            shape,
            range,
        })
    }
}

fn bits_of(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E5M2FNUZ" | "F8_E4M3FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// The header's entries, in order; a repeated name is an error rather than a silent choice.
struct Header(BTreeMap<String, RawEntry>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else if entries.insert(name.clone(), map.next_value::<RawEntry>()?).is_some() {
                        return Err(A::Error::custom(format!("tensor {name} is described twice")));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
