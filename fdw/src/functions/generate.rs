//! `candle.generate`.
#![allow(unsafe_code)]

use candle_compute_proto::v1::generate_request::Input;
use candle_compute_proto::v1::{GenerateRequest, SamplingOptions};
use pgrx::JsonB;
use pgrx::prelude::*;

use super::server::client;
use crate::client::{Client, read, wait};
use crate::error::{Error, OrReport, Result};
use crate::relations::{adapters, sampling};
use crate::transaction;

/// Completes a prompt. NULL for an option means its default; NULL for the model or the prompt gives NULL.
#[allow(clippy::too_many_arguments)] // SQL's named arguments
#[pg_extern(volatile, parallel_unsafe)]
fn generate(
    model: Option<&str>,
    prompt: Option<&str>,
    max_tokens: default!(Option<i32>, "NULL"),
    temperature: default!(Option<f32>, "NULL"),
    top_k: default!(Option<i32>, "NULL"),
    top_p: default!(Option<f32>, "NULL"),
    min_p: default!(Option<f32>, "NULL"),
    repetition_penalty: default!(Option<f32>, "NULL"),
    seed: default!(Option<i64>, "NULL"),
    stop: default!(Option<Vec<Option<String>>>, "NULL"),
    adapter: default!(Option<&str>, "NULL"),
    frequency_penalty: default!(Option<f32>, "NULL"),
    presence_penalty: default!(Option<f32>, "NULL"),
    logit_bias: default!(Option<JsonB>, "NULL"),
    response_format: default!(Option<JsonB>, "NULL"),
) -> Option<String> {
    let (model, prompt) = (model?, prompt?);
    let complete = || -> Result<String> {
        let client = client()?;
        let request = GenerateRequest {
            transaction: transaction::reading(client.session)?,
            model: model.to_string(),
            input: Some(Input::Prompt(prompt.to_string())),
            max_tokens: max_tokens.map(i64::from),
            sampling: Some(SamplingOptions {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                seed,
                frequency_penalty,
                presence_penalty,
                logit_bias: sampling::logit_bias(logit_bias.map(|bias| bias.0.to_string()).as_deref())?,
            }),
            stop: stop.unwrap_or_default().into_iter().flatten().collect(),
            stream_tokens: false,
            response_format_json: response_format.map(|format| format.0.to_string()).unwrap_or_default(),
            adapter: adapters::checked(adapter)?,
            ..GenerateRequest::default()
        };
        wait(run(client, request))
    };
    Some(complete().or_report().replace('\0', "\u{FFFD}"))
}

async fn run(client: Client, request: GenerateRequest) -> Result<String> {
    let mut stream = read!(client, inference.generate(request)).await?;
    let mut summary = None;
    while let Some(message) = client.next(&mut stream).await? {
        summary = message.summary.or(summary);
    }
    summary
        .map(|summary| summary.completion)
        .ok_or_else(|| Error::protocol("summary of the generation"))
}
