//! Backward of LayerNorm and RMSNorm.

use candle_core::Tensor;

use super::{add_in_place, composed};
use crate::config::Norm;
use crate::error::Result;

/// A norm's parameters, and where their gradients are added up.
pub(crate) struct NormBackward<'a> {
    /// Which norm.
    pub(crate) kind: Norm,
    /// Factor, `[width]`.
    pub(crate) weight: &'a Tensor,
    /// Added to the variance.
    pub(crate) epsilon: f32,
    /// `[width]`; none for a frozen weight.
    pub(crate) dweight: Option<&'a Tensor>,
    /// `[width]`; none without bias or for a frozen one.
    pub(crate) dbias: Option<&'a Tensor>,
}

/// `x` and the gradient `dy` of the output, both `[rows, width]`: adds the gradients of weight and bias, and adds that of
/// `x` to `dx` in place.
pub(crate) fn norm_backward(norm: &NormBackward<'_>, x: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> {
    let (own, dweight, dbias) = match norm.kind {
        Norm::Layer => {
            let (dx, dweight, dbias) = composed::layer_norm(x, norm.weight, dy, f64::from(norm.epsilon))?;
            (dx, dweight, Some(dbias))
        }
        Norm::Rms => {
            let (dx, dweight) = composed::rms_norm(x, norm.weight, dy, f64::from(norm.epsilon))?;
            (dx, dweight, None)
        }
    };
    if let Some(sum) = norm.dweight {
        add_in_place(sum, &dweight)?;
    }
    if let (Some(sum), Some(dbias)) = (norm.dbias, dbias) {
        add_in_place(sum, &dbias)?;
    }
    add_in_place(dx, &own)
}
