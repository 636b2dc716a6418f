//! Forward and backward over the sequences of a statement.

use super::packed::Packed;
use super::{ActivationSettings, Gradient, TapeEntry, TrainingSequence};
use crate::decoder::{Decoder, Layout};
use crate::error::{Error, Result};
use crate::ops::attention::AttentionShape;
use crate::ops::rotary::RotaryAngles;

/// What one sequence contributed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SequenceLoss {
    /// Mean cross-entropy (natural logarithm) over its targets, whatever its loss weight. NaN when it has none.
    pub loss: f64,
    /// Number of its targets that are not ignored.
    pub token_count: u32,
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
    pub(super) heads: AttentionShape,
    pub(super) batch: &'a Packed,
    /// Of the rotary positions; none where positions are learned.
    pub(super) angles: Option<RotaryAngles>,
    /// Their negatives.
    pub(super) opposite_angles: Option<RotaryAngles>,
    pub(super) gradient: &'a Gradient,
    pub(super) activations: ActivationSettings,
    pub(super) cancelled: &'a dyn Fn() -> bool,
}

/// Adds the gradient of sequences to `gradient`, with the default [`ActivationSettings`]. They are packed into passes of
/// bounded size; the result is the same, to rounding, as for one call a sequence, and bit for bit the same for the same
/// calls.
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
        let report = accumulate_in_place(decoder, sequences, &mut fresh, Default::default(), cancelled)?;
        gradient.merge(fresh)?;
        return Ok(report.losses);
    }
    let result = accumulate_in_place(decoder, sequences, gradient, Default::default(), cancelled);
    if result.is_err() {
        gradient.clear();
    }
    Ok(result?.losses)
}

/// As [`accumulate`], keeping activations as `activations` says, and always in place: no second gradient is needed for
/// one that has something already, but after an error `gradient` is of no more use.
///
/// # Errors
/// As [`accumulate`].
pub fn accumulate_in_place(
    decoder: &Decoder,
    sequences: &[TrainingSequence],
    gradient: &mut Gradient,
    activations: ActivationSettings,
    cancelled: &dyn Fn() -> bool,
) -> Result<PassReport> {
    if gradient.parameter_count() != decoder.parameters().len() {
        return Err(Error::InvalidArgument("the gradient is of another model".into()));
    }
    if decoder.lora_config().is_some_and(|adapter| adapter.dropout > 0.0) {
        return Err(Error::Unsupported(
            "training an adapter with dropout is not supported; make it with dropout 0".into(),
        ));
    }
    let counts = sequences.iter().map(TrainingSequence::target_count);
    let mut losses: Vec<_> = counts
        .map(|token_count| SequenceLoss { loss: 0.0, token_count })
        .collect();
    let mut tape = vec![];
    for batch in Packed::split(sequences, activations.reuse) {
        gradient.allocate()?;
        let pass = Pass::new(decoder, &batch, gradient, activations, cancelled)?;
        let recorded = pass.forward()?;
        tape = pass.list(&recorded);
        let rows = pass.backward(recorded)?;
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
    Ok(PassReport { losses, tape })
}

impl<'a> Pass<'a> {
    fn new(
        decoder: &'a Decoder,
        batch: &'a Packed,
        gradient: &'a Gradient,
        activations: ActivationSettings,
        cancelled: &'a dyn Fn() -> bool,
    ) -> Result<Self> {
        let frequencies = decoder.inverse_frequencies();
        let opposite: Vec<f32> = frequencies.iter().map(|frequency| -frequency).collect();
        Ok(Self {
            decoder,
            layout: decoder.layout(),
            heads: AttentionShape::of(decoder.config()),
            angles: RotaryAngles::new(frequencies, &batch.positions, decoder.device())?,
            opposite_angles: RotaryAngles::new(&opposite, &batch.positions, decoder.device())?,
            batch,
            gradient,
            activations,
            cancelled,
        })
    }
}

/// Stops the work if the caller asked for it.
pub(super) fn check_cancelled(cancelled: &dyn Fn() -> bool) -> Result<()> {
    if cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}
