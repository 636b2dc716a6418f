//! LayerNorm (arXiv:1607.06450) and RMSNorm (arXiv:1910.07467).

use std::ops::RangeInclusive;

use candle_core::{DType, Tensor};

use super::check_floating;
use crate::config::Norm;
use crate::error::{Error, Result};
use crate::executor::rows::{in_f32, map_rows, widened};
use crate::executor::{Attributes, ElementType, Monitor, Operation, Prepared, TensorType};
use crate::ops::norm::composed;

/// `layer_norm` over the last dimension: inputs `x` `[…, width]`, and where they are wanted `weight` and `bias`
/// `[width]`, of the type of `x` or f32. Attribute `epsilon`, default 1e-5.
pub(super) struct LayerNorm;

/// `rms_norm`, likewise, without a bias.
pub(super) struct RmsNorm;

impl Operation for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=3
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["epsilon"]
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        prepare(inputs, attributes, Norm::Layer)
    }
}

impl Operation for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=2
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["epsilon"]
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        prepare(inputs, attributes, Norm::Rms)
    }
}

fn prepare(inputs: &[TensorType], attributes: &Attributes, norm: Norm) -> Result<Prepared> {
    let x = &inputs[0];
    check_floating(x)?;
    let Some(width) = x.shape().last().copied() else {
        return Err(Error::invalid_argument("a scalar has no dimension to normalise over"));
    };
    for (role, given) in ["weight", "bias"].iter().zip(&inputs[1..]) {
        if given.shape() != [width] {
            return Err(Error::invalid_argument(format!(
                "the {role} is {given}, but its shape must be [{width}]"
            )));
        }
        if ![x.element(), ElementType::F32].contains(&given.element()) {
            return Err(Error::invalid_argument(format!(
                "the {role} is {given}, but its type must be {} or f32",
                x.element()
            )));
        }
    }
    let epsilon = attributes.number("epsilon", 1e-5)? as f32;
    Ok(Prepared::new(x.clone(), move |inputs, monitor| {
        normalize(inputs, width, norm, epsilon, monitor)
    }))
}

fn normalize(inputs: &[Tensor], width: usize, norm: Norm, epsilon: f32, monitor: &Monitor<'_>) -> Result<Tensor> {
    let (x, affine) = (&inputs[0], &inputs[1..]);
    if x.device().is_cpu() {
        let weight = affine.first().map_or_else(|| Ok(vec![1.0; width]), widened)?;
        let bias = affine.get(1).map(widened).transpose()?;
        return map_rows(x, width, monitor, |x, out| match norm {
            Norm::Layer => candle_kernels_cpu::layer_norm(x, &weight, bias.as_deref(), epsilon, out, None),
            Norm::Rms => candle_kernels_cpu::rms_norm(x, &weight, epsilon, out, None),
        });
    }
    in_f32(x, |x| {
        let weight = match affine.first() {
            Some(weight) => weight.to_dtype(DType::F32)?,
            None => Tensor::ones(width, DType::F32, x.device())?,
        };
        let bias = affine.get(1).map(|bias| bias.to_dtype(DType::F32)).transpose()?;
        composed(x, norm, &weight, bias.as_ref(), epsilon)
    })
}
