//! Settings of AdamW.

use crate::decoder::ParameterRole;
use crate::error::{Error, Result};

/// Settings of one step of [`AdamW`](super::AdamW), named as in arXiv:1711.05101. The defaults are PyTorch's.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Step size. Default 1e-3. Finite, at least 0.
    pub learning_rate: f64,
    /// Decay of the first moment. Default 0.9. In [0, 1).
    pub beta1: f64,
    /// Decay of the second moment. Default 0.999. In [0, 1).
    pub beta2: f64,
    /// Added to the denominator. Default 1e-8. Finite, above 0.
    pub epsilon: f64,
    /// Decoupled weight decay, applied to the trainable parameters of the group that decays. Default 0.01. Finite, at
    /// least 0.
    pub weight_decay: f64,
    /// Whether weights of norms and biases belong to the group that decays. Default true, as PyTorch does it with one
    /// group; false leaves embeddings and matrices.
    pub decay_norms_and_biases: bool,
    /// A gradient whose Euclidean norm is larger is scaled down to it. Default: no clipping. Above 0.
    pub max_grad_norm: Option<f64>,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            decay_norms_and_biases: true,
            max_grad_norm: None,
        }
    }
}

impl AdamWOptions {
    /// Whether a parameter belongs to the group that decays.
    pub(super) fn decays(&self, role: ParameterRole) -> bool {
        self.decay_norms_and_biases || !matches!(role, ParameterRole::NormWeight | ParameterRole::Bias)
    }

    /// Refuses values out of range.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with the name of the setting, its value and its range.
    pub fn validate(&self) -> Result<()> {
        // As f32, in which the step computes.
        let finite_from_zero = |value: f64| (value as f32).is_finite() && value >= 0.0;
        let decay = |value: f64| (0.0..1.0).contains(&(value as f32)) && value >= 0.0;
        check(
            "learning_rate",
            self.learning_rate,
            "finite as f32 and at least 0",
            finite_from_zero,
        )?;
        check("beta1", self.beta1, "at least 0 and below 1 as f32", decay)?;
        check("beta2", self.beta2, "at least 0 and below 1 as f32", decay)?;
        check("epsilon", self.epsilon, "finite and above 0 as f32", |value| {
            (value as f32).is_finite() && (value as f32).is_normal() && value > 0.0
        })?;
        check(
            "weight_decay",
            self.weight_decay,
            "finite as f32 and at least 0",
            finite_from_zero,
        )?;
        let product = self.learning_rate * self.weight_decay;
        if !(product as f32).is_finite() {
            let message = format!("learning_rate times weight_decay is {product}; it must be finite as f32");
            return Err(Error::InvalidArgument(message));
        }
        if let Some(norm) = self.max_grad_norm {
            check("max_grad_norm", norm, "above 0", |value| value > 0.0)?;
        }
        Ok(())
    }
}

/// The error that says which setting has which value and which ones it may have.
fn check(name: &str, value: f64, range: &str, valid: impl Fn(f64) -> bool) -> Result<()> {
    if valid(value) {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!("{name} is {value}; it must be {range}")))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        AdamWOptions::default().validate().unwrap();
    }

    #[test]
    fn names_the_setting_and_the_value() {
        type Change = fn(&mut AdamWOptions);
        let cases: [(&str, Change); 12] = [
            ("learning_rate is NaN", |o| o.learning_rate = f64::NAN),
            ("learning_rate is -1", |o| o.learning_rate = -1.0),
            ("beta1 is 1", |o| o.beta1 = 1.0),
            ("beta2 is -0.5", |o| o.beta2 = -0.5),
            ("beta2 is 0.99999999999", |o| o.beta2 = 0.999_999_999_99),
            ("learning_rate is 1000", |o| o.learning_rate = 1e39),
            ("epsilon is 0.000", |o| o.epsilon = 1e-60),
            ("learning_rate times weight_decay", |o| {
                (o.learning_rate, o.weight_decay) = (1e30, 1e30)
            }),
            ("epsilon is 0", |o| o.epsilon = 0.0),
            ("weight_decay is inf", |o| o.weight_decay = f64::INFINITY),
            ("max_grad_norm is 0", |o| o.max_grad_norm = Some(0.0)),
            ("max_grad_norm is NaN", |o| o.max_grad_norm = Some(f64::NAN)),
        ];
        for (expected, change) in cases {
            let mut options = AdamWOptions::default();
            change(&mut options);
            let message = options.validate().unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
