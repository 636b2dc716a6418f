//! Logits and losses of whole sequences, in blocks of tokens: never all logits at once.

use super::{Decoder, KeyValueCache, SequenceStep};
use crate::error::{Error, Result};
use crate::ops::log_probability::log_probabilities;
use candle_core::Tensor;

/// Tokens whose logits exist at one time.
const BLOCK: usize = 64;

/// Losses of one sequence that are being computed.
#[derive(Debug)]
pub struct LossPass {
    cache: KeyValueCache,
    losses: Vec<Option<f32>>,
}

impl LossPass {
    /// The losses so far.
    pub fn into_losses(self) -> Vec<Option<f32>> {
        self.losses
    }
}

/// The target of each token, the token after it; the last one has none.
pub fn next_tokens(tokens: &[u32]) -> Vec<Option<u32>> {
    (1..=tokens.len()).map(|next| tokens.get(next).copied()).collect()
}

/// Each token's log-probability from the losses of its predecessors; `None` for the first.
pub fn as_scores(losses: Vec<Option<f32>>) -> Vec<Option<f32>> {
    let before = losses.len().saturating_sub(1);
    let scores = losses.into_iter().take(before).map(|loss| loss.map(|loss| -loss));
    std::iter::once(None).chain(scores).collect()
}

impl Decoder {
    /// Log-probability (natural) of each token given those before it; `None` for the first.
    /// Fails as [`forward`](Self::forward).
    pub fn score(&self, tokens: &[u32]) -> Result<Vec<Option<f32>>> {
        let targets = next_tokens(tokens);
        Ok(as_scores(self.losses_unless(tokens, &targets, &|| false)?))
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
        let mut pass = self.begin_losses(tokens)?;
        while !cancelled() {
            if self.next_losses(tokens, targets, &mut pass, cancelled)? {
                return Ok(pass.losses);
            }
        }
        Err(Error::Cancelled)
    }

    /// Begins to compute what [`losses_unless`](Self::losses_unless) does, a block of tokens at a time. Fails as
    /// [`forward`](Self::forward).
    pub fn begin_losses(&self, tokens: &[u32]) -> Result<LossPass> {
        let cache = self.new_cache();
        self.check_tokens(tokens, cache.remaining())?;
        Ok(LossPass {
            cache,
            losses: Vec::with_capacity(tokens.len()),
        })
    }

    /// Computes the losses of the next block; true when it was the last. `tokens` and `targets` are those of the whole pass.
    /// Fails as [`forward_adapted`](Self::forward_adapted).
    pub fn next_losses(
        &self,
        tokens: &[u32],
        targets: &[Option<u32>],
        pass: &mut LossPass,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<bool> {
        let block = pass.losses.len()..tokens.len().min(pass.losses.len() + BLOCK);
        let (last, targets) = (block.end == tokens.len(), &targets[block.clone()]);
        let step = SequenceStep {
            tokens: &tokens[block],
            cache: &mut pass.cache,
        };
        let hidden = self.hidden(&mut [step], cancelled)?;
        if targets.iter().all(Option::is_none) {
            pass.losses.extend(std::iter::repeat_n(None, targets.len()));
            return Ok(last);
        }
        let hidden = self.normalize(&hidden, &self.layout.final_norm)?;
        // Rows without a target are computed with those that have one, and left out.
        let present: Vec<u32> = targets.iter().map(|target| target.unwrap_or(0)).collect();
        let head = self.weight(self.layout.head.weight);
        let found = log_probabilities(&hidden, head, self.head_bias()?, &present)?;
        let found = found.into_iter().zip(targets);
        pass.losses.extend(found.map(|(value, target)| target.map(|_| -value)));
        Ok(last)
    }

    /// The logits after each of the new `tokens` of one sequence, `[tokens, vocabulary]` f32; `cache` is extended by them.
    /// Fails as [`forward_adapted`](Self::forward_adapted).
    pub fn next_logits(
        &self,
        tokens: &[u32],
        cache: &mut KeyValueCache,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Tensor> {
        let hidden = self.hidden(&mut [SequenceStep { tokens, cache }], cancelled)?;
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
            let step = SequenceStep {
                tokens,
                cache: &mut cache,
            };
            let hidden = self.hidden(&mut [step], cancelled)?;
            visit(block * BLOCK, &hidden)?;
        }
        Ok(())
    }
}
