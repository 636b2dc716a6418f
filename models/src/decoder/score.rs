//! Logits and log-probabilities of whole sequences, in blocks of tokens: never all logits at once.

use super::{Decoder, SequenceStep};
use crate::error::{Error, Result};
use candle_core::Tensor;
use rayon::prelude::*;

/// Tokens whose logits exist at one time.
const BLOCK: usize = 64;

impl Decoder {
    /// Log-probability (natural) of each token given those before it; `None` for the first.
    /// Fails as [`forward`](Self::forward).
    pub fn score(&self, tokens: &[u32]) -> Result<Vec<Option<f32>>> {
        self.score_unless(tokens, &|| false)
    }

    /// As [`score`](Self::score); ends with [`Error::Cancelled`] soon after `cancelled` returns true.
    pub fn score_unless(&self, tokens: &[u32], cancelled: &dyn Fn() -> bool) -> Result<Vec<Option<f32>>> {
        let mut scores = Vec::with_capacity(tokens.len());
        scores.push(None);
        self.for_each_logits(tokens, cancelled, &mut |first, logits| {
            let count = logits.dim(0)?;
            let targets = tokens
                .get(first + 1..(first + 1 + count).min(tokens.len()))
                .unwrap_or_default();
            let vocabulary = self.config.vocabulary;
            let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
            let block: Vec<f32> = logits
                .par_chunks(vocabulary)
                .zip(targets)
                .map(|(row, target)| log_probability(row, *target as usize))
                .collect();
            scores.extend(block.into_iter().map(Some));
            Ok(())
        })?;
        Ok(scores)
    }

    /// Calls `visit` with the number of the first token and the logits `[tokens, vocabulary]` f32 of one block of
    /// tokens after another. Ends with [`Error::Cancelled`] soon after `cancelled` returns true.
    pub fn for_each_logits(
        &self,
        tokens: &[u32],
        cancelled: &dyn Fn() -> bool,
        visit: &mut dyn FnMut(usize, Tensor) -> Result<()>,
    ) -> Result<()> {
        let mut cache = self.new_cache();
        self.check_tokens(tokens, cache.remaining())?;
        for (block, tokens) in tokens.chunks(BLOCK).enumerate() {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let hidden = self.hidden(&mut [SequenceStep {
                tokens,
                cache: &mut cache,
            }])?;
            visit(block * BLOCK, self.head(&hidden)?)?;
        }
        Ok(())
    }
}

/// `log softmax(row)[target]`, the sum in f64.
fn log_probability(row: &[f32], target: usize) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|value| f64::from((value - max).exp())).sum();
    (f64::from(row[target] - max) - sum.ln()) as f32
}
