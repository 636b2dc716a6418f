//! Gradients as plain data, so that a log can keep one exactly.

use candle_core::Tensor;

use super::Gradient;
use crate::decoder::Decoder;
use crate::error::{Error, Result};

/// What a [`Gradient`] holds, bit for bit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GradientData {
    /// Which parameters take part, one entry a parameter.
    pub trainable: Vec<bool>,
    /// For each parameter its sum: f32, row-major in the decoder's layout; none for a frozen one. Empty before the first
    /// batch.
    pub sums: Vec<Option<Vec<f32>>>,
    /// Targets.
    pub tokens: u64,
    /// Sequences.
    pub micro_batches: u64,
    /// Sum of `loss_weight` times the cross-entropy over `loss_tokens` targets.
    pub weighted_loss: f64,
    /// Targets whose loss is known.
    pub loss_tokens: u64,
    /// Factor on the sums.
    pub scale: f64,
    /// [`Gradient::overflows`].
    pub overflows: u64,
    /// [`Gradient::underflows`].
    pub underflows: u64,
}

impl Gradient {
    /// Everything that it holds.
    ///
    /// # Errors
    /// [`Error::Candle`] if the device fails.
    pub fn to_data(&self) -> Result<GradientData> {
        let elements = |sum: &Option<Tensor>| -> Result<Option<Vec<f32>>> {
            let flat = sum.as_ref().map(|sum| sum.flatten_all()?.to_vec1());
            Ok(flat.transpose()?)
        };
        Ok(GradientData {
            trainable: self.parameters.iter().map(|parameter| parameter.trainable).collect(),
            sums: self.sums.iter().map(elements).collect::<Result<_>>()?,
            tokens: self.tokens,
            micro_batches: self.micro_batches,
            weighted_loss: self.weighted_loss,
            loss_tokens: self.loss_tokens,
            scale: self.scale,
            overflows: self.overflows,
            underflows: self.underflows,
        })
    }

    /// The gradient that [`to_data`](Self::to_data) was called on, for a decoder of the same shape.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the data is of another model.
    pub fn from_data(decoder: &Decoder, data: GradientData) -> Result<Self> {
        let count = decoder.parameters().len();
        if data.trainable.len() != count || ![0, count].contains(&data.sums.len()) {
            return Err(Error::InvalidArgument("the gradient is of another model".into()));
        }
        let mut gradient = Self::of_parameters(decoder, &data.trainable);
        for (sum, parameter) in data.sums.into_iter().zip(decoder.parameters()) {
            let sum = sum.map(|elements| {
                if elements.len() != parameter.elements() {
                    let (given, name) = (elements.len(), &parameter.name);
                    return Err(Error::InvalidArgument(format!(
                        "the gradient of {name:?} has {given} elements, not {}",
                        parameter.elements()
                    )));
                }
                Ok(Tensor::from_vec(elements, parameter.held_shape(), decoder.device())?)
            });
            gradient.sums.push(sum.transpose()?);
        }
        gradient.tokens = data.tokens;
        gradient.micro_batches = data.micro_batches;
        gradient.weighted_loss = data.weighted_loss;
        gradient.loss_tokens = data.loss_tokens;
        gradient.scale = data.scale;
        gradient.overflows = data.overflows;
        gradient.underflows = data.underflows;
        Ok(gradient)
    }
}
