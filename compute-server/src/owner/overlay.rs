//! What a transaction staged on one model, in order.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::training::{AdamW, AdamWOptions, Gradient, LossScale};
use candle_models::{AttentionLayouts, Model};

use super::accumulated::Part;
use super::adapter::StagedMerge;
use super::attention::StagedLayouts;
use super::settings::TrainingSettings;
use super::writing::StagedWrite;
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
    /// Weights that the staged gradients, steps and writes rely on; see [`Versions`](super::state::Versions).
    pub(super) weights_version: u64,
    /// The state after what was staged, made when the transaction uses it before it is published.
    pub(super) result: Option<StagedState>,
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
    /// New elements of a parameter.
    Write(StagedWrite),
    /// Whether optimizer steps change a parameter.
    Train {
        /// Number of the parameter.
        parameter: usize,
        /// Whether they do.
        trainable: bool,
    },
    /// Other attention layouts.
    Attend(StagedLayouts),
    /// An adapter's product is to be added to the weights of the model.
    Merge(StagedMerge),
    /// The adapter adds nothing any more: its product is added to the weights of its model.
    Merged,
    /// Another model takes the place of this one.
    Replaced,
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
    /// The dynamic loss scale after it.
    pub(super) loss_scale: LossScale,
    /// The whole gradient, where it comes from more than one place; otherwise it stays where it is.
    pub(super) merged: Option<Gradient>,
    /// Memory for `merged` and for the optimizer's moments.
    pub(super) _memory: Vec<Reservation>,
}

/// Copies of weights and optimizer with staged changes.
pub(super) struct StagedState {
    /// Its own; another one whenever it has changed.
    pub(super) number: u64,
    /// Number of [changes](Operation::changes_state) that they have.
    pub(super) changes: usize,
    pub(super) model: Model,
    /// None before the first staged step.
    pub(super) optimizer: Option<AdamW>,
    pub(super) memory: Reservation,
}

impl Operation {
    /// Whether it changes weights, attention layouts, optimizer, or what is trained.
    pub(super) fn changes_state(&self) -> bool {
        match self {
            Self::Step(step) => !step.report.skipped,
            Self::Write(_) | Self::Train { .. } | Self::Attend(_) | Self::Merge(_) | Self::Merged => true,
            Self::Batch(_) | Self::Zero(_) | Self::Configure(_) | Self::Replaced | Self::Spoilt => false,
        }
    }

    /// Whether it is stale once another transaction has changed the weights.
    pub(super) fn relies_on_weights(&self) -> bool {
        matches!(self, Self::Batch(_) | Self::Step(_) | Self::Replaced) || self.changes_state()
    }
}

impl Overlay {
    /// The staged step, if any. There is at most one: a batch after it is refused, and a step needs a batch.
    pub(super) fn step(&self) -> Option<&StagedStep> {
        self.operations.iter().find_map(|staged| match &staged.operation {
            Operation::Step(step) => Some(step.as_ref()),
            _ => None,
        })
    }

    /// Whether a staged step changes the weights.
    pub(super) fn is_stepped(&self) -> bool {
        self.step().is_some_and(|step| !step.report.skipped)
    }

    /// Whether the weights, or what they are used for, are others than the committed ones.
    pub(super) fn changes_weights(&self) -> bool {
        let writes = |staged: &Staged| matches!(staged.operation, Operation::Write(_) | Operation::Attend(_));
        self.is_recomputed() || self.operations.iter().any(writes)
    }

    /// Whether weights change otherwise than by the elements that were written: only a copy can show them.
    pub(super) fn is_recomputed(&self) -> bool {
        let merges = |staged: &Staged| matches!(staged.operation, Operation::Merge(_) | Operation::Merged);
        self.is_stepped() || self.operations.iter().any(merges)
    }

    /// The staged changes of weights, optimizer, and what is trained.
    pub(super) fn changes(&self) -> impl Iterator<Item = &Operation> {
        let operations = self.operations.iter().map(|staged| &staged.operation);
        operations.filter(|operation| operation.changes_state())
    }

    /// Whether something staged is stale once another transaction has changed the weights.
    pub(super) fn relies_on_weights(&self) -> bool {
        self.operations
            .iter()
            .any(|staged| staged.operation.relies_on_weights())
    }

    /// Whether a gradient is staged.
    pub(super) fn has_gradient(&self) -> bool {
        let gradient = |staged: &Staged| matches!(staged.operation, Operation::Batch(_));
        self.operations.iter().any(gradient)
    }

    /// Whether staged operations discard the committed gradient (they zero it, or step with it).
    pub(super) fn consumes(&self) -> Option<Consumed> {
        self.operations.iter().find_map(|staged| match &staged.operation {
            Operation::Zero(consumed) => Some(*consumed),
            Operation::Step(step) => Some(step.consumed),
            Operation::Batch(_)
            | Operation::Configure(_)
            | Operation::Write(_)
            | Operation::Train { .. }
            | Operation::Attend(_)
            | Operation::Merge(_)
            | Operation::Merged
            | Operation::Replaced
            | Operation::Spoilt => None,
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

    /// The attention layouts as staged last.
    pub(super) fn attention_layouts(&self) -> Option<&AttentionLayouts> {
        self.operations.iter().rev().find_map(|staged| match &staged.operation {
            Operation::Attend(staged) => Some(&staged.layouts),
            _ => None,
        })
    }

    /// Whether another model takes the place of this one.
    pub(super) fn is_replaced(&self) -> bool {
        let replaced = |staged: &Staged| matches!(staged.operation, Operation::Replaced);
        self.operations.iter().any(replaced)
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
