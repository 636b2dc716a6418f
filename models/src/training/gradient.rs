//! The accumulated gradient.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::ExpertLoad;
use super::layout::{change_range, read_range};
use crate::decoder::{Decoder, ParameterInfo};
use crate::error::{Error, Result};
use crate::ops::backward::{add_in_place, scale_in_place};

/// Sums over targets of `loss_weight` times the derivative of the cross-entropy, in f32, one tensor a trainable
/// parameter in the decoder's own layout, with what is needed to make their mean. Takes no memory for parameters until
/// something is accumulated.
pub struct Gradient {
    pub(super) parameters: Arc<[ParameterInfo]>,
    device: Device,
    /// One entry a parameter; empty until the first batch; `None` for a frozen parameter.
    pub(super) sums: Vec<Option<Tensor>>,
    pub(super) tokens: u64,
    pub(super) micro_batches: u64,
    /// Sum over `loss_tokens` targets of `loss_weight` times the cross-entropy.
    pub(super) weighted_loss: f64,
    /// Targets whose loss is known: all but those merged without it.
    pub(super) loss_tokens: u64,
    /// Factor on the sums, but for which they would be the gradient: the loss scale of what was accumulated.
    pub(super) scale: f64,
    pub(super) overflows: u64,
    pub(super) underflows: u64,
    /// What each expert of each layer had to do, `[layers, experts]`; empty until something was accumulated.
    pub(super) load: Vec<ExpertLoad>,
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
            loss_tokens: 0,
            scale: 1.0,
            overflows: 0,
            underflows: 0,
            load: vec![],
        }
    }

    /// A gradient of nothing yet, of the parameters that `trainable` says, one entry a parameter, rather than of those
    /// that the decoder trains.
    #[must_use]
    pub fn of_parameters(decoder: &Decoder, trainable: &[bool]) -> Self {
        let chosen = decoder.parameters().iter().zip(trainable);
        let parameters = chosen.map(|(parameter, &trainable)| ParameterInfo {
            trainable,
            ..parameter.clone()
        });
        Self {
            parameters: parameters.collect(),
            ..Self::new(decoder)
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

    /// Mean over targets of `loss_weight` times the cross-entropy; none without targets, and none when all of it was
    /// merged without its loss.
    #[must_use]
    pub fn loss(&self) -> Option<f64> {
        (self.loss_tokens > 0).then(|| self.weighted_loss / self.loss_tokens as f64)
    }

    /// Number of targets that [`loss`](Self::loss) is the mean over: fewer than [`tokens`](Self::tokens) when something was
    /// merged without its loss.
    #[must_use]
    pub fn loss_tokens(&self) -> u64 {
        self.loss_tokens
    }

    /// Elements of activations' gradients that were infinite or NaN, or became infinite, when they were rounded to half
    /// precision.
    #[must_use]
    pub fn overflows(&self) -> u64 {
        self.overflows
    }

    /// Elements of activations' gradients, scaled by the loss scale, that were not 0 and became 0 when they were rounded
    /// to half precision.
    #[must_use]
    pub fn underflows(&self) -> u64 {
        self.underflows
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
            load: self.load.clone(),
            ..*self
        })
    }

    /// Euclidean norm of the mean gradient of the parameters that `trainable` says, one entry a parameter; not finite if any
    /// element is not, NaN without targets.
    ///
    /// # Errors
    /// [`Error::Candle`] if a tensor operation fails.
    pub fn norm(&self, trainable: &[bool]) -> Result<f64> {
        Ok(super::adamw::norm(self, trainable)? / self.divisor())
    }

    /// Adds what another gradient of the same model holds, which stays as it is.
    ///
    /// # Errors
    /// As [`merge`](Self::merge).
    pub fn merge_from(&mut self, other: &Self) -> Result<()> {
        // Tensors are shared, so this costs nothing unless the other's sums are taken over.
        let mut shared = Self {
            parameters: Arc::clone(&other.parameters),
            device: other.device.clone(),
            sums: other.sums.clone(),
            load: other.load.clone(),
            ..*other
        };
        for (index, sum) in shared.sums.iter_mut().enumerate() {
            let changes = self.sum(index).is_none() || self.scale != other.scale;
            if let Some(taken) = sum.as_ref().filter(|_| changes) {
                *sum = Some(taken.copy()?);
            }
        }
        self.merge(shared)
    }

    /// Adds what another gradient of the same model holds.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the other is of a model with other parameters.
    pub fn merge(&mut self, mut other: Self) -> Result<()> {
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
            self.scale = other.scale;
        } else {
            other.rescale(self.scale)?;
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
        self.tokens += other.tokens;
        self.micro_batches += other.micro_batches;
        self.weighted_loss += other.weighted_loss;
        self.loss_tokens += other.loss_tokens;
        self.count_rounding_losses(other.overflows, other.underflows);
        self.count_load(&other.load);
        Ok(())
    }

    /// Adds a mean gradient that was computed elsewhere over `tokens` targets: its elements `start..start + mean.len()` of
    /// the parameter of that name, in row-major order of transformers' shape. What it is the mean over is counted apart
    /// from it, once for all its parts, by [`add_weight`](Self::add_weight). After an error nothing has changed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown or frozen parameter, elements outside of it, and elements that are not
    /// finite once they are multiplied by `tokens`.
    pub fn add_mean(&mut self, name: &str, start: usize, mean: &[f32], tokens: u64) -> Result<()> {
        let weight = tokens as f64 * self.scale;
        let scaled = |element: f32| (f64::from(element) * weight) as f32;
        // Without an early exit the check is several times as fast.
        let finite = mean
            .iter()
            .fold(true, |finite, element| finite & scaled(*element).is_finite());
        if !finite && let Some(at) = mean.iter().position(|element| !scaled(*element).is_finite()) {
            let (at, element) = (start + at, mean[at]);
            return Err(Error::InvalidArgument(format!(
                "gradient of {name:?}: its element {at} is {element}, with a weight of {tokens}"
            )));
        }
        self.add_any_mean(name, start, mean, tokens)
    }

    /// As [`add_mean`](Self::add_mean), for elements that need not be finite: a step over them is skipped.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown or frozen parameter, and elements outside of it.
    pub fn add_any_mean(&mut self, name: &str, start: usize, mean: &[f32], tokens: u64) -> Result<()> {
        let refuse = |reason: String| Error::InvalidArgument(format!("gradient of {name:?}: {reason}"));
        let Some(index) = self.parameters.iter().position(|parameter| parameter.name == name) else {
            return Err(refuse("the model has no such parameter".into()));
        };
        let parameters = Arc::clone(&self.parameters);
        let parameter = &parameters[index];
        let elements = parameter.elements();
        if start.checked_add(mean.len()).is_none_or(|end| end > elements) {
            let end = start.saturating_add(mean.len());
            return Err(refuse(format!("elements {start}..{end} are not within its {elements}")));
        }
        if !parameter.trainable {
            return Err(refuse("the parameter is frozen".into()));
        }
        let weight = tokens as f64 * self.scale;
        self.allocate()?;
        if let Some(sum) = &self.sums[index] {
            let add = |sum: &mut f32, element: f32| *sum += (f64::from(element) * weight) as f32;
            change_range(sum, parameter, start, mean, add)?;
        }
        Ok(())
    }

    /// Counts what an added mean gradient is the mean over: targets, sequences, and the mean loss where it is known.
    pub fn add_weight(&mut self, tokens: u64, micro_batches: u64, loss: Option<f64>) {
        self.tokens += tokens;
        self.micro_batches += micro_batches;
        if let Some(loss) = loss {
            self.weighted_loss += loss * tokens as f64;
            self.loss_tokens += tokens;
        }
    }

    /// Starts anew, keeping the memory of the sums, which is cheaper than a new gradient. The parameters that take part stay
    /// those that were trainable when it was made.
    ///
    /// # Errors
    /// [`Error::Candle`] if the device fails.
    pub fn reset(&mut self) -> Result<()> {
        self.forget_counts();
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
                let divisor = self.divisor();
                elements
                    .iter_mut()
                    .for_each(|element| *element = (f64::from(*element) / divisor) as f32);
                Ok(elements)
            }
            _ => Ok(vec![0.0; range.len()]),
        }
    }

    /// The sum of parameter `index`, in the decoder's layout; none for a frozen parameter or before the first batch.
    pub(super) fn sum(&self, index: usize) -> Option<&Tensor> {
        self.sums.get(index).and_then(Option::as_ref)
    }

    /// What the sums are divided by to give the mean gradient; 0 without targets.
    pub(super) fn divisor(&self) -> f64 {
        self.tokens as f64 * self.scale
    }

    /// Brings the sums to another loss scale.
    pub(super) fn rescale(&mut self, scale: f64) -> Result<()> {
        if scale != self.scale && self.micro_batches > 0 {
            let factor = scale / self.scale;
            self.sums
                .iter()
                .flatten()
                .try_for_each(|sum| scale_in_place(sum, factor))?;
        }
        self.scale = scale;
        Ok(())
    }

    /// Adds to what rounding has lost.
    pub fn count_rounding_losses(&mut self, overflows: u64, underflows: u64) {
        self.overflows += overflows;
        self.underflows += underflows;
    }

    /// What each expert of each layer had to do in the passes that were accumulated, `[layers, experts]`; empty without
    /// any.
    #[must_use]
    pub fn load(&self) -> &[ExpertLoad] {
        &self.load
    }

    /// Adds to what the experts had to do.
    pub(super) fn count_load(&mut self, load: &[ExpertLoad]) {
        super::expert_load::add(&mut self.load, load);
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
        self.loss_tokens += tokens;
    }

    /// How many parameters it was made for.
    pub(super) fn parameter_count(&self) -> usize {
        self.parameters.len()
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.sums.clear();
        self.forget_counts();
    }

    fn forget_counts(&mut self) {
        (self.tokens, self.micro_batches, self.weighted_loss, self.loss_tokens) = (0, 0, 0.0, 0);
        (self.overflows, self.underflows) = (0, 0);
        self.load.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_settings;
    use serde_json::json;

    /// GPT-2's matrices are held transposed.
    fn decoder() -> Decoder {
        let settings = json!({"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "context_length": 4,
            "vocabulary": 16});
        let config = from_settings(settings.as_object().unwrap(), None).unwrap();
        Decoder::initialize(config, &Device::Cpu, None, 1).unwrap()
    }

    const MATRIX: &str = "transformer.h.0.mlp.c_fc.weight";

    #[test]
    fn means_are_added_by_weight_where_they_belong() {
        let mut gradient = Gradient::new(&decoder());
        let first: Vec<f32> = (0..256).map(|n| n as f32).collect();
        gradient.add_mean(MATRIX, 0, &first, 3).unwrap();
        gradient.add_weight(3, 1, Some(2.0));
        gradient.add_mean(MATRIX, 100, &[8.0; 28], 1).unwrap();
        gradient.add_weight(1, 1, None);
        let expected: Vec<f32> = (0..256)
            .map(|n| (3.0 * n as f32 + if (100..128).contains(&n) { 8.0 } else { 0.0 }) / 4.0)
            .collect();
        assert_eq!(gradient.read(MATRIX, 0..256).unwrap(), expected);
        assert_eq!((gradient.tokens(), gradient.micro_batches()), (4, 2));
        // Over the targets whose loss is known.
        assert_eq!(gradient.loss(), Some(2.0));
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let decoder = decoder();
        let mut trainable = vec![true; decoder.parameters().len()];
        trainable[0] = false;
        let frozen = decoder.parameters()[0].name.clone();
        let mut gradient = Gradient::of_parameters(&decoder, &trainable);
        for (name, start, mean, tokens, what) in [
            ("none", 0, vec![1.0], 1, "no such parameter"),
            (frozen.as_str(), 0, vec![1.0], 1, "frozen"),
            (MATRIX, 250, vec![1.0; 7], 1, "250..257"),
            (MATRIX, usize::MAX, vec![1.0; 7], 1, "not within"),
            (MATRIX, 0, vec![0.0, f32::NAN], 1, "element 1 is NaN"),
            (MATRIX, 5, vec![1e38], 1000, "element 5"),
        ] {
            let error = gradient.add_mean(name, start, &mean, tokens).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        assert!(gradient.is_empty() && gradient.memory_bytes() == 0);
    }

    #[test]
    fn merging_from_a_gradient_of_more_parameters_shares_no_storage() {
        let decoder = decoder();
        let name = decoder.parameters()[0].name.clone();
        let mut trainable = vec![true; decoder.parameters().len()];
        trainable[0] = false;
        let filled = |mut gradient: Gradient, name: &str| {
            gradient.add_mean(name, 0, &[1.0], 1).unwrap();
            gradient.add_weight(1, 1, None);
            gradient
        };
        let all = filled(Gradient::new(&decoder), &name);
        let mut some = filled(Gradient::of_parameters(&decoder, &trainable), MATRIX);
        some.merge_from(&all).unwrap();
        some.merge_from(&all).unwrap();
        assert_eq!(all.read(&name, 0..1).unwrap(), [1.0]);
        assert_eq!(some.read(&name, 0..1).unwrap(), [2.0 / 3.0]);
    }
}
