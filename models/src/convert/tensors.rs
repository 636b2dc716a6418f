//! A tensor of the source in the type and layout of the target.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::plan::{Conversion, PlannedTensor};
use crate::decoder::WeightType;
use crate::error::{Error, Result};
use crate::formats::{TensorData, TensorSource};
use crate::ops::storage::CpuSlice;

impl Conversion {
    /// A tensor in transformers' layout, or held `[out, in]`, in the type of the source; quantised ones as f32.
    pub(super) fn read(&self, planned: &PlannedTensor, out_in: bool) -> Result<Tensor> {
        let stored = self.model.source().load(&planned.info.name)?;
        let tensor = match stored.data {
            TensorData::Dense(tensor) => tensor,
            TensorData::Quantized(tensor) => tensor.dequantize(&Device::Cpu)?,
        };
        match (&planned.half, planned.shape.as_slice()) {
            (None, _) if planned.info.transposed && self.source_is_out_in() != out_in => {
                Ok(tensor.t()?.contiguous()?)
            }
            (Some(half), &[experts, rows, columns]) => {
                let both = tensor.reshape((experts, 2, rows, columns))?;
                Ok(both
                    .narrow(1, *half, 1)?
                    .contiguous()?
                    .reshape((experts, rows, columns))?)
            }
            _ => Ok(tensor),
        }
    }
}

/// Calls `write` with the bytes of a tensor in the planned type: little-endian and row-major, or blocks along the rows.
///
/// # Errors
/// `InvalidArgument` naming the tensor if a value is too large for the type; what `write` fails with.
pub(super) fn with_bytes<T>(
    planned: &PlannedTensor,
    tensor: Tensor,
    write: impl FnOnce(&[u8]) -> Result<T>,
) -> Result<T> {
    let dtype = match planned.dtype {
        WeightType::F32 => DType::F32,
        WeightType::F16 => DType::F16,
        WeightType::Bf16 => DType::BF16,
        WeightType::Quantized(kind) => return write(&blocks(&tensor, kind)?),
    };
    let converted = tensor.to_dtype(dtype)?.contiguous()?;
    // Of the two that may be held here, only one is needed.
    drop(tensor);
    let slice = CpuSlice::new(&converted)?;
    let too_large = match dtype {
        DType::F16 => slice.elements::<f16>()?.iter().position(|value| !value.is_finite()),
        DType::BF16 => slice.elements::<bf16>()?.iter().position(|value| !value.is_finite()),
        // Whatever was read is finite.
        _ => None,
    };
    if let Some(index) = too_large {
        return Err(Error::InvalidArgument(format!(
            "tensor {} holds a number at element {index} that {} cannot: choose another type",
            planned.name,
            planned.dtype.name()
        )));
    }
    write(slice.bytes()?)
}

fn blocks(tensor: &Tensor, kind: GgmlDType) -> Result<Vec<u8>> {
    // candle quantises the storage from its beginning, wherever in it the tensor lies.
    let quantized = QTensor::quantize(&tensor.to_dtype(DType::F32)?.force_contiguous()?, kind)?;
    Ok(quantized.data()?.into_owned())
}
