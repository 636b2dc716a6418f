//! The state of one model.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_compute_proto::v1;
use candle_models::training::{AdamW, LossScale, TapeEntry};
use candle_models::{Decoder, Model};

use super::accumulated::Accumulated;
use super::base::Followed;
use super::embedding::Embeddings;
use super::experts::LentExperts;
use super::generation::Generations;
use super::handle::{Shared, Work};
use super::overlay::{Operation, Overlay, StagedState, TransactionId, View};
use super::precision::HalfCopies;
use super::reading::ChunkReader;
use super::settings::TrainingSettings;
use super::training::Training;
use crate::app::ModelSlot;
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::memory::{MemoryBudget, Reservation};

/// Everything about a model that changes. Only its thread touches it.
pub(crate) struct Owner {
    pub(super) shared: Arc<Shared>,
    /// Weights, tokenizer, configuration without training settings.
    pub(super) model: Model,
    /// The weights as f32, where `model` holds them otherwise and a gradient has been asked for. A published step
    /// makes them the decoder.
    pub(super) trainable: Option<(Decoder, Reservation)>,
    /// The last weights that were trained in half precision, until they change.
    pub(super) half: Option<HalfCopies>,
    pub(super) optimizer: AdamW,
    /// The dynamic loss scale.
    pub(super) loss_scale: LossScale,
    /// Seed of the masks of dropout.
    pub(super) dropout_seed: u64,
    pub(super) settings: TrainingSettings,
    /// Of an adapter: the model that it belongs to.
    pub(super) followed: Option<Followed>,
    pub(super) versions: Versions,
    pub(super) accumulated: Accumulated,
    pub(super) log: Vec<v1::OptimizerStep>,
    /// What the last forward pass of training recorded.
    pub(super) tape: Vec<TapeEntry>,
    pub(super) overlays: HashMap<TransactionId, Overlay>,
    /// The transaction that is being published, and the number of leading parts of the committed gradient that its own
    /// may not be added to.
    pub(super) publishing: Option<(TransactionId, usize)>,
    /// Work that waits for the end of that.
    pub(super) deferred: Vec<Work>,
    /// Work that waits until no save reads the weights.
    pub(super) waiting_for_saves: Vec<Work>,
    /// Number of the last frame of the commit log that was applied.
    pub(super) applied: u64,
    pub(super) generations: Generations,
    pub(super) embeddings: Embeddings,
    pub(super) training: Training,
    pub(super) readers: Vec<ChunkReader>,
    /// Weights of experts that other servers train.
    pub(super) lent: LentExperts,
    pub(super) limits: Limits,
    pub(super) budget: Arc<MemoryBudget>,
    /// Memory of the weights and of the optimizer's moments.
    pub(super) memory: Reservation,
    /// Held for its drop.
    pub(super) _slot: Option<ModelSlot>,
}

/// What needs memory when a transaction uses what it has staged.
const COPY: &str = "a copy of the model for a transaction that reads its own changes";

/// Numbers of staged states given so far.
static STAGED_STATES: AtomicU64 = AtomicU64::new(0);

/// Counts changes, so that what a transaction staged can be told to be stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Versions {
    /// Grows with every published step and write of parameters.
    pub(super) weights: u64,
    /// Grows whenever the committed gradient is used up or discarded.
    pub(super) gradient: u64,
}

impl Owner {
    /// The weights that `view` sees.
    ///
    /// # Errors
    /// `Stale` when the view's staged step has been overtaken, `Memory` when there is none for a copy.
    pub(crate) fn decoder(&mut self, view: &View) -> Result<&Decoder> {
        self.materialize(view)?;
        Ok(self.present_decoder(view))
    }

    /// The weights that `view` sees, as far as its changes have been applied to a copy.
    pub(super) fn present_decoder(&self, view: &View) -> &Decoder {
        self.staged_state(view)
            .map_or(&self.model.decoder, |state| &state.model.decoder)
    }

    /// The digest of the state that `view` sees ([`candle_models::training::digest`]), and its step.
    ///
    /// # Errors
    /// As [`decoder`](Self::decoder).
    pub(crate) fn digest(&mut self, view: &View) -> Result<(String, u64)> {
        self.materialize(view)?;
        let staged = self.staged_state(view).and_then(|state| state.optimizer.as_ref());
        let optimizer = staged.unwrap_or(&self.optimizer);
        let digest = candle_models::training::digest(self.present_decoder(view), optimizer)?;
        Ok((digest, optimizer.steps()))
    }

    /// The training settings that `view` sees.
    pub(super) fn settings(&self, view: &View) -> &TrainingSettings {
        self.overlay(view).and_then(Overlay::settings).unwrap_or(&self.settings)
    }

    /// The training log that `view` sees.
    pub(crate) fn log(&self, view: &View) -> Vec<v1::OptimizerStep> {
        let staged = self
            .overlay(view)
            .and_then(Overlay::step)
            .map(|step| step.report.clone());
        self.log.iter().cloned().chain(staged).collect()
    }

    /// The sequences accumulated since the last step that `view` sees.
    pub(crate) fn sequences(&self, view: &View) -> Vec<v1::AccumulatedSequence> {
        self.visible_parts(view)
            .into_iter()
            .flat_map(|part| part.sequences.iter().cloned())
            .collect()
    }

