//! A Hugging Face directory with safetensors.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::plan::{Conversion, PlannedTensor};
use super::target::{OutputFile, write_file};
use super::writing::{Progress, shards};
use crate::decoder::WeightType;
use crate::error::Result;

/// Writes the directory; gives its bytes.
pub(super) fn write(conversion: &Conversion, folder: &Path, progress: &mut Progress<'_>) -> Result<u64> {
    let mut bytes = 0;
    for (name, text) in conversion.documents()? {
        bytes += write_file(&folder.join(name), text.as_bytes())?;
    }
    let shards = shards(&conversion.tensors, conversion.options.shard_bytes);
    let count = shards.len();
    let mut weight_map = Map::new();
    for (index, tensors) in shards.into_iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        bytes += write_shard(conversion, &folder.join(&name), tensors, progress)?;
        weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(name))));
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": conversion.bytes()}, "weight_map": weight_map});
        let index = format!("{index:#}\n");
        bytes += write_file(&folder.join("model.safetensors.index.json"), index.as_bytes())?;
    }
    Ok(bytes)
}

fn write_shard(
    conversion: &Conversion,
    path: &Path,
    tensors: &[PlannedTensor],
    progress: &mut Progress<'_>,
) -> Result<u64> {
    let mut file = OutputFile::create(path)?;
    let header = header(tensors);
    file.write(&(header.len() as u64).to_le_bytes())?;
    file.write(header.as_bytes())?;
    for tensor in tensors {
        conversion.with_bytes_of(tensor, |bytes| file.write(bytes))?;
        progress.finished(tensor);
    }
    file.finish()
}

/// The JSON header, padded with spaces to a multiple of 8 bytes.
fn header(tensors: &[PlannedTensor]) -> String {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut begin = 0;
    for tensor in tensors {
        let end = begin + tensor.bytes;
        let entry = json!({"dtype": dtype_name(tensor.dtype), "shape": tensor.shape, "data_offsets": [begin, end]});
        header.insert(tensor.name.clone(), entry);
        begin = end;
    }
    let mut text = Value::Object(header).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    text
}

/// safetensors' name of a dense type, also that of manifests.
pub(super) fn dtype_name(dtype: WeightType) -> &'static str {
    match dtype {
        WeightType::F16 => "F16",
        WeightType::Bf16 => "BF16",
        // Quantised types are refused when the conversion is planned.
        WeightType::F32 | WeightType::Quantized(_) => "F32",
    }
}
