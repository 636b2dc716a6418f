//! What a transaction staged on one model, in order.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::Model;
use candle_models::training::{AdamW, AdamWOptions, Gradient};

use super::accumulated::Part;
use super::settings::TrainingSettings;
use crate::memory::Reservation;

/// Identifier of a transaction.
pub(crate) type TransactionId = Arc<str>;

/// Whose state is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum View {
    /// What everybody sees.
    Committed,
    /// That, with what a transaction staged on top.
    Transaction(TransactionId),
}

/// Where a write belongs.
#[derive(Debug, Clone)]
pub(crate) struct Ticket {
    /// The transaction.
    pub(crate) transaction: TransactionId,
    /// The subtransaction within it; 1 is the top level.
    pub(crate) subtransaction: u32,
}

/// The writes of one transaction to one model.
#[derive(Default)]
pub(super) struct Overlay {
    pub(super) operations: Vec<Staged>,
    /// Weights that the staged gradients were computed on; see [`Versions`](super::state::Versions).
    pub(super) weights_version: u64,
}

/// One staged write.
pub(super) struct Staged {
    pub(super) subtransaction: u32,
    pub(super) operation: Operation,
}

/// The kinds of staged writes.
pub(super) enum Operation {
    /// Sequences whose gradient is to be added.
    Batch(Part),
    /// The gradient is to be discarded.
    Zero(Consumed),
    /// An optimizer step.
    Step(Box<StagedStep>),
    /// New training settings.
    Configure(TrainingSettings),
    /// A gradient that a cancelled batch left incomplete: the subtransaction can only be rolled back.
    Spoilt,
}

/// Which part of the committed gradient an operation uses up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Consumed {
    /// Number of leading parts of the committed gradient; later ones were added by others since, and stay.
    pub(super) parts: usize,
    /// The gradient that those parts belong to; see [`Versions`](super::state::Versions).
    pub(super) gradient_version: u64,
}

/// A step that is not yet taken by the committed state.
pub(super) struct StagedStep {
    pub(super) consumed: Consumed,
    pub(super) options: AdamWOptions,
    /// What the step reports, known before it is applied.
    pub(super) report: v1::OptimizerStep,
    /// The whole gradient, where it comes from more than one place; otherwise it stays where it is.
    pub(super) merged: Option<Gradient>,
    /// The state after the step, made when the transaction reads it before it is published.
    pub(super) result: Option<SteppedState>,
    /// Memory for `merged` and for the optimizer's moments.
    pub(super) _memory: Vec<Reservation>,
}

/// Weights and optimizer after a staged step.
pub(super) struct SteppedState {
    pub(super) model: Model,
    pub(super) optimizer: AdamW,
    pub(super) memory: Reservation,
}

impl Overlay {
    /// The staged step, if any. There is at most one: a batch after it is refused, and a step needs a batch.
    pub(super) fn step(&self) -> Option<&StagedStep> {
        self.operations.iter().find_map(|staged| match &staged.operation {
            Operation::Step(step) => Some(step.as_ref()),
            _ => None,
        })
    }

    /// The staged step, to be changed.
    pub(super) fn step_mut(&mut self) -> Option<&mut StagedStep> {
        self.operations
            .iter_mut()
            .find_map(|staged| match &mut staged.operation {
                Operation::Step(step) => Some(step.as_mut()),
                _ => None,
            })
    }

    /// Whether staged operations discard the committed gradient (they zero it, or step with it).
    pub(super) fn consumes(&self) -> Option<Consumed> {
        self.operations.iter().find_map(|staged| match &staged.operation {
            Operation::Zero(consumed) => Some(*consumed),
            Operation::Step(step) => Some(step.consumed),
            Operation::Batch(_) | Operation::Configure(_) | Operation::Spoilt => None,
        })
    }

    /// The staged gradients that no staged operation has used up.
    pub(super) fn parts(&self) -> impl Iterator<Item = &Part> {
        let used_up = |staged: &Staged| matches!(staged.operation, Operation::Zero(_) | Operation::Step(_));
        let first = self.operations.iter().rposition(used_up).map_or(0, |index| index + 1);
        self.operations[first..]
            .iter()
            .filter_map(|staged| match &staged.operation {
                Operation::Batch(part) => Some(part),
                _ => None,
            })
    }

    /// The settings as staged last.
    pub(super) fn settings(&self) -> Option<&TrainingSettings> {
        self.operations.iter().rev().find_map(|staged| match &staged.operation {
            Operation::Configure(settings) => Some(settings),
            _ => None,
        })
    }

    /// Whether only a rollback is left.
    pub(super) fn is_spoilt(&self) -> bool {
        self.operations
            .iter()
            .any(|staged| matches!(staged.operation, Operation::Spoilt))
    }

    /// Tokens of the staged sequences.
    pub(super) fn tokens(&self) -> u64 {
        let tokens = |staged: &Staged| match &staged.operation {
            Operation::Batch(part) => part.token_count(),
            _ => 0,
        };
        self.operations.iter().map(tokens).sum()
    }
}
