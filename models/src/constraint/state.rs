//! A constraint while a completion grows.

use llguidance::Matcher;
use llguidance::api::StopReason;
use llguidance::toktrie::SimpleVob;

use crate::error::{Error, Result};

/// Tokens that may come next.
#[derive(Debug, Clone)]
pub struct AllowedTokens {
    tokens: SimpleVob,
    /// The completion may end here.
    may_end: bool,
}

impl AllowedTokens {
    /// Makes all other tokens impossible in `logits` `[vocabulary]`; of `end_tokens` those are possible that end a
    /// completion which may end.
    pub fn restrict(&self, logits: &mut [f32], end_tokens: &[u32]) {
        let ends: Vec<(u32, f32)> = end_tokens
            .iter()
            .filter(|_| self.may_end)
            .filter_map(|&token| Some((token, *logits.get(token as usize)?)))
            .collect();
        let words = self.tokens.as_slice();
        for (index, block) in logits.chunks_mut(32).enumerate() {
            match words.get(index).copied().unwrap_or(0) {
                u32::MAX => {}
                0 => block.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in block.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        for (token, logit) in ends {
            logits[token as usize] = logit;
        }
    }

    /// Whether the completion may end here.
    pub fn may_end(&self) -> bool {
        self.may_end
    }

    /// Whether `token` continues the completion.
    pub fn contains(&self, token: u32) -> bool {
        (token as usize) < self.tokens.len() && self.tokens.is_allowed(token)
    }
}

/// Follows a completion token by token. A clone follows another completion of the same request and shares what both have
/// worked out.
#[derive(Clone)]
pub struct Constraint {
    matcher: Matcher,
    allowed: AllowedTokens,
    complete: bool,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Constraint")
            .field("complete", &self.complete)
            .finish_non_exhaustive()
    }
}

impl Constraint {
    /// The constraint before the first of `vocabulary` tokens.
    pub(super) fn start(matcher: Matcher, vocabulary: usize) -> Result<Self> {
        let mut constraint = Self {
            matcher,
            allowed: AllowedTokens {
                tokens: SimpleVob::alloc(vocabulary),
                may_end: false,
            },
            complete: false,
        };
        constraint.find_allowed()?;
        match constraint.complete {
            true => Err(Error::InvalidArgument(
                "nothing but the empty text matches it".to_owned(),
            )),
            false => Ok(constraint),
        }
    }

    /// The tokens that may come next.
    pub fn allowed(&self) -> &AllowedTokens {
        &self.allowed
    }

    /// Whether the completion matches and nothing can be added to it: generation ends.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Adds a token, one of those allowed, to the completion, and finds the next ones.
    ///
    /// # Errors
    /// `FailedPrecondition` when the grammar needs more work at this place than a token may take, or when no token of the
    /// vocabulary goes on.
    pub fn push(&mut self, token: u32) -> Result<()> {
        self.matcher.consume_token(token).map_err(|error| stuck(&error))?;
        self.find_allowed()
    }

    fn find_allowed(&mut self) -> Result<()> {
        if self.matcher.stop_reason() == StopReason::NoExtension {
            self.complete = true;
            return Ok(());
        }
        let may_end = self.matcher.is_accepting().map_err(|error| stuck(&error))?;
        match self.matcher.compute_mask() {
            Ok(tokens) => self.allowed = AllowedTokens { tokens, may_end },
            // The grammar goes on, but the vocabulary does not.
            Err(_) if may_end && self.matcher.stop_reason() == StopReason::NoExtensionBias => self.complete = true,
            Err(_) if self.matcher.stop_reason() == StopReason::NoExtensionBias => {
                return Err(stuck(&"no token of the vocabulary goes on with it"));
            }
            Err(error) => return Err(stuck(&error)),
        }
        Ok(())
    }
}

fn stuck(error: &dyn std::fmt::Display) -> Error {
    let reason = error.to_string();
    let reason: String = reason
        .split("\n<")
        .next()
        .unwrap_or_default()
        .chars()
        .take(300)
        .collect();
    Error::FailedPrecondition(format!(
        "the completion cannot go on as the response_format demands: {reason}"
    ))
}
