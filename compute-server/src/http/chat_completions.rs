//! `POST /v1/chat/completions`.

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
use super::parameters::Parameters;
use crate::app::App;

const NO_TOOLS: &str = "this server calls no tools; describe them in a message";
const UNSUPPORTED: [(&str, &str); 12] = [
    ("audio", "the models write text"),
    ("function_call", NO_TOOLS),
    ("functions", NO_TOOLS),
    ("modalities", "the models write text"),
    ("moderation", "nothing is moderated"),
    ("parallel_tool_calls", NO_TOOLS),
    ("prediction", "the models generate every token themselves"),
    ("reasoning_effort", "the models have no setting for it"),
    ("tool_choice", NO_TOOLS),
    ("tools", NO_TOOLS),
    ("verbosity", "the models have no setting for it"),
    ("web_search_options", "the server reaches nothing outside of it"),
];
const UNSUPPORTED_IN_MESSAGES: [(&str, &str); 4] = [
    ("audio", "the models read text"),
    ("function_call", NO_TOOLS),
    ("tool_call_id", NO_TOOLS),
    ("tool_calls", NO_TOOLS),
];

/// Answers a conversation, as the model's own template renders it.
pub(super) async fn create(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = admission::caller(&request)?;
    let mut fields = body::read(&app, request).await?;
    let mut parameters = Parameters::take(&app, &mut fields)?;
    let messages = messages(fields.required("messages")?)?;
    let logprobs = logprobs(&mut fields)?;
    fields.finish(&UNSUPPORTED)?;
    parameters.request.top_logprobs = logprobs;
    parameters.request.stream_tokens |= logprobs.is_some();
    let request = v1::GenerateRequest {
        input: Some(Input::Messages(v1::ChatMessages { messages })),
        ..parameters.request.clone()
    };
    let choices = Choices::start(&app, &caller, vec![request], parameters.n).await?;
    Answer::<ChatCompletion>::new(choices, parameters, logprobs)
        .respond()
        .await
}

fn logprobs(fields: &mut Fields) -> Result<Option<i32>, ApiError> {
    let (wanted, count): (bool, Option<i32>) =
        (fields.take("logprobs")?.unwrap_or(false), fields.take("top_logprobs")?);
    match count {
        Some(_) if !wanted => Err(ApiError::invalid("'top_logprobs' needs 'logprobs': true").of("top_logprobs")),
        Some(count) if !(0..=20).contains(&count) => {
            Err(ApiError::invalid(format!("'top_logprobs' is {count}; it must be from 0 to 20")).of("top_logprobs"))
        }
        count => Ok(wanted.then(|| count.unwrap_or(0))),
    }
}

fn messages(given: Vec<Box<RawValue>>) -> Result<Vec<v1::ChatMessage>, ApiError> {
    if given.is_empty() {
        return Err(ApiError::invalid("'messages' is an empty list").of("messages"));
    }
    let read = |(index, json): (usize, Box<RawValue>)| {
        message(json.get()).map_err(|error| error.within(&format!("messages[{index}]")))
    };
    given.into_iter().enumerate().map(read).collect()
}

fn message(json: &str) -> Result<v1::ChatMessage, ApiError> {
    let mut fields = Fields::parse("a message", json.as_bytes())?;
    // Templates of models know no names of speakers.
    fields.ignore(&["name", "refusal"]);
    let role: String = fields.required("role")?;
    let content = fields.take_raw("content");
    fields.finish(&UNSUPPORTED_IN_MESSAGES)?;
    let content = content.ok_or_else(|| ApiError::invalid("a message needs 'content'").of("content"))?;
    let role = match role.as_str() {
        // The newer name of the same.
        "developer" => "system".to_owned(),
        "tool" | "function" => return Err(ApiError::invalid(format!("role '{role}': {NO_TOOLS}")).of("role")),
        "system" | "user" | "assistant" => role,
        other => {
            let reason = format!("role '{other}' is not one of system, developer, user, assistant");
            return Err(ApiError::invalid(reason).of("role"));
        }
    };
    Ok(v1::ChatMessage {
        role,
        content: text(content.get())?,
    })
}

