//! The forward pass of inference: several cached sequences at once.

use super::{Decoder, FeedForward, KeyValueCache, Layer, LowRank, NormParameters, Projection, QueryKeyValue};
use crate::adapters::{AdapterRows, AdapterWeights};
use crate::config::Position;
use crate::error::{Error, Result};
use crate::experts::Routing;
use crate::ops::attention;
use crate::ops::backward::add_in_place;
use crate::ops::rotary::RotaryAngles;
use crate::ops::storage::{CpuSlice, is_cpu};
use crate::ops::{activation, embedding, heads, linear, low_rank, norm, rotary};
use candle_core::Tensor;
use std::cell::RefCell;

/// What one sequence contributes to a forward pass.
#[derive(Debug)]
pub struct SequenceStep<'a> {
    /// The new tokens, at least one; their positions follow those of the cache.
    pub tokens: &'a [u32],
    /// The sequence's past; extended by the new tokens when the pass succeeds.
    pub cache: &'a mut KeyValueCache,
}

/// What goes beside the layers' own computation.
pub(super) struct Beside<'a> {
    /// What adapters add.
    pub(super) adapters: &'a AdapterRows<'a>,
    /// Where the routers' decisions are collected, if anywhere.
    pub(super) routings: Option<&'a RefCell<Vec<Routing>>>,
    /// Whether nobody waits for the result any more; asked while other servers compute experts.
    pub(super) cancelled: &'a dyn Fn() -> bool,
}

