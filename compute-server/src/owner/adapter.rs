//! What only adapters do: being merged into their model.

use std::sync::Arc;

use candle_models::adapters::Delta;

use super::handle::Shared;
use super::overlay::{Operation, Overlay};
use super::state::Owner;
use super::{Ticket, View};
use crate::error::{Error, Result};
use crate::memory::Reservation;

/// An adapter's product, to be added to the weights of its model.
pub(crate) struct StagedMerge {
    pub(super) delta: Delta,
    /// The adapter, unless the commit log is being replayed, when nobody computes with it.
    pub(super) adapter: Option<Arc<Shared>>,
    pub(super) _memory: Reservation,
}

impl Owner {
    /// What the adapter, as the ticket's transaction sees it, adds to its model.
    ///
    /// # Errors
    /// `Precondition` when it is merged already, `Memory`.
    pub(crate) fn delta(&mut self, ticket: &Ticket) -> Result<StagedMerge> {
        self.check_usable(ticket)?;
        let view = View::Transaction(Arc::clone(&ticket.transaction));
        self.check_not_merged(&view)?;
        let bytes = self.model.decoder.memory_bytes();
        let memory = self.budget.reserve("merging the adapter", bytes)?;
        Ok(StagedMerge {
            delta: Delta::of(self.decoder(&view)?)?,
            adapter: Some(Arc::clone(&self.shared)),
            _memory: memory,
        })
    }

    /// Stages that an adapter's product is added to the weights.
    ///
    /// # Errors
    /// `Unsupported` when one of the matrices is quantised.
    pub(crate) fn stage_merge_of(&mut self, ticket: &Ticket, merge: StagedMerge) -> Result<()> {
        self.check_usable(ticket)?;
        let view = View::Transaction(Arc::clone(&ticket.transaction));
        merge
            .delta
            .check(match self.overlay(&view).is_some_and(Overlay::is_recomputed) {
                true => self.training_decoder(),
                false => &self.model.decoder,
            })?;
        self.push(ticket, Operation::Merge(merge));
        Ok(())
    }

    /// Stages that the adapter adds nothing any more.
    ///
    /// # Errors
    /// As [`delta`](Self::delta).
    pub(crate) fn stage_merged(&mut self, ticket: &Ticket) -> Result<()> {
        self.check_usable(ticket)?;
        self.check_not_merged(&View::Transaction(Arc::clone(&ticket.transaction)))?;
        self.push(ticket, Operation::Merged);
        Ok(())
    }

    /// Whether `view` sees an adapter that is merged into its model.
    pub(super) fn is_merged(&self, view: &View) -> bool {
        let staged = self.overlay(view).is_some_and(|overlay| {
            let mut operations = overlay.operations.iter();
            operations.any(|staged| matches!(staged.operation, Operation::Merged))
        });
        staged || self.model.decoder.is_merged()
    }

    /// Refuses to train or merge an adapter that is merged into its model.
    pub(super) fn check_not_merged(&self, view: &View) -> Result<()> {
        match self.is_merged(view) {
            false => Ok(()),
            true => Err(Error::Precondition {
                message: format!(
                    "the adapter has been merged into the weights of model \"{}\" and adds nothing any more",
                    self.shared.name
                ),
                hint: "Make a new adapter, or train the model itself.",
            }),
        }
    }
}
