//! What the forward pass keeps for the backward pass, segment by segment: the embedding, each layer, the head.
//! Norms and activations are cheap beside products, so their outputs are computed again instead of kept.

use candle_core::{DType, Tensor};

use super::{ActivationSettings, Compression, Recompute};
use crate::error::Result;
use crate::ops::backward::AttentionTape;

/// The activations kept of one pass over `tokens` packed rows.
pub(super) struct Tape {
    /// One a layer.
    pub(super) layers: Vec<Kept>,
    /// Output of the last layer, `[tokens, width]`.
    pub(super) output: Tensor,
}

/// What is kept of one layer.
pub(super) enum Kept {
    /// All that its backward needs.
    Everything(LayerTape),
    /// Its input, `[tokens, width]`, from which this layer and those after it that keep nothing are run again.
    Input(Tensor),
    /// Nothing.
    Nothing,
}

/// What the backward pass of one layer needs.
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

impl LayerTape {
    /// What is kept of it as layer number `index`.
    pub(super) fn keep(self, index: usize, settings: ActivationSettings) -> Result<Kept> {
        let dtype = match settings.compression {
            Compression::None => DType::F32,
            Compression::Bf16 => DType::BF16,
        };
        Ok(match settings.recompute {
            Recompute::None => Kept::Everything(self.converted(dtype)?),
            Recompute::EveryNthBlock(n) if index.is_multiple_of(n.get()) => Kept::Input(self.input.to_dtype(dtype)?),
            Recompute::EveryNthBlock(_) => Kept::Nothing,
        })
    }

    /// The same in another type; costs nothing where it is of that type.
    pub(super) fn converted(self, dtype: DType) -> Result<Self> {
        Ok(Self {
            input: self.input.to_dtype(dtype)?,
            attention: self.attention.converted(dtype)?,
            middle: self.middle.to_dtype(dtype)?,
            gate: self.gate.map(|gate| gate.to_dtype(dtype)).transpose()?,
            up: self.up.to_dtype(dtype)?,
        })
    }
}
