//! AdamW (arXiv:1711.05101), with PyTorch's order of operations.

use candle_core::Tensor;

use super::{AdamWOptions, Gradient};
use crate::decoder::{Decoder, ParameterId};
use crate::error::{Error, Result};
use crate::ops::storage::{is_cpu, with_slice};

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
    /// Mean over targets of `loss_weight` times the cross-entropy.
    pub loss: f64,
    /// Euclidean norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// Whether nothing was changed because the gradient was not finite.
    pub skipped: bool,
    /// Targets that took part.
    pub tokens: u64,
    /// Sequences that took part.
    pub micro_batches: u64,
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
        let Some(loss) = gradient.loss() else {
            let message =
                "no target was accumulated since the last step; insert a batch with at least two tokens first";
            return Err(Error::FailedPrecondition(message.into()));
        };
        if gradient.parameter_count() != decoder.parameters().len() {
            return Err(Error::InvalidArgument("the gradient is of another model".into()));
        }
        let grad_norm = norm(gradient)? / gradient.tokens() as f64;
        let mut report = StepReport {
            step: self.step + 1,
            loss,
            grad_norm,
            skipped: !grad_norm.is_finite(),
            tokens: gradient.tokens(),
            micro_batches: gradient.micro_batches(),
        };
        report.skipped |= !loss.is_finite();
        if !report.skipped {
            self.allocate(gradient)?;
            let clipping = match options.max_grad_norm {
                Some(largest) => (largest / (grad_norm + CLIPPING_EPSILON)).min(1.0),
                None => 1.0,
            };
            let factor = clipping / gradient.tokens() as f64;
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
        let coefficients = Coefficients::new(options, factor, self.step + 1);
        for (index, moments) in self.moments.iter().enumerate() {
            let (Some(moments), Some(sum)) = (moments, gradient.sum(index)) else {
                continue;
            };
            if !decoder.parameters()[index].trainable {
                continue;
            }
            let parameter = decoder.weight(ParameterId(index)).as_f32()?;
            composed(parameter, sum, moments, &coefficients)?;
        }
        Ok(())
    }
}

/// Euclidean norm of the sums; not finite if any element is not.
fn norm(gradient: &Gradient) -> Result<f64> {
    let mut squares = 0.0;
    for index in 0..gradient.parameter_count() {
        let Some(sum) = gradient.sum(index) else { continue };
        squares += if is_cpu(sum) {
            with_slice(sum, |sum| {
                sum.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>()
            })?
        } else {
            f64::from(sum.sqr()?.sum_all()?.to_scalar::<f32>()?)
        };
    }
    Ok(squares.sqrt())
}

/// Coefficients of one step, the same for every parameter.
struct Coefficients {
    /// What the gradient's sums are multiplied by: the mean, clipped.
    factor: f64,
    /// What the parameters are multiplied by before the step: decoupled weight decay.
    decay: f64,
    /// Weight of the new gradient in the first moment.
    first: f64,
    /// Weight of the square of the new gradient in the second moment.
    second: f64,
    /// Learning rate over the bias correction of the first moment.
    rate: f64,
    /// Root of the bias correction of the second moment.
    correction: f64,
    /// Added to the denominator.
    epsilon: f64,
}

impl Coefficients {
    fn new(options: &AdamWOptions, factor: f64, step: u64) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Self {
            factor,
            decay: 1.0 - options.learning_rate * options.weight_decay,
            first: 1.0 - options.beta1,
            second: 1.0 - options.beta2,
            rate: options.learning_rate / correction(options.beta1),
            correction: correction(options.beta2).sqrt(),
            epsilon: options.epsilon,
        }
    }
}

/// One parameter's step from plain candle operations: for devices without kernels of our own, and the tests' oracle.
fn composed(parameter: &Tensor, sum: &Tensor, moments: &Moments, coefficients: &Coefficients) -> Result<()> {
    let Coefficients {
        factor,
        decay,
        first,
        second,
        rate,
        correction,
        epsilon,
    } = *coefficients;
    let gradient = (sum * factor)?;
    let mean = (&moments.first + ((&gradient - &moments.first)? * first)?)?;
    let square = ((&moments.second * (1.0 - second))? + (gradient.sqr()? * second)?)?;
    let denominator = ((square.sqrt()? / correction)? + epsilon)?;
    let changed = ((parameter * decay)? - ((&mean / denominator)? * rate)?)?;
    moments.first.slice_set(&mean, 0, 0)?;
    moments.second.slice_set(&square, 0, 0)?;
    Ok(parameter.slice_set(&changed, 0, 0)?)
}
