//! The settings of a sampler.

use crate::error::{Error, Result};

/// Most tokens with a bias of their own.
pub const MAX_LOGIT_BIAS: usize = 4096;

/// Most tokens that are reported beside the chosen one.
pub const MAX_TOP_LOGPROBS: i64 = 20;

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
    /// Subtracted from a token's logit once for each time that the sampler chose it. From -2 to 2.
    pub frequency_penalty: f32,
    /// Subtracted from the logits of tokens that the sampler chose before. From -2 to 2.
    pub presence_penalty: f32,
    /// Tokens and what is added to their logits, from -100 to 100; at most [`MAX_LOGIT_BIAS`].
    pub logit_bias: Vec<(u32, f32)>,
    /// Most likely tokens to report with each chosen one, from 0 to [`MAX_TOP_LOGPROBS`].
    pub top_logprobs: i64,
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
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            top_logprobs: 0,
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
        let penalties = [
            ("frequency_penalty", self.frequency_penalty),
            ("presence_penalty", self.presence_penalty),
        ];
        for (field, penalty) in penalties {
            if !(-2.0..=2.0).contains(&penalty) {
                return refuse(field, &penalty, "from -2 to 2");
            }
        }
        if self.logit_bias.len() > MAX_LOGIT_BIAS {
            let count = format!("of {} tokens", self.logit_bias.len());
            return refuse("logit_bias", &count, &format!("of at most {MAX_LOGIT_BIAS}"));
        }
        if let Some((token, bias)) = self
            .logit_bias
            .iter()
            .find(|(_, bias)| !(-100.0..=100.0).contains(bias))
        {
            return refuse(&format!("logit_bias of token {token}"), bias, "from -100 to 100");
        }
        if !(0..=MAX_TOP_LOGPROBS).contains(&self.top_logprobs) {
            let allowed = format!("from 0 to {MAX_TOP_LOGPROBS}");
            return refuse("top_logprobs", &self.top_logprobs, &allowed);
        }
        Ok(())
    }

    /// Checks that tokens named by the options are below `vocabulary`.
    ///
    /// # Errors
    /// `InvalidArgument` naming the token.
    pub fn validate_for(&self, vocabulary: usize) -> Result<()> {
        match self.logit_bias.iter().find(|&&(token, _)| token as usize >= vocabulary) {
            None => Ok(()),
            Some((token, _)) => Err(Error::InvalidArgument(format!(
                "logit_bias has the token {token}, but the model's tokens are from 0 to {}",
                vocabulary.saturating_sub(1)
            ))),
        }
    }
}
