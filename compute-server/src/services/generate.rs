//! Starting a generation: the one way, for gRPC (and SQL over it) and for HTTP.

use std::sync::Arc;
use std::time::Instant;

use candle_compute_proto::v1;
use candle_models::{ChatMessage, CompletionText, Sampler, SamplingOptions, Tokenizer};

use super::constraints;
use super::inputs::{token_ids, tokenizer};
use super::placement::{Placement, place};
use super::tokenizing::tokenizing;
use crate::access::Caller;
use crate::app::App;
use crate::error::{Error, Result};
use crate::owner::{GenerationRequest, ModelHandle, OutputStream, Step, keep_place};
use crate::transactions::Reader;

/// Tokens generated when a request does not say how many.
const DEFAULT_MAX_TOKENS: i64 = 256;

/// Most completions of one request.
const MAX_CHOICES: i32 = 128;

/// Tokens as they are generated, and a summary for every completion; the last summary ends it. Dropping it ends the work.
pub(crate) type GenerateStream = OutputStream<v1::GenerateResponse, v1::GenerateResponse>;

/// Checks a request and queues its completions at its model.
///
/// # Errors
/// `InvalidArgument` for a bad value, `NotFound` for a model that does not exist, `Precondition` for one without a
/// tokenizer or chat template, `Limit` when the queue is full or the request too long.
pub(crate) async fn start(app: &Arc<App>, caller: Caller, request: v1::GenerateRequest) -> Result<GenerateStream> {
    let arrived = Instant::now();
    let reader = Reader::open(app, request.transaction.as_ref())?;
    let Placement {
        asked,
        model,
        view,
        adapter,
    } = place(&reader, &request.model, &request.adapter).await?;
    let choices = choices(request.n)?;
    let tokenizer = tokenizer(&model)?;
    let bytes = prost::Message::encoded_len(&request);
    let (of, with, input) = (model.clone(), Arc::clone(&tokenizer), request.input);
    let tokens = tokenizing(bytes, move || prompt_tokens(&of, &with, input)).await?;
    let max_tokens = max_tokens(&model, tokens.len(), request.max_tokens)?;
    app.check_request_tokens((choices as usize * (tokens.len() + max_tokens)) as u64)?;
    let sampling = sampling_options(request.sampling.unwrap_or_default(), request.top_logprobs)?;
    sampling.validate_for(model.facts().decoder_config.vocabulary)?;
    let constraint = constraints::compile(&tokenizer, &request.response_format_json).await?;
    let mut left = choices;
    let (output, stream) = OutputStream::channel(&model, move |message: v1::GenerateResponse| {
        left -= u32::from(message.summary.is_some());
        match left {
            0 => Step::Last(message),
            _ => Step::Next(message),
        }
    });
    caller.tenant.admit_tokens(tokens.len())?;
    let guard = Arc::new(app.requests.begin(&caller, "generate", model.name())?);
    keep_place(&guard, &output);
    guard.set_progress(0, u64::from(choices) * max_tokens as u64);
    let completion = |choice: u32| {
        let seed = sampling.seed.wrapping_add(u64::from(choice));
        let mut text = CompletionText::new(Arc::clone(&tokenizer), &tokens, &request.stop)?;
        if constraint.is_some() {
            text.keep_first_space();
        }
        Ok(GenerationRequest {
            view: view.clone(),
            adapter: adapter.clone(),
            tokens: tokens.clone(),
            choice,
            ignore_cache: request.ignore_cache,
            max_tokens,
            sampler: Sampler::new(&SamplingOptions {
                seed,
                ..sampling.clone()
            })?,
            constraint: constraint.clone(),
            text,
            tokenizer: Arc::clone(&tokenizer),
            stream_tokens: request.stream_tokens,
            request: Arc::clone(&guard),
            metrics: Arc::clone(&asked.facts().metrics),
            output: output.clone(),
            arrived,
            caller: caller.clone(),
        })
    };
    let generations = (0..choices).map(completion).collect::<Result<Vec<_>>>()?;
    // The stream ends with an error if the thread goes away, for which no sender may be left here.
    drop(output);
    model.call(move |owner| owner.submit_generations(generations)).await?;
    Ok(stream)
}

