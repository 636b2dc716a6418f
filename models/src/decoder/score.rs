//! Logits and log-probabilities of whole sequences, in blocks of tokens: never all logits at once.

use super::{Decoder, KeyValueCache, SequenceStep};
use crate::error::{Error, Result};
use crate::ops::log_probability::log_probabilities;
use candle_core::Tensor;

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
        let (head, bias) = (self.weight(self.layout.head.weight), self.head_bias()?);
        let mut scores = Vec::with_capacity(tokens.len());
        scores.push(None);
        self.for_each_block(tokens, cancelled, &mut |first, hidden| {
            // The last token of the sequence predicts nothing.
            let targets = &tokens[first + 1..tokens.len().min(first + 1 + hidden.dim(0)?)];
            if targets.is_empty() {
                return Ok(());
            }
            let hidden = self.normalize(&hidden.narrow(0, 0, targets.len())?, &self.layout.final_norm)?;
            let block = log_probabilities(&hidden, head, bias, targets)?;
            scores.extend(block.into_iter().map(Some));
            Ok(())
        })?;
        Ok(scores)
    }

    /// Cross-entropy (natural logarithm) of every token's target, given the tokens up to it: `None` where there is no
    /// target. `targets` has one entry a token, each below the vocabulary's size. Ends with [`Error::Cancelled`] soon after
    /// `cancelled` returns true.
    pub fn losses_unless(
        &self,
        tokens: &[u32],
        targets: &[Option<u32>],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<f32>>> {
        let (head, bias) = (self.weight(self.layout.head.weight), self.head_bias()?);
        let mut losses = Vec::with_capacity(tokens.len());
        self.for_each_block(tokens, cancelled, &mut |first, hidden| {
            let targets = &targets[first..first + hidden.dim(0)?];
            if targets.iter().all(Option::is_none) {
                losses.extend(std::iter::repeat_n(None, targets.len()));
                return Ok(());
            }
            let hidden = self.normalize(hidden, &self.layout.final_norm)?;
            // Rows without a target are computed with those that have one, and left out.
            let present: Vec<u32> = targets.iter().map(|target| target.unwrap_or(0)).collect();
            let block = log_probabilities(&hidden, head, bias, &present)?;
            losses.extend(
                block
                    .into_iter()
                    .zip(targets)
                    .map(|(value, target)| target.map(|_| -value)),
            );
            Ok(())
        })?;
        Ok(losses)
    }

    /// The logits after each of the new `tokens` of one sequence, `[tokens, vocabulary]` f32; `cache` is extended by them.
    /// Fails as [`forward`](Self::forward).
    pub fn next_logits(&self, tokens: &[u32], cache: &mut KeyValueCache) -> Result<Tensor> {
        let hidden = self.hidden(&mut [SequenceStep { tokens, cache }])?;
        self.head(&hidden)
    }

    /// Calls `visit` with the number of the first token and the logits `[tokens, vocabulary]` f32 of one block of
    /// tokens after another. Ends with [`Error::Cancelled`] soon after `cancelled` returns true.
    pub fn for_each_logits(
        &self,
        tokens: &[u32],
        cancelled: &dyn Fn() -> bool,
        visit: &mut dyn FnMut(usize, Tensor) -> Result<()>,
    ) -> Result<()> {
        self.for_each_block(tokens, cancelled, &mut |first, hidden| visit(first, self.head(hidden)?))
    }

    /// The head's bias, `[vocabulary]`, if it has one.
    fn head_bias(&self) -> Result<Option<&Tensor>> {
        self.layout.head.bias.map(|bias| self.weight(bias).as_f32()).transpose()
    }

    /// Calls `visit` with the number of the first token and the residual stream `[tokens, width]` of every block.
    fn for_each_block(
        &self,
        tokens: &[u32],
        cancelled: &dyn Fn() -> bool,
        visit: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
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
            visit(block * BLOCK, &hidden)?;
        }
        Ok(())
    }
}
