//! Dropout of rows of packed sequences.

use candle_core::Tensor;
use candle_kernels_cpu::{Dropout, dropout};

use crate::error::Result;
use crate::ops::storage::{is_cpu, with_mut_slice};

/// Drops elements of `x` `[tokens, width]`, f32, in place; sequence `i` has the rows from `bounds[i]` to `bounds[i + 1]`. The
/// same forward and backward.
pub(crate) fn drop_in_place(x: &Tensor, bounds: &[usize], masks: &Dropout<'_>) -> Result<()> {
    if is_cpu(x) {
        return with_mut_slice(x, |x| dropout(x, bounds, masks));
    }
    let mut factors = vec![1.0f32; x.elem_count()];
    dropout(&mut factors, bounds, masks);
    let factors = Tensor::from_vec(factors, x.shape(), x.device())?;
    Ok(x.slice_set(&(x * factors)?, 0, 0)?)
}
