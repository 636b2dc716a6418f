//! LayerNorm and RMSNorm, forward with what backward needs, and backward.

use candle_core::{Device, Tensor};
use candle_kernels_cpu::{NormStatistics, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};

use super::{add_in_place, composed, with_optional_mut_slice};
use crate::config::Norm;
use crate::error::Result;
use crate::ops::storage::{CpuSlice, is_cpu, with_mut_slice};

/// A norm's parameters, and where their gradients are added up.
pub(crate) struct NormWeights<'a> {
    /// Which norm.
    pub(crate) kind: Norm,
    /// Added to the variance.
    pub(crate) epsilon: f32,
    /// Factor, `[width]`.
    pub(crate) weight: &'a Tensor,
    /// Summand, `[width]`, for LayerNorm.
    pub(crate) bias: Option<&'a Tensor>,
    /// `[width]`; none for a frozen weight.
    pub(crate) dweight: Option<&'a Tensor>,
    /// `[width]`; none without bias or for a frozen one.
    pub(crate) dbias: Option<&'a Tensor>,
}

/// The output of a norm and what its backward needs.
pub(crate) struct Normed {
    /// `[rows, width]`.
    pub(crate) output: Tensor,
    /// Mean of each row, `[rows]`; empty on devices without kernels of our own.
    mean: Vec<f32>,
    /// Reciprocal deviation of each row, `[rows]`; empty likewise.
    rstd: Vec<f32>,
}

impl NormWeights<'_> {
    /// Normalises `x` `[rows, width]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Normed> {
        if !is_cpu(x) {
            let output = crate::ops::norm::composed(x, self.kind, self.weight, self.bias, self.epsilon)?;
            return Ok(Normed {
                output,
                mean: vec![],
                rstd: vec![],
            });
        }
        let shape = x.dims2()?;
        let (mut mean, mut rstd) = (vec![0.0; shape.0], vec![0.0; shape.0]);
        let mut output = vec![0.0; shape.0 * shape.1];
        let statistics = Some(NormStatistics {
            mean: &mut mean,
            rstd: &mut rstd,
        });
        let (x, weight) = (CpuSlice::new(x)?, CpuSlice::new(self.weight)?);
        let bias = self.bias.map(CpuSlice::new).transpose()?;
        let bias = bias.as_ref().map(CpuSlice::f32).transpose()?;
        match self.kind {
            Norm::Layer => layer_norm(x.f32()?, weight.f32()?, bias, self.epsilon, &mut output, statistics),
            Norm::Rms => rms_norm(x.f32()?, weight.f32()?, self.epsilon, &mut output, statistics),
        }
        Ok(Normed {
            output: Tensor::from_vec(output, shape, &Device::Cpu)?,
            mean,
            rstd,
        })
    }

    /// `x` and the gradient `dy` of the output, both `[rows, width]`: adds the gradients of weight and bias, and adds
    /// that of `x` to `dx` in place.
    pub(crate) fn backward(&self, normed: &Normed, x: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> {
        if !is_cpu(x) {
            return self.backward_elsewhere(x, dy, dx);
        }
        let (dy, x, weight) = (CpuSlice::new(dy)?, CpuSlice::new(x)?, CpuSlice::new(self.weight)?);
        let (dy, x, weight) = (dy.f32()?, x.f32()?, weight.f32()?);
        let Normed { mean, rstd, .. } = normed;
        with_mut_slice(dx, |dx| {
            with_optional_mut_slice(self.dweight, |dweight| {
                // The kernels always compute it; of a frozen weight it is thrown away.
                let mut unwanted = vec![];
                let dweight = dweight.unwrap_or_else(|| {
                    unwanted.resize(weight.len(), 0.0);
                    &mut unwanted
                });
                match self.kind {
                    Norm::Rms => {
                        rms_norm_backward(dy, x, weight, rstd, dx, dweight);
                        Ok(())
                    }
                    Norm::Layer => with_optional_mut_slice(self.dbias, |dbias| {
                        layer_norm_backward(dy, x, weight, mean, rstd, dx, dweight, dbias);
                    }),
                }
            })?
        })?
    }

    pub(super) fn backward_elsewhere(&self, x: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> {
        let epsilon = f64::from(self.epsilon);
        let (own, dweight, dbias) = match self.kind {
            Norm::Layer => {
                let (dx, dweight, dbias) = composed::layer_norm(x, self.weight, dy, epsilon)?;
                (dx, dweight, Some(dbias))
            }
            Norm::Rms => {
                let (dx, dweight) = composed::rms_norm(x, self.weight, dy, epsilon)?;
                (dx, dweight, None)
            }
        };
        if let Some(sum) = self.dweight {
            add_in_place(sum, &dweight)?;
        }
        if let (Some(sum), Some(dbias)) = (self.dbias, dbias) {
            add_in_place(sum, &dbias)?;
        }
        add_in_place(dx, &own)
    }
}
