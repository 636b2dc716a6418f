//! One parameter's values, dense or block-quantised.

use crate::error::{Error, Result};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

/// The values of one parameter. Matrices are `[out, in]`, whatever the file they came from; vectors are dense f32.
#[derive(Debug, Clone)]
pub enum Weight {
    /// f32, f16 or bf16, contiguous.
    Dense(Tensor),
    /// GGML blocks along the rows.
    Quantized(Arc<QTensor>),
}

/// How a parameter's values are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of integers with scales.
    Quantized(GgmlDType),
}

impl WeightType {
    /// The types that `models.dtype` can ask for.
    pub const REQUESTABLE: &'static [Self] = &[
        Self::F32,
        Self::Bf16,
        Self::F16,
        Self::Quantized(GgmlDType::Q8_0),
        Self::Quantized(GgmlDType::Q4_0),
        Self::Quantized(GgmlDType::Q4K),
    ];

    /// The type of that name among all that weights can be held as; none for another one.
    #[must_use]
    pub fn held(name: &str) -> Option<Self> {
        const BLOCKS: [GgmlDType; 10] = [
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
            GgmlDType::Q8_0,
            GgmlDType::Q2K,
            GgmlDType::Q3K,
            GgmlDType::Q4K,
            GgmlDType::Q5K,
            GgmlDType::Q6K,
        ];
        let dense = [Self::F32, Self::F16, Self::Bf16].into_iter();
        dense
            .chain(BLOCKS.map(Self::Quantized))
            .find(|kind| kind.name() == name)
    }

    /// Elements of a block, and its bytes; dense types have blocks of one.
    #[must_use]
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Quantized(kind) => (kind.block_size(), kind.type_size()),
        }
    }

    /// The requestable type of that name. Fails with [`Error::InvalidArgument`], listing those known.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::REQUESTABLE
            .iter()
            .copied()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| {
                let known: Vec<_> = Self::REQUESTABLE.iter().map(|kind| kind.name()).collect();
                let shown: String = name.chars().take(80).collect();
                Error::invalid_argument(format!("unknown dtype `{shown}`; known are {}", known.join(", ")))
            })
    }

    /// Its name, `f32`, `q4_k`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Quantized(kind) => match kind {
                GgmlDType::F32 => "f32",
                GgmlDType::F16 => "f16",
                GgmlDType::BF16 => "bf16",
                GgmlDType::Q4_0 => "q4_0",
                GgmlDType::Q4_1 => "q4_1",
                GgmlDType::Q5_0 => "q5_0",
                GgmlDType::Q5_1 => "q5_1",
                GgmlDType::Q8_0 => "q8_0",
                GgmlDType::Q8_1 => "q8_1",
                GgmlDType::Q2K => "q2_k",
                GgmlDType::Q3K => "q3_k",
                GgmlDType::Q4K => "q4_k",
                GgmlDType::Q5K => "q5_k",
                GgmlDType::Q6K => "q6_k",
                GgmlDType::Q8K => "q8_k",
            },
        }
    }
}

