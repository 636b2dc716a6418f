//! Nonlinearities.

use std::ops::RangeInclusive;

use super::check_floating;
use crate::config::Activation;
use crate::error::{Error, Result};
use crate::executor::rows::{in_f32, map_rows};
use crate::executor::{Attributes, Operation, Prepared, TensorType};
use crate::ops::activation::composed;

/// `gelu`: the form with the error function, or with the attribute `approximate` `tanh` its approximation.
pub(super) struct Gelu;

/// `silu`: `x * sigmoid(x)`.
pub(super) struct Silu;

/// `relu`: `max(x, 0)`.
pub(super) struct Relu;

impl Operation for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=1
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["approximate"]
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        match attributes.text("approximate")? {
            None | Some("none") => prepare(inputs, Activation::GeluErf, candle_kernels_cpu::gelu_erf),
            Some("tanh") => prepare(inputs, Activation::GeluTanh, candle_kernels_cpu::gelu_tanh),
            Some(other) => Err(Error::invalid_argument(format!(
                "attribute approximate is {other:?}; it must be none or tanh"
            ))),
        }
    }
}

impl Operation for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=1
    }

    fn prepare(&self, inputs: &[TensorType], _: &Attributes) -> Result<Prepared> {
        prepare(inputs, Activation::Silu, candle_kernels_cpu::silu)
    }
}

impl Operation for Relu {
    fn name(&self) -> &'static str {
        "relu"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=1
    }

    fn prepare(&self, inputs: &[TensorType], _: &Attributes) -> Result<Prepared> {
        check_floating(&inputs[0])?;
        // Not f32::max, which prefers a number to NaN.
        let relu = |x: &[f32], out: &mut [f32]| {
            for (x, out) in x.iter().zip(out) {
                *out = if *x < 0.0 { 0.0 } else { *x };
            }
        };
        Ok(Prepared::new(inputs[0].clone(), move |inputs, monitor| {
            let x = &inputs[0];
            match x.device().is_cpu() {
                true => map_rows(x, 1, monitor, relu),
                false => Ok(x.relu()?),
            }
        }))
    }
}

fn prepare(inputs: &[TensorType], activation: Activation, kernel: fn(&[f32], &mut [f32])) -> Result<Prepared> {
    check_floating(&inputs[0])?;
    Ok(Prepared::new(inputs[0].clone(), move |inputs, monitor| {
        let x = &inputs[0];
        match x.device().is_cpu() {
            true => map_rows(x, 1, monitor, kernel),
            false => in_f32(x, |x| composed(x, activation)),
        }
    }))
}
