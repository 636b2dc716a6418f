//! The bytes of a GGUF file, version 3.

use std::path::Path;

use candle_core::quantized::GgmlDType;

use super::metadata::{self, Metadata};
use super::rotary_factors;
use crate::convert::plan::Conversion;
use crate::convert::target::OutputFile;
use crate::convert::tensors::with_bytes;
use crate::convert::writing::Progress;
use crate::decoder::WeightType;
use crate::error::Result;
use crate::formats::gguf::MetadataValue;

/// Where tensors begin: multiples of this.
const ALIGNMENT: u64 = 32;

/// Writes the file; gives its bytes.
pub(in crate::convert) fn write(conversion: &Conversion, path: &Path, progress: &mut Progress<'_>) -> Result<u64> {
    let metadata = metadata::of(conversion)?;
    let factors = rotary_factors(&conversion.model.config);
    let mut infos: Vec<(&str, Vec<usize>, WeightType, u64)> = Vec::new();
    if let Some(factors) = &factors {
        infos.push((
            "rope_freqs.weight",
            vec![factors.len()],
            WeightType::F32,
            4 * factors.len() as u64,
        ));
    }
    for tensor in &conversion.tensors {
        infos.push((&tensor.name, tensor.shape.clone(), tensor.dtype, tensor.bytes));
    }
    let mut header = header(&metadata, &infos);
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
    let mut file = OutputFile::create(path)?;
    file.write(&header)?;
    if let Some(factors) = &factors {
        file.write(bytemuck::cast_slice(factors))?;
        pad(&mut file)?;
    }
    for tensor in &conversion.tensors {
        let values = conversion.read_for_gguf(tensor)?;
        with_bytes(tensor, values, |bytes| file.write(bytes))?;
        pad(&mut file)?;
        progress.finished(tensor);
    }
    file.finish()
}

fn pad(file: &mut OutputFile) -> Result<()> {
    let padding = file.bytes.next_multiple_of(ALIGNMENT) - file.bytes;
    file.write(&[0; ALIGNMENT as usize][..padding as usize])
}

/// Everything before the tensors.
fn header(metadata: &Metadata, infos: &[(&str, Vec<usize>, WeightType, u64)]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend_from_slice(&3u32.to_le_bytes());
    bytes.extend_from_slice(&(infos.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut bytes, key);
        put_value(&mut bytes, value);
    }
    let mut offset = 0u64;
    for (name, shape, dtype, length) in infos {
        put_text(&mut bytes, name);
        bytes.extend_from_slice(&(shape.len() as u32).to_le_bytes());
        // The fastest dimension first.
        for size in shape.iter().rev() {
            bytes.extend_from_slice(&(*size as u64).to_le_bytes());
        }
        bytes.extend_from_slice(&type_code(*dtype).to_le_bytes());
        bytes.extend_from_slice(&offset.to_le_bytes());
        offset += length.next_multiple_of(ALIGNMENT);
    }
    bytes
}

/// ggml's number of a type.
fn type_code(dtype: WeightType) -> u32 {
    match dtype {
        WeightType::F16 => 1,
        WeightType::Bf16 => 30,
        WeightType::Quantized(GgmlDType::Q8_0) => 8,
        // Other quantised types are refused when the conversion is planned.
        WeightType::F32 | WeightType::Quantized(_) => 0,
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

/// A value with its kind: integers as u32 (in arrays i32), numbers as f32, which is what llama.cpp asks for.
fn put_value(bytes: &mut Vec<u8>, value: &MetadataValue) {
    let kind = |bytes: &mut Vec<u8>, code: u32| bytes.extend_from_slice(&code.to_le_bytes());
    let array = |bytes: &mut Vec<u8>, code: u32, length: usize| {
        bytes.extend_from_slice(&9u32.to_le_bytes());
        bytes.extend_from_slice(&code.to_le_bytes());
        bytes.extend_from_slice(&(length as u64).to_le_bytes());
    };
    match value {
        MetadataValue::Integer(value) => {
            kind(bytes, 4);
            bytes.extend_from_slice(&u32::try_from(*value).unwrap_or(u32::MAX).to_le_bytes());
        }
        MetadataValue::Float(value) => {
            kind(bytes, 6);
            bytes.extend_from_slice(&(*value as f32).to_le_bytes());
        }
        MetadataValue::Boolean(value) => {
            kind(bytes, 7);
            bytes.push(u8::from(*value));
        }
        MetadataValue::String(text) => {
            kind(bytes, 8);
            put_text(bytes, text);
        }
        MetadataValue::Integers(values) => {
            array(bytes, 5, values.len());
            for value in values {
                bytes.extend_from_slice(&i32::try_from(*value).unwrap_or(i32::MAX).to_le_bytes());
            }
        }
        MetadataValue::Floats(values) => {
            array(bytes, 6, values.len());
            for value in values {
                bytes.extend_from_slice(&(*value as f32).to_le_bytes());
            }
        }
        MetadataValue::Booleans(values) => {
            array(bytes, 7, values.len());
            bytes.extend(values.iter().map(|value| u8::from(*value)));
        }
        MetadataValue::Strings(texts) => {
            array(bytes, 8, texts.len());
            for text in texts {
                put_text(bytes, text);
            }
        }
    }
}
