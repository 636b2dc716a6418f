//! The inputs that `generations` and `generation_tokens` share, and the request that they make of them.

use std::collections::HashMap;

use candle_compute_proto::v1::generate_request::Input;
use candle_compute_proto::v1::{ChatMessage, ChatMessages, GenerateRequest, SamplingOptions};
use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::relation::{Call, Column, Inputs, input};
use crate::relations::adapters;
use crate::values::Kind;

/// Of each group one has to be given.
pub(super) const REQUIRED: &[&[&str]] = &[&["model"], &["prompt", "messages"]];

/// Number of input columns.
pub(super) const INPUTS: usize = 17;

/// The input columns, the first columns of both tables.
pub(super) const COLUMNS: [Column; INPUTS] = [
    input("model", Kind::Text),
    input("prompt", Kind::Text),
    input("messages", Kind::Jsonb),
    input("max_tokens", Kind::Int),
    input("temperature", Kind::Real),
    input("top_k", Kind::Int),
    input("top_p", Kind::Real),
    input("min_p", Kind::Real),
    input("repetition_penalty", Kind::Real),
    input("seed", Kind::BigInt),
    input("stop", Kind::TextArray),
    input("adapter", Kind::Text),
    input("frequency_penalty", Kind::Real),
    input("presence_penalty", Kind::Real),
    input("logit_bias", Kind::Jsonb),
    input("response_format", Kind::Jsonb),
    input("n", Kind::Int),
];

/// The request for one set of inputs.
pub(super) fn request(call: &Call, stream_tokens: bool) -> Result<GenerateRequest> {
    let inputs = &call.inputs;
    Ok(GenerateRequest {
        transaction: call.transaction.clone(),
        model: inputs.required("model")?,
        input: Some(continue_what(inputs)?),
        max_tokens: inputs.integer("max_tokens"),
        sampling: Some(SamplingOptions {
            temperature: inputs.real("temperature"),
            top_k: small(inputs, "top_k")?,
            top_p: inputs.real("top_p"),
            min_p: inputs.real("min_p"),
            repetition_penalty: inputs.real("repetition_penalty"),
            seed: inputs.integer("seed"),
            frequency_penalty: inputs.real("frequency_penalty"),
            presence_penalty: inputs.real("presence_penalty"),
            logit_bias: logit_bias(inputs.text("logit_bias").as_deref())?,
        }),
        stop: inputs.texts("stop"),
        stream_tokens,
        n: small(inputs, "n")?,
        top_logprobs: small(inputs, "logprobs")?,
        response_format_json: inputs.text("response_format").unwrap_or_default(),
        ignore_cache: false,
        adapter: adapters::named(inputs)?,
    })
}

fn small(inputs: &Inputs, name: &str) -> Result<Option<i32>> {
    let Some(value) = inputs.integer(name) else {
        return Ok(None);
    };
    i32::try_from(value)
        .map(Some)
        .map_err(|_| Error::bad_value(format!("{name} must be a 32-bit number, not {value}")))
}

/// Parses `{"token id": bias, …}`.
pub(crate) fn logit_bias(text: Option<&str>) -> Result<HashMap<i64, f32>> {
    let Some(text) = text else { return Ok(HashMap::new()) };
    let wrong = |what: String| Error::bad_value(what).hint(r#"For example '{"1234": -100, "42": 2.5}'."#);
    let parsed: Json = serde_json::from_str(text).unwrap_or_default();
    let object = parsed
        .as_object()
        .ok_or_else(|| wrong("logit_bias must be a JSON object from token ids to numbers".into()))?;
    let entry = |(token, bias): (&String, &Json)| {
        let id = token
            .parse()
            .map_err(|_| wrong(format!("logit_bias has the key \"{token}\", which is no token id")))?;
        let bias = bias.as_f64().ok_or_else(|| {
            wrong(format!(
                "logit_bias of token {token} must be a number, not {}",
                kind_of(bias)
            ))
        })?;
        Ok((id, bias as f32))
    };
    object.iter().map(entry).collect()
}

fn continue_what(inputs: &Inputs) -> Result<Input> {
    match (inputs.text("prompt"), inputs.text("messages")) {
        (Some(prompt), None) => Ok(Input::Prompt(prompt)),
        (None, Some(messages)) => Ok(Input::Messages(parse_messages(&messages)?)),
        _ => Err(Error::bad_value("give either prompt or messages, not both")),
    }
}

/// Parses `[{"role": "user", "content": "…"}, …]`.
fn parse_messages(text: &str) -> Result<ChatMessages> {
    let wrong = |what: String| Error::bad_value(what).hint(r#"For example '[{"role": "user", "content": "Hello"}]'."#);
    let no_list = || wrong("messages must be a JSON array of objects with the texts \"role\" and \"content\"".into());
    let parsed: Json = serde_json::from_str(text).map_err(|_| no_list())?;
    let list = parsed.as_array().ok_or_else(no_list)?;
    if list.is_empty() {
        return Err(wrong(
            "messages is an empty array; at least one message is needed".into(),
        ));
    }
    let messages = list.iter().enumerate().map(|(index, message)| {
        let object = message
            .as_object()
            .ok_or_else(|| wrong(format!("messages[{index}] must be an object, not {}", kind_of(message))))?;
        if let Some(unknown) = object.keys().find(|key| !matches!(key.as_str(), "role" | "content")) {
            return Err(wrong(format!(
                "messages[{index}] has the unknown field \"{unknown}\"; its fields are \"role\" and \"content\""
            )));
        }
        let field = |name: &str| match object.get(name) {
            Some(Json::String(text)) => Ok(text.clone()),
            Some(other) => Err(wrong(format!(
                "\"{name}\" of messages[{index}] must be a text, not {}",
                kind_of(other)
            ))),
            None => Err(wrong(format!("messages[{index}] has no \"{name}\""))),
        };
        Ok(ChatMessage {
            role: field("role")?,
            content: field("content")?,
        })
    });
    Ok(ChatMessages {
        messages: messages.collect::<Result<_>>()?,
    })
}

fn kind_of(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a text",
        Json::Array(_) => "an array",
        Json::Object(_) => "an object",
    }
}
