//! One training sequence, checked at the border.

use crate::config::DecoderConfig;
use crate::error::{Error, Result};

/// A target that contributes neither to the loss nor to the gradient.
pub const IGNORED_TARGET: i64 = -100;

/// Tokens with the token to be predicted at each; valid for the model whose configuration made it.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingSequence {
    tokens: Vec<u32>,
    targets: Vec<Option<u32>>,
    loss_weight: f32,
}

impl TrainingSequence {
    /// Checks a sequence against a model.
    ///
    /// * `tokens`: 1 to `config.context_length` token ids.
    /// * `targets`: for each token the id to be predicted, or [`IGNORED_TARGET`]; by default the next token, and none
    ///   for the last.
    /// * `loss_weight`: factor on the loss of this sequence in the gradient, by default 1; finite, at least 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that names the first offending index and value.
    pub fn new(
        tokens: &[i64],
        targets: Option<&[i64]>,
        loss_weight: Option<f32>,
        config: &DecoderConfig,
    ) -> Result<Self> {
        if tokens.is_empty() {
            return invalid("tokens is empty; a training sequence needs at least one token".into());
        }
        if tokens.len() > config.context_length {
            return invalid(format!(
                "tokens has {} elements, more than the context length {} of the model; split the sequence",
                tokens.len(),
                config.context_length
            ));
        }
        let loss_weight = loss_weight.unwrap_or(1.0);
        if !(loss_weight.is_finite() && loss_weight >= 0.0) {
            return invalid(format!(
                "loss_weight is {loss_weight}; it must be finite and at least 0"
            ));
        }
        let vocabulary = config.vocabulary;
        let tokens = tokens
            .iter()
            .enumerate()
            .map(|(index, &id)| token_id("tokens", index, id, vocabulary, ""))
            .collect::<Result<Vec<u32>>>()?;
        let targets = match targets {
            None => tokens[1..].iter().copied().map(Some).chain([None]).collect(),
            Some(targets) => explicit_targets(targets, tokens.len(), vocabulary)?,
        };
        Ok(Self {
            tokens,
            targets,
            loss_weight,
        })
    }

    /// The token ids.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// For each token the id to be predicted; `None` where nothing is.
    #[must_use]
    pub fn targets(&self) -> &[Option<u32>] {
        &self.targets
    }

    /// Factor on the loss of this sequence in the gradient.
    #[must_use]
    pub fn loss_weight(&self) -> f32 {
        self.loss_weight
    }

    /// Number of tokens that have a target.
    #[must_use]
    pub fn target_count(&self) -> u32 {
        // The context length of no model comes near the limit.
        u32::try_from(self.targets.iter().flatten().count()).unwrap_or(u32::MAX)
    }
}

/// Checks targets that the caller gave.
fn explicit_targets(targets: &[i64], tokens: usize, vocabulary: usize) -> Result<Vec<Option<u32>>> {
    if targets.len() != tokens {
        return invalid(format!(
            "targets has {} elements but tokens has {tokens}; give one target a token",
            targets.len()
        ));
    }
    targets
        .iter()
        .enumerate()
        .map(|(index, &id)| {
            if id == IGNORED_TARGET {
                return Ok(None);
            }
            token_id("targets", index, id, vocabulary, ", or -100 to ignore it").map(Some)
        })
        .collect()
}

/// The token id, or an error that names its place and the range.
fn token_id(list: &str, index: usize, id: i64, vocabulary: usize, also: &str) -> Result<u32> {
    match u32::try_from(id) {
        Ok(token) if (token as usize) < vocabulary => Ok(token),
        _ => invalid(format!(
            "{list}[{index}] is {id}; it must be from 0 to {}{also}",
            vocabulary.saturating_sub(1)
        )),
    }
}

fn invalid<T>(message: String) -> Result<T> {
    Err(Error::InvalidArgument(message))
}
