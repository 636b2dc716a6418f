//! One running generation.

use std::collections::VecDeque;
use std::time::Instant;

use candle_compute_proto::v1;
use candle_models::{KeyValueCache, Place, Sampled, SequenceStep, Tokenizer};
use tokio::sync::mpsc::error::TrySendError;

use super::generation::GenerationRequest;
use super::paging::Weights;
use crate::error::Error;
use crate::requests::Phase;

/// A generation that has left the queue.
pub(super) struct Sequence {
    pub(super) request: GenerationRequest,
    /// Keys and values of the tokens read so far; none once the generation has ended.
    pub(super) cache: Option<KeyValueCache>,
    /// What the cache is computed with.
    pub(super) weights: Weights,
    /// Times that the cache was begun anew since the last token.
    pub(super) restarts: u32,
    /// Whether it had to give its pages back and waits for room.
    is_put_back: bool,
    /// Prompt tokens that were computed for others before.
    cached_tokens: usize,
    prompt_tokens: usize,
    completion: String,
    /// The last token's message, while the end of its text is not certain.
    held: Option<v1::GeneratedToken>,
    /// Messages that the client has not had room for.
    outbox: VecDeque<Result<v1::GenerateResponse, Error>>,
    /// When it left the queue.
    pub(super) started: Instant,
    first_token: Option<Instant>,
    ended: bool,
    abandoned: bool,
    /// The round in which it last had a part in a pass.
    pub(super) last_round: u64,
    /// Passes that it took part in, and the sequences of all of them together.
    passes: (u64, u64),
}

impl Sequence {
    /// Starts a generation with a cache for `weights`, which holds nothing but what was taken over.
    pub(super) fn new(request: GenerationRequest, weights: Weights, cache: KeyValueCache) -> Self {
        request.request.set_phase(Phase::Prefill);
        Self {
            prompt_tokens: request.tokens.len(),
            request,
            cached_tokens: cache.len(),
            cache: Some(cache),
            weights,
            restarts: 0,
            is_put_back: false,
            completion: String::new(),
            held: None,
            outbox: VecDeque::new(),
            started: Instant::now(),
            first_token: None,
            ended: false,
            abandoned: false,
            last_round: 0,
            passes: (0, 0),
        }
    }

    /// Whether it can go on now: not ended, its client keeps up, and there was room for it.
    pub(super) fn is_runnable(&self) -> bool {
        !self.ended && !self.abandoned && self.outbox.is_empty() && !self.is_put_back
    }

