//! A manifest, one line per tensor, and its shards.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::plan::Conversion;
use super::safetensors::dtype_name;
use super::target::{OutputFile, write_file};
use super::writing::{Progress, shards};
use crate::error::Result;
use crate::formats::manifest::{FORMAT, VERSION};

/// Writes the directory; gives its bytes.
pub(super) fn write(conversion: &Conversion, folder: &Path, progress: &mut Progress<'_>) -> Result<u64> {
    let mut bytes = 0;
    for (name, text) in conversion.documents()? {
        bytes += write_file(&folder.join(name), text.as_bytes())?;
    }
    let mut lines = format!("{}\n", json!({"format": FORMAT, "version": VERSION}));
    let shards = shards(&conversion.tensors, conversion.options.shard_bytes);
    let count = shards.len();
    for (index, tensors) in shards.into_iter().enumerate() {
        let name = format!("weights-{:05}-of-{count:05}.bin", index + 1);
        let mut file = OutputFile::create(&folder.join(&name))?;
        for tensor in tensors {
            let start = file.bytes;
            let digest = conversion.with_bytes_of(tensor, |bytes| {
                file.write(bytes)?;
                Ok(Sha256::digest(bytes))
            })?;
            let mut digits = String::new();
            for byte in digest {
                // Writing to a String does not fail.
                let _ = write!(digits, "{byte:02x}");
            }
            let line = json!({"name": tensor.name, "dtype": dtype_name(tensor.dtype), "shape": tensor.shape,
                "file": name, "byte_range": [start, file.bytes], "sha256": digits});
            lines.push_str(&format!("{line}\n"));
            progress.finished(tensor);
        }
        bytes += file.finish()?;
    }
    Ok(bytes + write_file(&folder.join("model.jsonl"), lines.as_bytes())?)
}
