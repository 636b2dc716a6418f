//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use candle_compute_proto::v1;
use candle_compute_proto::v1::generate_request::Input;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::admission;
use super::answer::{Answer, Format, Piece};
use super::body;
use super::choices::Choices;
use super::error::ApiError;
use super::fields::{Fields, parse};
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
    let prompt: Box<RawValue> = fields
        .take_raw("prompt")
        .ok_or_else(|| ApiError::invalid("you must provide 'prompt'").of("prompt"))?;
    let prompts = prompts(prompt.get())?;
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
    let request = |input| v1::GenerateRequest {
        input: Some(input),
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

/// A text, texts, token ids, or lists of token ids.
fn prompts(json: &str) -> Result<Vec<Input>, ApiError> {
    let (text, ids) = (Input::Prompt, |ids| Input::Tokens(v1::TokenIds { ids }));
    let Some(list) = json.strip_prefix('[') else {
        return Ok(vec![text(parse("prompt", json)?)]);
    };
    match list.trim_start().as_bytes().first() {
        Some(b'"') => Ok(parse::<Vec<String>>("prompt", json)?.into_iter().map(text).collect()),
        Some(b'[') => Ok(parse::<Vec<Vec<i64>>>("prompt", json)?.into_iter().map(ids).collect()),
        Some(b']') => Err(ApiError::invalid("'prompt' is an empty list").of("prompt")),
        _ => Ok(vec![ids(parse("prompt", json)?)]),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_texts_or_tokens_alone_or_in_lists() {
        let text = |text: &str| Input::Prompt(text.to_owned());
        let ids = |ids: &[i64]| Input::Tokens(v1::TokenIds { ids: ids.to_vec() });
        let read = |json: &str| prompts(json).unwrap();
        assert_eq!(read("\"a\""), [text("a")]);
        assert_eq!(read("[ \"a\", \"b\"]"), [text("a"), text("b")]);
        assert_eq!(read("[1, 2]"), [ids(&[1, 2])]);
        assert_eq!(read("[[1], [2, 3]]"), [ids(&[1]), ids(&[2, 3])]);
        for refused in ["1", "{}", "[]", "[1, \"a\"]", "[null]", "true"] {
            assert_eq!(
                prompts(refused).unwrap_err().to_json()["error"]["param"],
                "prompt",
                "{refused}"
            );
        }
    }
}
