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
        let base = self.decoder(view)?;
        let mut pass = base.begin_losses(tokens)?;
        let over_base = |adapter: &AppliedAdapter| -> Result<_> { Ok(adapter.factors()?.weights.over(base)?) };
        let adapted = adapter.map(over_base).transpose()?;
        loop {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let decoder = match &adapted {
                Some(adapted) => adapted,
                None => self.decoder(view)?,
            };
            let is_last = decoder.next_losses(tokens, &targets, &mut pass, cancelled)?;
            if is_last {
                return Ok(as_scores(pass.into_losses()));
            }
            self.generate();
        }
    }
}
