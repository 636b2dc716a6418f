//! Backward of the feed-forward network's nonlinearities.

use candle_core::Tensor;

use super::composed;
use crate::config::Activation;
use crate::error::Result;

/// The gradients of `gate` (if there is one) and `up` from the gradient `dy` of `activation(up)` or
/// `activation(gate) * up`; all of one shape.
pub(crate) fn activate_backward(
    activation: Activation,
    gate: Option<&Tensor>,
    up: &Tensor,
    dy: &Tensor,
) -> Result<(Option<Tensor>, Tensor)> {
    match gate {
        None => Ok((None, composed::activation(activation, up, dy)?)),
        Some(gate) => {
            let (dgate, dup) = composed::gate(activation, gate, up, dy)?;
            Ok((Some(dgate), dup))
        }
    }
}
