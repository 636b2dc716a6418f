//! Forward and backward over a micro-batch: for a request, and in the same way for a replay of the commit log.

use candle_models::training::{self, DropoutKey, Gradient, PassOptions, PassReport, TrainingSequence};

use super::View;
use super::settings::TrainingSettings;
use super::state::Owner;
use crate::error::Result;

/// Tokens of a micro-batch, at least one sequence. Always the same, so that the rounding of a gradient does not depend
/// on what else runs.
const MICRO_BATCH_TOKENS: usize = 1024;

/// What decides about the gradient of some sequences, beside them and the weights.
pub(super) struct PassInputs {
    pub(super) settings: TrainingSettings,
    /// Sequences that were accumulated before, since the last step.
    pub(super) first_sequence: u64,
    /// Factor on the loss of each target.
    pub(super) loss_factor: f64,
    /// Whether other servers are left alone: a log is replayed without them.
    pub(super) alone: bool,
}

impl Owner {
    /// What decides about the gradient of sequences that `view` accumulates next to what `gradient` has already.
    pub(super) fn pass_inputs(&self, view: &View, gradient: &Gradient) -> PassInputs {
        let visible = self
            .visible_parts(view)
            .into_iter()
            .map(super::accumulated::Part::gradient);
        PassInputs {
            settings: self.settings(view).clone(),
            first_sequence: visible.chain([gradient]).map(Gradient::micro_batches).sum(),
            loss_factor: self.loss_factor(view),
            alone: false,
        }
    }

    /// Adds the gradient of those of `sequences` that make the next micro-batch; the first `done` are in it already.
    ///
    /// # Errors
    /// As [`prepare_weights`](Self::prepare_weights) and [`training::accumulate_in_place`].
    pub(super) fn accumulate_next(
        &mut self,
        view: &View,
        inputs: &PassInputs,
        (sequences, done): (&[TrainingSequence], usize),
        gradient: &mut Gradient,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<PassReport> {
        self.prepare_weights(view, inputs.settings.precision().precision)?;
        let key = DropoutKey {
            seed: self.dropout_seed,
            step: self.step_number(&View::Committed),
            first_sequence: inputs.first_sequence + done as u64,
        };
        let options = PassOptions {
            alone: inputs.alone,
            ..inputs.settings.pass(self.half_weights(), inputs.loss_factor, key)
        };
        let decoder = self.training_weights(view);
        let rest = &sequences[done..];
        let batch = &rest[..training::leading_sequences(rest, MICRO_BATCH_TOKENS, options.reuses(decoder))];
        Ok(training::accumulate_in_place(
            decoder, batch, gradient, &options, cancelled,
        )?)
    }
}
