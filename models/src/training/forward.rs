//! The forward pass of training: the decoder's own operations, with what backward needs kept on a [`Tape`].

use candle_core::Tensor;

use super::tape::{LayerTape, Tape};
use super::{Pass, check_cancelled};
use crate::decoder::Layer;
use crate::error::Result;
use crate::ops::backward::{add_in_place, attention_forward};
use crate::ops::{activation, rotary};

impl Pass<'_> {
    /// Runs the embedding and every layer.
    pub(super) fn forward(&self) -> Result<Tape> {
        let mut x = self.decoder.embed(&self.batch.tokens, &self.batch.positions)?;
        let mut layers = Vec::with_capacity(self.layout.layers.len());
        for layer in &self.layout.layers {
            check_cancelled(self.cancelled)?;
            let (output, tape) = self.forward_layer(layer, x)?;
            layers.push(tape);
            x = output;
        }
        Ok(Tape { layers, output: x })
    }

    /// One layer: `x` `[tokens, width]` to the same shape.
    fn forward_layer(&self, layer: &Layer, input: Tensor) -> Result<(Tensor, LayerTape)> {
        let normed = self.decoder.normalize(&input, &layer.attention_norm)?;
        let [query, key, value] = &layer.query_key_value;
        let query = self.rotate(self.decoder.project(&normed, query)?)?;
        let key = self.rotate(self.decoder.project(&normed, key)?)?;
        let value = self.decoder.project(&normed, value)?;
        drop(normed);
        let attention = attention_forward(query, key, value, &self.batch.bounds, &self.heads)?;
        let middle = self.decoder.project(&attention.output, &layer.attention_output)?;
        add_in_place(&middle, &input)?;
        let normed = self.decoder.normalize(&middle, &layer.feed_forward_norm)?;
        let gate = layer
            .feed_forward
            .gate
            .as_ref()
            .map(|gate| self.decoder.project(&normed, gate))
            .transpose()?;
        let up = self.decoder.project(&normed, &layer.feed_forward.up)?;
        drop(normed);
        let inner = self.activate(gate.as_ref(), &up)?;
        let output = self.decoder.project(&inner, &layer.feed_forward.down)?;
        add_in_place(&output, &middle)?;
        Ok((
            output,
            LayerTape {
                input,
                attention,
                middle,
                gate,
                up,
            },
        ))
    }

    /// The feed-forward network's activation, gated or not: `[tokens, feed_forward_width]`.
    pub(super) fn activate(&self, gate: Option<&Tensor>, up: &Tensor) -> Result<Tensor> {
        let kind = self.decoder.config().activation;
        match gate {
            Some(gate) => activation::gate(gate, up, kind),
            None => activation::activate(up, kind),
        }
    }

    /// Rotates queries or keys by their positions; nothing where positions are learned.
    fn rotate(&self, x: Tensor) -> Result<Tensor> {
        match &self.angles {
            Some(angles) => rotary::rotate(x, angles, self.decoder.config().head_dim),
            None => Ok(x),
        }
    }
}
