//! AdamW (arXiv:1711.05101), with PyTorch's order of operations.

use candle_core::Tensor;
use candle_kernels_cpu::{AdamWStep, adamw, sum_of_squares};

use super::{AdamWOptions, Gradient};
use crate::decoder::{Decoder, ParameterId};
use crate::error::{Error, Result};
use crate::ops::storage::{is_cpu, with_mut_slice, with_slice};

/// Added to the norm before the clipping factor is taken, as torch.nn.utils.clip_grad_norm_ does.
const CLIPPING_EPSILON: f64 = 1e-6;

/// The state of the optimizer: f32 moments in the decoder's layout, and the number of steps taken.
#[derive(Default)]
pub struct AdamW {
    pub(super) step: u64,
    /// One entry a parameter; empty before the first step; `None` for a parameter that never took part.
    pub(super) moments: Vec<Option<Moments>>,
}

/// Decaying means of one parameter's gradient.
#[derive(Clone)]
pub(super) struct Moments {
    /// Of the gradient (PyTorch's `exp_avg`).
    pub(super) first: Tensor,
    /// Of its square (PyTorch's `exp_avg_sq`).
    pub(super) second: Tensor,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Number of the step, from 1. A skipped step's number is used again.
    pub step: u64,
    /// Mean over targets of `loss_weight` times the cross-entropy; NaN when it is not known ([`Gradient::loss`]).
    pub loss: f64,
    /// Euclidean norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// Whether nothing was changed because the gradient was not finite.
    pub skipped: bool,
    /// Targets that took part.
    pub tokens: u64,
    /// Sequences that took part.
    pub micro_batches: u64,
    /// [`Gradient::overflows`].
    pub overflows: u64,
    /// [`Gradient::underflows`].
    pub underflows: u64,
}

impl AdamW {
    /// The state before the first step.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of steps taken.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Bytes that the moments take.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.moments
            .iter()
            .flatten()
            .map(|moments| 8 * moments.first.elem_count() as u64)
            .sum()
    }

    /// A state that shares its storage with this one: where that is changed in place, both are.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            step: self.step,
            moments: self.moments.clone(),
        }
    }

    /// A copy that shares no storage.
    ///
    /// # Errors
    /// [`Error::Candle`] if the device has no memory for it.
    pub fn deep_copy(&self) -> Result<Self> {
        let copy = |moments: &Moments| -> Result<Moments> {
            Ok(Moments {
                first: moments.first.copy()?,
                second: moments.second.copy()?,
            })
        };
        let moments = self
            .moments
            .iter()
            .map(|moments| moments.as_ref().map(copy).transpose());
        Ok(Self {
            step: self.step,
            moments: moments.collect::<Result<_>>()?,
        })
    }

    /// The state of a decoder whose parameters were copied from those that `sources` names: each has the moments of its
    /// source. No storage is shared.
    ///
    /// # Errors
    /// [`Error::Candle`] if the device has no memory for it.
    pub fn regrouped(&self, sources: &[ParameterId]) -> Result<Self> {
        let moments = match self.moments.is_empty() {
            true => Vec::new(),
            false => sources.iter().map(|source| self.moments[source.0].clone()).collect(),
        };
        let shared = Self {
            step: self.step,
            moments,
        };
        shared.deep_copy()
    }

    /// Changes the trainable parameters by one step along the mean gradient. Weights are changed in place: clones of the
    /// decoder that share its storage see the change.
    ///
    /// All or nothing: after an error, or when the report says `skipped`, decoder and optimizer are as they were.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for options out of range or a gradient of another model;
    /// [`Error::FailedPrecondition`] if the gradient has no targets.
    pub fn step(&mut self, decoder: &mut Decoder, gradient: &Gradient, options: &AdamWOptions) -> Result<StepReport> {
        options.validate()?;
        if gradient.tokens() == 0 {
            let message =
                "no target was accumulated since the last step; insert a batch with at least two tokens first";
            return Err(Error::FailedPrecondition(message.into()));
        }
        if gradient.parameter_count() != decoder.parameters().len() {
            return Err(Error::InvalidArgument("the gradient is of another model".into()));
        }
        let trainable: Vec<bool> = decoder
            .parameters()
            .iter()
            .map(|parameter| parameter.trainable)
            .collect();
        let grad_norm = gradient.norm(&trainable)?;
        let loss = gradient.loss();
        let report = StepReport {
            step: self.step + 1,
            loss: loss.unwrap_or(f64::NAN),
            grad_norm,
            skipped: !grad_norm.is_finite() || loss.is_some_and(|loss| !loss.is_finite()),
            tokens: gradient.tokens(),
            micro_batches: gradient.micro_batches(),
            overflows: gradient.overflows(),
            underflows: gradient.underflows(),
        };
        if !report.skipped {
            self.allocate(gradient)?;
            let clipping = match options.max_grad_norm {
                Some(largest) => (largest / (grad_norm + CLIPPING_EPSILON)).min(1.0),
                None => 1.0,
            };
            let factor = clipping / gradient.divisor();
            decoder.weights_change();
            self.update(decoder, gradient, options, factor)?;
            self.step += 1;
        }
        Ok(report)
    }

    /// Makes moments, of zeros, where the gradient has a sum and there are none yet.
    fn allocate(&mut self, gradient: &Gradient) -> Result<()> {
        self.moments.resize(gradient.parameter_count(), None);
        for (index, moments) in self.moments.iter_mut().enumerate() {
            if let (None, Some(sum)) = (&moments, gradient.sum(index)) {
                *moments = Some(Moments {
                    first: sum.zeros_like()?,
                    second: sum.zeros_like()?,
                });
            }
        }
        Ok(())
    }

    /// The update itself, with the gradient's sums multiplied by `factor`.
    fn update(&self, decoder: &mut Decoder, gradient: &Gradient, options: &AdamWOptions, factor: f64) -> Result<()> {
        let decaying = AdamWStep {
            learning_rate: options.learning_rate,
            beta1: options.beta1,
            beta2: options.beta2,
            epsilon: options.epsilon,
            weight_decay: options.weight_decay,
            step: self.step + 1,
            gradient_scale: factor,
        };
        let constant = AdamWStep {
            weight_decay: 0.0,
            ..decaying
        };
        for (index, moments) in self.moments.iter().enumerate() {
            let (Some(moments), Some(sum)) = (moments, gradient.sum(index)) else {
                continue;
            };
            let info = &decoder.parameters()[index];
            if !info.trainable {
                continue;
            }
            let step = if options.decays(info.role) {
                &decaying
            } else {
                &constant
            };
            let parameter = decoder.weight(ParameterId(index)).as_f32()?;
            update_one(parameter, sum, moments, step)?;
        }
        Ok(())
    }
}

