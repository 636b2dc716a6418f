//! A part of a tensor.

use std::ops::RangeInclusive;

use crate::error::{Error, Result};
use crate::executor::{Attributes, Operation, Prepared, TensorType};

/// `slice`: of the dimension `axis` (required) the indices from `start` (default 0) to before `end` (default the size).
pub(super) struct Slice;

impl Operation for Slice {
    fn name(&self) -> &'static str {
        "slice"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=1
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["axis", "start", "end"]
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        let x = &inputs[0];
        let axis = attributes
            .axis("axis", x.rank())?
            .ok_or_else(|| Error::invalid_argument("attribute axis is required"))?;
        let size = x.shape()[axis];
        let bound = |name: &str, default: usize| -> Result<usize> {
            let Some(given) = attributes.integer(name)? else {
                return Ok(default);
            };
            let index = usize::try_from(given).ok().filter(|index| *index <= size);
            index.ok_or_else(|| {
                Error::invalid_argument(format!(
                    "attribute {name} is {given}; it must be from 0 to {size}, the size of dimension {axis}"
                ))
            })
        };
        let (start, end) = (bound("start", 0)?, bound("end", size)?);
        let Some(length) = end.checked_sub(start) else {
            return Err(Error::invalid_argument(format!(
                "attribute end is {end}, which is before start, {start}"
            )));
        };
        let mut shape = x.shape().to_vec();
        shape[axis] = length;
        let output = TensorType::new(x.element(), &shape)?;
        Ok(Prepared::new(output, move |inputs, _| {
            let x = &inputs[0];
            // A part that lies in one run would share the input's memory.
            Ok(x.narrow(axis, start, length)?.copy()?)
        }))
    }
}
