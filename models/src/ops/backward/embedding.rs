//! Gathering rows of activations, and adding gradients back to the rows of a table.

use candle_core::Tensor;

use super::{add_in_place, composed};
use crate::error::Result;

/// The rows `ids` of `x` `[rows, width]`, `[ids, width]`.
pub(crate) fn gather_rows(x: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let ids = Tensor::from_slice(ids, ids.len(), x.device())?;
    Ok(x.index_select(&ids, 0)?)
}

/// Adds row `i` of `dy` `[ids, width]` to row `ids[i]` of `dtable` `[rows, width]` in place.
pub(crate) fn embedding_backward(ids: &[u32], dy: &Tensor, dtable: &Tensor) -> Result<()> {
    add_in_place(dtable, &composed::embedding(ids, dy, dtable.dim(0)?)?)
}
