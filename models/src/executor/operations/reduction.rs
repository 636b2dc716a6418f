//! Sums and means.

use std::ops::RangeInclusive;

use candle_core::{DType, Tensor};

use super::check_floating;
use crate::error::Result;
use crate::executor::rows::{narrowed, widened};
use crate::executor::{Attributes, Monitor, Operation, Prepared, TensorType};

/// Elements after which a sum can be stopped.
const BLOCK: usize = 1 << 21;

/// `sum`, `mean` over the dimension that the attribute `axis` names, by default over all. With `keep_dimensions` the
/// dimension stays, with the size 1. Sums are in double precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reduction {
    Sum,
    Mean,
}

impl Operation for Reduction {
    fn name(&self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Mean => "mean",
        }
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        1..=1
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["axis", "keep_dimensions"]
    }

    fn copies(&self) -> bool {
        true
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        let x = &inputs[0];
        check_floating(x)?;
        let axis = attributes.axis("axis", x.rank())?;
        let keep = attributes.boolean("keep_dimensions")?;
        let mut shape = match axis {
            Some(_) => x.shape().to_vec(),
            None => vec![1; x.rank()],
        };
        match (axis, keep) {
            (Some(axis), true) => shape[axis] = 1,
            (Some(axis), false) => drop(shape.remove(axis)),
            (None, true) => {}
            (None, false) => shape.clear(),
        }
        let output = TensorType::new(x.element(), &shape)?;
        let (count, width) = (output.elements(), axis.map_or(x.elements(), |axis| x.shape()[axis]));
        let mean = *self == Self::Mean;
        Ok(Prepared::new(output, move |inputs, monitor| {
            let x = &inputs[0];
            // The dimension that goes, last.
            let turned = match axis {
                Some(axis) => x.transpose(axis, x.rank() - 1)?,
                None => x.clone(),
            };
            let turned_shape = turned.dims().to_vec();
            let rows = turned.contiguous()?.reshape((count, width))?;
            let sums = match x.device().is_cpu() {
                true => narrowed(row_sums(&rows, mean, monitor)?, &[count], x.dtype())?,
                false => elsewhere(&rows, mean)?,
            };
            let Some(axis) = axis else {
                return Ok(sums.reshape(shape.as_slice())?);
            };
            // Back into the order of the dimensions that stay.
            let mut kept = turned_shape;
            let last = kept.len() - 1;
            kept[last] = 1;
            Ok(sums
                .reshape(kept)?
                .transpose(axis, last)?
                .contiguous()?
                .reshape(shape.as_slice())?)
        }))
    }
}

fn row_sums(rows: &Tensor, mean: bool, monitor: &Monitor<'_>) -> Result<Vec<f32>> {
    let (count, width) = rows.dims2()?;
    let values = widened(rows)?;
    let divisor = if mean { width as f64 } else { 1.0 };
    let mut sums = Vec::with_capacity(count);
    for row in 0..count {
        let mut sum = 0.0f64;
        for block in values[row * width..(row + 1) * width].chunks(BLOCK) {
            sum += sum_of(block);
            if block.len() == BLOCK {
                monitor.advance(row, count)?;
            }
        }
        sums.push((sum / divisor) as f32);
        if row % 4096 == 0 {
            monitor.advance(row, count)?;
        }
    }
    monitor.advance(count, count)?;
    Ok(sums)
}

/// Several sums side by side: one alone would wait for each addition.
fn sum_of(values: &[f32]) -> f64 {
    let mut sums = [0.0f64; 16];
    let (groups, rest) = values.as_chunks::<16>();
    for group in groups {
        for (sum, value) in sums.iter_mut().zip(group) {
            *sum += f64::from(*value);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().copied().map(f64::from).sum::<f64>()
}

fn elsewhere(rows: &Tensor, mean: bool) -> Result<Tensor> {
    let wide = rows.to_dtype(DType::F32)?;
    let sums = if mean { wide.mean(1)? } else { wide.sum(1)? };
    Ok(sums.to_dtype(rows.dtype())?)
}
