//! An open GGUF file as a source of tensors, tokenizer and chat template.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};

use super::element_type::{ElementType, first_damaged_block};
use super::metadata::GgufMetadata;
use super::names::transformers_name;
use super::reader::{GgufEntry, read_header};
use super::rows::Reordered;
use crate::chat_template::ChatTemplate;
use crate::decoder::WeightType;
use crate::error::{Error, Result};
use crate::formats::files::{invalid, open};
use crate::formats::source::{Orientation, StoredTensor, TensorData, TensorSource, TextAssets};
use crate::formats::values::{not_finite, read_dense, read_values};
use crate::tokenizer::Tokenizer;

/// An open GGUF file; its header has been read and checked.
#[derive(Debug)]
pub struct GgufModel {
    path: PathBuf,
    file: File,
    metadata: GgufMetadata,
    /// By transformers' names.
    entries: BTreeMap<String, GgufEntry>,
}

/// Opens a GGUF file and checks its header: every tensor lies inside the file, aligned, overlapping no other.
///
/// # Errors
/// `NotFound`, `InvalidFile` for a damaged or foreign file, `Unsupported` for an element type that is not served.
pub fn open_gguf(path: &Path) -> Result<GgufModel> {
    let (file, length) = open(path)?;
    let header = read_header(path, &file, length)?;
    let architecture = header.metadata.architecture()?;
    let mut entries = BTreeMap::new();
    for (name, entry) in header.entries {
        let renamed = transformers_name(architecture, &name);
        if entries.insert(renamed, entry).is_some() {
            return Err(invalid(path, format!("tensor {name} is there under two names")));
        }
    }
    Ok(GgufModel {
        path: path.to_owned(),
        file,
        metadata: header.metadata,
        entries,
    })
}

impl GgufModel {
    /// The metadata: configuration, tokenizer, template.
    pub fn metadata(&self) -> &GgufMetadata {
        &self.metadata
    }

    /// Tokenizer, chat template and end tokens.
    ///
    /// # Errors
    /// `InvalidFile` or `Unsupported` for a tokenizer or template that cannot be used.
    pub fn text_assets(&self) -> Result<TextAssets> {
        let tokenizer = Tokenizer::from_gguf(&self.metadata)?.map(Arc::new);
        let text_of = |key: &str| -> Result<Option<String>> {
            let (Some(tokenizer), Some(id)) = (&tokenizer, self.metadata.unsigned(key)?) else {
                return Ok(None);
            };
            Ok(u32::try_from(id).ok().and_then(|id| tokenizer.token(id)))
        };
        let bos = text_of("tokenizer.ggml.bos_token_id")?;
        let eos = text_of("tokenizer.ggml.eos_token_id")?;
        let chat_template = match self.metadata.string("tokenizer.chat_template")? {
            Some(source) => Some(Arc::new(ChatTemplate::new(source, bos.as_deref(), eos.as_deref())?)),
            None => None,
        };
        let mut end_tokens = Vec::new();
        for key in ["eos", "eot", "eom"] {
            let id = self.metadata.unsigned(&format!("tokenizer.ggml.{key}_token_id"))?;
            end_tokens.extend(id.and_then(|id| u32::try_from(id).ok()));
        }
        end_tokens.sort_unstable();
        end_tokens.dedup();
        Ok(TextAssets {
            tokenizer,
            chat_template,
            end_tokens,
        })
    }

    /// What llama.cpp's converter did to the rows of a tensor, if anything.
    fn reordered(&self, name: &str) -> Result<Option<Reordered>> {
        let architecture = self.metadata.architecture()?;
        let heads_of = |key: &str| self.metadata.unsigned(&format!("{architecture}.attention.{key}"));
        let (heads, reordered): (_, fn(usize) -> Reordered) = match architecture {
            "llama" if name.contains(".self_attn.q_proj.") => (heads_of("head_count")?, Reordered::Halves),
            "llama" if name.contains(".self_attn.k_proj.") => {
                let heads = heads_of("head_count_kv")?;
                (heads.or(heads_of("head_count")?), Reordered::Halves)
            }
            "gptneox" if name.contains(".query_key_value.") => (heads_of("head_count")?, Reordered::Kinds),
            _ => return Ok(None),
        };
        match heads.and_then(|heads| usize::try_from(heads).ok()) {
            Some(heads) => Ok(Some(reordered(heads))),
            None => {
                let reason = format!("metadata {architecture}.attention.head_count is missing");
                Err(invalid(&self.path, reason))
            }
        }
    }

