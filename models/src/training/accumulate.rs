//! Forward and backward over the sequences of a statement.

use std::cell::RefCell;
use std::sync::Arc;

use super::dropout::PassDropout;
use super::packed::Packed;
use super::router::{RouterLossSums, load_of};
use super::{
    ActivationSettings, DropoutKey, DropoutSettings, ExpertLoad, Gradient, HalfWeights, RouterSettings, TapeEntry,
    TrainingSequence,
};
use crate::decoder::{Decoder, Layout};
use crate::error::{Error, Result};
use crate::experts::Routing;
use crate::ops::half::RoundingLosses;
use crate::ops::rotary::RotaryAngles;

/// What one sequence contributed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SequenceLoss {
    /// Mean cross-entropy (natural logarithm) over its targets, whatever its loss weight, with the losses of its routers if
    /// there are any ([`RouterSettings`]). NaN when it has no targets.
    pub loss: f64,
    /// Number of its targets that are not ignored.
    pub token_count: u32,
}

/// How forward and backward are run. The defaults are f32 without dropout, all activations kept.
#[derive(Clone, Copy, Debug)]
pub struct PassOptions<'a> {
    /// What is kept for backward.
    pub activations: ActivationSettings,
    /// Copies of the decoder's weights, which make the products half precision. Default: none, f32.
    pub half: Option<&'a HalfWeights>,
    /// Factor on each target's loss in backward ([`LossScaling::factor`](super::LossScaling::factor)); finite, above 0.
    /// Default 1.
    pub loss_scale: f64,
    /// What is dropped.
    pub dropout: DropoutSettings,
    /// What the masks of dropout depend on.
    pub dropout_key: DropoutKey,
    /// Losses and capacity of routers.
    pub router: RouterSettings,
    /// Whether experts that other servers compute are computed here, with the same result bit for bit (on a processor of the
    /// same kind). Default false.
    pub alone: bool,
}

impl Default for PassOptions<'_> {
    fn default() -> Self {
        Self {
            activations: ActivationSettings::default(),
            half: None,
            loss_scale: 1.0,
            dropout: DropoutSettings::default(),
            dropout_key: DropoutKey::default(),
            router: RouterSettings::default(),
            alone: false,
        }
    }
}

impl PassOptions<'_> {
    /// Whether sequences share the activations of what they have in common: not with dropout, of the model or of an
    /// adapter, whose masks differ, and not with experts of limited capacity, which sequences fill differently.
    #[must_use]
    pub fn reuses(&self, decoder: &Decoder) -> bool {
        let mut matrices = decoder.adapted_modules().iter();
        let dropless = self.router.capacity_factor.is_none() || decoder.config().experts.is_none();
        self.activations.reuse && dropless && !self.dropout.is_on() && !matrices.any(|(_, matrix)| matrix.dropout > 0.0)
    }
}

/// What a call of [`accumulate_in_place`] did.
#[derive(Clone, Debug, Default)]
pub struct PassReport {
    /// One entry a sequence.
    pub losses: Vec<SequenceLoss>,
    /// What the last forward pass recorded; empty when no sequence had a target.
    pub tape: Vec<TapeEntry>,
}

/// One pass over packed sequences: what forward and backward both need.
pub(super) struct Pass<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) layout: &'a Layout,
    pub(super) batch: &'a Packed,
    /// Of the rotary positions; none where positions are learned.
    pub(super) angles: Option<RotaryAngles>,
    /// Their negatives.
    pub(super) opposite_angles: Option<RotaryAngles>,
    pub(super) gradient: &'a Gradient,
    pub(super) activations: ActivationSettings,
    /// None without mixed precision.
    pub(super) half: Option<&'a HalfWeights>,
    /// What rounding gradients to half precision has lost.
    pub(super) losses: RoundingLosses,
    /// Factor of each row's loss in the scaled gradient, `[targets]`.
    pub(super) factors: Vec<f32>,
    pub(super) dropout: PassDropout,
    pub(super) router: RouterSettings,
    /// Whether experts that other servers compute are computed here.
    pub(super) alone: bool,
    /// Where the tokens go in each layer with experts, once it has been run: the same when it is run again.
    pub(super) routings: RefCell<Vec<Option<Arc<Routing>>>>,
    /// The losses of the routers, once all layers have been run.
    pub(super) router_losses: RefCell<Option<RouterLossSums>>,
    pub(super) cancelled: &'a dyn Fn() -> bool,
}

