//! The parameters that completions and chat completions share.

use std::collections::BTreeMap;

use candle_compute_proto::v1;
use serde::Deserialize;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, one_or_many};
use super::model_names;
use crate::app::App;

/// Parameters that change nothing here: who asks, where it is billed, what is stored elsewhere.
const WITHOUT_EFFECT: [&str; 7] = [
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
];

/// Most completions of one request, all prompts together.
pub(super) const MAX_CHOICES: usize = 128;

/// What a request asks for besides its prompt.
#[derive(Debug)]
pub(super) struct Parameters {
    /// The model as the client called it.
    pub(super) model: String,
    /// Everything but the input.
    pub(super) request: v1::GenerateRequest,
    /// Completions of each prompt.
    pub(super) n: usize,
    /// Send events as tokens are generated.
    pub(super) stream: bool,
    /// Send an event with the usage before the end.
    pub(super) include_usage: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
    /// Padding against an observer of packet sizes; there is none here.
    #[serde(default, rename = "include_obfuscation")]
    _include_obfuscation: bool,
}

impl Parameters {
    /// Takes them from the fields of a request.
    ///
    /// # Errors
    /// 400 that names the parameter.
    pub(super) fn take(app: &App, fields: &mut Fields) -> Result<Self, ApiError> {
        fields.ignore(&WITHOUT_EFFECT);
        let model: String = fields.required("model")?;
        let key = model_names::resolve(app, &model);
        let n: i32 = fields.take("n")?.unwrap_or(1);
        let stream: bool = fields.take("stream")?.unwrap_or(false);
        let options: Option<StreamOptions> = fields.take("stream_options")?;
        if options.is_some() && !stream {
            return Err(ApiError::invalid("'stream_options' needs 'stream': true").of("stream_options"));
        }
        let choices = usize::try_from(n).ok().filter(|n| (1..=MAX_CHOICES).contains(n));
        let choices = choices
            .ok_or_else(|| ApiError::invalid(format!("'n' is {n}; it must be from 1 to {MAX_CHOICES}")).of("n"))?;
        let stop = match fields.take_raw("stop") {
            Some(stop) => one_or_many("stop", &stop)?,
            None => Vec::new(),
        };
        let response_format: Option<Value> = fields.take("response_format")?;
        Ok(Self {
            model,
            request: v1::GenerateRequest {
                model: key.model,
                adapter: key.adapter.unwrap_or_default(),
                max_tokens: max_tokens(fields)?,
                sampling: Some(sampling(fields)?),
                stop,
                stream_tokens: stream,
                n: Some(n),
                response_format_json: response_format.map(|format| format.to_string()).unwrap_or_default(),
                ..Default::default()
            },
            n: choices,
            stream,
            include_usage: options.unwrap_or_default().include_usage,
        })
    }
}

/// The newer name and the older one of the same limit.
fn max_tokens(fields: &mut Fields) -> Result<Option<i64>, ApiError> {
    let (newer, older) = (fields.take("max_completion_tokens")?, fields.take("max_tokens")?);
    match (newer, older) {
        (Some(newer), Some(older)) if newer != older => {
            Err(ApiError::invalid("'max_tokens' and 'max_completion_tokens' differ; give one of them").of("max_tokens"))
        }
        (newer, older) => Ok(newer.or(older)),
    }
}

fn sampling(fields: &mut Fields) -> Result<v1::SamplingOptions, ApiError> {
    Ok(v1::SamplingOptions {
        temperature: fields.take("temperature")?,
        top_k: fields.take("top_k")?,
        top_p: fields.take("top_p")?,
        min_p: fields.take("min_p")?,
        repetition_penalty: fields.take("repetition_penalty")?,
        seed: fields.take("seed")?,
        frequency_penalty: fields.take("frequency_penalty")?,
        presence_penalty: fields.take("presence_penalty")?,
        logit_bias: logit_bias(fields)?,
    })
}

/// Token ids are keys of a JSON object, and so they are text.
fn logit_bias(fields: &mut Fields) -> Result<std::collections::HashMap<i64, f32>, ApiError> {
    let given: BTreeMap<String, f32> = fields.take("logit_bias")?.unwrap_or_default();
    let entry = |(token, bias): (String, f32)| match token.parse() {
        Ok(token) => Ok((token, bias)),
        Err(_) => {
            let shown: String = token.chars().take(40).collect();
            Err(ApiError::invalid(format!("'logit_bias': \"{shown}\" is not a token id")).of("logit_bias"))
        }
    };
    given.into_iter().map(entry).collect()
}
