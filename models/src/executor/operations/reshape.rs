//! The same elements in another shape.

use std::ops::RangeInclusive;

use crate::error::{Error, Result};
use crate::executor::{Attributes, Operation, Prepared, TensorType};

/// `reshape` to the attribute `shape`, in which one size may be -1: what is left.
pub(super) struct Reshape;

impl Operation for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=1
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["shape"]
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        let x = &inputs[0];
        let given = attributes
            .integers("shape")?
            .ok_or_else(|| Error::invalid_argument("attribute shape is required"))?;
        let refuse =
            || Error::invalid_argument(format!("its {} elements cannot have the shape {given:?}", x.elements()));
        let open = given.iter().filter(|size| **size == -1).count();
        let known = given.iter().filter(|size| **size != -1);
        let known = known.map(|size| usize::try_from(*size).ok());
        let product = known
            .into_iter()
            .try_fold(1usize, |product, size| product.checked_mul(size?))
            .ok_or_else(refuse)?;
        let rest = match open {
            0 => 1,
            1 if product > 0 && x.elements().is_multiple_of(product) => x.elements() / product,
            _ => return Err(refuse()),
        };
        let shape: Vec<usize> = given
            .iter()
            .map(|size| usize::try_from(*size).unwrap_or(rest))
            .collect();
        let output = TensorType::new(x.element(), &shape)?;
        if output.elements() != x.elements() {
            return Err(refuse());
        }
        Ok(Prepared::new(output, move |inputs, _| {
            let x = &inputs[0];
            Ok(x.reshape(shape.as_slice())?)
        }))
    }
}
