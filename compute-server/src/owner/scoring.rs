//! Scores of stretches of tokens, for evaluations.

use candle_models::evaluation::{Scores, Stretch};

use super::View;
use super::state::Owner;
use crate::error::Result;

impl Owner {
    /// The scores of every stretch, all read before anything else is done.
    ///
    /// # Errors
    /// As [`decoder`](Self::decoder); `Memory` for their keys and values; `Cancelled` soon after `cancelled` returns true.
    pub(crate) fn score_stretches(
        &mut self,
        view: &View,
        stretches: &[Stretch],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Vec<Scores>> {
        let config = self.model.decoder.config();
        let tokens: usize = stretches.iter().map(|stretch| stretch.inputs.len()).sum();
        let bytes = 8 * (config.layers * config.key_value_heads * config.head_dim * tokens) as u64;
        let _memory = self.budget.reserve("the keys and values of an evaluation", bytes)?;
        Ok(self.decoder(view)?.score_stretches(stretches, cancelled)?)
    }
}
