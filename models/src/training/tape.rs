//! What the forward pass keeps for the backward pass, segment by segment: the embedding, each layer, the head.
//! Norms and activations are cheap beside products, so their outputs are computed again instead of kept.

use candle_core::Tensor;

use crate::ops::backward::AttentionTape;

/// The activations kept of one pass over `tokens` packed rows.
pub(super) struct Tape {
    /// One a layer.
    pub(super) layers: Vec<LayerTape>,
    /// Output of the last layer, `[tokens, width]`.
    pub(super) output: Tensor,
}

/// What one layer keeps.
pub(super) struct LayerTape {
    /// The layer's input, `[tokens, width]`.
    pub(super) input: Tensor,
    /// Rotated queries, rotated keys, values, the attention's output and its normalisers.
    pub(super) attention: AttentionTape,
    /// The residual stream after attention, `[tokens, width]`.
    pub(super) middle: Tensor,
    /// Output of the gate projection, `[tokens, feed_forward_width]`, for gated networks.
    pub(super) gate: Option<Tensor>,
    /// Output of the up projection, `[tokens, feed_forward_width]`.
    pub(super) up: Tensor,
}
