//! The forward pass of training: the decoder's own operations, with what backward needs kept on a [`Tape`].

use candle_core::{DType, Tensor};
use candle_kernels_cpu::Dropout;

use super::dropout::DropoutSite;
use super::packed::Attended;
use super::tape::{LayerTape, Tape};
use super::{Pass, check_cancelled};
use crate::decoder::{Layer, Projection, QueryKeyValue};
use crate::error::Result;
use crate::ops::attention::AttentionShape;
use crate::ops::backward::{
    AttentionTape, add_in_place, attention_forward, drop_in_place, gather_rows, linear_forward, low_rank_forward,
};
use crate::ops::half::{rounded, widened};
use crate::ops::{activation, heads, linear, rotary};

impl Pass<'_> {
    /// Runs the embedding and every layer.
    pub(super) fn forward(&self) -> Result<Tape> {
        let mut x = self.decoder.embed(&self.batch.tokens, &self.batch.positions)?;
        self.drop(&x, DropoutSite::Embedding)?;
        let mut layers = Vec::with_capacity(self.layout.layers.len());
        for (index, layer) in self.layout.layers.iter().enumerate() {
            check_cancelled(self.cancelled)?;
            let tape = self.record_layer(index, layer, x)?;
            x = self.layer_output(index, layer, &tape)?;
            layers.push(tape.keep(index, self.activations)?);
        }
        Ok(Tape { layers, output: x })
    }

    /// Runs `layers`, the first of which has number `first`, again on that one's input `[tokens, width]`: the tapes of all
    /// of them. The last one's output is not computed.
    pub(super) fn replay(&self, first: usize, layers: &[Layer], input: Tensor) -> Result<Vec<LayerTape>> {
        let mut tapes: Vec<LayerTape> = Vec::with_capacity(layers.len());
        let mut input = Some(input);
        for (index, layer) in layers.iter().enumerate() {
            check_cancelled(self.cancelled)?;
            let x = match (input.take(), tapes.last()) {
                (None, Some(before)) => self.layer_output(first + index - 1, &layers[index - 1], before)?,
                (Some(x), _) => x,
                (None, None) => break,
            };
            tapes.push(self.record_layer(first + index, layer, x)?);
        }
        Ok(tapes)
    }

    /// Layer number `index` on `input` `[tokens, width]` as far as its backward needs it. What is rounded is rounded before
    /// anything reads it, so that it makes no difference whether it is kept or computed again.
    fn record_layer(&self, index: usize, layer: &Layer, input: Tensor) -> Result<LayerTape> {
        let normed = self.operand(&self.decoder.normalize(&input, &layer.attention_norm)?)?;
        let [query, key, value] = self.query_key_value(layer, &normed)?;
        drop(normed);
        let dropout = self.dropout_at(DropoutSite::Attention(index));
        let shape = self.decoder.attention_shape(index);
        let mut attention = self.attend([query, key, value], &shape, dropout.as_ref())?;
        attention.output = self.operand(&attention.output)?;
        let middle = self.linear(&layer.attention_output, &attention.output)?;
        self.drop(&middle, DropoutSite::AttentionOutput(index))?;
        add_in_place(&middle, &input)?;
        let feed_forward_input = self.decoder.feed_forward_input(&input, &middle);
        let normed = self.decoder.normalize(feed_forward_input, &layer.feed_forward_norm)?;
        if let Some(experts) = &layer.experts {
            let [gate, up] = self.record_experts(index, layer, experts, &normed)?;
            return Ok(LayerTape {
                input,
                attention,
                middle,
                gate: Some(gate),
                up,
            });
        }
        let normed = self.operand(&normed)?;
        let gate = layer
            .feed_forward
            .gate
            .as_ref()
            .map(|gate| self.operand(&self.linear(gate, &normed)?))
            .transpose()?;
        let up = self.operand(&self.linear(&layer.feed_forward.up, &normed)?)?;
        Ok(LayerTape {
            input,
            attention,
            middle,
            gate,
            up,
        })
    }

    /// Rotated queries, rotated keys and values of `x` `[tokens, width]`, as attention reads them.
    fn query_key_value(&self, layer: &Layer, x: &Tensor) -> Result<[Tensor; 3]> {
        let (query, key, value) = match &layer.query_key_value {
            QueryKeyValue::Separate([query, key, value]) => {
                let (query, key) = self.normalize_heads(layer, self.linear(query, x)?, self.linear(key, x)?)?;
                let query = self.operand(&self.rotate(query)?)?;
                let key = self.operand(&self.rotate(key)?)?;
                return Ok([query, key, self.operand(&self.linear(value, x)?)?]);
            }
            QueryKeyValue::PerHead(all) => {
                let [query, key, value] = heads::split(&self.linear(all, x)?, self.decoder.config().head_dim)?;
                (query, key, value)
            }
        };
        let query = self.operand(&self.rotate(query)?)?;
        Ok([query, self.operand(&self.rotate(key)?)?, self.operand(&value)?])
    }

    /// Attention of every sequence over its own tokens.
    fn attend(
        &self,
        [query, key, value]: [Tensor; 3],
        shape: &AttentionShape<'_>,
        dropout: Option<&Dropout<'_>>,
    ) -> Result<AttentionTape> {
        let bounds = &self.batch.bounds;
        let Some(Attended { rows: attended, first }) = &self.batch.attended else {
            return attention_forward(query, key, value, bounds, shape, dropout);
        };
        let [spread_query, spread_key, spread_value] = [
            gather_rows(&widened(&query)?, attended)?,
            gather_rows(&widened(&key)?, attended)?,
            gather_rows(&widened(&value)?, attended)?,
        ];
        let spread = attention_forward(spread_query, spread_key, spread_value, bounds, shape, None)?;
        Ok(AttentionTape {
            query,
            key,
            value,
            output: gather_rows(&spread.output, first)?,
            log_sum_exp: gather_groups(&spread.log_sum_exp, shape.heads, first),
        })
    }

    /// The rest of layer number `index`: its output, `[tokens, width]`.
    fn layer_output(&self, index: usize, layer: &Layer, tape: &LayerTape) -> Result<Tensor> {
        let output = match &layer.experts {
            Some(experts) => self.mix_experts(index, layer, experts, tape)?,
            None => {
                let inner = self.activate(tape.gate.as_ref(), &tape.up)?;
                self.linear(&layer.feed_forward.down, &inner)?
            }
        };
        self.drop(&output, DropoutSite::FeedForward(index))?;
        add_in_place(&output, &tape.middle)?;
        Ok(output)
    }

    /// Queries and keys normalised, where the layer does that.
    fn normalize_heads(&self, layer: &Layer, query: Tensor, key: Tensor) -> Result<(Tensor, Tensor)> {
        match &layer.query_key_norm {
            None => Ok((query, key)),
            Some([query_norm, key_norm]) => Ok((
                self.decoder.normalize(&query, query_norm)?,
                self.decoder.normalize(&key, key_norm)?,
            )),
        }
    }

    /// The feed-forward network's activation, gated or not: `[tokens, feed_forward_width]`, as the next product reads it.
    pub(super) fn activate(&self, gate: Option<&Tensor>, up: &Tensor) -> Result<Tensor> {
        let kind = self.decoder.config().activation;
        let up = widened(up)?;
        self.operand(&match gate {
            Some(gate) => activation::gate(&widened(gate)?, &up, kind)?,
            None => activation::activate(&up, kind)?,
        })
    }

    /// Activations as products read them: in half precision if there is any.
    pub(super) fn operand(&self, x: &Tensor) -> Result<Tensor> {
        rounded(x, self.product_dtype())
    }

    /// Type of what products read.
    pub(super) fn product_dtype(&self) -> DType {
        self.half.map_or(DType::F32, |half| half.precision().dtype())
    }

    /// What is dropped at a place; none if nothing is.
    pub(super) fn dropout_at(&self, site: DropoutSite) -> Option<Dropout<'_>> {
        self.dropout.at(site, self.decoder.config())
    }

    /// Drops elements of `x` `[tokens, width]` in place, forward or backward.
    pub(super) fn drop(&self, x: &Tensor, site: DropoutSite) -> Result<()> {
        match self.dropout_at(site) {
            Some(dropout) => drop_in_place(x, &self.batch.bounds, &dropout),
            None => Ok(()),
        }
    }

    /// A projection with its bias and what an adapter adds: `x` `[tokens, in]` to `[tokens, out]`.
    pub(super) fn linear(&self, projection: &Projection, x: &Tensor) -> Result<Tensor> {
        let bias = projection.bias.map(|bias| self.weight_f32(bias)).transpose()?;
        let y = match self.frozen(projection.weight) {
            Some(weight) => linear::linear(&widened(x)?, weight, projection.rows.clone(), bias)?,
            None => linear_forward(&self.matrix(projection)?, bias, x)?,
        };
        if let Some(factors) = self.low_rank(projection)? {
            low_rank_forward(&factors, &widened(x)?, &y)?;
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
