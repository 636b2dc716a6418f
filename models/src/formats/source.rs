//! What every weight format offers.

use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use candle_core::quantized::QTensor;

use crate::chat_template::ChatTemplate;
use crate::decoder::WeightType;
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// How the matrix of a linear layer lies in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orientation {
    /// As transformers has it: [out, in], but [in, out] for GPT-2's `Conv1D`.
    AsTransformers,
    /// Always [out, in]; GGUF stores GPT-2 so.
    OutIn,
}

/// The numbers of a stored tensor, on the CPU.
#[derive(Debug, Clone)]
pub enum TensorData {
    /// f32, f16 or bf16, as the file has it; contiguous.
    Dense(Tensor),
    /// Blocks of a GGUF quantisation, [out, in] with whole blocks along the last dimension.
    Quantized(Arc<QTensor>),
}

/// A tensor read from a file.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Its numbers; all finite.
    pub data: TensorData,
    /// How the matrix of a linear layer lies.
    pub orientation: Orientation,
}

impl StoredTensor {
    /// The shape as stored.
    pub fn shape(&self) -> &[usize] {
        match &self.data {
            TensorData::Dense(tensor) => tensor.dims(),
            TensorData::Quantized(tensor) => tensor.shape().dims(),
        }
    }
}

/// A checked collection of named tensors.
pub trait TensorSource: std::fmt::Debug + Send + Sync {
    /// Where it was read from; for messages.
    fn path(&self) -> &Path;

    /// The tensors' names as transformers has them (`transformer.h.0.attn.c_attn.weight`,
    /// `model.layers.0.self_attn.q_proj.weight`), sorted. A tensor that transformers does not know keeps its own name.
    fn names(&self) -> Vec<&str>;

    /// The shape of a tensor as stored; `None` if there is no such tensor.
    fn shape(&self, name: &str) -> Option<&[usize]>;

    /// How matrices of linear layers lie in this source.
    fn orientation(&self) -> Orientation;

    /// Bytes of a tensor in the file; 0 if there is no such tensor.
    fn bytes(&self, name: &str) -> u64;

    /// How a tensor's elements are held once it is read; `None` if there is no such tensor.
    fn stored_type(&self, name: &str) -> Option<WeightType>;

    /// Reads a tensor.
    ///
    /// # Errors
    /// `NotFound` for an unknown name, `InvalidFile` if a value is NaN or infinite, `Io` if reading fails.
    fn load(&self, name: &str) -> Result<StoredTensor>;
}

/// What a model's files say about text.
#[derive(Debug, Clone, Default)]
pub struct TextAssets {
    /// The tokenizer; absent in models without text.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// The chat template; absent in base models.
    pub chat_template: Option<Arc<ChatTemplate>>,
    /// Tokens that end a generation, sorted, without repetition.
    pub end_tokens: Vec<u32>,
}
