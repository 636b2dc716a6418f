//! One round of generations: a pass over the weights for all sequences that write and for pieces of prompts.

use std::sync::Arc;

use candle_models::{Decoder, KeyValueCache, SequenceStep};

use super::factors::Factors;
use super::sequence::Sequence;
use super::state::Owner;
use super::{AppliedAdapter, View};
use crate::error::{Error, Result};

/// Tokens of a prompt that it may read before another prompt has its turn. The numbers of a prompt do not depend on where it
/// is cut: every row of a pass is computed by itself.
const PREFILL_CHUNK: usize = 64;

/// A sequence's part in a pass.
struct Part<'a> {
    sequence: &'a mut Sequence,
    /// Tokens that it reads.
    tokens: usize,
    adapter: Option<Arc<Factors>>,
}

impl Owner {
    /// A pass for each view that has sequences; false when none could go on.
    pub(super) fn run_round(&mut self, active: &mut [Sequence]) -> bool {
        let mut views: Vec<View> = Vec::new();
        for sequence in active.iter().filter(|sequence| sequence.is_runnable()) {
            if !views.contains(&sequence.request.view) {
                views.push(sequence.request.view.clone());
            }
        }
        self.generations.round += 1;
        let (shared, round, budget) = (
            Arc::clone(&self.shared),
            self.generations.round,
            self.limits.batch_tokens,
        );
        for view in &views {
            let of_view = active
                .iter_mut()
                .filter(|sequence| sequence.is_runnable() && sequence.request.view == *view);
            match self.decoder(view) {
                Ok(decoder) => {
                    let mut parts = plan(of_view.collect(), budget);
                    let writing = parts.iter().filter(|part| !part.sequence.is_prefilling()).count();
                    if writing > 0 {
                        shared.metrics.decoded(writing);
                    }
                    run_pass(decoder, &mut parts, round, &shared.end_tokens);
                }
                Err(error) => {
                    let status = error.to_string();
                    of_view.for_each(|sequence| sequence.fail(Error::Stale(status.clone())));
                }
            }
        }
        !views.is_empty()
    }

    /// Log-probability (natural) of each token given those before it; `None` for the first.
    ///
    /// # Errors
    /// As [`decoder`](Self::decoder), and [`AppliedAdapter::factors`]; `Cancelled` soon after `cancelled` returns true.
    pub(crate) fn score(
        &mut self,
        view: &View,
        adapter: Option<&AppliedAdapter>,
        tokens: &[u32],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<f32>>> {
        let decoder = self.decoder(view)?;
        match adapter {
            None => Ok(decoder.score_unless(tokens, cancelled)?),
            Some(adapter) => {
                let adapted = adapter.factors()?.weights.over(decoder)?;
                Ok(adapted.score_unless(tokens, cancelled)?)
            }
        }
    }
}

/// Which sequences take part, and with how many tokens: all that write, with one, and of prompts what `budget` has left, at
/// least a chunk, in turns. Sequences of one adapter are neighbours.
fn plan(sequences: Vec<&mut Sequence>, budget: usize) -> Vec<Part<'_>> {
    let mut parts: Vec<Part<'_>> = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        match sequence.request.adapter.as_ref().map(AppliedAdapter::factors).transpose() {
            Ok(adapter) => parts.push(Part {
                tokens: usize::from(!sequence.is_prefilling()),
                sequence,
                adapter,
            }),
            Err(error) => sequence.fail(error),
        }
    }
    let mut left = budget.saturating_sub(parts.iter().map(|part| part.tokens).sum());
    left = left.max(PREFILL_CHUNK.min(budget));
    // Who has waited longest first; then once more round for what is left.
    parts.sort_by_key(|part| part.sequence.last_round);
    loop {
        let before = left;
        for part in parts.iter_mut().filter(|part| part.sequence.is_prefilling()) {
            let more = (part.sequence.unread_tokens() - part.tokens).min(PREFILL_CHUNK).min(left);
            part.tokens += more;
            left -= more;
        }
        if left == 0 || left == before {
            break;
        }
    }
    parts.retain(|part| part.tokens > 0);
    parts.sort_by_key(|part| part.adapter.as_ref().map(|factors| factors.version));
    parts
}

/// One forward pass over the parts.
fn run_pass(decoder: &Decoder, parts: &mut [Part<'_>], round: u64, end_tokens: &[u32]) {
    if parts.is_empty() {
        return;
    }
    let mut caches: Vec<KeyValueCache> = parts
        .iter_mut()
        .map(|part| part.sequence.cache.take().unwrap_or_else(|| decoder.new_cache()))
        .collect();
    let mut steps: Vec<SequenceStep<'_>> = parts
        .iter()
        .zip(&mut caches)
        .map(|(part, cache)| SequenceStep {
            tokens: &part.sequence.request.tokens[cache.len()..cache.len() + part.tokens],
            cache,
        })
        .collect();
    let adapters: Vec<_> = parts
        .iter()
        .map(|part| part.adapter.as_deref().map(|factors| &factors.weights))
        .collect();
    let logits = decoder
        .forward_adapted(&mut steps, &adapters)
        .and_then(|logits| Ok(logits.to_vec2::<f32>()?));
    drop(steps);
    let count = parts.len();
    for (part, cache) in parts.iter_mut().zip(caches) {
        part.sequence.cache = Some(cache);
        part.sequence.count_pass(round, count);
    }
    match logits {
        Ok(rows) => {
            for (part, mut row) in parts.iter_mut().zip(rows) {
                part.sequence.accept(&mut row, end_tokens);
            }
        }
        Err(error) => {
            let message = error.to_string();
            parts
                .iter_mut()
                .for_each(|part| part.sequence.fail(Error::Internal(message.clone())));
        }
    }
}
