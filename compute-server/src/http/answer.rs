//! What is sent back: one JSON object, or server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::SystemTime;

use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use candle_compute_proto::v1;
use serde_json::{Value, json};
use tokio_stream::Stream;

use super::admission::Outcome;
use super::choices::Choices;
use super::error::ApiError;
use super::parameters::Parameters;
use crate::error::Error;

/// What differs between the endpoints: how a choice looks.
pub(super) trait Format: Send + 'static {
    /// Start of an answer's id.
    const PREFIX: &'static str;
    /// `object` of a whole answer.
    const OBJECT: &'static str;
    /// `object` of an event.
    const CHUNK: &'static str;

    /// The choice of a first event, before any token.
    fn opening(index: usize) -> Option<Value>;
    /// The choice of an event: `text` and the tokens that it came with, if they are wanted.
    fn piece(index: usize, text: &str, tokens: Option<&[Piece]>) -> Value;
    /// The choice of its last event.
    fn closing(index: usize, finish_reason: &str) -> Value;
    /// A choice of a whole answer.
    fn whole(index: usize, text: &str, tokens: Option<&[Piece]>, finish_reason: &str) -> Value;
}

/// A token with its place.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    /// The token.
    pub(super) token: v1::GeneratedToken,
    /// Characters of the completion before it.
    pub(super) offset: usize,
}

impl Piece {
    /// What the token itself stands for; bytes that are not UTF-8 on their own become U+FFFD.
    pub(super) fn text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.token.bytes)
    }
}

/// An answer that is being made.
pub(super) struct Answer<F> {
    choices: Choices,
    parameters: Parameters,
    logprobs: bool,
    id: String,
    created: u64,
    usage: Usage,
    /// Characters sent of each choice.
    offsets: Vec<usize>,
    format: PhantomData<fn() -> F>,
}

/// Tokens read and generated.
#[derive(Debug, Default)]
struct Usage {
    prompt: u64,
    cached: u64,
    completion: u64,
}

impl Usage {
    /// A prompt counts once, however many completions it has.
    fn add(&mut self, summary: &v1::GenerationSummary) {
        if summary.choice == 0 {
            self.prompt += u64::from(summary.prompt_tokens);
            self.cached += u64::from(summary.cached_tokens);
        }
        self.completion += u64::from(summary.completion_tokens);
    }

    fn to_json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}

impl<F: Format> Answer<F> {
    /// The answer of generations that run. `logprobs`: how many alternatives each token is shown with, if tokens are.
    pub(super) fn new(choices: Choices, parameters: Parameters, logprobs: Option<i32>) -> Self {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            offsets: vec![0; choices.len()],
            choices,
            parameters,
            logprobs: logprobs.is_some(),
            id: format!("{}-{:x}{:04x}", F::PREFIX, now.as_nanos(), next_number() & 0xffff),
            created: now.as_secs(),
            usage: Usage::default(),
            format: PhantomData,
        }
    }

    /// The response: events from now on, or the whole when it is there.
    ///
    /// # Errors
    /// What a generation failed with.
    pub(super) async fn respond(self) -> Result<Response, ApiError> {
        match self.parameters.stream {
            true => {
                let events = Events::new(self);
                let outcome = Extension(events.outcome.clone());
                Ok((outcome, Sse::new(events).keep_alive(KeepAlive::new())).into_response())
            }
            false => Ok(Json(self.whole().await?).into_response()),
        }
    }

    async fn whole(mut self) -> Result<Value, ApiError> {
        let mut pieces: Vec<Vec<Piece>> = vec![Vec::new(); self.choices.len()];
        let mut choices = vec![Value::Null; self.choices.len()];
        while let Some((index, message)) = self.choices.next().await {
            let message = message?;
            if let Some(token) = message.token {
                let piece = self.place(index, token);
                pieces[index].push(piece);
            }
            if let Some(summary) = message.summary {
                self.usage.add(&summary);
                let tokens = self.logprobs.then_some(&pieces[index][..]);
                choices[index] = F::whole(index, &summary.completion, tokens, finish_reason(&summary)?);
            }
        }
        let mut answer = self.head(F::OBJECT);
        answer["choices"] = Value::Array(choices);
        answer["usage"] = self.usage.to_json();
        Ok(answer)
    }

    /// A token's place in its choice.
    fn place(&mut self, index: usize, token: v1::GeneratedToken) -> Piece {
        let offset = self.offsets[index];
        self.offsets[index] += token.text.chars().count();
        Piece { token, offset }
    }

    fn head(&self, object: &str) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.parameters.model,
        })
    }

    fn event(&self, choices: Vec<Value>, usage: Value) -> Event {
        let mut chunk = self.head(F::CHUNK);
        chunk["choices"] = Value::Array(choices);
        if self.parameters.include_usage {
            chunk["usage"] = usage;
        }
        Event::default().data(chunk.to_string())
    }
}

/// Why a choice ended, in OpenAI's words.
fn finish_reason(summary: &v1::GenerationSummary) -> Result<&str, ApiError> {
    match summary.finish_reason.as_str() {
        "cancelled" => Err(ApiError::cancelled()),
        reason => Ok(reason),
    }
}

/// The events of an answer. Dropping them, as when the client is gone, ends the generations at the next token.
struct Events<F> {
    answer: Answer<F>,
    ready: VecDeque<Event>,
    ended: bool,
    outcome: Outcome,
}

impl<F: Format> Events<F> {
    fn new(answer: Answer<F>) -> Self {
        let openings = (0..answer.choices.len()).filter_map(F::opening);
        let ready = openings.map(|choice| answer.event(vec![choice], Value::Null)).collect();
        Self {
            answer,
            ready,
            ended: false,
            outcome: Outcome::default(),
        }
    }

    fn add(&mut self, index: usize, message: v1::GenerateResponse) -> Result<(), ApiError> {
        if let Some(token) = message.token {
            let piece = self.answer.place(index, token);
            let text = &piece.token.text;
            // Half a character is not worth an event.
            if self.answer.logprobs || !text.is_empty() {
                let tokens = self.answer.logprobs.then_some(std::slice::from_ref(&piece));
                let choice = F::piece(index, text, tokens);
                self.ready.push_back(self.answer.event(vec![choice], Value::Null));
            }
        }
        if let Some(summary) = message.summary {
            self.answer.usage.add(&summary);
            let choice = F::closing(index, finish_reason(&summary)?);
            self.ready.push_back(self.answer.event(vec![choice], Value::Null));
        }
        Ok(())
    }

    fn fail(&mut self, error: &ApiError) {
        self.ended = true;
        self.outcome.set(error.status().as_u16());
        self.answer.choices.stop();
        self.ready.push_back(Event::default().data(error.to_json().to_string()));
    }

    fn finish(&mut self) {
        self.ended = true;
        self.outcome.set(StatusCode::OK.as_u16());
        if self.answer.parameters.include_usage {
            let usage = self.answer.usage.to_json();
            self.ready.push_back(self.answer.event(Vec::new(), usage));
        }
        self.ready.push_back(Event::default().data("[DONE]"));
    }
}

impl<F: Format> Stream for Events<F> {
    type Item = Result<Event, Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let events = self.get_mut();
        loop {
            if let Some(event) = events.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if events.ended {
                return Poll::Ready(None);
            }
            match ready!(events.answer.choices.poll_next(context)) {
                None => events.finish(),
                Some((index, message)) => {
                    let added = message.map_err(|error: Error| error.into());
                    if let Err(error) = added.and_then(|message| events.add(index, message)) {
                        events.fail(&error);
                    }
                }
            }
        }
    }
}

/// Tells answers of the same moment apart.
fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
