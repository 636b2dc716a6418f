//! Adding in place.

use candle_core::Tensor;

use crate::error::Result;
use crate::ops::storage::{is_cpu, with_mut_slice, with_slice};

/// Adds `delta` to `sum`, whose storage keeps its place. Both f32 of one shape, and of different storage.
pub(crate) fn add_in_place(sum: &Tensor, delta: &Tensor) -> Result<()> {
    if is_cpu(sum) {
        let delta = delta.contiguous()?;
        return with_slice(&delta, |delta| {
            with_mut_slice(sum, |sum| candle_kernels_cpu::add_assign(sum, delta))
        })?;
    }
    add_elsewhere(sum, delta)
}

/// [`add_in_place`] from plain candle operations.
pub(super) fn add_elsewhere(sum: &Tensor, delta: &Tensor) -> Result<()> {
    Ok(sum.slice_set(&(sum + delta)?, 0, 0)?)
}

/// Multiplies the elements of `x`, f32, whose storage keeps its place.
pub(crate) fn scale_in_place(x: &Tensor, factor: f64) -> Result<()> {
    if is_cpu(x) {
        return with_mut_slice(x, |x| candle_kernels_cpu::scale(factor as f32, x));
    }
    Ok(x.slice_set(&(x * factor)?, 0, 0)?)
}

/// [`with_mut_slice`] of a tensor that may be absent.
pub(crate) fn with_optional_mut_slice<T>(
    tensor: Option<&Tensor>,
    write: impl FnOnce(Option<&mut [f32]>) -> T,
) -> Result<T> {
    match tensor {
        Some(tensor) => with_mut_slice(tensor, |slice| write(Some(slice))),
        None => Ok(write(None)),
    }
}
