//! Output head and cross-entropy together, forward and backward, so that the logits are never held whole.

use candle_core::{Device, Tensor};
use candle_kernels_cpu::{self as kernels, HeadMatrix, OutOfRange};

use super::{Matrix, add_in_place, composed, with_optional_mut_slice};
use crate::error::Result;
use crate::ops::half::widened;
use crate::ops::storage::{CpuSlice, is_cpu};

/// Rows `x` `[rows, width]` through the head `matrix` `[vocabulary, width]` with its bias `[vocabulary]`: their
/// cross-entropies against `targets` `[rows]`, and the gradient `[rows, width]` of the sum of `factors[i]` times row `i`'s.
/// Adds the head's own gradients to its sums, unless they are frozen. `x` and the matrix are of one type; losses and
/// gradients are f32. Last comes what was lost when the gradient of the logits was rounded to that type, which only the
/// CPU does.
pub(crate) fn cross_entropy_head(
    x: &Tensor,
    matrix: &Matrix<'_>,
    bias: Option<&Tensor>,
    targets: &[u32],
    factors: &[f32],
) -> Result<(Vec<f32>, Tensor, OutOfRange)> {
    if is_cpu(x) {
        return on_cpu(x, matrix, bias, targets, factors);
    }
    let head = composed::cross_entropy_head(&widened(x)?, &widened(matrix.weight)?, bias, targets, factors)?;
    for (sum, gradient) in [(matrix.dweight, &head.dweight), (matrix.dbias, &head.dbias)] {
        if let Some(sum) = sum {
            add_in_place(sum, gradient)?;
        }
    }
    Ok((head.losses, head.dx, OutOfRange::default()))
}

fn on_cpu(
    x: &Tensor,
    matrix: &Matrix<'_>,
    bias: Option<&Tensor>,
    targets: &[u32],
    factors: &[f32],
) -> Result<(Vec<f32>, Tensor, OutOfRange)> {
    let shape = x.dims2()?;
    let vocabulary = matrix.weight.dim(0)?;
    let targets: Vec<i64> = targets.iter().map(|target| i64::from(*target)).collect();
    let (mut losses, mut d_hidden) = (vec![0.0; shape.0], vec![0.0; shape.0 * shape.1]);
    let (hidden, weight) = (CpuSlice::new(x)?, CpuSlice::new(matrix.weight)?);
    let bias = bias.map(CpuSlice::new).transpose()?;
    let head = HeadMatrix {
        weight: weight.matrix(vocabulary, shape.1)?,
        bias: bias.as_ref().map(CpuSlice::f32).transpose()?,
    };
    let hidden = hidden.matrix(shape.0, shape.1)?;
    let lost = with_optional_mut_slice(matrix.dweight, |d_weight| {
        with_optional_mut_slice(matrix.dbias, |d_bias| {
            let gradients = kernels::HeadGradients {
                d_hidden: &mut d_hidden,
                d_weight,
                d_bias,
            };
            kernels::cross_entropy_head(hidden, head, &targets, factors, &mut losses, Some(gradients))
        })
    })??;
    Ok((losses, Tensor::from_vec(d_hidden, shape, &Device::Cpu)?, lost))
}
