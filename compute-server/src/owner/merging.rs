//! Gradients that were computed elsewhere, added by weight.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::overlay::{Operation, Staged};
use super::state::Owner;
use super::{Ticket, View};
use crate::chunks::Received;
use crate::error::{Error, Result};

/// Sets that are remembered at a time. More than one is open only while a statement's rows come from a function that
/// merges itself.
const OPEN_SETS: usize = 8;

/// A chunk of a mean gradient with what it is the mean over.
pub(crate) struct GradientChunk {
    /// Number of the parameter.
    pub(crate) parameter: usize,
    /// Its elements, checked.
    pub(crate) chunk: Received,
    /// The weight of its source.
    pub(crate) weight: SourceWeight,
    /// Whether its elements must be finite.
    pub(crate) finite: bool,
}

/// What a source's gradient is the mean over.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct SourceWeight {
    /// Targets.
    pub(crate) tokens: u64,
    /// Sequences.
    pub(crate) micro_batches: u64,
    /// Mean loss, where it is known.
    pub(crate) loss: Option<f64>,
    /// Overflows and underflows of rounding to half precision.
    pub(crate) rounding_losses: (u64, u64),
}

/// Tells sources apart, so that the weight of each counts once, by the weight itself: a chunk that comes again with the
/// same weight is of another source.
#[derive(Debug, Default)]
pub(super) struct Sources {
    sets: VecDeque<(u64, Set)>,
}

/// The sources of one set, by their weight (the loss by its bits).
type Set = HashMap<(u64, u64, Option<u64>), SameWeight>;

/// Sources of one weight.
#[derive(Debug, Default)]
struct SameWeight {
    sources: u64,
    /// How often each chunk (parameter, number) has come.
    chunks: HashMap<(usize, usize), u64>,
}

impl Sources {
    /// Notes a chunk of the set `set`; true when it is the first of another source.
    fn is_new(&mut self, set: u64, weight: SourceWeight, chunk: (usize, usize)) -> bool {
        let index = self.sets.iter().position(|(known, _)| *known == set);
        let index = index.unwrap_or_else(|| {
            if self.sets.len() == OPEN_SETS {
                self.sets.pop_front();
            }
            self.sets.push_back((set, Set::new()));
            self.sets.len() - 1
        });
        let key = (weight.tokens, weight.micro_batches, weight.loss.map(f64::to_bits));
        let same = self.sets[index].1.entry(key).or_default();
        let times = same.chunks.entry(chunk).or_default();
        *times += 1;
        let new = *times > same.sources;
        same.sources = same.sources.max(*times);
        new
    }

    /// Forgets a set.
    fn close(&mut self, set: u64) {
        self.sets.retain(|(known, _)| *known != set);
    }
}

impl Owner {
    /// Stages that chunks are added to the gradient. `set` groups calls: see `MergeGradientsRequest.set_id`.
    ///
    /// # Errors
    /// `InvalidArgument` for a frozen parameter, `Precondition` after a staged step, `Memory`. Nothing has changed then.
    pub(crate) fn stage_merge(&mut self, ticket: &Ticket, set: u64, chunks: &[GradientChunk]) -> Result<()> {
        self.check_usable(ticket)?;
        let trainable = self.trainable(&View::Transaction(Arc::clone(&ticket.transaction)));
        if let Some(frozen) = chunks.iter().find(|chunk| !trainable[chunk.parameter]) {
            return Err(Error::invalid(format!(
                "parameter \"{}\" is frozen (trainable = false) and takes no gradient",
                self.shared.parameters[frozen.parameter].name
            )));
        }
        self.make_trainable()?;
        let (mut part, _) = self.take_part(ticket)?;
        part.recipe = None;
        let mut added = Ok(());
        for GradientChunk {
            parameter,
            chunk,
            weight,
            finite,
        } in chunks
        {
            let name = &self.shared.parameters[*parameter].name;
            added = match finite {
                true => part.gradient.add_mean(name, chunk.start, &chunk.values, weight.tokens),
                false => part
                    .gradient
                    .add_any_mean(name, chunk.start, &chunk.values, weight.tokens),
            };
            if added.is_err() {
                break;
            }
            if part.sources.is_new(set, *weight, (*parameter, chunk.number)) {
                part.gradient
                    .add_weight(weight.tokens, weight.micro_batches, weight.loss);
                let (overflows, underflows) = weight.rounding_losses;
                part.gradient.count_rounding_losses(overflows, underflows);
            }
        }
        if set == 0 {
            part.sources.close(set);
        }
        // What was checked can only fail for want of memory; the rest of the part is then of no use.
        let operation = match &added {
            Ok(()) => Operation::Batch(part),
            Err(_) => Operation::Spoilt,
        };
        let overlay = self.overlays.entry(Arc::clone(&ticket.transaction)).or_default();
        overlay.operations.push(Staged {
            subtransaction: ticket.subtransaction,
            operation,
        });
        self.describe_staged(&ticket.transaction);
        Ok(added?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(tokens: u64, loss: f64) -> SourceWeight {
        SourceWeight {
            tokens,
            micro_batches: 1,
            loss: Some(loss),
            rounding_losses: (0, 0),
        }
    }

    #[test]
    fn a_source_counts_once_in_a_set_whatever_the_order_of_its_chunks() {
        let mut sources = Sources::default();
        let mut new = |set, weight, chunk| sources.is_new(set, weight, (chunk, 0));
        let (a, b) = (weight(7, 1.0), weight(5, 1.0));
        assert!(new(1, a, 0) && !new(1, a, 1) && new(1, b, 0) && !new(1, b, 1) && !new(1, a, 2));
        // Another set counts anew.
        assert!(new(2, a, 3));
        // Two sources of the same weight are told apart by the chunk that comes again.
        assert!(new(1, a, 0) && !new(1, a, 1) && !new(1, a, 2));
        assert!(new(1, weight(7, 2.0), 0), "another loss is another source");
    }

    #[test]
    fn only_the_latest_sets_are_remembered() {
        let mut sources = Sources::default();
        for set in 0..100 {
            assert!(sources.is_new(set, weight(1, 0.0), (0, 0)));
        }
        assert_eq!(sources.sets.len(), OPEN_SETS);
        assert!(!sources.is_new(99, weight(1, 0.0), (1, 0)));
        sources.close(99);
        assert!(sources.is_new(99, weight(1, 0.0), (1, 0)));
    }
}