/// A text, or parts that are texts.
fn text(json: &str) -> Result<String, ApiError> {
    if !json.starts_with('[') {
        return parse("content", json);
    }
    let parts: Vec<Box<RawValue>> = parse("content", json)?;
    let part = |(index, json): (usize, Box<RawValue>)| {
        let read = || {
            let mut fields = Fields::parse("a part of the content", json.get().as_bytes())?;
            let kind: String = fields.required("type")?;
            match kind.as_str() {
                "text" => {
                    let text = fields.required("text")?;
                    fields.finish(&[]).map(|()| text)
                }
                _ => {
                    let shown: String = kind.chars().take(40).collect();
                    Err(ApiError::invalid(format!(
                        "parts of type '{shown}' are not supported: the models read text"
                    ))
                    .of("type"))
                }
            }
        };
        read().map_err(|error: ApiError| error.within(&format!("content[{index}]")))
    };
    let texts: Vec<String> = parts.into_iter().enumerate().map(part).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

/// `chat.completion` and `chat.completion.chunk`.
pub(super) struct ChatCompletion;

impl Format for ChatCompletion {
    const PREFIX: &'static str = "chatcmpl";
    const OBJECT: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";

    fn opening(index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": "", "refusal": null});
        Some(json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null}))
    }

    fn piece(index: usize, text: &str, tokens: Option<&[Piece]>) -> Value {
        json!({"index": index, "delta": {"content": text}, "logprobs": tokens.map(describe), "finish_reason": null})
    }

    fn closing(index: usize, finish_reason: &str) -> Value {
        json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": finish_reason})
    }

    fn whole(index: usize, text: &str, tokens: Option<&[Piece]>, finish_reason: &str) -> Value {
        let message = json!({"role": "assistant", "content": text, "refusal": null});
        json!({"index": index, "message": message, "logprobs": tokens.map(describe), "finish_reason": finish_reason})
    }
}

fn describe(pieces: &[Piece]) -> Value {
    let entry = |text: &str, logprob: f32, bytes: &[u8]| json!({"token": text, "logprob": logprob, "bytes": bytes});
    let token = |piece: &Piece| {
        let mut described = entry(&piece.text(), piece.token.logprob, &piece.token.bytes);
        let others = piece.token.top_logprobs.iter();
        described["top_logprobs"] = others
            .map(|other| entry(&other.text, other.logprob, &other.bytes))
            .collect();
        described
    };
    json!({"content": pieces.iter().map(token).collect::<Vec<_>>(), "refusal": null})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Vec<v1::ChatMessage>, ApiError> {
        messages(serde_json::from_str(json).unwrap())
    }

    #[test]
    fn contents_are_texts_or_parts_of_text() {
        let messages = read(
            r#"[{"role": "developer", "content": "a", "name": "ann"},
                {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}]"#,
        )
        .unwrap();
        assert_eq!(
            (messages[0].role.as_str(), messages[0].content.as_str()),
            ("system", "a")
        );
        assert_eq!(messages[1].content, "b\nc");
    }

    #[test]
    fn refusals_name_where() {
        let cases = [
            (r#"[]"#, "messages"),
            (r#"[{"role": "user"}]"#, "messages[0].content"),
            (r#"[{"role": "user", "content": 1}]"#, "messages[0].content"),
            (
                r#"[{"role": "user", "content": "x"}, {"content": "x"}]"#,
                "messages[1].role",
            ),
            (r#"[{"role": "tool", "content": "x"}]"#, "messages[0].role"),
            (r#"[{"role": "nobody", "content": "x"}]"#, "messages[0].role"),
            (r#"[{"role": "assistant", "tool_calls": []}]"#, "messages[0].tool_calls"),
            (
                r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#,
                "messages[0].content[0].type",
            ),
            (r#"["x"]"#, "messages[0]"),
        ];
        for (json, param) in cases {
            assert_eq!(read(json).unwrap_err().to_json()["error"]["param"], param, "{json}");
        }
    }
}
