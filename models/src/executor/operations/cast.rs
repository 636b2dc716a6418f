//! Another element type.

use std::ops::RangeInclusive;

use candle_core::Device;

use crate::error::{Error, Result};
use crate::executor::rows::widened;
use crate::executor::{Attributes, ElementType, Operation, Prepared, TensorType};

/// `cast` to the attribute `dtype`. Floating-point numbers are rounded to the nearest, ties to even; to i32 they are cut
/// off towards 0, and NaN and what i32 does not hold fail the operation.
pub(super) struct Cast;

impl Operation for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=1
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["dtype"]
    }

    fn copies(&self) -> bool {
        true
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        let x = &inputs[0];
        let name = attributes
            .text("dtype")?
            .ok_or_else(|| Error::invalid_argument("attribute dtype is required"))?;
        let Some(element) = ElementType::parse(name) else {
            let name: String = name.chars().take(40).collect();
            return Err(Error::invalid_argument(format!(
                "attribute dtype is {name:?}; it must be one of {}",
                ElementType::ALL.map(ElementType::name).join(", ")
            )));
        };
        let checked = x.element().is_floating() && !element.is_floating();
        let output = TensorType::new(element, x.shape())?;
        Ok(Prepared::new(output, move |inputs, _| {
            let x = &inputs[0];
            if checked {
                let values = widened(&x.to_device(&Device::Cpu)?)?;
                // The largest f32 below 2^31; both bounds are exact.
                let fits = |value: &f32| (-2_147_483_648.0..2_147_483_648.0).contains(value);
                if let Some(at) = values.iter().position(|value| !fits(value)) {
                    return Err(Error::invalid_argument(format!(
                        "element {at} is {}, which i32 does not hold",
                        values[at]
                    )));
                }
            }
            Ok(x.to_dtype(element.dtype())?)
        }))
    }
}