/// Number of completions.
fn choices(asked: Option<i32>) -> Result<u32> {
    let asked = asked.unwrap_or(1);
    match asked {
        1..=MAX_CHOICES => Ok(asked.unsigned_abs()),
        _ => Err(Error::invalid(format!(
            "n is {asked}; it must be from 1 to {MAX_CHOICES}"
        ))),
    }
}

/// Tokens that a generation may add: what was asked for, cut to what the context still holds.
fn max_tokens(model: &ModelHandle, prompt: usize, asked: Option<i64>) -> Result<usize> {
    let context = model.facts().decoder_config.context_length;
    if prompt >= context {
        return Err(Error::ContextLength { prompt, context });
    }
    let asked = asked.unwrap_or(DEFAULT_MAX_TOKENS.min(context as i64));
    let asked = usize::try_from(asked)
        .ok()
        .filter(|asked| (1..=context).contains(asked))
        .ok_or_else(|| {
            Error::invalid(format!(
                "max_tokens is {asked}; it must be from 1 to {context}, the context of the model"
            ))
        })?;
    Ok(asked.min(context - prompt))
}

/// Tokens of the prompt, or of the conversation as the model's template renders it.
fn prompt_tokens(
    model: &ModelHandle,
    tokenizer: &Tokenizer,
    input: Option<v1::generate_request::Input>,
) -> Result<Vec<u32>> {
    let tokens = match input {
        Some(v1::generate_request::Input::Prompt(prompt)) if prompt.is_empty() => {
            return Err(Error::invalid("prompt is empty; give some text to continue"));
        }
        Some(v1::generate_request::Input::Prompt(prompt)) => tokenizer.encode(&prompt)?,
        Some(v1::generate_request::Input::Messages(messages)) => {
            let template = model
                .facts()
                .chat_template
                .as_ref()
                .ok_or_else(|| Error::Precondition {
                    message: format!(
                        "model \"{}\" has no chat template, so it takes no messages",
                        model.name()
                    ),
                    hint: "Give a prompt instead.",
                })?;
            let messages = messages.messages.into_iter();
            let messages: Vec<_> = messages
                .map(|message| ChatMessage {
                    role: message.role,
                    content: message.content,
                })
                .collect();
            tokenizer.encode_without_special_tokens(&template.render(&messages)?)?
        }
        Some(v1::generate_request::Input::Tokens(tokens)) => {
            token_ids(&tokens.ids, model.facts().decoder_config.vocabulary)?
        }
        None => return Err(Error::invalid("prompt or messages is required")),
    };
    if tokens.is_empty() {
        return Err(Error::invalid("the prompt has no tokens; give some text to continue"));
    }
    Ok(tokens)
}

fn sampling_options(given: v1::SamplingOptions, top_logprobs: Option<i32>) -> Result<SamplingOptions> {
    let default = SamplingOptions::default();
    let bias = given.logit_bias.into_iter();
    let bias = bias.map(|(token, bias)| match u32::try_from(token) {
        Ok(token) => Ok((token, bias)),
        Err(_) => Err(Error::invalid(format!(
            "logit_bias has the token {token}, which is no token id"
        ))),
    });
    Ok(SamplingOptions {
        temperature: given.temperature.unwrap_or(default.temperature),
        top_k: given.top_k.map_or(default.top_k, i64::from),
        top_p: given.top_p.unwrap_or(default.top_p),
        min_p: given.min_p.unwrap_or(default.min_p),
        repetition_penalty: given.repetition_penalty.unwrap_or(default.repetition_penalty),
        frequency_penalty: given.frequency_penalty.unwrap_or(default.frequency_penalty),
        presence_penalty: given.presence_penalty.unwrap_or(default.presence_penalty),
        logit_bias: bias.collect::<Result<_>>()?,
        top_logprobs: top_logprobs.map_or(default.top_logprobs, i64::from),
        // Every bit pattern is a seed.
        seed: given.seed.unwrap_or(0) as u64,
    })
}
