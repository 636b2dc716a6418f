//! Gradients with the sequences they came from.

use candle_compute_proto::v1;
use candle_models::training::Gradient;

use super::merging::Sources;
use crate::commit_log::{Recipe, recipe_step};
use crate::error::Result;
use crate::memory::Reservation;

/// A gradient and the sequences that it sums.
pub(crate) struct Part {
    pub(super) gradient: Gradient,
    pub(super) sequences: Vec<v1::AccumulatedSequence>,
    /// Time of forward and backward, in milliseconds.
    pub(super) duration_ms: f64,
    /// Memory of the gradient.
    pub(super) memory: Reservation,
    /// Sources of what was merged into it while it was staged.
    pub(super) sources: Sources,
    /// How the gradient was summed from the sequences, for the commit log; none once something was added that no sequence
    /// tells, and for what is committed.
    pub(super) recipe: Option<Recipe>,
}

impl Part {
    /// The gradient.
    pub(crate) fn gradient(&self) -> &Gradient {
        &self.gradient
    }

    /// Adds what another part holds. The other's memory is given back.
    pub(super) fn merge(&mut self, other: Part) -> Result<()> {
        self.gradient.merge(other.gradient)?;
        self.sequences.extend(other.sequences);
        self.duration_ms += other.duration_ms;
        match (&mut self.recipe, other.recipe) {
            (Some(recipe), Some(other)) => recipe.push(recipe_step::Kind::Apart(other)),
            (recipe, _) => *recipe = None,
        }
        if self.memory.bytes() == 0 {
            self.memory.absorb(other.memory);
        }
        Ok(())
    }

    /// Tokens of its sequences.
    pub(super) fn token_count(&self) -> u64 {
        self.sequences
            .iter()
            .filter_map(|row| row.sequence.as_ref())
            .map(|row| row.token_ids.len() as u64)
            .sum()
    }
}

/// The committed gradient. It is kept in parts while a transaction has staged an operation that uses up what was there
/// when it looked: what others publish meanwhile must not be swept along.
#[derive(Default)]
pub(super) struct Accumulated {
    pub(super) parts: Vec<Part>,
}

impl Accumulated {
    /// Adds a part. `sealed` is the number of leading parts that staged operations rely on.
    pub(super) fn add(&mut self, mut part: Part, sealed: usize) -> Result<()> {
        part.sources = Sources::default();
        part.recipe = None;
        let open = self.parts.len() > sealed;
        match self.parts.last_mut() {
            Some(last) if open => last.merge(part),
            _ => {
                self.parts.push(part);
                Ok(())
            }
        }
    }

    /// Takes the first `count` parts out.
    pub(super) fn take(&mut self, count: usize) -> Vec<Part> {
        let count = count.min(self.parts.len());
        self.parts.drain(..count).collect()
    }

    /// Tokens of the sequences.
    pub(super) fn token_count(&self) -> u64 {
        self.parts.iter().map(Part::token_count).sum()
    }
}
