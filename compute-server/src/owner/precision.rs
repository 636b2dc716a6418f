//! Mixed precision: the half-precision copies of the weights, and the loss scale.

use candle_models::Decoder;
use candle_models::training::{HalfWeights, LossScale, Precision};

use super::View;
use super::overlay::Overlay;
use super::state::Owner;
use crate::error::Result;
use crate::memory::Reservation;

/// Half-precision copies of the weights that a view sees. There is one set at a time: passes follow each other.
pub(super) struct HalfCopies {
    weights: HalfWeights,
    key: Key,
    memory: Reservation,
}

/// What copies are made of; they are stale as soon as it differs.
#[derive(PartialEq)]
struct Key {
    /// None for the committed weights, else the view and the number of its changes.
    staged: Option<(View, usize)>,
    weights_version: u64,
    precision: Precision,
}

impl Owner {
    /// Makes the weights that `view` sees ready for passes in `precision`: applied to a copy if they are staged, and rounded
    /// once until they change.
    ///
    /// # Errors
    /// `Stale` when the view's staged step has been overtaken, `Memory`.
    pub(super) fn prepare_weights(&mut self, view: &View, precision: Precision) -> Result<()> {
        if self.overlay(view).is_some_and(Overlay::changes_weights) {
            self.decoder(view)?;
        }
        let staged = self.overlay(view).filter(|overlay| overlay.changes_weights());
        let key = Key {
            staged: staged.map(|overlay| (view.clone(), overlay.changes().count())),
            weights_version: self.versions.weights,
            precision,
        };
        if self.half.as_ref().is_some_and(|half| half.key == key) {
            return Ok(());
        }
        self.half = None;
        let decoder = self.training_weights(view);
        let bytes = HalfWeights::bytes(decoder, precision);
        let memory = self.budget.reserve("half-precision copies of the weights", bytes)?;
        self.half = HalfWeights::new(decoder, precision)?.map(|weights| HalfCopies { weights, key, memory });
        Ok(())
    }

    /// The f32 weights that `view` sees, after [`prepare_weights`](Self::prepare_weights).
    pub(super) fn training_weights(&self, view: &View) -> &Decoder {
        match self.overlay(view).is_some_and(Overlay::changes_weights) {
            true => self.present_decoder(view),
            false => self.training_decoder(),
        }
    }

    /// The copies that [`prepare_weights`](Self::prepare_weights) made last; none in f32.
    pub(super) fn half_weights(&self) -> Option<&HalfWeights> {
        self.half.as_ref().map(|half| &half.weights)
    }

    /// Bytes of the copies.
    pub(super) fn half_bytes(&self) -> u64 {
        self.half.as_ref().map_or(0, |half| half.memory.bytes())
    }

    /// Drops copies but those of the committed weights that the committed settings have a use for.
    pub(super) fn release_half(&mut self) {
        let current = |half: &HalfCopies| {
            half.key.staged.is_none()
                && half.key.weights_version == self.versions.weights
                && half.key.precision == self.settings.precision().precision
        };
        if !self.half.as_ref().is_some_and(current) {
            self.half = None;
        }
    }

    /// The dynamic loss scale that `view` sees.
    pub(super) fn loss_scale(&self, view: &View) -> LossScale {
        let staged = self.overlay(view).and_then(Overlay::step);
        staged.map_or(self.loss_scale, |step| step.loss_scale)
    }

    /// The factor on the loss of each target in the next batch of `view`.
    pub(super) fn loss_factor(&self, view: &View) -> f64 {
        let scaling = self.settings(view).precision().loss_scaling;
        scaling.factor(self.loss_scale(view))
    }
}
