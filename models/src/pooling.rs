//! From the hidden states of a sequence's tokens to one vector that stands for it.

use crate::error::{Error, Result};

/// How the states of the tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// That of the last token, which in a causal model is the only one that has seen all others.
    Last,
    /// That of the first token, for models trained with a token of classification there.
    Cls,
}

impl Pooling {
    /// Reads `mean`, `last` or `cls`; the empty name is `mean`.
    ///
    /// # Errors
    /// `InvalidArgument` for another name.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "" | "mean" => Ok(Self::Mean),
            "last" => Ok(Self::Last),
            "cls" => Ok(Self::Cls),
            other => {
                let shown: String = other.chars().take(40).collect();
                Err(Error::InvalidArgument(format!(
                    "pooling is {shown:?}; it must be mean, last or cls"
                )))
            }
        }
    }
}

/// A vector that grows with the states of one sequence, block after block.
#[derive(Debug, Clone)]
pub struct Pooled {
    pooling: Pooling,
    /// Sum of the states, or the one that was chosen; `[width]`.
    values: Vec<f64>,
    tokens: usize,
}

impl Pooled {
    /// Nothing yet of a sequence whose states have `width` elements.
    pub fn new(pooling: Pooling, width: usize) -> Self {
        Self {
            pooling,
            values: vec![0.0; width],
            tokens: 0,
        }
    }

    /// Adds the states of the next tokens, `[tokens, width]`, row-major.
    pub fn add(&mut self, states: &[f32]) {
        let width = self.values.len().max(1);
        for state in states.chunks_exact(width) {
            let takes = match self.pooling {
                Pooling::Mean => {
                    self.values
                        .iter_mut()
                        .zip(state)
                        .for_each(|(sum, &value)| *sum += f64::from(value));
                    false
                }
                Pooling::Last => true,
                Pooling::Cls => self.tokens == 0,
            };
            if takes {
                self.values
                    .iter_mut()
                    .zip(state)
                    .for_each(|(kept, &value)| *kept = f64::from(value));
            }
            self.tokens += 1;
        }
    }

    /// The vector `[width]`; scaled to the Euclidean length 1 if `normalize` is set and it has a length.
    ///
    /// # Errors
    /// `FailedPrecondition` if an element is not finite: the model's weights are broken.
    pub fn finish(mut self, normalize: bool) -> Result<Vec<f32>> {
        let mut divisor = match self.pooling {
            Pooling::Mean => self.tokens.max(1) as f64,
            Pooling::Last | Pooling::Cls => 1.0,
        };
        if normalize {
            let length = self.values.iter().map(|value| value * value).sum::<f64>().sqrt();
            divisor = if length > 0.0 { length } else { 1.0 };
        }
        self.values.iter_mut().for_each(|value| *value /= divisor);
        match self.values.iter().all(|value| value.is_finite()) {
            true => Ok(self.values.into_iter().map(|value| value as f32).collect()),
            false => Err(Error::FailedPrecondition(
                "the model's hidden states are not finite: its weights are damaged or training has diverged; restore a \
                 checkpoint"
                    .to_owned(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [f32; 6] = [3.0, 4.0, 1.0, 0.0, -1.0, 2.0];

    fn pooled(pooling: Pooling, normalize: bool) -> Vec<f32> {
        let mut pooled = Pooled::new(pooling, 2);
        pooled.add(&STATES[..2]);
        pooled.add(&STATES[2..]);
        pooled.finish(normalize).unwrap()
    }

    #[test]
    fn each_pooling_over_blocks() {
        assert_eq!(pooled(Pooling::Mean, false), [1.0, 2.0]);
        assert_eq!(pooled(Pooling::Last, false), [-1.0, 2.0]);
        assert_eq!(pooled(Pooling::Cls, false), [3.0, 4.0]);
        assert_eq!(pooled(Pooling::Cls, true), [0.6, 0.8]);
    }

    #[test]
    fn zero_stays_zero_and_broken_states_are_an_error() {
        assert_eq!(Pooled::new(Pooling::Mean, 2).finish(true).unwrap(), [0.0, 0.0]);
        let mut broken = Pooled::new(Pooling::Mean, 2);
        broken.add(&[f32::NAN, 1.0]);
        assert!(matches!(broken.finish(true), Err(Error::FailedPrecondition(_))));
        assert!(Pooling::from_name("max").is_err());
    }
}
