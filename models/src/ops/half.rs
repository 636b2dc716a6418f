//! Between f32 and the half types of mixed precision.

use std::cell::Cell;

use candle_core::{DType, Device, Tensor, WithDType};
use candle_kernels_cpu::{HalfType, OutOfRange, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, out_of_range};
use half::{bf16, f16};

use super::storage::{CpuSlice, is_cpu, with_slice};
use crate::error::Result;

/// Counts what was lost when gradients were rounded to a half type.
#[derive(Debug, Default)]
pub(crate) struct RoundingLosses {
    /// Elements that became infinite or were not finite.
    pub(crate) overflows: Cell<u64>,
    /// Elements other than 0 that became 0.
    pub(crate) underflows: Cell<u64>,
}

impl RoundingLosses {
    /// Adds what was lost.
    pub(crate) fn count(&self, lost: OutOfRange) {
        self.overflows.set(self.overflows.get() + lost.overflows);
        self.underflows.set(self.underflows.get() + lost.underflows);
    }
}

/// The values in another type, to the nearest; shares storage with a tensor that is of that type.
pub(crate) fn rounded(x: &Tensor, dtype: DType) -> Result<Tensor> {
    match (x.dtype(), dtype) {
        (DType::F32, DType::BF16) if is_cpu(x) => converted(x, bf16::ZERO, f32_to_bf16),
        (DType::F32, DType::F16) if is_cpu(x) => converted(x, f16::ZERO, f32_to_f16),
        _ => Ok(x.to_dtype(dtype)?),
    }
}

/// The values as f32; shares storage with a tensor that is f32.
pub(crate) fn widened(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::BF16 if is_cpu(x) => converted(x, 0.0, bf16_to_f32),
        DType::F16 if is_cpu(x) => converted(x, 0.0, f16_to_f32),
        _ => Ok(x.to_dtype(DType::F32)?),
    }
}

/// A conversion by a kernel.
fn converted<A: WithDType, B: WithDType>(x: &Tensor, zero: B, kernel: fn(&[A], &mut [B])) -> Result<Tensor> {
    let x = x.contiguous()?;
    let slice = CpuSlice::new(&x)?;
    let mut out = vec![zero; x.elem_count()];
    kernel(slice.elements()?, &mut out);
    Ok(Tensor::from_vec(out, x.shape(), &Device::Cpu)?)
}

/// [`rounded`] of a gradient, f32, whose losses are counted.
pub(crate) fn rounded_gradient(x: &Tensor, dtype: DType, losses: &RoundingLosses) -> Result<Tensor> {
    let kind = match dtype {
        DType::BF16 => HalfType::Bf16,
        DType::F16 => HalfType::F16,
        _ => return rounded(x, dtype),
    };
    let lost = match is_cpu(x) {
        true => with_slice(x, |x| out_of_range(x, kind))?,
        false => elsewhere(x, kind)?,
    };
    losses.count(lost);
    rounded(x, dtype)
}

/// Counts from plain candle operations: for devices without kernels of our own.
fn elsewhere(x: &Tensor, kind: HalfType) -> Result<OutOfRange> {
    let values: Vec<f32> = x.flatten_all()?.to_vec1()?;
    Ok(out_of_range(&values, kind))
}
