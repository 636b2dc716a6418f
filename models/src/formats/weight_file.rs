//! A file of named tensors beside which a configuration lies: what safetensors, `.npz`, `.bin` and manifests have in common.

use std::path::Path;

use candle_core::Tensor;

use super::values::FloatType;
use crate::error::{Error, Result};

/// A tensor as a file's header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorInfo {
    pub(super) dtype: StoredType,
    /// Row-major, the outermost dimension first.
    pub(super) shape: Vec<usize>,
    /// Bytes it takes once it is read.
    pub(super) bytes: u64,
}

/// The type of a tensor's elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum StoredType {
    Float(FloatType),
    /// Something that weights cannot be, by its name in the file.
    Other(String),
}

impl TensorInfo {
    /// Refuses what weights cannot be stored as.
    pub(super) fn check_type(&self, path: &Path, name: &str) -> Result<()> {
        match &self.dtype {
            StoredType::Float(_) => Ok(()),
            StoredType::Other(dtype) => Err(Error::Unsupported(format!(
                "tensor {name} in {} is stored as {dtype}; weights must be F32, F16 or BF16: convert them first",
                path.display()
            ))),
        }
    }
}

/// An open file of tensors; its header has been read and checked.
pub(super) trait WeightFile: std::fmt::Debug + Send + Sync {
    /// The file; for messages.
    fn path(&self) -> &Path;

    /// All tensors under their stored names.
    fn tensors(&self) -> Vec<(&str, TensorInfo)>;

    /// Reads a tensor in transformers' layout, row-major.
    ///
    /// # Errors
    /// `NotFound` for an unknown name; `InvalidFile` naming the tensor if its bytes are damaged or not finite; `Io`.
    fn load(&self, stored_name: &str) -> Result<Tensor>;

    /// Documents that the file itself holds, by the name that they have in a Hugging Face directory.
    fn documents(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}
