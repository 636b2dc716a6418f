//! Forward and backward of `y = x W^T + b` in training.

use std::ops::Range;

use candle_core::{Device, Tensor};
use candle_kernels_cpu::{matmul, sum_rows};

use super::{add_in_place, composed};
use crate::error::Result;
use crate::ops::half::widened;
use crate::ops::storage::{CpuSlice, is_cpu, with_mut_slice};

/// A projection: rows of a matrix, and where the gradients of matrix and bias are added up.
pub(crate) struct Matrix<'a> {
    /// The whole matrix, `[out, in]`, f32 or in half precision.
    pub(crate) weight: &'a Tensor,
    /// The rows that make up the projection.
    pub(crate) rows: Range<usize>,
    /// `[out, in]`; none for a frozen matrix.
    pub(crate) dweight: Option<&'a Tensor>,
    /// `[out]`; none without bias or for a frozen one.
    pub(crate) dbias: Option<&'a Tensor>,
}

impl Matrix<'_> {
    /// The projection's part of the matrix, the bias or their gradients; shares storage.
    fn part(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.narrow(0, self.rows.start, self.rows.len())?)
    }
}

/// `x` `[tokens, in]`, of the matrix' type, to `[tokens, rows]` f32, with the elements of `bias` `[out]` added that belong
/// to the rows.
///
/// Inference multiplies so that a row's result does not depend on the other rows; training needs no such promise, and
/// the general product is several times faster on many rows.
pub(crate) fn linear_forward(matrix: &Matrix<'_>, bias: Option<&Tensor>, x: &Tensor) -> Result<Tensor> {
    let weight = matrix.part(matrix.weight)?;
    if !is_cpu(x) {
        let (x, weight) = (widened(x)?, widened(&weight)?);
        let bias = bias.map(|bias| matrix.part(bias)).transpose()?;
        let product = x.matmul(&weight.t()?)?;
        return Ok(match bias {
            Some(bias) => product.broadcast_add(&bias)?,
            None => product,
        });
    }
    let (tokens, inputs) = x.dims2()?;
    let outputs = matrix.rows.len();
    let (x, weight) = (CpuSlice::new(x)?, CpuSlice::new(&weight)?);
    let x = x.matrix(tokens, inputs)?;
    let weight = weight.matrix(outputs, inputs)?.transpose();
    // With a bias the product is added to rows of it.
    let y = match bias {
        None => {
            let mut y = vec![0.0; tokens * outputs];
            matmul(x, weight, false, &mut y);
            y
        }
        Some(bias) => {
            let bias = matrix.part(bias)?;
            let mut y = CpuSlice::new(&bias)?.f32()?.repeat(tokens);
            matmul(x, weight, true, &mut y);
            y
        }
    };
    Ok(Tensor::from_vec(y, (tokens, outputs), &Device::Cpu)?)
}

/// The gradient of a projection's output, `[tokens, rows]`.
#[derive(Clone, Copy)]
pub(crate) struct OutputGradient<'a> {
    /// As it is, f32.
    pub(crate) exact: &'a Tensor,
    /// Of the matrix' type, for the products.
    pub(crate) rounded: &'a Tensor,
}

/// `x` `[tokens, in]`, of the matrix' type, and the gradient `dy` of the output: adds the gradients of matrix and bias, and
/// returns that of `x`, f32, added to `dx` in place if given.
pub(crate) fn linear_backward(
    matrix: &Matrix<'_>,
    x: &Tensor,
    dy: OutputGradient<'_>,
    dx: Option<Tensor>,
) -> Result<Tensor> {
    if is_cpu(x) {
        on_cpu(matrix, x, dy, dx)
    } else {
        elsewhere(matrix, x, dy, dx)
    }
}

pub(super) fn on_cpu(matrix: &Matrix<'_>, x: &Tensor, dy: OutputGradient<'_>, dx: Option<Tensor>) -> Result<Tensor> {
    let (tokens, inputs) = x.dims2()?;
    let outputs = matrix.rows.len();
    if let Some(sum) = matrix.dbias {
        let dy = CpuSlice::new(dy.exact)?;
        let dy = dy.f32()?;
        with_mut_slice(&matrix.part(sum)?, |sum| sum_rows(dy, sum))?;
    }
    let weight = matrix.part(matrix.weight)?;
    let (x, dy, weight) = (CpuSlice::new(x)?, CpuSlice::new(dy.rounded)?, CpuSlice::new(&weight)?);
    let dy = dy.matrix(tokens, outputs)?;
    if let Some(sum) = matrix.dweight {
        let x = x.matrix(tokens, inputs)?;
        with_mut_slice(&matrix.part(sum)?, |sum| matmul(dy.transpose(), x, true, sum))?;
    }
    let weight = weight.matrix(outputs, inputs)?;
    match dx {
        Some(dx) => {
            with_mut_slice(&dx, |dx| matmul(dy, weight, true, dx))?;
            Ok(dx)
        }
        None => {
            let mut dx = vec![0.0; tokens * inputs];
            matmul(dy, weight, false, &mut dx);
            Ok(Tensor::from_vec(dx, (tokens, inputs), &Device::Cpu)?)
        }
    }
}

pub(super) fn elsewhere(matrix: &Matrix<'_>, x: &Tensor, dy: OutputGradient<'_>, dx: Option<Tensor>) -> Result<Tensor> {
    if let Some(sum) = matrix.dbias {
        add_in_place(&matrix.part(sum)?, &composed::sum_rows(dy.exact)?)?;
    }
    let weight = widened(&matrix.part(matrix.weight)?)?;
    let (own, dweight) = composed::linear(&widened(x)?, &weight, &widened(dy.rounded)?)?;
    if let Some(sum) = matrix.dweight {
        add_in_place(&matrix.part(sum)?, &dweight)?;
    }
    match dx {
        None => Ok(own),
        Some(dx) => {
            add_in_place(&dx, &own)?;
            Ok(dx)
        }
    }
}
