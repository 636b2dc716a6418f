//! LayerNorm (arXiv:1607.06450) and RMSNorm (arXiv:1910.07467) over the last dimension.

use crate::config::Norm;
use crate::error::Result;
use candle_core::{D, Tensor};

/// Normalises the rows of `x` `[rows, width]` f32, then multiplies by `weight` `[width]` and adds `bias` `[width]`.
pub fn normalize(x: &Tensor, norm: Norm, weight: &Tensor, bias: Option<&Tensor>, epsilon: f32) -> Result<Tensor> {
    composed(x, norm, weight, bias, epsilon)
}

/// [`normalize`] from plain candle operations: for devices without kernels of our own, and the tests' oracle.
pub fn composed(x: &Tensor, norm: Norm, weight: &Tensor, bias: Option<&Tensor>, epsilon: f32) -> Result<Tensor> {
    let centred = match norm {
        Norm::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        Norm::Rms => x.clone(),
    };
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + f64::from(epsilon))?.sqrt()?;
    let scaled = centred.broadcast_div(&deviation)?.broadcast_mul(weight)?;
    match bias {
        Some(bias) => Ok(scaled.broadcast_add(bias)?),
        None => Ok(scaled),
    }
}
