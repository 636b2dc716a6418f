//! Rows of a table.

use std::ops::RangeInclusive;

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::executor::{Attributes, ElementType, Operation, Prepared, TensorType};

/// `embedding`: inputs `ids` (i32, any shape) and `table` `[rows, …]`; the output has the shape of `ids` and then that of
/// a row. An id without a row fails the operation.
pub(super) struct Embedding;

impl Operation for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        2..=2
    }

    fn prepare(&self, inputs: &[TensorType], _: &Attributes) -> Result<Prepared> {
        let (ids, table) = (&inputs[0], &inputs[1]);
        if ids.element() != ElementType::I32 {
            return Err(Error::invalid_argument(format!(
                "the ids are {ids}, but their type must be i32"
            )));
        }
        let Some((rows, row)) = table.shape().split_first() else {
            return Err(Error::invalid_argument("the table is a scalar, which has no rows"));
        };
        let shape = [ids.shape(), row].concat();
        let (rows, output) = (*rows, TensorType::new(table.element(), &shape)?);
        Ok(Prepared::new(output, move |inputs, _| {
            let (ids, table) = (&inputs[0], &inputs[1]);
            let ids: Vec<i32> = ids.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
            let valid = |id: i32| u32::try_from(id).ok().filter(|id| (*id as usize) < rows);
            if let Some(at) = ids.iter().position(|id| valid(*id).is_none()) {
                return Err(Error::invalid_argument(format!(
                    "element {at} of the ids is {}; the table has {rows} rows, numbered from 0",
                    ids[at]
                )));
            }
            let count = ids.len();
            let ids: Vec<u32> = ids.into_iter().filter_map(valid).collect();
            let ids = Tensor::from_vec(ids, count, table.device())?;
            Ok(table.index_select(&ids, 0)?.reshape(shape.as_slice())?)
        }))
    }
}
