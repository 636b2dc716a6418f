//! LayerNorm (arXiv:1607.06450) and RMSNorm (arXiv:1910.07467) over the last dimension.

use super::storage::{CpuSlice, is_cpu, new_tensor};
use crate::config::Norm;
use crate::error::Result;
use candle_core::{D, Tensor};

/// Normalises the rows of `x` `[rows, width]` f32, then multiplies by `weight` `[width]` and adds `bias` `[width]`.
pub fn normalize(x: &Tensor, norm: Norm, weight: &Tensor, bias: Option<&Tensor>, epsilon: f32) -> Result<Tensor> {
    if !is_cpu(x) {
        return composed(x, norm, weight, bias, epsilon);
    }
    let bias = bias.map(CpuSlice::new).transpose()?;
    let bias = bias.as_ref().map(CpuSlice::f32).transpose()?;
    let (input, weight) = (CpuSlice::new(x)?, CpuSlice::new(weight)?);
    new_tensor(x.shape(), |out| {
        match norm {
            Norm::Layer => candle_kernels_cpu::layer_norm(input.f32()?, weight.f32()?, bias, epsilon, out, None),
            Norm::Rms => candle_kernels_cpu::rms_norm(input.f32()?, weight.f32()?, epsilon, out, None),
        }
        Ok(())
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_util::{assert_close, noise};

    #[test]
    fn both_norms_equal_the_composition() {
        let (x, weight, bias) = (noise(&[5, 37], 1), noise(&[37], 2), noise(&[37], 3));
        for (norm, bias) in [(Norm::Layer, Some(&bias)), (Norm::Rms, None)] {
            let found = normalize(&x, norm, &weight, bias, 1e-5).unwrap();
            assert_close(&found, &composed(&x, norm, &weight, bias, 1e-5).unwrap(), 1e-5);
        }
    }
}
