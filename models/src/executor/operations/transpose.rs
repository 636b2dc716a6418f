//! Dimensions in another order.

use std::ops::RangeInclusive;

use crate::error::{Error, Result};
use crate::executor::attributes::axis;
use crate::executor::{Attributes, Operation, Prepared, TensorType};

/// `transpose`: the attribute `axes` lists all dimensions of the input in their new order; by default the last two change
/// places.
pub(super) struct Transpose;

impl Operation for Transpose {
    fn name(&self) -> &'static str {
        "transpose"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=1
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["axes"]
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        let x = &inputs[0];
        let rank = x.rank();
        let axes = match attributes.integers("axes")? {
            Some(given) => {
                let axes = given.iter().map(|given| axis("axes", *given, rank));
                let axes = axes.collect::<Result<Vec<usize>>>()?;
                let mut sorted = axes.clone();
                sorted.sort_unstable();
                if !sorted.into_iter().eq(0..rank) {
                    return Err(Error::invalid_argument(format!(
                        "attribute axes is {given:?}; it must name each of the {rank} dimensions once"
                    )));
                }
                axes
            }
            None if rank < 2 => {
                return Err(Error::invalid_argument("fewer than 2 dimensions cannot change places"));
            }
            None => (0..rank - 2).chain([rank - 1, rank - 2]).collect(),
        };
        let shape: Vec<usize> = axes.iter().map(|axis| x.shape()[*axis]).collect();
        let output = TensorType::new(x.element(), &shape)?;
        Ok(Prepared::new(output, move |inputs, _| {
            let x = &inputs[0];
            Ok(x.permute(axes.as_slice())?)
        }))
    }
}