/// Euclidean norm of the sums of the parameters that `trainable` says; not finite if any element is not.
pub(super) fn norm(gradient: &Gradient, trainable: &[bool]) -> Result<f64> {
    let mut squares = 0.0;
    for (index, _) in trainable.iter().enumerate().filter(|(_, trainable)| **trainable) {
        let Some(sum) = gradient.sum(index) else { continue };
        squares += if is_cpu(sum) {
            with_slice(sum, sum_of_squares)?
        } else {
            f64::from(sum.sqr()?.sum_all()?.to_scalar::<f32>()?)
        };
    }
    Ok(squares.sqrt())
}

/// One parameter's step, in place.
fn update_one(parameter: &Tensor, sum: &Tensor, moments: &Moments, step: &AdamWStep) -> Result<()> {
    if !is_cpu(parameter) {
        return composed(parameter, sum, moments, step);
    }
    with_slice(sum, |sum| {
        with_mut_slice(parameter, |parameter| {
            with_mut_slice(&moments.first, |first| {
                with_mut_slice(&moments.second, |second| adamw(parameter, first, second, sum, step))
            })?
        })?
    })?
}

/// [`update_one`] from plain candle operations: for devices without kernels of our own, and the tests' oracle.
fn composed(parameter: &Tensor, sum: &Tensor, moments: &Moments, step: &AdamWStep) -> Result<()> {
    let correction = |beta: f64| 1.0 - beta.powf(step.step as f64);
    let rate = step.learning_rate / correction(step.beta1);
    let gradient = (sum * step.gradient_scale)?;
    let first = (&moments.first + ((&gradient - &moments.first)? * (1.0 - step.beta1))?)?;
    let second = ((&moments.second * step.beta2)? + (gradient.sqr()? * (1.0 - step.beta2))?)?;
    let denominator = ((second.sqrt()? / correction(step.beta2).sqrt())? + step.epsilon)?;
    let decayed = (parameter * (1.0 - step.learning_rate * step.weight_decay))?;
    let changed = (decayed - ((&first / denominator)? * rate)?)?;
    moments.first.slice_set(&first, 0, 0)?;
    moments.second.slice_set(&second, 0, 0)?;
    Ok(parameter.slice_set(&changed, 0, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_kernel_does_what_plain_operations_do() {
        let random = || Tensor::randn(0f32, 1f32, (7, 37), &Device::Cpu).unwrap();
        let (parameter, sum) = (random(), random());
        let moments = Moments {
            first: random(),
            second: random().sqr().unwrap(),
        };
        let copy = |x: &Tensor| x.copy().unwrap();
        let (other, other_moments) = (
            copy(&parameter),
            Moments {
                first: copy(&moments.first),
                second: copy(&moments.second),
            },
        );
        let step = AdamWStep {
            learning_rate: 0.01,
            beta1: 0.8,
            beta2: 0.95,
            epsilon: 1e-3,
            weight_decay: 0.1,
            step: 3,
            gradient_scale: 0.25,
        };
        update_one(&parameter, &sum, &moments, &step).unwrap();
        composed(&other, &sum, &other_moments, &step).unwrap();
        let pairs = [
            (parameter, other),
            (moments.first, other_moments.first),
            (moments.second, other_moments.second),
        ];
        for (kernel, plain) in pairs {
            let difference = (kernel - plain)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            assert!(difference < 1e-6, "{difference:e}");
        }
    }
}
