//! The linear map of a projection: `y = x W^T + b`.

use crate::decoder::Weight;
use crate::error::Result;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Applies rows of `weight` `[out, in]`, and the same elements of `bias` `[out]`, to `x` `[rows, in]` f32.
/// Returns `[rows, range.len()]` f32.
pub fn linear(x: &Tensor, weight: &Weight, range: Range<usize>, bias: Option<&Tensor>) -> Result<Tensor> {
    let bias = bias.map(|bias| bias.narrow(0, range.start, range.len())).transpose()?;
    composed(x, weight, range, bias.as_ref())
}

/// [`linear`] from plain candle operations: for devices without kernels of our own, and the tests' oracle.
pub fn composed(x: &Tensor, weight: &Weight, range: Range<usize>, bias: Option<&Tensor>) -> Result<Tensor> {
    let matrix = match weight {
        Weight::Dense(tensor) => tensor.narrow(0, range.start, range.len())?.to_dtype(DType::F32)?,
        Weight::Quantized(tensor) => tensor.dequantize(x.device())?.narrow(0, range.start, range.len())?,
    };
    let product = x.matmul(&matrix.t()?)?;
    match bias {
        Some(bias) => Ok(product.broadcast_add(bias)?),
        None => Ok(product),
    }
}
