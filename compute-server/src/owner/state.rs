//! The state of one model.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::training::{AdamW, checkpoint};
use candle_models::{Decoder, Model};
use serde_json::Value;

use super::accumulated::Accumulated;
use super::generation::Generations;
use super::handle::Shared;
use super::log_row;
use super::overlay::{Operation, Overlay, SteppedState, TransactionId, View};
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
    pub(super) optimizer: AdamW,
    pub(super) settings: TrainingSettings,
    pub(super) versions: Versions,
    pub(super) accumulated: Accumulated,
    pub(super) log: Vec<v1::OptimizerStep>,
    pub(super) overlays: HashMap<TransactionId, Overlay>,
    pub(super) generations: Generations,
    pub(super) training: Training,
    pub(super) readers: Vec<ChunkReader>,
    pub(super) limits: Limits,
    pub(super) budget: Arc<MemoryBudget>,
    /// Memory of the weights and of the optimizer's moments.
    pub(super) memory: Reservation,
    /// Held for its drop.
    pub(super) _slot: Option<ModelSlot>,
}

/// Counts changes, so that what a transaction staged can be told to be stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Versions {
    /// Grows with every published step.
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
        Ok(self
            .stepped(view)
            .map_or(&self.model.decoder, |state| &state.model.decoder))
    }

    /// Saves the model that `view` sees as the folder `directory`, which must not exist.
    ///
    /// # Errors
    /// As [`checkpoint::save`], and as [`decoder`](Self::decoder).
    pub(crate) fn save_checkpoint(&mut self, view: &View, directory: &Path, tag: &str) -> Result<()> {
        self.materialize(view)?;
        let log = self.log(view).iter().map(log_row::to_json).collect();
        let mut config = self.shared.config.clone();
        config.extend(self.settings(view).values().clone());
        let stepped = match view {
            View::Committed => None,
            View::Transaction(id) => self.overlays.get_mut(id).and_then(Overlay::step_mut),
        };
        let (model, optimizer) = match stepped.and_then(|step| step.result.as_mut()) {
            Some(state) => (&mut state.model, &state.optimizer),
            None => (&mut self.model, &self.optimizer),
        };
        model.config = Value::Object(config);
        checkpoint::save(
            directory,
            model,
            optimizer,
            checkpoint::Details {
                tag: tag.to_owned(),
                log,
            },
        )?;
        Ok(())
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

    fn stepped(&self, view: &View) -> Option<&SteppedState> {
        self.overlay(view)?.step()?.result.as_ref()
    }

    /// Applies the staged step of `view`, if it has one, to copies of weights and optimizer.
    fn materialize(&mut self, view: &View) -> Result<()> {
        let View::Transaction(id) = view else { return Ok(()) };
        let pending = |overlay: &Overlay| {
            overlay
                .step()
                .is_some_and(|step| step.result.is_none() && !step.report.skipped)
        };
        if !self.overlays.get(id).is_some_and(pending) {
            return Ok(());
        }
        self.check_fresh(id)?;
        let Some(overlay) = self.overlays.get(id) else {
            return Ok(());
        };
        let Some(step) = overlay.step() else { return Ok(()) };
        let base = self
            .trainable
            .as_ref()
            .map_or(&self.model.decoder, |(decoder, _)| decoder);
        let bytes = base.memory_bytes() + 8 * base.parameter_count();
        let memory = self
            .budget
            .reserve("a copy of the model for a transaction that reads its own step", bytes)?;
        let mut decoder = base.deep_copy()?;
        let mut optimizer = self.optimizer.deep_copy()?;
        let gradient = match &step.merged {
            Some(gradient) => gradient,
            None => self.only_gradient(overlay, step.consumed.parts)?,
        };
        optimizer.step(&mut decoder, gradient, &step.options)?;
        let model = Model {
            decoder,
            tokenizer: self.model.tokenizer.clone(),
            chat_template: self.model.chat_template.clone(),
            end_tokens: self.model.end_tokens.clone(),
            config: self.model.config.clone(),
        };
        if let Some(step) = self.overlays.get_mut(id).and_then(Overlay::step_mut) {
            step.result = Some(SteppedState {
                model,
                optimizer,
                memory,
            });
        }
        Ok(())
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
        let has_batch = overlay
            .operations
            .iter()
            .any(|staged| matches!(staged.operation, Operation::Batch(_)));
        let stale_batch = has_batch && overlay.weights_version != self.versions.weights;
        let stale_use = overlay
            .consumes()
            .is_some_and(|consumed| consumed.gradient_version != self.versions.gradient);
        if stale_batch || stale_use {
            return Err(Error::Stale(format!(
                "model \"{}\" was stepped by another transaction after this one had changed it",
                self.shared.name
            )));
        }
        Ok(())
    }
}
