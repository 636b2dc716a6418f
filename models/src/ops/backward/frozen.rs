//! The way back through a matrix that is not trained and may be held in any type. It is expanded a few rows at a time.

use std::ops::Range;

use candle_core::{Device, Tensor};
use candle_kernels_cpu as kernels;

use super::{add_in_place, composed};
use crate::decoder::Weight;
use crate::error::Result;
use crate::ops::storage::{CpuSlice, is_cpu, with_mut_slice};
use crate::ops::weights::KernelWeight;

/// The gradient of `x` from `dy` `[tokens, rows]`, that of `y = x W[rows]^T`: `[tokens, in]`, added to `dx` in place if
/// given.
pub(crate) fn frozen_linear_backward(
    weight: &Weight,
    rows: Range<usize>,
    dy: &Tensor,
    dx: Option<Tensor>,
) -> Result<Tensor> {
    let matrix = match KernelWeight::new(weight)? {
        Some(matrix) if is_cpu(dy) => matrix,
        _ => {
            let own = dy.matmul(&weight.to_f32()?.narrow(0, rows.start, rows.len())?)?;
            return match dx {
                None => Ok(own),
                Some(dx) => add_in_place(&dx, &own).map(|()| dx),
            };
        }
    };
    let (tokens, _) = dy.dims2()?;
    let dy = CpuSlice::new(dy)?;
    let (dy, weights) = (dy.f32()?, matrix.rows(rows)?);
    match dx {
        Some(dx) => {
            with_mut_slice(&dx, |dx| kernels::linear_input_gradient(dy, weights, true, dx))?;
            Ok(dx)
        }
        None => {
            let mut dx = vec![0.0; tokens * weights.columns];
            kernels::linear_input_gradient(dy, weights, false, &mut dx);
            Ok(Tensor::from_vec(dx, (tokens, weights.columns), &Device::Cpu)?)
        }
    }
}

/// As [`cross_entropy_head`](super::cross_entropy_head), for a head that is not trained.
pub(crate) fn frozen_head(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    targets: &[u32],
    factors: &[f32],
) -> Result<(Vec<f32>, Tensor)> {
    let matrix = match KernelWeight::new(weight)? {
        Some(matrix) if is_cpu(x) => matrix,
        _ => {
            let head = composed::cross_entropy_head(x, &weight.to_f32()?, bias, targets, factors)?;
            return Ok((head.losses, head.dx));
        }
    };
    let shape = x.dims2()?;
    let targets: Vec<i64> = targets.iter().map(|target| i64::from(*target)).collect();
    let (mut losses, mut d_hidden) = (vec![0.0; shape.0], vec![0.0; shape.0 * shape.1]);
    let hidden = CpuSlice::new(x)?;
    let weights = matrix.rows(0..weight.dims()[0])?;
    let bias = bias.map(CpuSlice::new).transpose()?;
    let bias = bias.as_ref().map(CpuSlice::f32).transpose()?;
    let labels = (&targets[..], factors);
    kernels::cross_entropy_frozen_head(hidden.f32()?, weights, bias, labels, &mut losses, &mut d_hidden);
    Ok((losses, Tensor::from_vec(d_hidden, shape, &Device::Cpu)?))
}
