//! Ends of transactions, as far as one model is concerned.

use std::sync::Arc;

use super::accumulated::Part;
use super::overlay::{Operation, Overlay, Staged, StagedState, StagedStep};
use super::recording::Recorded;
use super::staging::spoilt;
use super::state::Owner;
use super::{Ticket, TransactionId, View};
use crate::error::{Error, Result};

impl Owner {
    /// Checks that [`apply`](Self::apply) will succeed, and settles how: what others stage from now on waits for it, as far
    /// as it would change that. With `record`, returns what the commit log is to hold.
    ///
    /// # Errors
    /// `Stale` when another transaction has stepped the model since, `Precondition` when something staged is incomplete, an
    /// attention layout for example,
    /// `Memory`.
    pub(crate) fn prepare(&mut self, id: &TransactionId, record: bool) -> Result<Option<Recorded>> {
        let ticket = Ticket {
            transaction: Arc::clone(id),
            subtransaction: 1,
        };
        self.check_usable(&ticket)?;
        if self.overlays.get(id).is_some_and(Overlay::is_replaced) {
            self.check_still_replaceable()?;
        }
        self.check_attention_layouts(&View::Transaction(Arc::clone(id)))?;
        // What this transaction relied on is used up by itself, so its own seal does not count.
        let sealed = self.sealed(id);
        let recorded = match self.overlays.get(id).filter(|_| record) {
            Some(overlay) => Some(self.record(overlay, sealed)?),
            None => None,
        };
        self.publishing = Some((Arc::clone(id), sealed));
        Ok(recorded)
    }

    /// Makes what a transaction staged the state that everybody sees. Called right after a successful
    /// [`prepare`](Self::prepare), with no other publish in between. `number` is that of its frame in the commit log.
    pub(crate) fn apply(&mut self, id: &TransactionId, number: u64) -> Result<()> {
        let sealed = match self.publishing.take() {
            Some((prepared, sealed)) if prepared == *id => sealed,
            _ => self.sealed(id),
        };
        let applied = self.apply_beside_adapters(id, sealed);
        self.applied = self.applied.max(number);
        self.do_deferred();
        applied
    }

    /// [`apply`](Self::apply), while no adapter uses the weights.
    pub(super) fn apply_staged(&mut self, id: &TransactionId, sealed: usize) -> Result<()> {
        let Some(overlay) = self.overlays.remove(id) else {
            return Ok(());
        };
        let changes = overlay.changes().count();
        let made = overlay.is_stepped().then_some(overlay.result).flatten();
        let adopted = match made.filter(|state| state.changes == changes) {
            Some(state) => self.adopt(state),
            None => false,
        };
        let mut own: Vec<Part> = Vec::new();
        for Staged { operation, .. } in overlay.operations {
            match operation {
                Operation::Batch(part) => own.push(part),
                Operation::Zero(consumed) => {
                    own.clear();
                    self.accumulated.take(consumed.parts);
                    self.versions.gradient += 1;
                }
                Operation::Step(step) => {
                    let mut parts = self.accumulated.take(step.consumed.parts);
                    parts.append(&mut own);
                    self.apply_step(*step, &parts, adopted)?;
                }
                Operation::Configure(settings) => self.settings = settings,
                operation @ (Operation::Write(_)
                | Operation::Train { .. }
                | Operation::Attend(_)
                | Operation::Merge(_)
                | Operation::Merged) => {
                    if !adopted {
                        self.apply_write(&operation)?;
                    }
                    if let Operation::Merge(merge) = &operation {
                        merge.adapter.iter().for_each(|adapter| adapter.factors.set_merged());
                    }
                    self.versions.weights += 1;
                }
                // What is left of it is in its successor.
                Operation::Replaced => {}
                Operation::Spoilt => return Err(spoilt(&self.shared.name)),
            }
        }
        for part in own {
            self.accumulated.add(part, sealed)?;
        }
        self.release_trainable();
        self.release_half();
        self.forget_stale_pages();
        self.shared.forget(id);
        self.describe_committed();
        if changes > 0 {
            self.republish_factors();
        }
        Ok(())
    }

    /// Makes a state that has all that was staged the committed one; false when it has no step.
    fn adopt(&mut self, state: StagedState) -> bool {
        let Some(optimizer) = state.optimizer else { return false };
        self.model = state.model;
        self.optimizer = optimizer;
        self.trainable = None;
        self.memory = state.memory;
        // It was copied before, maybe over weights of the base that have changed in this very publish.
        self.forget_base();
        true
    }

    /// Applies a write of parameters to the weights, and to the f32 copy of them where there is one.
    fn apply_write(&mut self, operation: &Operation) -> Result<()> {
        let copy = self.trainable.as_mut().map(|(decoder, _)| decoder);
        for decoder in [Some(&mut self.model.decoder), copy].into_iter().flatten() {
            operation.write_to(decoder)?;
        }
        Ok(())
    }