impl Weight {
    /// Wraps a tensor of a stored dtype, made contiguous. Fails for other dtypes than f32, f16 and bf16.
    pub fn dense(tensor: &Tensor) -> Result<Self> {
        match tensor.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => Ok(Self::Dense(tensor.contiguous()?)),
            other => Err(Error::Unsupported(format!(
                "weights of dtype {other:?} are not supported"
            ))),
        }
    }

    /// Wraps quantised blocks; GGML's unquantised types become dense.
    pub fn quantized(tensor: Arc<QTensor>) -> Result<Self> {
        let dense = |dtype| Ok(Self::Dense(tensor.dequantize(&tensor.device())?.to_dtype(dtype)?));
        match tensor.dtype() {
            GgmlDType::F32 => dense(DType::F32),
            GgmlDType::F16 => dense(DType::F16),
            GgmlDType::BF16 => dense(DType::BF16),
            _ => Ok(Self::Quantized(tensor)),
        }
    }

    /// A matrix from its bytes: little-endian elements, or blocks along the rows, as many as it has.
    pub(super) fn from_bytes(bytes: &[u8], kind: WeightType, shape: [usize; 2], device: &Device) -> Result<Self> {
        let dtype = match kind {
            WeightType::F32 => DType::F32,
            WeightType::F16 => DType::F16,
            WeightType::Bf16 => DType::BF16,
            WeightType::Quantized(kind) => {
                // Every block has an even number of bytes, and candle wants them aligned for f16.
                let words: Vec<u16> = bytes
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .copied()
                    .map(u16::from_ne_bytes)
                    .collect();
                let storage = QStorage::from_data(Cow::Borrowed(bytemuck::cast_slice(&words)), device, kind)?;
                return Ok(Self::Quantized(Arc::new(QTensor::new(storage, &shape)?)));
            }
        };
        Ok(Self::Dense(Tensor::from_raw_buffer(bytes, dtype, &shape, device)?))
    }

    /// Rows of a matrix as they are held: a view of dense ones, a copy of quantised ones.
    pub(super) fn rows(&self, rows: Range<usize>) -> Result<Self> {
        match self {
            Self::Dense(tensor) => Ok(Self::Dense(tensor.narrow(0, rows.start, rows.len())?.contiguous()?)),
            Self::Quantized(tensor) => {
                let (all, columns) = tensor.shape().dims2()?;
                let data = tensor.data()?;
                let row = data.len() / all.max(1);
                let bytes = &data[rows.start * row..rows.end * row];
                Self::from_bytes(bytes, self.kind(), [rows.len(), columns], &tensor.device())
            }
        }
    }

    /// Its dimensions as held: `[out, in]` for matrices.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Dense(tensor) => tensor.dims(),
            Self::Quantized(tensor) => tensor.shape().dims(),
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }

    /// How the values are held.
    pub fn kind(&self) -> WeightType {
        match self {
            Self::Dense(tensor) => match tensor.dtype() {
                DType::F16 => WeightType::F16,
                DType::BF16 => WeightType::Bf16,
                _ => WeightType::F32,
            },
            Self::Quantized(tensor) => WeightType::Quantized(tensor.dtype()),
        }
    }

    /// Bytes of the values.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Dense(tensor) => (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64,
            Self::Quantized(tensor) => tensor.storage_size_in_bytes() as u64,
        }
    }

    /// Where the values lie.
    pub fn device(&self) -> Device {
        match self {
            Self::Dense(tensor) => tensor.device().clone(),
            Self::Quantized(tensor) => tensor.device(),
        }
    }

    /// The values as f32. Shares storage with a weight that is f32 already.
    pub fn to_f32(&self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.to_dtype(DType::F32)?),
            Self::Quantized(tensor) => Ok(tensor.dequantize(&tensor.device())?),
        }
    }

    /// The f32 tensor itself, for weights that are held so. Fails with [`Error::FailedPrecondition`] for others.
    pub fn as_f32(&self) -> Result<&Tensor> {
        match self {
            Self::Dense(tensor) if tensor.dtype() == DType::F32 => Ok(tensor),
            other => Err(Error::FailedPrecondition(format!(
                "the weight is held as {}; it must be made trainable (f32) first",
                other.kind().name()
            ))),
        }
    }

    /// The values in another type; quantising rounds. `name` is for the message when rows are no multiple of the block.
    pub fn convert(&self, name: &str, kind: WeightType) -> Result<Self> {
        if self.kind() == kind {
            return Ok(self.clone());
        }
        let values = self.to_f32()?;
        match kind {
            WeightType::F32 => Ok(Self::Dense(values)),
            WeightType::F16 => Ok(Self::Dense(values.to_dtype(DType::F16)?)),
            WeightType::Bf16 => Ok(Self::Dense(values.to_dtype(DType::BF16)?)),
            WeightType::Quantized(quantized) => {
                let row = self.dims().last().copied().unwrap_or(1);
                if row % quantized.block_size() != 0 {
                    return Err(Error::InvalidArgument(format!(
                        "dtype {} needs rows of a multiple of {} elements, but `{name}` has rows of {row}; \
                         use another dtype",
                        kind.name(),
                        quantized.block_size()
                    )));
                }
                Ok(Self::Quantized(Arc::new(QTensor::quantize(&values, quantized)?)))
            }
        }
    }

    /// A weight whose storage nobody else can change. Quantised blocks never change, so they stay shared.
    pub fn deep_copy(&self) -> Result<Self> {
        match self {
            Self::Dense(tensor) => Ok(Self::Dense(tensor.copy()?)),
            Self::Quantized(tensor) => Ok(Self::Quantized(tensor.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantising_needs_whole_blocks() {
        let weight = Weight::Dense(Tensor::zeros((2, 96), DType::F32, &Device::Cpu).unwrap());
        let q4_k = WeightType::from_name("q4_k").unwrap();
        let error = weight.convert("a.weight", q4_k).unwrap_err().to_string();
        assert!(error.contains("a.weight") && error.contains("256"), "{error}");
        let q8_0 = weight
            .convert("a.weight", WeightType::from_name("q8_0").unwrap())
            .unwrap();
        assert_eq!((q8_0.kind().name(), q8_0.bytes()), ("q8_0", 2 * 3 * 34));
        assert!(WeightType::from_name("int3").unwrap_err().to_string().contains("q8_0"));
    }
}
