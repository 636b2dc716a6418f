//! Sums, differences, products and quotients of elements.

use std::ops::RangeInclusive;

use super::{broadcast, check_floating, check_same_element};
use crate::error::Result;
use crate::executor::{Attributes, Operation, Prepared, TensorType};

/// `add`, `sub`, `mul`, `div`: inputs `a` and `b` of one element type, which are broadcast. i32 wraps around, and is not
/// divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Elementwise {
    Add,
    Sub,
    Mul,
    Div,
}

impl Operation for Elementwise {
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Sub => "sub",
            Self::Mul => "mul",
            Self::Div => "div",
        }
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        2..=2
    }

    fn prepare(&self, inputs: &[TensorType], _: &Attributes) -> Result<Prepared> {
        check_same_element(inputs)?;
        if *self == Self::Div {
            check_floating(&inputs[0])?;
        }
        let shape = broadcast(inputs[0].shape(), inputs[1].shape())?;
        let output = TensorType::new(inputs[0].element(), &shape)?;
        let operation = *self;
        Ok(Prepared::new(output, move |inputs, monitor| {
            let (a, b) = (&inputs[0], &inputs[1]);
            let result = match operation {
                Self::Add => a.broadcast_add(b)?,
                Self::Sub => a.broadcast_sub(b)?,
                Self::Mul => a.broadcast_mul(b)?,
                Self::Div => a.broadcast_div(b)?,
            };
            monitor.advance(1, 1)?;
            Ok(result)
        }))
    }
}
