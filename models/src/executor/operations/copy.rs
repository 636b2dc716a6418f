//! The same tensor elsewhere.

use std::ops::RangeInclusive;

use crate::error::Result;
use crate::executor::{Attributes, Operation, Prepared, TensorType};

/// `copy`: the input, on the operation's device, wherever it was.
pub(super) struct Copy;

impl Operation for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=1
    }

    fn moves(&self) -> bool {
        true
    }

    fn prepare(&self, inputs: &[TensorType], _: &Attributes) -> Result<Prepared> {
        Ok(Prepared::new(inputs[0].clone(), |inputs, _| Ok(inputs[0].clone())))
    }
}