    fn load_quantized(&self, name: &str, entry: &GgufEntry, dtype: GgmlDType) -> Result<Arc<QTensor>> {
        // Every block has an even number of bytes, and candle wants them aligned for f16: so they are read as words.
        let mut words: Vec<u16> = read_values(&self.file, &self.path, entry.range)?;
        if let Some(block) = first_damaged_block(dtype, bytemuck::cast_slice(&words)) {
            return Err(not_finite(&self.path, name, block * dtype.block_size()));
        }
        if let Some(reordered) = self.reordered(name)? {
            let rows = entry.shape.first().copied().unwrap_or(0);
            let row_words = words.len().checked_div(rows).unwrap_or(0);
            let ordered = reordered.undo(&words, row_words);
            words = ordered.ok_or_else(|| self.not_heads(name, rows, reordered))?;
        }
        let storage = QStorage::from_data(Cow::Borrowed(bytemuck::cast_slice(&words)), &Device::Cpu, dtype)?;
        Ok(Arc::new(QTensor::new(storage, entry.shape.as_slice())?))
    }

    fn load_dense(&self, name: &str, entry: &GgufEntry, dtype: DType) -> Result<Tensor> {
        let tensor = read_dense(&self.file, &self.path, name, dtype, &entry.shape, entry.range)?;
        let Some(reordered) = self.reordered(name)? else {
            return Ok(tensor);
        };
        let rows = entry.shape.first().copied().unwrap_or(0);
        let (heads, parts) = match reordered {
            Reordered::Halves(heads) => (heads, 2),
            Reordered::Kinds(heads) => (heads, 3),
        };
        if rows == 0 || heads == 0 || !rows.is_multiple_of(heads.saturating_mul(parts)) {
            return Err(self.not_heads(name, rows, reordered));
        }
        let (block, rest) = (rows / heads / parts, tensor.elem_count() / rows);
        let ordered = match reordered {
            Reordered::Halves(_) => tensor.reshape((heads, block, 2, rest))?.transpose(1, 2)?,
            Reordered::Kinds(_) => tensor.reshape((3, heads, block, rest))?.transpose(0, 1)?,
        };
        Ok(ordered.contiguous()?.reshape(entry.shape.as_slice())?)
    }

    fn not_heads(&self, name: &str, rows: usize, reordered: Reordered) -> Error {
        let what = match reordered {
            Reordered::Halves(heads) => format!("{heads} heads of even size"),
            Reordered::Kinds(heads) => format!("query, key and value of {heads} heads"),
        };
        invalid(
            &self.path,
            format!("tensor {name} has {rows} rows, which are not {what}"),
        )
    }
}

impl TensorSource for GgufModel {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<&str> {
        self.entries.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    fn orientation(&self) -> Orientation {
        Orientation::OutIn
    }

    fn bytes(&self, name: &str) -> u64 {
        self.entries.get(name).map_or(0, |entry| entry.range.length as u64)
    }

    fn stored_type(&self, name: &str) -> Option<WeightType> {
        Some(match self.entries.get(name)?.element_type {
            ElementType::Dense(DType::F16) => WeightType::F16,
            ElementType::Dense(DType::BF16) => WeightType::Bf16,
            ElementType::Dense(_) => WeightType::F32,
            ElementType::Quantized(dtype) => WeightType::Quantized(dtype),
        })
    }

    fn load(&self, name: &str) -> Result<StoredTensor> {
        let missing = || Error::NotFound(format!("there is no tensor {name} in {}", self.path.display()));
        let entry = self.entries.get(name).ok_or_else(missing)?;
        let data = match entry.element_type {
            ElementType::Dense(dtype) => TensorData::Dense(self.load_dense(name, entry, dtype)?),
            ElementType::Quantized(dtype) => TensorData::Quantized(self.load_quantized(name, entry, dtype)?),
        };
        Ok(StoredTensor {
            data,
            orientation: Orientation::OutIn,
        })
    }
}