    fn apply_step(&mut self, step: StagedStep, parts: &[Part], adopted: bool) -> Result<()> {
        let StagedStep {
            options,
            report,
            loss_scale,
            merged,
            _memory: memory,
            ..
        } = step;
        if !report.skipped {
            if !adopted {
                let gradient = merged.as_ref().or_else(|| parts.first().map(|part| &part.gradient));
                let gradient = gradient.ok_or_else(|| Error::Internal("a step without a gradient".to_owned()))?;
                if let Some((decoder, bytes)) = self.trainable.take() {
                    self.model.decoder = decoder;
                    self.memory = bytes;
                }
                self.optimizer.step(&mut self.model.decoder, gradient, &options)?;
                // The step has happened: its memory was reserved when it was staged, and what it did not need goes back.
                memory.into_iter().for_each(|reserved| self.memory.absorb(reserved));
                let bytes = self.model.decoder.memory_bytes() + self.optimizer.memory_bytes();
                self.memory.shrink(bytes);
            }
            self.versions.weights += 1;
        }
        self.loss_scale = loss_scale;
        self.versions.gradient += 1;
        self.log.push(report);
        Ok(())
    }

    /// Discards what the transaction staged in `subtransaction` and those within it.
    pub(crate) fn roll_back(&mut self, id: &TransactionId, subtransaction: u32) {
        self.training.end_staging(id, subtransaction);
        if self.publishing.as_ref().is_some_and(|(prepared, _)| prepared == id) {
            self.publishing = None;
        }
        if let Some(overlay) = self.overlays.get_mut(id) {
            let changes = overlay.changes().count();
            overlay
                .operations
                .retain(|staged| staged.subtransaction < subtransaction);
            if overlay.changes().count() < changes {
                overlay.result = None;
            }
            if overlay.operations.is_empty() {
                self.overlays.remove(id);
            }
        }
        self.release_trainable();
        self.release_half();
        self.describe_staged(id);
        self.do_deferred();
    }

    /// Does `work` now, or once a publish that is under way has been applied: work that uses the committed gradient up.
    pub(crate) fn once_settled(&mut self, work: impl FnOnce(&mut Owner) + Send + 'static) {
        match self.publishing {
            None => work(self),
            Some(_) => self.deferred.push(Box::new(work)),
        }
    }

    /// Does the work that had to wait, if it need not any more.
    pub(super) fn do_deferred(&mut self) {
        if self.publishing.is_none() {
            let work = std::mem::take(&mut self.deferred);
            work.into_iter().for_each(|work| work(self));
        }
        if !self.is_being_saved() {
            let work = std::mem::take(&mut self.waiting_for_saves);
            work.into_iter().for_each(|work| work(self));
        }
    }

    /// Gives what `subtransaction` staged to `parent`.
    pub(crate) fn release(&mut self, id: &TransactionId, subtransaction: u32, parent: u32) -> Result<()> {
        let Some(overlay) = self.overlays.get_mut(id) else {
            return Ok(());
        };
        let mut operations: Vec<Staged> = Vec::with_capacity(overlay.operations.len());
        for mut staged in overlay.operations.drain(..) {
            if staged.subtransaction == subtransaction {
                staged.subtransaction = parent;
            }
            match (operations.last_mut(), staged) {
                // Neighbours of one subtransaction share a gradient, but for one that a staged step looks at.
                (
                    Some(Staged {
                        subtransaction: last,
                        operation: Operation::Batch(into),
                    }),
                    Staged {
                        subtransaction,
                        operation: Operation::Batch(part),
                    },
                ) if *last == subtransaction => into.merge(part)?,
                (_, staged) => operations.push(staged),
            }
        }
        overlay.operations = operations;
        Ok(())
    }

    /// Number of leading parts of the committed gradient that operations staged by others than `publishing` rely on.
    fn sealed(&self, publishing: &TransactionId) -> usize {
        let valid = |overlay: &Overlay| {
            overlay
                .consumes()
                .filter(|consumed| consumed.gradient_version == self.versions.gradient)
                .map(|c| c.parts)
        };
        let others = self.overlays.iter().filter(|(id, _)| *id != publishing);
        others.filter_map(|(_, overlay)| valid(overlay)).max().unwrap_or(0)
    }

    /// Gives the f32 copy of the weights back once no gradient is left that was computed on it.
    pub(super) fn release_trainable(&mut self) {
        let staged = self.overlays.values().any(Overlay::has_gradient);
        if self.accumulated.parts.is_empty() && !staged && self.training.is_idle() {
            self.trainable = None;
        }
    }
}
