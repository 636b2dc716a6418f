//! Output head and cross-entropy together, forward and backward, so that the logits are never held whole.

use candle_core::Tensor;

use super::{add_in_place, composed};
use crate::error::Result;

/// Rows `x` `[rows, width]` through the head `weight` `[vocabulary, width]`: their cross-entropies against `targets`
/// `[rows]`, and the gradient `[rows, width]` of the sum of `factors[i]` times row `i`'s. Adds the head's own gradient to
/// `dweight`, unless it is frozen.
pub(crate) fn cross_entropy_head(
    x: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    factors: &[f32],
    dweight: Option<&Tensor>,
) -> Result<(Vec<f32>, Tensor)> {
    let head = composed::cross_entropy_head(x, weight, targets, factors)?;
    if let Some(sum) = dweight {
        add_in_place(sum, &head.dweight)?;
    }
    Ok((head.losses, head.dx))
}
