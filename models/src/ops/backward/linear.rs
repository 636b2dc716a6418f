//! Backward of `y = x W^T + b`.

use std::ops::Range;

use candle_core::Tensor;

use super::{add_in_place, composed};
use crate::error::Result;

/// A projection: rows of a matrix, and where the gradients of matrix and bias are added up.
pub(crate) struct Matrix<'a> {
    /// The whole matrix, `[out, in]` f32.
    pub(crate) weight: &'a Tensor,
    /// The rows that make up the projection.
    pub(crate) rows: Range<usize>,
    /// `[out, in]`; none for a frozen matrix.
    pub(crate) dweight: Option<&'a Tensor>,
    /// `[out]`; none without bias or for a frozen one.
    pub(crate) dbias: Option<&'a Tensor>,
}

/// `x` `[tokens, in]` and the gradient `dy` `[tokens, rows]` of the output: adds the gradients of matrix and bias, and
/// returns that of `x`, added to `dx` in place if given.
pub(crate) fn linear_backward(matrix: &Matrix<'_>, x: &Tensor, dy: &Tensor, dx: Option<Tensor>) -> Result<Tensor> {
    let rows = |tensor: &Tensor| tensor.narrow(0, matrix.rows.start, matrix.rows.len());
    if let Some(dbias) = matrix.dbias {
        add_in_place(&rows(dbias)?, &composed::sum_rows(dy)?)?;
    }
    let (own, dweight) = composed::linear(x, &rows(matrix.weight)?, dy)?;
    if let Some(sum) = matrix.dweight {
        add_in_place(&rows(sum)?, &dweight)?;
    }
    match dx {
        None => Ok(own),
        Some(dx) => {
            add_in_place(&dx, &own)?;
            Ok(dx)
        }
    }
}
