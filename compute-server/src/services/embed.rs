//! Starting an embedding: the one way, for gRPC (and SQL over it) and for HTTP.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_compute_proto::v1::embed_input::Input;
use candle_models::Pooling;

use super::inputs::{check_sequence, token_ids, tokenizer};
use super::tokenizing::tokenizing;
use crate::access::Caller;
use crate::app::App;
use crate::error::{Error, Result};
use crate::owner::{EmbeddingRequest, ModelHandle, OutputStream, Step, keep_place};
use crate::transactions::Reader;

/// Most inputs of one request.
const MAX_INPUTS: usize = 2048;

/// Vectors as they are ready. Dropping it ends the work.
pub(crate) type EmbedStream = OutputStream<v1::EmbedResponse, v1::EmbedResponse>;

/// Checks a request and queues its inputs at its model.
///
/// # Errors
/// `InvalidArgument` for a bad value, `NotFound` for a model that does not exist, `Precondition` for texts to a model
/// without a tokenizer, `Limit` when the queue is full or the request too long.
pub(crate) async fn start(app: &Arc<App>, caller: &Caller, request: v1::EmbedRequest) -> Result<EmbedStream> {
    let reader = Reader::open(app, request.transaction.as_ref())?;
    let model = reader.find(&request.model, &request.adapter)?;
    let pooling = Pooling::from_name(&request.pooling)?;
    let count = request.inputs.len();
    if !(1..=MAX_INPUTS).contains(&count) {
        return Err(Error::invalid(format!(
            "there are {count} inputs; a request takes from 1 to {MAX_INPUTS}"
        )));
    }
    let inputs = tokenize(app, &model, request.inputs).await?;
    let tokens: usize = inputs.iter().map(Vec::len).sum();
    app.check_request_tokens(tokens as u64)?;
    caller.tenant.admit_tokens(tokens)?;
    let mut left = count;
    let (output, stream) = OutputStream::channel(&model, move |message: v1::EmbedResponse| {
        left -= message.embeddings.len();
        match left {
            0 => Step::Last(message),
            _ => Step::Next(message),
        }
    });
    let guard = app.requests.begin(caller, "embed", model.name())?;
    keep_place(&guard, &output);
    let embedding = EmbeddingRequest {
        view: reader.view(),
        inputs,
        pooling,
        normalize: request.normalize.unwrap_or(true),
        request: guard,
        caller: caller.clone(),
        output,
    };
    model.call(move |owner| owner.submit_embedding(embedding)).await?;
    Ok(stream)
}

/// The tokens of all inputs, each a sequence that the model can read.
async fn tokenize(app: &Arc<App>, model: &ModelHandle, inputs: Vec<v1::EmbedInput>) -> Result<Vec<Vec<u32>>> {
    let (app, model) = (Arc::clone(app), model.clone());
    let bytes = inputs.iter().map(prost::Message::encoded_len).sum();
    let tokenized = tokenizing(bytes, move || {
        let ids = |input: v1::EmbedInput| match input.input {
            Some(Input::Text(text)) => Ok(tokenizer(&model)?.encode(&text)?),
            Some(Input::Tokens(ids)) => token_ids(&ids.ids, model.facts().decoder_config.vocabulary),
            None => Err(Error::invalid("text or tokens is required")),
        };
        let checked = |(index, input)| {
            let ids = ids(input)?;
            match check_sequence(&app, &model, &ids) {
                Ok(()) => Ok(ids),
                Err(Error::InvalidArgument(reason)) => Err(Error::invalid(format!("input {index}: {reason}"))),
                Err(error) => Err(error),
            }
        };
        inputs.into_iter().enumerate().map(checked).collect()
    });
    tokenized.await
}
