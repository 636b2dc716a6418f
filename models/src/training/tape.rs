//! What the forward pass keeps for the backward pass, segment by segment: the embedding, each layer, the head.
//! Norms and activations are cheap beside products, so their outputs are computed again instead of kept.

use candle_core::{DType, Tensor};

use super::stored::Stored;
use super::{ActivationSettings, Compression, Recompute};
use crate::error::Result;
use crate::ops::backward::AttentionTape;
use crate::ops::half::rounded;

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
    Everything(Box<LayerTape<Stored>>),
    /// Its input, `[tokens, width]`, from which this layer and those after it that keep nothing are run again.
    Input(Stored),
    /// Nothing.
    Nothing,
}

/// What the backward pass of one layer needs; `T` is how its tensors are kept.
pub(super) struct LayerTape<T = Tensor> {
    /// The layer's input, `[tokens, width]`.
    pub(super) input: T,
    /// Rotated queries, rotated keys, values, the attention's output and its normalisers.
    pub(super) attention: AttentionTape<T>,
    /// The residual stream after attention, `[tokens, width]`.
    pub(super) middle: T,
    /// Output of the gate projection, `[tokens, feed_forward_width]`, for gated networks.
    pub(super) gate: Option<T>,
    /// Output of the up projection, `[tokens, feed_forward_width]`.
    pub(super) up: T,
}

impl LayerTape {
    /// What is kept of it as layer number `index`.
    pub(super) fn keep(self, index: usize, settings: ActivationSettings) -> Result<Kept> {
        let store = |tensor| Stored::new(tensor, settings.compression, None);
        match settings.recompute {
            Recompute::None => {}
            Recompute::EveryNthBlock(n) if index.is_multiple_of(n.get()) => return Ok(Kept::Input(store(self.input)?)),
            Recompute::EveryNthBlock(_) => return Ok(Kept::Nothing),
        }
        let input = store(self.input)?;
        // The stream after attention is the stream before it and a little more. The base is what will be at hand then,
        // lest its rounding be added.
        let base = match settings.compression {
            Compression::Q8 => Some(input.restore(None)?),
            Compression::None | Compression::Bf16 => None,
        };
        let middle = Stored::new(self.middle, settings.compression, base.as_ref())?;
        Ok(Kept::Everything(Box::new(LayerTape {
            input,
            attention: self.attention.map(store)?,
            middle,
            gate: self.gate.map(store).transpose()?,
            up: store(self.up)?,
        })))
    }
}

impl LayerTape<Stored> {
    /// The tensors as they were, to the rounding of compression: the residual stream in f32, the rest in the type
    /// `products` that products read.
    pub(super) fn restore(self, products: DType) -> Result<LayerTape> {
        let restore = |stored: Stored| rounded(&stored.restore(None)?, products);
        let input = self.input.restore(None)?;
        Ok(LayerTape {
            middle: self.middle.restore(Some(&input))?,
            input,
            attention: self.attention.map(restore)?,
            gate: self.gate.map(restore).transpose()?,
            up: restore(self.up)?,
        })
    }
}
