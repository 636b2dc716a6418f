//! Output head and cross-entropy together, forward and backward, so that the logits are never held whole.

use candle_core::{Device, Tensor};
use candle_kernels_cpu::{self as kernels, OutOfRange};

use super::{add_in_place, composed, with_optional_mut_slice};
use crate::error::Result;
use crate::ops::half::widened;
use crate::ops::storage::{CpuSlice, is_cpu};

/// Rows `x` `[rows, width]` through the head `weight` `[vocabulary, width]`: their cross-entropies against `targets`
/// `[rows]`, and the gradient `[rows, width]` of the sum of `factors[i]` times row `i`'s. Adds the head's own gradient to
/// `dweight`, unless it is frozen. `x` and `weight` are of one type; losses and gradients are f32.
/// Last comes what was lost when the gradient of the logits was rounded to that type, which only the CPU does.
pub(crate) fn cross_entropy_head(
    x: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    factors: &[f32],
    dweight: Option<&Tensor>,
) -> Result<(Vec<f32>, Tensor, OutOfRange)> {
    if is_cpu(x) {
        return on_cpu(x, weight, targets, factors, dweight);
    }
    let head = composed::cross_entropy_head(&widened(x)?, &widened(weight)?, targets, factors)?;
    if let Some(sum) = dweight {
        add_in_place(sum, &head.dweight)?;
    }
    Ok((head.losses, head.dx, OutOfRange::default()))
}

fn on_cpu(
    x: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    factors: &[f32],
    dweight: Option<&Tensor>,
) -> Result<(Vec<f32>, Tensor, OutOfRange)> {
    let shape = x.dims2()?;
    let vocabulary = weight.dim(0)?;
    let targets: Vec<i64> = targets.iter().map(|target| i64::from(*target)).collect();
    let (mut losses, mut d_hidden) = (vec![0.0; shape.0], vec![0.0; shape.0 * shape.1]);
    let (hidden, head) = (CpuSlice::new(x)?, CpuSlice::new(weight)?);
    let (hidden, head) = (hidden.matrix(shape.0, shape.1)?, head.matrix(vocabulary, shape.1)?);
    let lost = with_optional_mut_slice(dweight, |d_weight| {
        let gradients = kernels::HeadGradients {
            d_hidden: &mut d_hidden,
            d_weight,
        };
        kernels::cross_entropy_head(hidden, head, &targets, factors, &mut losses, Some(gradients))
    })?;
    Ok((losses, Tensor::from_vec(d_hidden, shape, &Device::Cpu)?, lost))
}