    /// The step number that `view` sees.
    pub(super) fn step_number(&self, view: &View) -> u64 {
        let staged = self.overlay(view).and_then(Overlay::step);
        staged.map_or_else(
            || self.optimizer.steps(),
            |step| {
                if step.report.skipped {
                    step.report.step - 1
                } else {
                    step.report.step
                }
            },
        )
    }

    /// The parts of the gradient that `view` sees: committed ones unless staged operations use them up, then staged.
    pub(super) fn visible_parts(&self, view: &View) -> Vec<&super::accumulated::Part> {
        let overlay = self.overlay(view);
        let used = match overlay.and_then(Overlay::consumes) {
            Some(consumed) if consumed.gradient_version == self.versions.gradient => consumed.parts,
            _ => 0,
        };
        let staged = overlay.into_iter().flat_map(Overlay::parts);
        self.accumulated.parts.iter().skip(used).chain(staged).collect()
    }

    pub(super) fn overlay(&self, view: &View) -> Option<&Overlay> {
        match view {
            View::Committed => None,
            View::Transaction(id) => self.overlays.get(id),
        }
    }

    pub(super) fn staged_state(&self, view: &View) -> Option<&StagedState> {
        self.overlay(view)?.result.as_ref()
    }

    /// Applies what `view` has staged to copies of weights and optimizer, if it changes the weights.
    pub(super) fn materialize(&mut self, view: &View) -> Result<()> {
        let View::Transaction(id) = view else { return Ok(()) };
        let behind = |overlay: &Overlay| {
            let made = overlay.result.as_ref().map(|state| state.changes);
            overlay.changes_weights() && made != Some(overlay.changes().count())
        };
        if !self.overlays.get(id).is_some_and(behind) {
            return Ok(());
        }
        self.check_fresh(id)?;
        self.check_attention_layouts(view)?;
        let Some(mut overlay) = self.overlays.remove(id) else {
            return Ok(());
        };
        let made = self.make_state(&mut overlay);
        let made = made.map(|state| overlay.result = Some(state));
        self.overlays.insert(Arc::clone(id), overlay);
        made
    }

    /// The state after all that is staged, from the one made before where there is one.
    fn make_state(&self, overlay: &mut Overlay) -> Result<StagedState> {
        let mut state = match overlay.result.take() {
            // It is changed in place.
            Some(state) if !self.is_being_saved() => state,
            _ => self.copy_state()?,
        };
        for operation in overlay.changes().skip(state.changes) {
            if let Operation::Step(step) = operation {
                let bytes = state.model.decoder.memory_bytes() + 8 * state.model.decoder.parameter_count();
                state.memory.resize(COPY, bytes)?;
                let gradient = match &step.merged {
                    Some(gradient) => gradient,
                    None => self.only_gradient(overlay, step.consumed.parts)?,
                };
                let mut optimizer = self.optimizer.deep_copy()?;
                optimizer.step(&mut state.model.decoder, gradient, &step.options)?;
                state.optimizer = Some(optimizer);
            } else {
                operation.write_to(&mut state.model.decoder)?;
            }
            state.changes += 1;
        }
        state.number = STAGED_STATES.fetch_add(1, Ordering::Relaxed);
        Ok(state)
    }

    /// A copy of the committed state, without the optimizer.
    fn copy_state(&self) -> Result<StagedState> {
        let base = self.training_decoder();
        let memory = self.budget.reserve(COPY, base.memory_bytes())?;
        Ok(StagedState {
            number: 0,
            changes: 0,
            model: Model {
                decoder: base.deep_copy()?,
                tokenizer: self.model.tokenizer.clone(),
                chat_template: self.model.chat_template.clone(),
                end_tokens: self.model.end_tokens.clone(),
                config: self.model.config.clone(),
            },
            optimizer: None,
            memory,
        })
    }

    /// The gradient of a step that takes it from one place: the overlay's one batch, or the one committed part.
    fn only_gradient<'a>(
        &'a self,
        overlay: &'a Overlay,
        committed: usize,
    ) -> Result<&'a candle_models::training::Gradient> {
        let staged = overlay
            .operations
            .iter()
            .rev()
            .find_map(|staged| match &staged.operation {
                Operation::Batch(part) => Some(&part.gradient),
                _ => None,
            });
        let gradient = match committed {
            0 => staged,
            _ => self.accumulated.parts.first().map(|part| &part.gradient),
        };
        gradient.ok_or_else(|| Error::Internal("a staged step has lost its gradient".to_owned()))
    }

    /// Fails when another transaction has published something that makes what `id` staged stale.
    pub(super) fn check_fresh(&self, id: &TransactionId) -> Result<()> {
        let Some(overlay) = self.overlays.get(id) else {
            return Ok(());
        };
        let stale_weights = overlay.relies_on_weights() && overlay.weights_version != self.versions.weights;
        let stale_use = overlay
            .consumes()
            .is_some_and(|consumed| consumed.gradient_version != self.versions.gradient);
        if stale_weights || stale_use {
            return Err(Error::Stale(format!(
                "model \"{}\" was changed by another transaction after this one had changed it",
                self.shared.name
            )));
        }
        Ok(())
    }
}
