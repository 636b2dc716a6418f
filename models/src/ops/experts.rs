//! Products of rows that are grouped by expert, and the experts' outputs put together.

use std::ops::Range;

use candle_core::{Device, Tensor};
use candle_kernels_cpu::{ExpertGroups, LinearGroup, LinearLayer, combine_experts, linear_groups};

use super::linear::composed;
use super::storage::{CpuSlice, is_cpu, new_tensor, with_mut_slice, with_slice};
use super::weights::KernelWeight;
use crate::decoder::Weight;
use crate::error::Result;

/// The rows of a matrix that belong to an expert.
pub(crate) type RowsOf<'a> = &'a dyn Fn(usize) -> Range<usize>;

/// Cuts rows of `width` into those of each expert.
pub(crate) fn split_rows<'a>(mut rows: &'a mut [f32], bounds: &[usize], width: usize) -> Vec<&'a mut [f32]> {
    let lengths = bounds.windows(2).map(|bounds| (bounds[1] - bounds[0]) * width);
    lengths
        .map(|length| rows.split_off_mut(..length).unwrap_or_default())
        .collect()
}

/// For several matrices `[experts' rows, in]`: `x` `[rows, in]` f32, of which expert `e` has the rows
/// `bounds[e]..bounds[e + 1]`, times that expert's part of the matrix, `[rows, out]` each. A row's result does not depend on
/// the other rows.
pub(crate) fn grouped_linear<const N: usize>(
    x: &Tensor,
    bounds: &[usize],
    matrices: [(&Weight, RowsOf<'_>); N],
) -> Result<[Tensor; N]> {
    let mut kernels = Vec::with_capacity(N);
    for (weight, _) in &matrices {
        kernels.push(KernelWeight::new(weight)?);
    }
    let mut tensors = Vec::with_capacity(N);
    if !is_cpu(x) || kernels.iter().any(Option::is_none) {
        for (weight, rows_of) in matrices {
            tensors.push(grouped_composed(x, bounds, weight, rows_of)?);
        }
        return Ok(std::array::from_fn(|index| tensors[index].clone()));
    }
    let (rows, columns) = x.dims2()?;
    let x = CpuSlice::new(x)?;
    let x = x.f32()?;
    let widths = matrices.map(|(_, rows_of)| rows_of(0).len());
    let mut outputs = widths.map(|width| vec![0.0f32; rows * width]);
    let mut groups = Vec::new();
    for (((kernel, (_, rows_of)), width), out) in kernels.iter().flatten().zip(matrices).zip(widths).zip(&mut outputs) {
        for (expert, out) in split_rows(out, bounds, width).into_iter().enumerate() {
            if !out.is_empty() {
                groups.push(LinearGroup {
                    x: &x[bounds[expert] * columns..bounds[expert + 1] * columns],
                    layer: LinearLayer {
                        weights: kernel.rows(rows_of(expert))?,
                        bias: None,
                        out,
                    },
                });
            }
        }
    }
    linear_groups(&mut groups);
    drop(groups);
    for (out, width) in outputs.into_iter().zip(widths) {
        tensors.push(Tensor::from_vec(out, (rows, width), &Device::Cpu)?);
    }
    Ok(std::array::from_fn(|index| tensors[index].clone()))
}

/// [`grouped_linear`] of one matrix from plain candle operations: for devices without kernels of our own.
fn grouped_composed(x: &Tensor, bounds: &[usize], weight: &Weight, rows_of: RowsOf<'_>) -> Result<Tensor> {
    let mut parts = Vec::new();
    for (expert, bounds) in bounds
        .windows(2)
        .enumerate()
        .filter(|(_, bounds)| bounds[0] < bounds[1])
    {
        let x = x.narrow(0, bounds[0], bounds[1] - bounds[0])?;
        parts.push(composed(&x, weight, rows_of(expert), None)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// The rows `y` `[rows, width]` of the groups added to the token of each, with `gates` `[tokens, per_token]` as factors if
/// given: `[tokens, width]` like `like`.
pub(crate) fn combine(groups: &ExpertGroups, y: &Tensor, gates: Option<&[f32]>, like: &Tensor) -> Result<Tensor> {
    let host = y.to_device(&Device::Cpu)?;
    let sum = with_slice(&host, |y| {
        new_tensor(like.dims2()?, |out| {
            combine_experts(groups, y, gates, out);
            Ok(())
        })
    })??;
    Ok(sum.to_device(like.device())?)
}

/// Each row of `y` `[rows, width]` times the sigmoid of its element of `scores` `[rows, 1]`, in place on the CPU.
pub(crate) fn sigmoid_rows(y: &Tensor, scores: &Tensor) -> Result<Tensor> {
    if !is_cpu(y) {
        let factors = ((scores.neg()?.exp()? + 1.0)?.recip())?;
        return Ok(y.broadcast_mul(&factors)?);
    }
    let width = y.dims2()?.1;
    with_slice(scores, |scores| {
        with_mut_slice(y, |y| {
            for (row, score) in y.chunks_exact_mut(width).zip(scores) {
                let factor = sigmoid(*score);
                row.iter_mut().for_each(|element| *element *= factor);
            }
        })
    })??;
    Ok(y.clone())
}

/// `1 / (1 + exp(-x))`.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