/// Adds the gradient of sequences to `gradient`, with the default [`PassOptions`]. They are packed into passes of bounded
/// size; the result is the same, to rounding, as for one call a sequence, and bit for bit the same for the same calls.
///
/// All or nothing: after an error the gradient is as it was. `cancelled` is asked before every segment.
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::FailedPrecondition`] if the weights are not f32 yet
/// ([`Decoder::make_trainable`]); [`Error::InvalidArgument`] if the gradient is of another model.
pub fn accumulate(
    decoder: &Decoder,
    sequences: &[TrainingSequence],
    gradient: &mut Gradient,
    cancelled: &dyn Fn() -> bool,
) -> Result<Vec<SequenceLoss>> {
    if gradient.parameter_count() != decoder.parameters().len() {
        return Err(Error::InvalidArgument("the gradient is of another model".into()));
    }
    // Into a gradient that has something, a failed pass must not leave its half.
    if !gradient.is_empty() {
        let mut fresh = Gradient::new(decoder);
        let report = accumulate_in_place(decoder, sequences, &mut fresh, &PassOptions::default(), cancelled)?;
        gradient.merge(fresh)?;
        return Ok(report.losses);
    }
    let result = accumulate_in_place(decoder, sequences, gradient, &PassOptions::default(), cancelled);
    if result.is_err() {
        gradient.clear();
    }
    Ok(result?.losses)
}

/// As [`accumulate`], with `options`, and always in place: no second gradient is needed for one that has something
/// already, but after an error `gradient` is of no more use.
///
/// # Errors
/// As [`accumulate`].
pub fn accumulate_in_place(
    decoder: &Decoder,
    sequences: &[TrainingSequence],
    gradient: &mut Gradient,
    options: &PassOptions<'_>,
    cancelled: &dyn Fn() -> bool,
) -> Result<PassReport> {
    if gradient.parameter_count() != decoder.parameters().len() {
        return Err(Error::InvalidArgument("the gradient is of another model".into()));
    }
    let counts = sequences.iter().map(TrainingSequence::target_count);
    let mut losses: Vec<_> = counts
        .map(|token_count| SequenceLoss { loss: 0.0, token_count })
        .collect();
    let (mut tape, mut lost, mut load) = (vec![], (0, 0), vec![]);
    gradient.rescale(options.loss_scale)?;
    for batch in Packed::split(sequences, options.reuses(decoder)) {
        gradient.allocate()?;
        let pass = Pass::new(decoder, &batch, gradient, options, cancelled)?;
        let recorded = pass.forward()?;
        tape = pass.list(&recorded);
        pass.sum_router_losses(sequences, options.loss_scale)?;
        for (member, loss) in batch.members.iter().zip(pass.mean_router_losses()) {
            losses[*member].loss += loss * f64::from(losses[*member].token_count);
        }
        super::expert_load::add(&mut load, &pass.expert_load()?);
        let rows = pass.backward(recorded)?;
        lost.0 += pass.losses.overflows.get();
        lost.1 += pass.losses.underflows.get();
        for &(row, sequence) in &batch.credits {
            losses[batch.members[sequence as usize]].loss += f64::from(rows[row as usize]);
        }
    }
    let mut weighted = 0.0;
    for (loss, sequence) in losses.iter_mut().zip(sequences) {
        weighted += f64::from(sequence.loss_weight()) * loss.loss;
        loss.loss /= f64::from(loss.token_count);
    }
    let tokens = losses.iter().map(|loss| u64::from(loss.token_count)).sum();
    gradient.count(tokens, sequences.len() as u64, weighted);
    gradient.count_rounding_losses(lost.0, lost.1);
    gradient.count_load(&load);
    Ok(PassReport { losses, tape })
}

impl<'a> Pass<'a> {
    fn new(
        decoder: &'a Decoder,
        batch: &'a Packed,
        gradient: &'a Gradient,
        options: &PassOptions<'a>,
        cancelled: &'a dyn Fn() -> bool,
    ) -> Result<Self> {
        let scale = options.loss_scale as f32;
        let angles = decoder.rotary_angles(&batch.positions)?;
        Ok(Self {
            decoder,
            layout: decoder.layout(),
            opposite_angles: angles.as_ref().map(RotaryAngles::opposite).transpose()?,
            angles,
            factors: batch.factors.iter().map(|factor| factor * scale).collect(),
            dropout: PassDropout::new(options.dropout, options.dropout_key, &batch.members),
            router: options.router,
            alone: options.alone,
            routings: RefCell::new(vec![None; decoder.layout().layers.len()]),
            router_losses: RefCell::new(None),
            batch,
            gradient,
            activations: options.activations,
            half: options.half,
            losses: RoundingLosses::default(),
            cancelled,
        })
    }
}

impl Pass<'_> {
    /// Sums what the losses of the routers depend on, once every layer has been run.
    fn sum_router_losses(&self, sequences: &[TrainingSequence], scale: f64) -> Result<()> {
        if self.decoder.config().experts.is_none() || !self.router.has_losses() {
            return Ok(());
        }
        let config = self.decoder.experts_config()?;
        let routings = self.routings.borrow();
        let routings: Vec<&Routing> = routings.iter().flatten().map(Arc::as_ref).collect();
        let sums = RouterLossSums::new(self.router, config, &routings, (self.batch, sequences), scale);
        *self.router_losses.borrow_mut() = Some(sums);
        Ok(())
    }

    /// What the routers add to the mean loss of each sequence of the pass; nothing without such losses.
    fn mean_router_losses(&self) -> Vec<f64> {
        let sums = self.router_losses.borrow();
        sums.as_ref().map(|sums| sums.losses().collect()).unwrap_or_default()
    }

    /// What each expert of each layer had to do, `[layers, experts]`; empty without experts.
    fn expert_load(&self) -> Result<Vec<ExpertLoad>> {
        if self.decoder.config().experts.is_none() {
            return Ok(vec![]);
        }
        let config = self.decoder.experts_config()?;
        let routings = self.routings.borrow();
        Ok(routings
            .iter()
            .flatten()
            .flat_map(|routing| load_of(config, routing))
            .collect())
    }
}

/// Stops the work if the caller asked for it.
pub(super) fn check_cancelled(cancelled: &dyn Fn() -> bool) -> Result<()> {
    if cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}
