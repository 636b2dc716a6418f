//! Many texts at a time through a tokenizer, away from the threads that serve calls.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::Tokenizer;
use candle_models::tokenizer::Documents;

use super::inputs::{token_ids, tokenizer};
use super::tokenizing::tokenizing;
use crate::error::{Error, Result};
use crate::owner::ModelHandle;

/// Texts to documents.
///
/// # Errors
/// Those of the tokenizer; `Precondition` for a model without one.
pub(super) async fn tokenize(
    model: &ModelHandle,
    texts: Vec<String>,
    with_ends: bool,
) -> Result<v1::TokenizeTextsResponse> {
    let bytes = texts.iter().map(String::len).sum();
    let texts = with_documents(model, bytes, move |_, documents| {
        let tokenize = |text: &String| {
            let made = documents.document(text)?;
            Ok(v1::TokenizedText {
                token_ids: made.tokens,
                ends: if with_ends { made.ends } else { Vec::new() },
                exact: with_ends && made.exact,
            })
        };
        texts.iter().map(tokenize).collect()
    });
    Ok(v1::TokenizeTextsResponse { texts: texts.await? })
}

/// Documents to texts.
///
/// # Errors
/// `InvalidArgument` for a token id outside the vocabulary; `Precondition` for a model without a tokenizer.
pub(super) async fn detokenize(model: &ModelHandle, lists: Vec<v1::TokenIds>) -> Result<v1::DetokenizeTextsResponse> {
    let bytes = lists.iter().map(prost::Message::encoded_len).sum();
    let texts = with_documents(model, bytes, move |tokenizer, documents| {
        let detokenize = |(index, list): (usize, &v1::TokenIds)| {
            let ids = token_ids(&list.ids, tokenizer.vocabulary_size())
                .map_err(|error| Error::invalid(format!("document {index}: {error}")))?;
            let made = documents.text(&ids)?;
            Ok(v1::DetokenizedText {
                text: made.text,
                ends: made.ends,
                exact: made.exact,
            })
        };
        lists.iter().enumerate().map(detokenize).collect()
    });
    Ok(v1::DetokenizeTextsResponse { texts: texts.await? })
}

async fn with_documents<T: Send + 'static>(
    model: &ModelHandle,
    bytes: usize,
    work: impl FnOnce(&Tokenizer, &Documents<'_>) -> Result<T> + Send + 'static,
) -> Result<T> {
    let tokenizer: Arc<Tokenizer> = tokenizer(model)?;
    let end_tokens = model.facts().end_tokens.clone();
    tokenizing(bytes, move || {
        let documents = Documents::new(&tokenizer, &end_tokens)?;
        work(&tokenizer, &documents)
    })
    .await
}
