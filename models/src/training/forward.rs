//! The forward pass of training: the decoder's own operations, with what backward needs kept on a [`Tape`].

use candle_core::Tensor;

use super::tape::{LayerTape, Tape};
use super::{Pass, check_cancelled};
use crate::decoder::{Layer, Projection};
use crate::error::Result;
use crate::ops::backward::{
    AttentionTape, add_in_place, attention_forward, gather_rows, linear_forward, low_rank_forward,
};
use crate::ops::{activation, linear, rotary};

impl Pass<'_> {
    /// Runs the embedding and every layer.
    pub(super) fn forward(&self) -> Result<Tape> {
        let mut x = self.decoder.embed(&self.batch.tokens, &self.batch.positions)?;
        let mut layers = Vec::with_capacity(self.layout.layers.len());
        for (index, layer) in self.layout.layers.iter().enumerate() {
            check_cancelled(self.cancelled)?;
            let tape = self.record_layer(layer, x)?;
            x = self.layer_output(layer, &tape)?;
            layers.push(tape.keep(index, self.activations)?);
        }
        Ok(Tape { layers, output: x })
    }

    /// Runs layers again on the first one's input `[tokens, width]`: the tapes of all of them. The last one's output is
    /// not computed.
    pub(super) fn replay(&self, layers: &[Layer], input: Tensor) -> Result<Vec<LayerTape>> {
        let mut tapes: Vec<LayerTape> = Vec::with_capacity(layers.len());
        let mut input = Some(input);
        for (index, layer) in layers.iter().enumerate() {
            check_cancelled(self.cancelled)?;
            let x = match (input.take(), tapes.last()) {
                (None, Some(before)) => self.layer_output(&layers[index - 1], before)?,
                (Some(x), _) => x,
                (None, None) => break,
            };
            tapes.push(self.record_layer(layer, x)?);
        }
        Ok(tapes)
    }

    /// One layer on `input` `[tokens, width]` as far as its backward needs it.
    fn record_layer(&self, layer: &Layer, input: Tensor) -> Result<LayerTape> {
        let normed = self.decoder.normalize(&input, &layer.attention_norm)?;
        let [query, key, value] = &layer.query_key_value;
        let query = self.rotate(self.linear(query, &normed)?)?;
        let key = self.rotate(self.linear(key, &normed)?)?;
        let value = self.linear(value, &normed)?;
        drop(normed);
        let attention = self.attend(query, key, value)?;
        let middle = self.linear(&layer.attention_output, &attention.output)?;
        add_in_place(&middle, &input)?;
        let normed = self.decoder.normalize(&middle, &layer.feed_forward_norm)?;
        let gate = layer
            .feed_forward
            .gate
            .as_ref()
            .map(|gate| self.linear(gate, &normed))
            .transpose()?;
        let up = self.linear(&layer.feed_forward.up, &normed)?;
        Ok(LayerTape {
            input,
            attention,
            middle,
            gate,
            up,
        })
    }

    /// Attention of every sequence over its own tokens.
    fn attend(&self, query: Tensor, key: Tensor, value: Tensor) -> Result<AttentionTape> {
        let bounds = &self.batch.bounds;
        let (Some(attended), Some(first)) = (&self.batch.attended, self.batch.first_attended()) else {
            return attention_forward(query, key, value, bounds, &self.heads);
        };
        let [spread_query, spread_key, spread_value] = [
            gather_rows(&query, attended)?,
            gather_rows(&key, attended)?,
            gather_rows(&value, attended)?,
        ];
        let spread = attention_forward(spread_query, spread_key, spread_value, bounds, &self.heads)?;
        Ok(AttentionTape {
            query,
            key,
            value,
            output: gather_rows(&spread.output, &first)?,
            log_sum_exp: gather_groups(&spread.log_sum_exp, self.heads.heads, &first),
        })
    }

    /// The rest of a layer: its output, `[tokens, width]`.
    fn layer_output(&self, layer: &Layer, tape: &LayerTape) -> Result<Tensor> {
        let inner = self.activate(tape.gate.as_ref(), &tape.up)?;
        let output = self.linear(&layer.feed_forward.down, &inner)?;
        add_in_place(&output, &tape.middle)?;
        Ok(output)
    }

    /// The feed-forward network's activation, gated or not: `[tokens, feed_forward_width]`.
    pub(super) fn activate(&self, gate: Option<&Tensor>, up: &Tensor) -> Result<Tensor> {
        let kind = self.decoder.config().activation;
        match gate {
            Some(gate) => activation::gate(gate, up, kind),
            None => activation::activate(up, kind),
        }
    }

    /// A projection with its bias and what an adapter adds: `x` `[tokens, in]` to `[tokens, out]`.
    fn linear(&self, projection: &Projection, x: &Tensor) -> Result<Tensor> {
        let bias = projection.bias.map(|bias| self.weight_f32(bias)).transpose()?;
        let y = match self.frozen(projection.weight) {
            Some(weight) => linear::linear(x, weight, projection.rows.clone(), bias)?,
            None => linear_forward(&self.matrix(projection)?, bias, x)?,
        };
        if let Some(factors) = self.low_rank(projection)? {
            low_rank_forward(&factors, x, &y)?;
        }
        Ok(y)
    }

    /// Rotates queries or keys by their positions; nothing where positions are learned.
    fn rotate(&self, x: Tensor) -> Result<Tensor> {
        match &self.angles {
            Some(angles) => rotary::rotate(x, angles, self.decoder.config().head_dim),
            None => Ok(x),
        }
    }
}

/// The groups `ids` of `width` numbers each. Without numbers there are no groups.
pub(super) fn gather_groups(numbers: &[f32], width: usize, ids: &[u32]) -> Vec<f32> {
    if numbers.is_empty() {
        return vec![];
    }
    let group = |id: &u32| &numbers[*id as usize * width..][..width];
    ids.iter().flat_map(group).copied().collect()
}
