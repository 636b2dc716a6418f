//! Gathering rows of activations, and adding gradients back to the rows of a table.

use candle_core::{Device, Tensor};
use candle_kernels_cpu::{Weights, embedding_gather, embedding_scatter_add};

use super::{add_in_place, composed};
use crate::error::Result;
use crate::ops::storage::{is_cpu, with_mut_slice, with_slice};

/// The rows `ids` of `x` `[rows, width]`, `[ids, width]`.
pub(crate) fn gather_rows(x: &Tensor, ids: &[u32]) -> Result<Tensor> {
    if is_cpu(x) {
        let (rows, width) = x.dims2()?;
        let mut out = vec![0.0; ids.len() * width];
        with_slice(x, |x| {
            embedding_gather(Weights::from_f32(x, rows, width), ids, &mut out)
        })?;
        return Ok(Tensor::from_vec(out, (ids.len(), width), &Device::Cpu)?);
    }
    let ids = Tensor::from_slice(ids, ids.len(), x.device())?;
    Ok(x.index_select(&ids, 0)?)
}

/// Adds row `i` of `dy` `[ids, width]` to row `ids[i]` of `dtable` `[rows, width]` in place.
pub(crate) fn embedding_backward(ids: &[u32], dy: &Tensor, dtable: &Tensor) -> Result<()> {
    let (rows, width) = dtable.dims2()?;
    if is_cpu(dy) {
        return with_slice(dy, |dy| {
            with_mut_slice(dtable, |dtable| embedding_scatter_add(dy, ids, width, dtable))
        })?;
    }
    add_in_place(dtable, &composed::embedding(ids, dy, rows)?)
}
