//! Floating-point tensors computed as f32, in blocks of rows: half types are widened and rounded on the way, and between
//! two blocks an operation can be stopped.

use candle_core::{DType, Device, Tensor};
use candle_kernels_cpu::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use half::{bf16, f16};

use super::plan::Monitor;
use crate::error::Result;
use crate::ops::storage::CpuSlice;

/// Elements of a block: some milliseconds of work.
const BLOCK: usize = 1 << 21;

/// The elements as f32.
pub(super) fn widened(tensor: &Tensor) -> Result<Vec<f32>> {
    let slice = CpuSlice::new(tensor)?;
    let mut out = vec![0.0; tensor.elem_count()];
    match tensor.dtype() {
        DType::F16 => f16_to_f32(slice.elements::<f16>()?, &mut out),
        DType::BF16 => bf16_to_f32(slice.elements::<bf16>()?, &mut out),
        _ => out.copy_from_slice(slice.f32()?),
    }
    Ok(out)
}

/// A tensor on the CPU of the elements, rounded to `dtype`.
pub(super) fn narrowed(values: Vec<f32>, shape: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(match dtype {
        DType::F16 => {
            let mut out = vec![f16::ZERO; values.len()];
            f32_to_f16(&values, &mut out);
            Tensor::from_vec(out, shape, &Device::Cpu)?
        }
        DType::BF16 => {
            let mut out = vec![bf16::ZERO; values.len()];
            f32_to_bf16(&values, &mut out);
            Tensor::from_vec(out, shape, &Device::Cpu)?
        }
        _ => Tensor::from_vec(values, shape, &Device::Cpu)?,
    })
}

/// Calls `body` with blocks of whole rows of `width` elements of a contiguous floating-point tensor on the CPU, and the
/// places of as many elements of the result, which has the tensor's shape and type.
pub(super) fn map_rows(
    x: &Tensor,
    width: usize,
    monitor: &Monitor<'_>,
    body: impl Fn(&[f32], &mut [f32]),
) -> Result<Tensor> {
    let step = (BLOCK / width.max(1)).max(1) * width.max(1);
    let total = x.elem_count();
    let slice = CpuSlice::new(x)?;
    let starts = || (0..total).step_by(step).map(|start| start..total.min(start + step));
    // Widens and rounds block by block.
    macro_rules! half {
        ($type:ty, $widen:ident, $narrow:ident) => {{
            let (input, mut out) = (slice.elements::<$type>()?, vec![<$type>::ZERO; total]);
            let (mut wide, mut result) = (vec![0.0; step.min(total)], vec![0.0; step.min(total)]);
            for range in starts() {
                let (wide, result) = (&mut wide[..range.len()], &mut result[..range.len()]);
                $widen(&input[range.clone()], wide);
                body(wide, result);
                $narrow(result, &mut out[range.clone()]);
                monitor.advance(range.end, total)?;
            }
            Tensor::from_vec(out, x.shape(), &Device::Cpu)?
        }};
    }
    Ok(match x.dtype() {
        DType::F16 => half!(f16, f16_to_f32, f32_to_f16),
        DType::BF16 => half!(bf16, bf16_to_f32, f32_to_bf16),
        _ => {
            let (input, mut out) = (slice.f32()?, vec![0.0; total]);
            for range in starts() {
                body(&input[range.clone()], &mut out[range.clone()]);
                monitor.advance(range.end, total)?;
            }
            Tensor::from_vec(out, x.shape(), &Device::Cpu)?
        }
    })
}

/// `compute` on a tensor of another device, in f32, and back in the tensor's type.
pub(super) fn in_f32(x: &Tensor, compute: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    Ok(compute(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?)
}
