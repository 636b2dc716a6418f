//! Tensors one after the other.

use std::ops::RangeInclusive;

use candle_core::Tensor;

use super::check_same_element;
use crate::error::{Error, Result};
use crate::executor::{Attributes, Operation, Prepared, TensorType};

/// `concatenate`: any number of inputs that agree in all dimensions but `axis` (default 0).
pub(super) struct Concatenation;

impl Operation for Concatenation {
    fn name(&self) -> &'static str {
        "concatenate"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=usize::MAX
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["axis"]
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        check_same_element(inputs)?;
        let first = &inputs[0];
        if first.rank() == 0 {
            return Err(Error::invalid_argument(
                "scalars cannot be concatenated; reshape them first",
            ));
        }
        let axis = attributes.axis("axis", first.rank())?.unwrap_or(0);
        let mut shape = first.shape().to_vec();
        for other in &inputs[1..] {
            let agrees = other.rank() == first.rank()
                && (0..first.rank()).all(|at| at == axis || other.shape()[at] == first.shape()[at]);
            if !agrees {
                return Err(Error::invalid_argument(format!(
                    "{first} and {other} differ in more than dimension {axis}"
                )));
            }
            shape[axis] = shape[axis].saturating_add(other.shape()[axis]);
        }
        let output = TensorType::new(first.element(), &shape)?;
        Ok(Prepared::new(output, move |inputs, _| {
            let filled: Vec<&Tensor> = inputs.iter().filter(|input| input.elem_count() > 0).collect();
            Ok(Tensor::cat(&filled, axis)?)
        }))
    }
}
