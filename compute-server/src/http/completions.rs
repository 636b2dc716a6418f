//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use candle_compute_proto::v1;
use candle_compute_proto::v1::generate_request::Input;
use serde_json::{Value, json};

use super::admission;
use super::answer::{Answer, Format, Piece};
use super::body;
use super::choices::Choices;
use super::error::ApiError;
use super::fields::Fields;
use super::inputs::{self, TextOrTokens};
use super::parameters::{MAX_CHOICES, Parameters};
use crate::app::App;

const UNSUPPORTED: [(&str, &str); 4] = [
    ("best_of", "choose among n completions by their logprobs"),
    (
        "echo",
        "put the prompt before the completion yourself; table token_scores has its logprobs",
    ),
    ("suffix", "the models continue text at its end"),
    ("tools", "describe them in the prompt"),
];
/// Most alternatives of each token.
const MAX_LOGPROBS: i32 = 20;

/// Continues one prompt or several.
pub(super) async fn create(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = admission::caller(&request)?;
    let mut fields = body::read(&app, request).await?;
    let mut parameters = Parameters::take(&app, &mut fields)?;
    let prompts = inputs::take(&mut fields, "prompt")?;
    if prompts.len() * parameters.n > MAX_CHOICES {
        let (prompts, n) = (prompts.len(), parameters.n);
        let message = format!("{prompts} prompts with n = {n} are more than {MAX_CHOICES} completions");
        return Err(ApiError::invalid(message).of("prompt"));
    }
    let logprobs = logprobs(&mut fields)?;
    take_defaults(&mut fields, &parameters)?;
    fields.finish(&UNSUPPORTED)?;
    parameters.request.top_logprobs = logprobs;
    parameters.request.stream_tokens |= logprobs.is_some();
    let request = |prompt| v1::GenerateRequest {
        input: Some(match prompt {
            TextOrTokens::Text(text) => Input::Prompt(text),
            TextOrTokens::Tokens(ids) => Input::Tokens(v1::TokenIds { ids }),
        }),
        ..parameters.request.clone()
    };
    let choices = Choices::start(&app, &caller, prompts.into_iter().map(request).collect(), parameters.n).await?;
    Answer::<Completion>::new(choices, parameters, logprobs).respond().await
}

fn logprobs(fields: &mut Fields) -> Result<Option<i32>, ApiError> {
    let asked: Option<i32> = fields.take("logprobs")?;
    match asked {
        Some(count) if !(0..=MAX_LOGPROBS).contains(&count) => {
            Err(ApiError::invalid(format!("'logprobs' is {count}; it must be from 0 to {MAX_LOGPROBS}")).of("logprobs"))
        }
        asked => Ok(asked),
    }
}

/// Takes parameters that are not supported, but may say what happens anyway.
fn take_defaults(fields: &mut Fields, parameters: &Parameters) -> Result<(), ApiError> {
    let refuse = |name: &str| {
        let reason = UNSUPPORTED
            .iter()
            .find(|(known, _)| *known == name)
            .map_or("", |(_, reason)| reason);
        Err(ApiError::invalid(format!("'{name}' is not supported: {reason}")).of(name))
    };
    if fields.take::<bool>("echo")?.unwrap_or(false) {
        return refuse("echo");
    }
    if fields
        .take::<usize>("best_of")?
        .is_some_and(|best_of| best_of != parameters.n)
    {
        return refuse("best_of");
    }
    if fields
        .take::<String>("suffix")?
        .is_some_and(|suffix| !suffix.is_empty())
    {
        return refuse("suffix");
    }
    Ok(())
}

/// `text_completion`.
pub(super) struct Completion;

impl Format for Completion {
    const PREFIX: &'static str = "cmpl";
    const OBJECT: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";

    fn opening(_index: usize) -> Option<Value> {
        None
    }

    fn piece(index: usize, text: &str, tokens: Option<&[Piece]>) -> Value {
        json!({"index": index, "text": text, "logprobs": tokens.map(describe), "finish_reason": null})
    }

    fn closing(index: usize, finish_reason: &str) -> Value {
        json!({"index": index, "text": "", "logprobs": null, "finish_reason": finish_reason})
    }

    fn whole(index: usize, text: &str, tokens: Option<&[Piece]>, finish_reason: &str) -> Value {
        json!({"index": index, "text": text, "logprobs": tokens.map(describe), "finish_reason": finish_reason})
    }
}

fn describe(pieces: &[Piece]) -> Value {
    let list = |value: fn(&Piece) -> Value| pieces.iter().map(value).collect::<Vec<_>>();
    json!({
        "tokens": list(|piece| piece.text().into()),
        "token_logprobs": list(|piece| json!(piece.token.logprob)),
        "top_logprobs": list(|piece| {
            let alternatives = piece.token.top_logprobs.iter();
            // Two tokens may look the same; the more likely one is first, and stays.
            let mut object = serde_json::Map::new();
            for other in alternatives {
                object.entry(other.text.clone()).or_insert_with(|| json!(other.logprob));
            }
            Value::Object(object)
        }),
        "text_offset": list(|piece| json!(piece.offset)),
    })
}