    /// Whether its client is slow.
    pub(super) fn is_paused(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Whether nothing is left to do for it.
    pub(super) fn is_over(&self) -> bool {
        self.abandoned || (self.ended && self.outbox.is_empty())
    }

    /// Whether it still reads its prompt.
    pub(super) fn is_prefilling(&self) -> bool {
        self.read_tokens() + 1 < self.request.tokens.len()
    }

    /// Tokens that a pass has yet to read.
    pub(super) fn unread_tokens(&self) -> usize {
        self.request.tokens.len() - self.read_tokens()
    }

    /// Counts a pass of so many sequences.
    pub(super) fn count_pass(&mut self, round: u64, sequences: usize) {
        self.last_round = round;
        self.passes = (self.passes.0 + 1, self.passes.1 + sequences as u64);
    }

    /// Whether it waits for room, and for nothing else.
    pub(super) fn waits_for_room(&self) -> bool {
        self.is_put_back && !self.ended && !self.abandoned && self.outbox.is_empty()
    }

    /// Whether its cache takes memory.
    pub(super) fn holds_pages(&self) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.memory_bytes() > 0)
    }

    /// Begins the cache anew, since the weights are others.
    pub(super) fn restart(&mut self, weights: Weights, cache: KeyValueCache) {
        // The longer it takes to compute the cache again, the more often may the weights change meanwhile.
        self.restarts += u32::from(!self.cache.as_ref().is_none_or(KeyValueCache::is_empty));
        self.weights = weights;
        self.cache = Some(cache);
        self.forget_cached();
    }

    /// Gives its pages back until there is room again.
    pub(super) fn put_back(&mut self) {
        if let Some(cache) = &mut self.cache {
            cache.truncate(0);
        }
        self.is_put_back = true;
        self.forget_cached();
    }

    /// Lets it go on.
    pub(super) fn resume(&mut self) {
        self.is_put_back = false;
    }

    fn forget_cached(&mut self) {
        if self.first_token.is_none() {
            self.cached_tokens = 0;
        }
    }

    /// Takes over what others have computed of the tokens that it reads next.
    pub(super) fn reuse_pages(&mut self) {
        let Some(cache) = &mut self.cache else { return };
        let reused = cache.reuse(&self.request.tokens);
        if self.first_token.is_none() {
            self.cached_tokens += reused;
        }
    }

    /// What it computes next, where others may be about to compute the same.
    pub(super) fn next_page(&self) -> Option<Place> {
        self.cache.as_ref()?.next_place(&self.request.tokens)
    }

    /// Makes room in the cache for so many tokens.
    ///
    /// # Errors
    /// `ResourceExhausted` when there is no page.
    pub(super) fn reserve(&mut self, tokens: usize) -> candle_models::Result<()> {
        self.cache.as_mut().map_or(Ok(()), |cache| cache.reserve(tokens))
    }

    /// Its part of a forward pass, the next so many tokens; none once it has ended.
    pub(super) fn step(&mut self, tokens: usize) -> Option<SequenceStep<'_>> {
        let cache = self.cache.as_mut()?;
        Some(SequenceStep {
            tokens: &self.request.tokens[cache.len()..cache.len() + tokens],
            cache,
        })
    }

    /// Tokens in the cache.
    fn read_tokens(&self) -> usize {
        self.cache.as_ref().map_or(0, KeyValueCache::len)
    }

    /// What tells whether anybody waits for its next token, while it is in a pass.
    pub(super) fn watch(&self) -> impl Fn() -> bool + use<> {
        let (output, request) = (self.request.output.clone(), self.request.request.watched());
        move || !output.is_closed() && !request.is_cancelled()
    }

    /// Looks whether the client is gone or asked for an end, and sends what waits.
    pub(super) fn poll(&mut self) {
        if self.request.output.is_closed() || self.request.request.is_given_up() {
            if !std::mem::replace(&mut self.abandoned, true) && !self.ended {
                self.request.metrics.abandoned();
            }
            self.cache = None;
        } else if self.request.request.is_cancelled() && !self.ended {
            self.end("cancelled");
        } else if let Some(error) = self.request.end() {
            self.fail(error);
        }
        self.flush();
    }

    /// Takes the logits after the last token, `[vocabulary]`, which are overwritten, and adds a token.
    pub(super) fn accept(&mut self, logits: &mut [f32], end_tokens: &[u32]) {
        if let Some(cache) = &mut self.cache {
            cache.share(&self.request.tokens);
        }
        if self.read_tokens() < self.request.tokens.len() {
            return;
        }
        let sampled = match self.sample(logits, end_tokens) {
            Ok(sampled) => sampled,
            Err(error) => return self.fail(error.into()),
        };
        self.first_token.get_or_insert_with(Instant::now);
        self.restarts = 0;
        self.request.request.set_phase(Phase::Decode);
        if end_tokens.contains(&sampled.token) {
            return self.end("stop");
        }
        self.request.tokens.push(sampled.token);
        self.request.metrics.generated();
        self.request.caller.tenant.charge_tokens(1);
        let mut complete = false;
        if let Some(constraint) = &mut self.request.constraint {
            if let Err(error) = constraint.push(sampled.token) {
                return self.fail(error.into());
            }
            complete = constraint.is_complete();
        }
        let count = self.completion_tokens();
        self.request.request.advance();
        let progress = self.request.text.push(sampled.token);
        self.completion.push_str(&progress.text);
        self.release_held();
        self.held = Some(v1::GeneratedToken {
            position: u32::try_from(count - 1).unwrap_or(u32::MAX),
            token_id: sampled.token,
            text: progress.text,
            logprob: sampled.logprob,
            choice: self.request.choice,
            bytes: self.request.tokenizer.token_bytes(sampled.token).to_vec().into(),
            top_logprobs: top_logprobs(&self.request.tokenizer, &sampled),
        });
        if progress.stopped || complete {
            self.end("stop");
        } else if count >= self.request.max_tokens {
            self.end("length");
        } else if !self.request.text.is_pending() {
            self.release_held();
        }
        self.flush();
    }

    /// Chooses a token; where the completion is constrained, one of those that it may go on with.
    fn sample(&mut self, logits: &mut [f32], end_tokens: &[u32]) -> candle_models::Result<Sampled> {
        let request = &mut self.request;
        match &request.constraint {
            None => request.sampler.sample(logits, &request.tokens),
            Some(constraint) => request.sampler.sample_restricted(logits, &request.tokens, |logits| {
                constraint.allowed().restrict(logits, end_tokens);
            }),
        }
    }

    /// Ends it with an error.
    pub(super) fn fail(&mut self, error: Error) {
        if !self.ended {
            self.ended = true;
            self.cache = None;
            self.outbox.push_back(Err(error));
            self.flush();
        }
    }

    fn completion_tokens(&self) -> usize {
        self.request.tokens.len() - self.prompt_tokens
    }

    /// Ends it: the last text, then the summary.
    fn end(&mut self, finish_reason: &str) {
        self.ended = true;
        self.cache = None;
        let rest = self.request.text.finish();
        self.completion.push_str(&rest);
        if let Some(held) = &mut self.held {
            held.text.push_str(&rest);
        }
        self.release_held();
        let milliseconds = |until: Instant| until.duration_since(self.request.arrived).as_secs_f64() * 1e3;
        let summary = v1::GenerationSummary {
            completion: std::mem::take(&mut self.completion),
            finish_reason: finish_reason.to_owned(),
            prompt_tokens: u32::try_from(self.prompt_tokens).unwrap_or(u32::MAX),
            cached_tokens: u32::try_from(self.cached_tokens).unwrap_or(u32::MAX),
            completion_tokens: u32::try_from(self.completion_tokens()).unwrap_or(u32::MAX),
            time_to_first_token_ms: milliseconds(self.first_token.unwrap_or_else(Instant::now)),
            duration_ms: milliseconds(Instant::now()),
            queue_ms: milliseconds(self.started),
            choice: self.request.choice,
            batch_size: self.passes.1 as f64 / self.passes.0.max(1) as f64,
        };
        self.request.metrics.finished(&summary);
        self.outbox.push_back(Ok(v1::GenerateResponse {
            token: None,
            summary: Some(summary),
        }));
        self.flush();
    }

    /// Sends the message of the last token.
    fn release_held(&mut self) {
        if let Some(token) = self.held.take()
            && self.request.stream_tokens
        {
            self.outbox.push_back(Ok(v1::GenerateResponse {
                token: Some(token),
                summary: None,
            }));
        }
    }

    /// Sends waiting messages as far as there is room.
    fn flush(&mut self) {
        while let Some(message) = self.outbox.pop_front() {
            match self.request.output.try_send(message) {
                Ok(()) => {}
                Err(TrySendError::Full(message)) => {
                    self.outbox.push_front(message);
                    return self.request.request.set_stalled(true);
                }
                Err(TrySendError::Closed(_)) => {
                    self.abandoned = true;
                    self.outbox.clear();
                    self.cache = None;
                }
            }
        }
        self.request.request.set_stalled(false);
    }
}

/// The most likely tokens at the place of `sampled`, as messages.
fn top_logprobs(tokenizer: &Tokenizer, sampled: &Sampled) -> Vec<v1::TopLogprob> {
    let message = |&(token_id, logprob): &(u32, f32)| {
        let bytes = tokenizer.token_bytes(token_id);
        v1::TopLogprob {
            token_id,
            text: String::from_utf8_lossy(bytes).into_owned(),
            bytes: bytes.to_vec().into(),
            logprob,
        }
    };
    sampled.top_logprobs.iter().map(message).collect()
}
