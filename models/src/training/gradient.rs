//! The accumulated gradient.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::layout::read_range;
use crate::decoder::{Decoder, ParameterInfo};
use crate::error::{Error, Result};
use crate::ops::backward::add_in_place;

/// Sums over targets of `loss_weight` times the derivative of the cross-entropy, in f32, one tensor a trainable
/// parameter in the decoder's own layout, with what is needed to make their mean. Takes no memory for parameters until
/// something is accumulated.
pub struct Gradient {
    parameters: Arc<[ParameterInfo]>,
    device: Device,
    /// One entry a parameter; empty until the first batch; `None` for a frozen parameter.
    sums: Vec<Option<Tensor>>,
    tokens: u64,
    micro_batches: u64,
    weighted_loss: f64,
}

impl Gradient {
    /// A gradient of nothing yet.
    #[must_use]
    pub fn new(decoder: &Decoder) -> Self {
        Self {
            parameters: decoder.parameters().into(),
            device: decoder.device().clone(),
            sums: vec![],
            tokens: 0,
            micro_batches: 0,
            weighted_loss: 0.0,
        }
    }

    /// Number of targets that were accumulated: the weight of the mean.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Number of sequences that were accumulated.
    #[must_use]
    pub fn micro_batches(&self) -> u64 {
        self.micro_batches
    }

    /// Mean over targets of `loss_weight` times the cross-entropy; none without targets.
    #[must_use]
    pub fn loss(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.weighted_loss / self.tokens as f64)
    }

    /// Whether nothing was accumulated.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.micro_batches == 0
    }

    /// Bytes that its tensors take.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.sums.iter().flatten().map(|sum| 4 * sum.elem_count() as u64).sum()
    }

    /// A copy that shares no storage.
    ///
    /// # Errors
    /// [`Error::Candle`] if the device has no memory for it.
    pub fn deep_copy(&self) -> Result<Self> {
        let copies = self.sums.iter().map(|sum| sum.as_ref().map(Tensor::copy).transpose());
        Ok(Self {
            parameters: Arc::clone(&self.parameters),
            device: self.device.clone(),
            sums: copies.collect::<candle_core::Result<_>>()?,
            ..*self
        })
    }

    /// Euclidean norm of the mean gradient; not finite if any element is not, NaN without targets.
    ///
    /// # Errors
    /// [`Error::Candle`] if a tensor operation fails.
    pub fn norm(&self) -> Result<f64> {
        Ok(super::adamw::norm(self)? / self.tokens as f64)
    }

    /// Adds what another gradient of the same model holds, which stays as it is.
    ///
    /// # Errors
    /// As [`merge`](Self::merge).
    pub fn merge_from(&mut self, other: &Self) -> Result<()> {
        // Tensors are shared, so this costs nothing unless the other's sums are taken over.
        let shared = Self {
            parameters: Arc::clone(&other.parameters),
            device: other.device.clone(),
            sums: other.sums.clone(),
            ..*other
        };
        match self.sums.is_empty() {
            true => self.merge(shared.deep_copy()?),
            false => self.merge(shared),
        }
    }

    /// Adds what another gradient of the same model holds.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the other is of a model with other parameters.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        let same = self.parameters.len() == other.parameters.len()
            && self
                .parameters
                .iter()
                .zip(other.parameters.iter())
                .all(|(a, b)| a.name == b.name && a.shape == b.shape);
        if !same {
            return Err(Error::InvalidArgument(
                "the gradients are of models with different parameters".into(),
            ));
        }
        if self.sums.is_empty() {
            self.sums = other.sums;
        } else if !other.sums.is_empty() {
            for (sum, other) in self.sums.iter_mut().zip(other.sums) {
                match (sum.as_ref(), other) {
                    (Some(sum), Some(other)) => add_in_place(sum, &other)?,
                    (None, Some(other)) => *sum = Some(other),
                    (_, None) => {}
                }
            }
        }
        self.count(other.tokens, other.micro_batches, other.weighted_loss);
        Ok(())
    }

    /// Starts anew, keeping the memory of the sums, which is cheaper than a new gradient. The parameters that take part stay
    /// those that were trainable when it was made.
    ///
    /// # Errors
    /// [`Error::Candle`] if the device fails.
    pub fn reset(&mut self) -> Result<()> {
        (self.tokens, self.micro_batches, self.weighted_loss) = (0, 0, 0.0);
        self.sums.iter().flatten().try_for_each(|sum| Ok(sum.zero_set()?))
    }

    /// The mean gradient of a part of a parameter: elements in row-major order of transformers' shape. Zeros while there
    /// are no targets, and for a frozen parameter.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an unknown name, [`Error::InvalidArgument`] for a range outside the parameter.
    pub fn read(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let Some(index) = self.parameters.iter().position(|parameter| parameter.name == name) else {
            return Err(Error::NotFound(format!("the model has no parameter {name:?}")));
        };
        let parameter = &self.parameters[index];
        let elements = parameter.shape.iter().product();
        if range.start > range.end || range.end > elements {
            let message = format!("elements {range:?} are not within the {elements} elements of {name:?}");
            return Err(Error::InvalidArgument(message));
        }
        match self.sums.get(index).and_then(Option::as_ref) {
            Some(sum) if self.tokens > 0 => {
                let mut elements = read_range(sum, parameter, range)?;
                let tokens = self.tokens as f64;
                elements
                    .iter_mut()
                    .for_each(|element| *element = (f64::from(*element) / tokens) as f32);
                Ok(elements)
            }
            _ => Ok(vec![0.0; range.len()]),
        }
    }

    /// The sum of parameter `index`, in the decoder's layout; none for a frozen parameter or before the first batch.
    pub(super) fn sum(&self, index: usize) -> Option<&Tensor> {
        self.sums.get(index).and_then(Option::as_ref)
    }

    /// Makes the sums, of zeros, if there are none yet.
    pub(super) fn allocate(&mut self) -> Result<()> {
        if self.sums.is_empty() {
            let sums = self.parameters.iter().map(|parameter| {
                let zeros = || Tensor::zeros(parameter.held_shape(), DType::F32, &self.device);
                parameter.trainable.then(zeros).transpose()
            });
            self.sums = sums.collect::<candle_core::Result<_>>()?;
        }
        Ok(())
    }

    /// Adds to what was counted.
    pub(super) fn count(&mut self, tokens: u64, micro_batches: u64, weighted_loss: f64) {
        self.tokens += tokens;
        self.micro_batches += micro_batches;
        self.weighted_loss += weighted_loss;
    }

    /// How many parameters it was made for.
    pub(super) fn parameter_count(&self) -> usize {
        self.parameters.len()
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.sums.clear();
        (self.tokens, self.micro_batches, self.weighted_loss) = (0, 0, 0.0);
    }
}
