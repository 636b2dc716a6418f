//! The settings of a sampler.

use crate::error::{Error, Result};

/// How the next token is chosen. The defaults are greedy decoding without a repetition penalty.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 is greedy. At least 0.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: i64,
    /// Keep the smallest set of tokens whose probabilities reach this sum. In (0, 1].
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one. In [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen before (CTRL, arXiv:1909.05858). Above 0.
    pub repetition_penalty: f32,
    /// Seed of the random draws.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplingOptions {
    /// Checks every field.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and its value.
    pub fn validate(&self) -> Result<()> {
        let refuse = |field: &str, value: &dyn std::fmt::Display, allowed: &str| {
            Err(Error::InvalidArgument(format!(
                "{field} is {value}, but must be {allowed}"
            )))
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return refuse("temperature", &self.temperature, "a number of at least 0; 0 is greedy");
        }
        if self.top_k < 0 {
            return refuse("top_k", &self.top_k, "at least 0; 0 keeps all tokens");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", &self.top_p, "above 0 and at most 1");
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return refuse("min_p", &self.min_p, "between 0 and 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return refuse("repetition_penalty", &self.repetition_penalty, "a number above 0");
        }
        Ok(())
    }
}
