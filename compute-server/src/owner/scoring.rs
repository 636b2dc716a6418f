//! Log-probabilities of a sequence's tokens, in blocks between which generations go on.

use candle_models::decoder::{as_scores, next_tokens};

use super::state::Owner;
use super::{AppliedAdapter, View};
use crate::error::{Error, Result};

impl Owner {
    /// Log-probability (natural) of each token given those before it; `None` for the first. After every block generations
    /// have a round; nothing else runs meanwhile, so that all blocks see the same weights.
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
        let targets = next_tokens(tokens);
        let factors = adapter.map(AppliedAdapter::factors).transpose()?;
        let mut pass = self.decoder(view)?.begin_losses(tokens)?;
        loop {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let decoder = self.decoder(view)?;
            let is_last = match &factors {
                None => decoder.next_losses(tokens, &targets, &mut pass, cancelled)?,
                Some(factors) => {
                    let adapted = factors.weights.over(decoder)?;
                    adapted.next_losses(tokens, &targets, &mut pass, cancelled)?
                }
            };
            if is_last {
                return Ok(as_scores(pass.into_losses()));
            }
            self.generate();
        }
    }
}
