//! Checks of what several services take: token ids, lengths, a model's tokenizer.

use std::sync::Arc;

use candle_models::Tokenizer;

use crate::app::App;
use crate::error::{Error, Result};
use crate::owner::ModelHandle;

/// The tokenizer of a model.
///
/// # Errors
/// `Precondition` for a model without one.
pub(super) fn tokenizer(model: &ModelHandle) -> Result<Arc<Tokenizer>> {
    model.facts().tokenizer.clone().ok_or_else(|| Error::Precondition {
        message: format!(
            "model \"{}\" has no tokenizer, so it takes token ids only",
            model.name()
        ),
        hint: "Load a model with a tokenizer, or create it with \"tokenizer\" in its config.",
    })
}

/// Token ids below `vocabulary`.
///
/// # Errors
/// `InvalidArgument` naming the first other one.
pub(super) fn token_ids(ids: &[i64], vocabulary: usize) -> Result<Vec<u32>> {
    let check = |(index, &id): (usize, &i64)| {
        u32::try_from(id)
            .ok()
            .filter(|&token| (token as usize) < vocabulary)
            .ok_or_else(|| {
                Error::invalid(format!(
                    "token {index} is {id}; it must be from 0 to {}",
                    vocabulary.saturating_sub(1)
                ))
            })
    };
    ids.iter().enumerate().map(check).collect()
}

/// Checks the length of a sequence that is read at once.
///
/// # Errors
/// `InvalidArgument` for none or more than the context holds, `Limit` for more than a request may have.
pub(super) fn check_sequence(app: &App, model: &ModelHandle, tokens: &[u32]) -> Result<()> {
    let context = model.facts().decoder_config.context_length;
    match tokens.len() {
        0 => Err(Error::invalid("there are no tokens; at least one is needed")),
        count if count > context => Err(Error::invalid(format!(
            "{count} tokens are more than the context of {context}; shorten the input"
        ))),
        count => app.check_request_tokens(count as u64),
    }
}
