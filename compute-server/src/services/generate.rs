//! Starting a generation: the one way, for gRPC (and SQL over it) and for HTTP.

use std::sync::Arc;
use std::time::Instant;

use candle_compute_proto::v1;
use candle_models::{ChatMessage, CompletionText, Sampler, SamplingOptions, Tokenizer};

use super::inference::tokenizer;
use crate::app::App;
use crate::caller::Caller;
use crate::error::{Error, Result};
use crate::owner::{GenerationRequest, ModelHandle, OutputStream, Step};
use crate::transactions::Reader;

/// Tokens generated when a request does not say how many.
const DEFAULT_MAX_TOKENS: i64 = 256;

/// Tokens as they are generated, and the summary. Dropping it ends the generation at the next token.
pub(crate) type GenerateStream = OutputStream<v1::GenerateResponse, v1::GenerateResponse>;

/// Checks a request and queues it at its model.
///
/// # Errors
/// When the request is not valid, names nothing that there is, or exceeds a limit.
pub(crate) async fn start(app: &Arc<App>, caller: Caller, request: v1::GenerateRequest) -> Result<GenerateStream> {
    let arrived = Instant::now();
    let reader = Reader::open(app, request.transaction.as_ref())?;
    let model = reader.find(&request.model, &request.adapter)?;
    let tokenizer = tokenizer(&model)?;
    let tokens = prompt_tokens(&model, &tokenizer, request.input)?;
    let max_tokens = max_tokens(app, &model, tokens.len(), request.max_tokens)?;
    let sampler = Sampler::new(&sampling_options(request.sampling.unwrap_or_default())?)?;
    let text = CompletionText::new(tokenizer, &tokens, &request.stop)?;
    let (output, stream) = OutputStream::channel(&model, |message: v1::GenerateResponse| {
        if message.summary.is_some() {
            Step::Last(message)
        } else {
            Step::Next(message)
        }
    });
    let generation = GenerationRequest {
        view: reader.view(),
        tokens,
        max_tokens,
        sampler,
        text,
        stream_tokens: request.stream_tokens,
        request: app.requests.begin("generate", model.name()),
        output,
        arrived,
        caller,
    };
    model.call(move |owner| owner.submit_generation(generation)).await?;
    Ok(stream)
}

/// Tokens that a generation may add: what was asked for, cut to what the context still holds.
fn max_tokens(app: &App, model: &ModelHandle, prompt: usize, asked: Option<i64>) -> Result<usize> {
    let context = model.facts().decoder_config.context_length;
    if prompt >= context {
        return Err(Error::invalid(format!(
            "the prompt has {prompt} tokens, which leave no room in the context of {context}; shorten it"
        )));
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
    let max_tokens = asked.min(context - prompt);
    app.check_request_tokens((prompt + max_tokens) as u64)?;
    Ok(max_tokens)
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
        None => return Err(Error::invalid("prompt or messages is required")),
    };
    if tokens.is_empty() {
        return Err(Error::invalid("the prompt has no tokens; give some text to continue"));
    }
    Ok(tokens)
}

fn sampling_options(given: v1::SamplingOptions) -> Result<SamplingOptions> {
    let default = SamplingOptions::default();
    Ok(SamplingOptions {
        temperature: given.temperature.unwrap_or(default.temperature),
        top_k: given.top_k.map_or(default.top_k, i64::from),
        top_p: given.top_p.unwrap_or(default.top_p),
        min_p: given.min_p.unwrap_or(default.min_p),
        repetition_penalty: given.repetition_penalty.unwrap_or(default.repetition_penalty),
        // Every bit pattern is a seed.
        seed: given.seed.unwrap_or(0) as u64,
    })
}
