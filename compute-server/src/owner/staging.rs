//! Writes other than batches: they are staged at once, and cost little until they are published or read.

use std::sync::Arc;
use std::time::SystemTime;

use candle_compute_proto::v1;
use candle_models::training::Gradient;

use super::accumulated::Part;
use super::overlay::{Consumed, Operation, Overlay, Staged, StagedStep};
use super::settings::{AdamWOverrides, TrainingSettings, to_proto};
use super::state::Owner;
use super::{Ticket, TransactionId, View};
use crate::error::{Error, Result};
use crate::memory::Reservation;

impl Owner {
    /// Stages that the accumulated gradient is discarded.
    pub(crate) fn stage_zero(&mut self, ticket: &Ticket) -> Result<()> {
        self.check_usable(ticket)?;
        let consumed = self.consumed(ticket);
        self.push(ticket, Operation::Zero(consumed));
        Ok(())
    }

    /// Stages new training settings.
    pub(crate) fn stage_settings(&mut self, ticket: &Ticket, settings: TrainingSettings) -> Result<()> {
        self.check_usable(ticket)?;
        self.push(ticket, Operation::Configure(settings));
        Ok(())
    }

    /// Stages an optimizer step over the accumulated gradient that the transaction sees. The step is taken when it is
    /// published, or on a copy when the transaction reads the model before.
    ///
    /// # Errors
    /// `Precondition` when nothing was accumulated, `InvalidArgument` for options out of range.
    pub(crate) fn stage_step(&mut self, ticket: &Ticket, overrides: &AdamWOverrides) -> Result<v1::OptimizerStep> {
        self.check_usable(ticket)?;
        let view = View::Transaction(Arc::clone(&ticket.transaction));
        self.check_not_merged(&view)?;
        let step = self.step_number(&View::Committed) + 1;
        let options = self.settings(&view).options(step, overrides)?;
        let started = SystemTime::now();
        let consumed = self.consumed(ticket);
        let parts = self.parts_of_step(&ticket.transaction, consumed.parts);
        let tokens: u64 = parts.iter().map(|part| part.gradient.tokens()).sum();
        if tokens == 0 {
            return Err(Error::Precondition {
                message: format!(
                    "model \"{}\" has no accumulated gradient to step with",
                    self.shared.name
                ),
                hint: "Insert a row with at least two tokens into batches first.",
            });
        }
        let duration_ms: f64 = parts.iter().map(|part| part.duration_ms).sum();
        let mut memory = Vec::new();
        if self.optimizer.memory_bytes() == 0 {
            memory.push(
                self.budget
                    .reserve("the moments of the optimizer", 8 * self.model.decoder.parameter_count())?,
            );
        }
        let merged = self.merge_parts(&parts, &mut memory)?;
        let gradient = merged.as_ref().or_else(|| parts.first().map(|part| &part.gradient));
        let trainable = self.trainable(&view);
        let grad_norm = gradient.map_or(Ok(f64::NAN), |gradient| gradient.norm(&trainable))?;
        let loss = gradient.and_then(|gradient| gradient.loss());
        let skipped = !grad_norm.is_finite() || loss.is_some_and(|loss| !loss.is_finite());
        let scaling = self.settings(&view).precision().loss_scaling;
        let report = v1::OptimizerStep {
            model: self.shared.name.clone(),
            step,
            loss: loss.unwrap_or(f64::NAN),
            grad_norm,
            options: Some(to_proto(&options)),
            loss_scale: scaling.scale(self.loss_scale(&view)),
            skipped,
            tokens,
            duration_ms: duration_ms + started.elapsed().unwrap_or_default().as_secs_f64() * 1e3,
            created_at: Some(started.into()),
            overflows: parts.iter().map(|part| part.gradient.overflows()).sum(),
            underflows: parts.iter().map(|part| part.gradient.underflows()).sum(),
        };
        let step = StagedStep {
            consumed,
            options,
            report: report.clone(),
            loss_scale: scaling.after_step(self.loss_scale(&view), skipped),
            merged,
            _memory: memory,
        };
        self.push(ticket, Operation::Step(Box::new(step)));
        // A state without the step may hold weights that are not f32.
        if let Some(overlay) = self.overlays.get_mut(&ticket.transaction) {
            overlay.result = None;
        }
        Ok(report)
    }

    /// The gradients that a step sums: so many leading parts of the committed one, then those of its transaction.
    pub(super) fn parts_of_step(&self, transaction: &TransactionId, committed: usize) -> Vec<&Part> {
        let staged = self.overlays.get(transaction).into_iter().flat_map(Overlay::parts);
        self.accumulated.parts.iter().take(committed).chain(staged).collect()
    }

    /// The sum of several parts; none for a single one, which is used where it is.
    pub(super) fn merge_parts(&self, parts: &[&Part], memory: &mut Vec<Reservation>) -> Result<Option<Gradient>> {
        match parts {
            [_] => Ok(None),
            [first, others @ ..] => {
                memory.push(
                    self.budget
                        .reserve("a merged gradient", 4 * self.model.decoder.parameter_count())?,
                );
                let mut merged = first.gradient.deep_copy()?;
                others.iter().try_for_each(|part| merged.merge_from(&part.gradient))?;
                Ok(Some(merged))
            }
            [] => Err(Error::Internal("a gradient without parts".to_owned())),
        }
    }

    /// Fails when the transaction cannot go on with this model.
    pub(super) fn check_usable(&self, ticket: &Ticket) -> Result<()> {
        if self.training.is_staging(&ticket.transaction) {
            return Err(Error::Precondition {
                message: format!(
                    "a batch of this transaction still runs on model \"{}\"",
                    self.shared.name
                ),
                hint: "Wait for it, or roll back.",
            });
        }
        if self.overlays.get(&ticket.transaction).is_some_and(Overlay::is_spoilt) {
            return Err(spoilt(&self.shared.name));
        }
        self.check_fresh(&ticket.transaction)
    }

    /// What a zero or a step staged now uses up: all that is committed, unless an earlier one already does.
    fn consumed(&self, ticket: &Ticket) -> Consumed {
        let earlier = self.overlays.get(&ticket.transaction).and_then(Overlay::consumes);
        match earlier {
            Some(_) => Consumed {
                parts: 0,
                gradient_version: self.versions.gradient,
            },
            None => Consumed {
                parts: self.accumulated.parts.len(),
                gradient_version: self.versions.gradient,
            },
        }
    }

    pub(super) fn push(&mut self, ticket: &Ticket, operation: Operation) {
        let weights_version = self.versions.weights;
        let overlay = self.overlays.entry(Arc::clone(&ticket.transaction)).or_default();
        if !overlay.relies_on_weights() {
            overlay.weights_version = weights_version;
        }
        overlay.operations.push(Staged {
            subtransaction: ticket.subtransaction,
            operation,
        });
        self.describe_staged(&ticket.transaction);
    }
}

/// The error of using a gradient that a cancelled statement left half-done.
pub(super) fn spoilt(model: &str) -> Error {
    Error::Precondition {
        message: format!("a cancelled batch left the staged gradient of model \"{model}\" incomplete"),
        hint: "Roll back to a savepoint before the cancelled batch, or roll back the transaction.",
    }
}