impl Decoder {
    /// Runs the new tokens of all sequences. Returns the logits after each sequence's last token,
    /// `[sequences, vocabulary]` f32, which do not depend on what other sequences are in the batch.
    ///
    /// Fails with [`Error::InvalidArgument`] for no sequence, a sequence without tokens, a token id outside the
    /// vocabulary, or more tokens than the context holds, and with [`Error::ResourceExhausted`] when the pool of a cache
    /// has no page left; the caches then hold what they held before.
    pub fn forward(&self, batch: &mut [SequenceStep<'_>]) -> Result<Tensor> {
        self.forward_adapted(batch, &[], &|| false)
    }

    /// As [`forward`](Self::forward), with the adapter of each sequence, if it has one, added to its rows alone: the same
    /// numbers, bit for bit, as those of [`AdapterWeights::over`]. Sequences past the end of `adapters` have none;
    /// neighbours of one adapter are computed together.
    ///
    /// Fails as [`forward`](Self::forward) and [`AdapterWeights::over`]; while other servers compute experts, with
    /// [`Error::Cancelled`] soon after `cancelled` returns true.
    pub fn forward_adapted(
        &self,
        batch: &mut [SequenceStep<'_>],
        adapters: &[Option<&AdapterWeights>],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Tensor> {
        let adapters = batch.iter().zip(adapters);
        let rows = AdapterRows::new(self, adapters.map(|(step, adapter)| (step.tokens.len(), *adapter)))?;
        let hidden = self.hidden_adapted(batch, &rows, cancelled)?;
        let mut end = 0;
        let last_rows: Vec<u32> = batch
            .iter()
            .map(|step| {
                end += step.tokens.len();
                (end - 1) as u32
            })
            .collect();
        let last_rows = Tensor::from_vec(last_rows, batch.len(), &self.device)?;
        self.head(&hidden.index_select(&last_rows, 0)?)
    }

    /// Runs the new tokens of all sequences. Returns their states after the last norm, `[new tokens of all sequences, width]`
    /// f32: what transformers calls the last hidden state. Fails as [`forward_adapted`](Self::forward_adapted).
    pub fn states(&self, batch: &mut [SequenceStep<'_>], cancelled: &dyn Fn() -> bool) -> Result<Tensor> {
        let hidden = self.hidden(batch, cancelled)?;
        self.normalize(&hidden, &self.layout.final_norm)
    }

    /// The logits after every token of one sequence, `[tokens, vocabulary]` f32. Fails as [`forward`](Self::forward).
    pub fn logits(&self, tokens: &[u32]) -> Result<Tensor> {
        let mut cache = self.new_cache();
        let step = SequenceStep {
            tokens,
            cache: &mut cache,
        };
        let hidden = self.hidden(&mut [step], &|| false)?;
        self.head(&hidden)
    }

    /// Checks the tokens of a sequence: at least one, at most `room`, each in the vocabulary.
    pub fn check_tokens(&self, tokens: &[u32], room: usize) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::InvalidArgument(
                "there are no tokens; at least one is needed".into(),
            ));
        }
        if tokens.len() > room {
            return Err(Error::InvalidArgument(format!(
                "{} tokens are more than the {room} that the context of {} still holds",
                tokens.len(),
                self.config.context_length
            )));
        }
        match tokens
            .iter()
            .position(|token| *token as usize >= self.config.vocabulary)
        {
            None => Ok(()),
            Some(position) => Err(Error::InvalidArgument(format!(
                "token id {} at position {position} is not below the vocabulary's size {}",
                tokens[position], self.config.vocabulary
            ))),
        }
    }

    /// The residual stream after the last layer, `[new tokens of all sequences, width]`; extends the caches.
    pub(crate) fn hidden(&self, batch: &mut [SequenceStep<'_>], cancelled: &dyn Fn() -> bool) -> Result<Tensor> {
        self.hidden_adapted(batch, &AdapterRows::none(), cancelled)
    }

    /// What the router of each layer with experts decides of the next tokens of a sequence; extends the cache.
    pub(super) fn routings(
        &self,
        tokens: &[u32],
        cache: &mut KeyValueCache,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Vec<Routing>> {
        let routings = RefCell::new(Vec::new());
        let beside = Beside {
            adapters: &AdapterRows::none(),
            routings: Some(&routings),
            cancelled,
        };
        self.hidden_beside(&mut [SequenceStep { tokens, cache }], &beside)?;
        Ok(routings.into_inner())
    }

    fn hidden_adapted(
        &self,
        batch: &mut [SequenceStep<'_>],
        adapters: &AdapterRows<'_>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Tensor> {
        let beside = Beside {
            adapters,
            routings: None,
            cancelled,
        };
        self.hidden_beside(batch, &beside)
    }

    fn hidden_beside(&self, batch: &mut [SequenceStep<'_>], beside: &Beside<'_>) -> Result<Tensor> {
        if batch.is_empty() {
            return Err(Error::InvalidArgument("there are no sequences to run".into()));
        }
        for step in batch.iter_mut() {
            if !step.cache.fits(&self.config) {
                return Err(Error::FailedPrecondition("the cache was made for another model".into()));
            }
            self.check_tokens(step.tokens, step.cache.remaining())?;
        }
        let layout = *batch[0].cache.layout();
        if batch.iter().any(|step| *step.cache.layout() != layout) {
            let message = "the caches of one batch hold their elements in different types";
            return Err(Error::FailedPrecondition(message.into()));
        }
        for step in batch.iter_mut() {
            step.cache.reserve(step.tokens.len())?;
        }
        let tokens: Vec<u32> = batch.iter().flat_map(|step| step.tokens.iter().copied()).collect();
        let positions: Vec<u32> = batch
            .iter()
            .flat_map(|step| {
                (step.cache.len()..)
                    .take(step.tokens.len())
                    .map(|position| position as u32)
            })
            .collect();
        let mut hidden = self.embed(&tokens, &positions)?;
        let angles = self.rotary_angles(&positions)?;
        for (index, layer) in self.layout.layers.iter().enumerate() {
            hidden = self.layer(index, layer, &hidden, angles.as_ref(), batch, beside)?;
        }
        for step in batch.iter_mut() {
            step.cache.advance(step.tokens.len());
        }
        Ok(hidden)
    }

    /// Token embeddings, plus learned positions: `[tokens, width]`.
    pub(crate) fn embed(&self, tokens: &[u32], positions: &[u32]) -> Result<Tensor> {
        let hidden = embedding::gather(self.weight(self.layout.token_embedding), tokens)?;
        match self.layout.position_embedding {
            None => Ok(hidden),
            Some(table) => Ok((hidden + embedding::gather(self.weight(table), positions)?)?),
        }
    }

    /// Final norm and head: `[rows, width]` to `[rows, vocabulary]`.
    pub(crate) fn head(&self, hidden: &Tensor) -> Result<Tensor> {
        let normalized = self.normalize(hidden, &self.layout.final_norm)?;
        self.project(&normalized, &self.layout.head)
    }

    fn layer(
        &self,
        index: usize,
        layer: &Layer,
        hidden: &Tensor,
        angles: Option<&RotaryAngles>,
        batch: &mut [SequenceStep<'_>],
        beside: &Beside<'_>,
    ) -> Result<Tensor> {
        let adapters = beside.adapters;
        let normalized = self.normalize(hidden, &layer.attention_norm)?;
        let [mut queries, mut keys, values] = match &layer.query_key_value {
            QueryKeyValue::Separate(each) => self.project_adapted(&normalized, each.each_ref(), adapters)?,
            QueryKeyValue::PerHead(all) => {
                let [all] = self.project_adapted(&normalized, [all], adapters)?;
                heads::split(&all, self.config.head_dim)?
            }
        };
        if let Some([query_norm, key_norm]) = &layer.query_key_norm {
            queries = self.normalize(&queries, query_norm)?;
            keys = self.normalize(&keys, key_norm)?;
        }
        if let Some(angles) = angles {
            queries = rotary::rotate(queries, angles, self.config.head_dim)?;
            keys = rotary::rotate(keys, angles, self.config.head_dim)?;
        }
        let attended = self.attend(index, &queries, &keys, &values, batch)?;
        let [middle] = self.project_adapted(&attended, [&layer.attention_output], adapters)?;
        add_in_place(&middle, hidden)?;
        let feed_forward_input = self.feed_forward_input(hidden, &middle);
        let normalized = self.normalize(feed_forward_input, &layer.feed_forward_norm)?;
        let output = match &layer.experts {
            Some(experts) => self.mix_experts(index, layer, experts, &normalized, beside)?,
            None => self.network(&layer.feed_forward, &normalized, beside)?,
        };
        add_in_place(&output, &middle)?;
        Ok(output)
    }

    /// A feed-forward network: `[rows, width]` to `[rows, width]`.
    pub(super) fn network(
        &self,
        feed_forward: &FeedForward,
        normalized: &Tensor,
        beside: &Beside<'_>,
    ) -> Result<Tensor> {
        let adapters = beside.adapters;
        let inner = match &feed_forward.gate {
            None => {
                let [up] = self.project_adapted(normalized, [&feed_forward.up], adapters)?;
                activation::activate(&up, self.config.activation)?
            }
            Some(gate) => {
                let [gate, up] = self.project_adapted(normalized, [gate, &feed_forward.up], adapters)?;
                activation::gate(&gate, &up, self.config.activation)?
            }
        };
        let [output] = self.project_adapted(&inner, [&feed_forward.down], adapters)?;
        Ok(output)
    }

    /// What the norm before the feed-forward network reads: the layer's input or the stream after attention.
    pub(crate) fn feed_forward_input<'a>(&self, input: &'a Tensor, middle: &'a Tensor) -> &'a Tensor {
        match self.config.residual.is_parallel() {
            true => input,
            false => middle,
        }
    }

    /// The angles by which queries and keys at these positions are rotated; none where positions are learned.
    pub(crate) fn rotary_angles(&self, positions: &[u32]) -> Result<Option<RotaryAngles>> {
        match &self.config.position {
            Position::Learned => Ok(None),
            Position::Rotary(rotary) => {
                RotaryAngles::new(&self.inverse_frequencies, rotary.layout, positions, &self.device)
            }
        }
    }

    /// Extends the caches by the new keys and values and attends to all of them.
    fn attend(
        &self,
        layer: usize,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        batch: &mut [SequenceStep<'_>],
    ) -> Result<Tensor> {
        let shape = self.attention_shape(layer);
        let width = self.config.key_value_width();
        let append = |batch: &mut [SequenceStep<'_>], keys: &[f32], values: &[f32]| {
            let mut end = 0;
            batch.iter_mut().try_for_each(|step| {
                let start = end;
                end += step.tokens.len() * width;
                step.cache.append(layer, &keys[start..end], &values[start..end])
            })
        };
        if is_cpu(queries) {
            let (keys, values) = (CpuSlice::new(keys)?, CpuSlice::new(values)?);
            append(batch, keys.f32()?, values.f32()?)?;
            let tables: Vec<_> = batch.iter().map(|step| step.cache.table(layer)).collect();
            let sequences = batch.iter().zip(&tables);
            let sequences = sequences.map(|(step, table)| step.cache.sequence(table, step.tokens.len()));
            let sequences: Vec<_> = sequences.collect();
            return attention::attend_cached(queries, batch[0].cache.layout(), &sequences, &shape);
        }
        let on_host = |x: &Tensor| -> Result<Vec<f32>> { Ok(x.flatten_all()?.to_vec1()?) };
        append(batch, &on_host(keys)?, &on_host(values)?)?;
        self.attend_elsewhere(layer, queries, batch)
    }

    /// The attention of [`attend`](Self::attend) from plain candle operations, on any device.
    fn attend_elsewhere(&self, layer: usize, queries: &Tensor, batch: &[SequenceStep<'_>]) -> Result<Tensor> {
        let mut first_row = 0;
        let sequences = batch.iter().map(|step| {
            let rows = first_row..first_row + step.tokens.len();
            first_row = rows.end;
            let positions = step.cache.len() + step.tokens.len();
            let shape = (positions, self.config.key_value_width());
            let [keys, values] = step.cache.gather(layer, positions);
            Ok(attention::CachedSequence {
                rows,
                keys: Tensor::from_vec(keys, shape, &self.device)?,
                values: Tensor::from_vec(values, shape, &self.device)?,
            })
        });
        let sequences: Vec<_> = sequences.collect::<Result<_>>()?;
        attention::composed(queries, &sequences, &self.attention_shape(layer))
    }

    pub(crate) fn normalize(&self, hidden: &Tensor, parameters: &NormParameters) -> Result<Tensor> {
        let weight = self.weight(parameters.weight).as_f32()?;
        let bias = parameters.bias.map(|bias| self.weight(bias).as_f32()).transpose()?;
        norm::normalize(hidden, self.config.norm, weight, bias, self.config.norm_epsilon as f32)
    }

    pub(crate) fn project(&self, input: &Tensor, projection: &Projection) -> Result<Tensor> {
        let [output] = self.project_each(input, [projection])?;
        Ok(output)
    }

    /// Several projections of the same input, with what each row's adapter adds.
    fn project_adapted<const N: usize>(
        &self,
        input: &Tensor,
        projections: [&Projection; N],
        adapters: &AdapterRows<'_>,
    ) -> Result<[Tensor; N]> {
        let outputs = self.project_each(input, projections)?;
        for (output, projection) in outputs.iter().zip(projections) {
            adapters.add(output, input, projection)?;
        }
        Ok(outputs)
    }

    /// Several projections of the same input.
    fn project_each<const N: usize>(&self, input: &Tensor, projections: [&Projection; N]) -> Result<[Tensor; N]> {
        let mut parts = Vec::with_capacity(N);
        for projection in projections {
            parts.push(linear::Part {
                weight: self.weight(projection.weight),
                rows: projection.rows.clone(),
                bias: projection.bias.map(|bias| self.weight(bias).as_f32()).transpose()?,
            });
        }
        let outputs = linear::linear_each(input, std::array::from_fn(|index| parts[index].clone()))?;
        for (output, projection) in outputs.iter().zip(projections) {
            if let Some(LowRank { a, b, scale, .. }) = projection.low_rank {
                let rows = projection.rows.clone();
                low_rank::add_low_rank(output, input, self.weight(a), self.weight(b), rows, scale)?;
            }
        }
        Ok(outputs)
    }
}

#[cfg(test)]
mod tests;
