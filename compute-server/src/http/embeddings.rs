//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use candle_compute_proto::v1;
use candle_compute_proto::v1::embed_input::Input;
use serde::Serialize;

use super::error::ApiError;
use super::inputs::{self, TextOrTokens};
use super::{admission, body, model_names};
use crate::app::App;
use crate::services::embed;

const UNSUPPORTED: [(&str, &str); 1] = [("dimensions", "the vectors are as long as the model is wide")];

/// Vectors of the inputs, in their order.
#[derive(Debug, Serialize)]
pub(super) struct Embeddings {
    object: &'static str,
    data: Vec<Embedding>,
    model: String,
    usage: Usage,
}

#[derive(Debug, Serialize)]
struct Embedding {
    object: &'static str,
    index: u32,
    embedding: Vector,
}

/// Numbers, or their little-endian bytes.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Default, Serialize)]
struct Usage {
    prompt_tokens: u64,
    total_tokens: u64,
}

/// Embeds one input or several.
pub(super) async fn create(State(app): State<Arc<App>>, request: Request) -> Result<Json<Embeddings>, ApiError> {
    let caller = admission::caller(&request)?;
    let mut fields = body::read(&app, request).await?;
    fields.ignore(&["user"]);
    let model: String = fields.required("model")?;
    let inputs = inputs::take(&mut fields, "input")?;
    let encode = encoding(fields.take("encoding_format")?)?;
    let (pooling, normalize): (Option<String>, Option<bool>) = (fields.take("pooling")?, fields.take("normalize")?);
    fields.finish(&UNSUPPORTED)?;
    let key = model_names::resolve(&app, &model);
    let count = inputs.len();
    let request = v1::EmbedRequest {
        transaction: None,
        model: key.model,
        inputs: inputs.into_iter().map(input).collect(),
        pooling: pooling.unwrap_or_default(),
        normalize,
        adapter: key.adapter.unwrap_or_default(),
    };
    let mut stream = embed::start(&app, &caller, request).await?;
    let mut data = Vec::with_capacity(count);
    let mut usage = Usage::default();
    while let Some(message) = std::future::poll_fn(|context| stream.poll_message(context)).await {
        for embedding in message?.embeddings {
            usage.prompt_tokens += u64::from(embedding.tokens);
            data.push(Embedding {
                object: "embedding",
                index: embedding.index,
                embedding: encode(&embedding.values),
            });
        }
    }
    // They come as they are ready.
    data.sort_by_key(|embedding| embedding.index);
    usage.total_tokens = usage.prompt_tokens;
    Ok(Json(Embeddings {
        object: "list",
        data,
        model,
        usage,
    }))
}

fn input(given: TextOrTokens) -> v1::EmbedInput {
    v1::EmbedInput {
        input: Some(match given {
            TextOrTokens::Text(text) => Input::Text(text),
            TextOrTokens::Tokens(ids) => Input::Tokens(v1::TokenIds { ids }),
        }),
    }
}

/// How the bytes of a vector, f32 and little-endian, are written.
fn encoding(name: Option<String>) -> Result<fn(&[u8]) -> Vector, ApiError> {
    match name.as_deref().unwrap_or("float") {
        "float" => Ok(|bytes| {
            let numbers = bytes.as_chunks::<4>().0.iter();
            Vector::Float(numbers.map(|number| f32::from_le_bytes(*number)).collect())
        }),
        "base64" => Ok(|bytes| Vector::Base64(STANDARD.encode(bytes))),
        other => {
            let shown: String = other.chars().take(40).collect();
            let message = format!("'encoding_format' is \"{shown}\"; it must be float or base64");
            Err(ApiError::invalid(message).of("encoding_format"))
        }
    }
}
