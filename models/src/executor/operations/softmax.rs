//! Softmax and its logarithm.

use std::ops::RangeInclusive;

use candle_core::Tensor;

use super::check_floating;
use crate::error::{Error, Result};
use crate::executor::rows::{in_f32, map_rows};
use crate::executor::{Attributes, Monitor, Operation, Prepared, TensorType};

/// Over the dimension that the attribute `axis` names, by default the last.
pub(super) enum Softmax {
    /// `softmax`.
    Plain,
    /// `log_softmax`.
    Logarithm,
}

impl Operation for Softmax {
    fn name(&self) -> &'static str {
        match self {
            Self::Plain => "softmax",
            Self::Logarithm => "log_softmax",
        }
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=1
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["axis"]
    }

    fn copies(&self) -> bool {
        true
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        prepare(&inputs[0], attributes, matches!(self, Self::Logarithm))
    }
}

fn prepare(x: &TensorType, attributes: &Attributes, logarithm: bool) -> Result<Prepared> {
    check_floating(x)?;
    let Some(last) = x.rank().checked_sub(1) else {
        return Err(Error::invalid_argument("a scalar has no dimension to normalise over"));
    };
    let axis = attributes.axis("axis", x.rank())?.unwrap_or(last);
    Ok(Prepared::new(x.clone(), move |inputs, monitor| {
        let x = &inputs[0];
        if axis == last {
            return rows(x, logarithm, monitor);
        }
        let turned = rows(&x.transpose(axis, last)?.contiguous()?, logarithm, monitor)?;
        Ok(turned.transpose(axis, last)?)
    }))
}

/// Over the last dimension.
fn rows(x: &Tensor, logarithm: bool, monitor: &Monitor<'_>) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1);
    if x.device().is_cpu() {
        return map_rows(x, width, monitor, |x, out| match logarithm {
            true => candle_kernels_cpu::log_softmax(x, width, out),
            false => candle_kernels_cpu::softmax(x, width, out),
        });
    }
    in_f32(x, |x| {
        let axis = x.rank() - 1;
        let shifted = x.broadcast_sub(&x.max_keepdim(axis)?)?;
        let exps = shifted.exp()?;
        let sum = exps.sum_keepdim(axis)?;
        Ok(match logarithm {
            true => shifted.broadcast_sub(&sum.log()?)?,
            false => exps.broadcast_div(&sum)?,
        })
    })
}
