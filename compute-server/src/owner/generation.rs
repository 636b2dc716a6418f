//! The generations of one model: a queue, and the sequences that run together.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use candle_compute_proto::v1;
use candle_models::sampling::Sampler;
use candle_models::{CompletionText, Decoder, KeyValueCache, SequenceStep, Tokenizer};
use tokio::sync::mpsc;

use super::View;
use super::sequence::Sequence;
use super::state::Owner;
use crate::caller::Caller;
use crate::error::{Error, Result};
use crate::metrics::ModelMetrics;
use crate::requests::RequestGuard;

/// A generation to be run: one completion of a request.
pub(crate) struct GenerationRequest {
    /// Whose weights it uses.
    pub(crate) view: View,
    /// The prompt; generated tokens are added behind it.
    pub(crate) tokens: Vec<u32>,
    /// Which completion of its request it is.
    pub(crate) choice: u32,
    /// Most tokens to generate, at least 1; prompt and completion together fit the context.
    pub(crate) max_tokens: usize,
    /// Chooses tokens.
    pub(crate) sampler: Sampler,
    /// Makes text of them.
    pub(crate) text: CompletionText,
    /// Knows what bytes tokens stand for.
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Send every token, not only the summary.
    pub(crate) stream_tokens: bool,
    /// Keeps the request listed.
    pub(crate) request: Arc<RequestGuard>,
    /// What is measured of the model or adapter.
    pub(crate) metrics: Arc<ModelMetrics>,
    /// Where messages go. A full channel pauses the generation, a closed one ends it.
    pub(crate) output: mpsc::Sender<Result<v1::GenerateResponse, Error>>,
    /// When the client asked.
    pub(crate) arrived: Instant,
    /// Who asked.
    pub(crate) caller: Caller,
}

/// Queue and running generations.
#[derive(Default)]
pub(super) struct Generations {
    waiting: VecDeque<GenerationRequest>,
    active: Vec<Sequence>,
}

impl Generations {
    /// Bytes of the caches.
    pub(super) fn cache_bytes(&self) -> u64 {
        self.active
            .iter()
            .filter_map(|sequence| sequence.cache.as_ref())
            .map(KeyValueCache::memory_bytes)
            .sum()
    }

    /// Whether generations are queued.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Ends all with an error.
    pub(super) fn end_all(&mut self, error: &impl Fn() -> Error) {
        self.active.drain(..).for_each(|mut sequence| sequence.fail(error()));
        for waiting in self.waiting.drain(..) {
            let _ = waiting.output.try_send(Err(error()));
        }
    }

    /// Drops queued generations that nobody waits for.
    fn drop_abandoned(&mut self) {
        self.waiting.retain(|waiting| {
            let cancelled = waiting.request.is_cancelled();
            if cancelled {
                let _ = waiting.output.try_send(Err(Error::Cancelled));
            }
            !cancelled && !waiting.output.is_closed()
        });
    }
}

impl Owner {
    /// Queues the completions of a request, all or none.
    ///
    /// # Errors
    /// `Limit` when the queue has no room for them.
    pub(crate) fn submit_generations(&mut self, requests: Vec<GenerationRequest>) -> Result<()> {
        self.generations.drop_abandoned();
        let room = self.limits.queue.saturating_sub(self.generations.waiting.len());
        if requests.len() > room {
            return Err(Error::Limit {
                what: match requests.len() {
                    1 => format!("a further generation in the queue of model \"{}\"", self.shared.name),
                    n => format!("{n} further generations in the queue of model \"{}\"", self.shared.name),
                },
                limit: self.limits.queue as u64,
                flag: "max-queue",
            });
        }
        for request in &requests {
            request.request.wake_on_cancel(Arc::clone(&self.shared.wake));
        }
        self.generations.waiting.extend(requests);
        Ok(())
    }

    /// Brings every sequence that can go on one step further; false when there was none.
    pub(super) fn generate(&mut self) -> bool {
        self.generations.active.iter_mut().for_each(Sequence::poll);
        self.generations.active.retain(|sequence| !sequence.is_over());
        self.admit();
        let mut active = std::mem::take(&mut self.generations.active);
        let worked = self.step_sequences(&mut active);
        active.retain(|sequence| !sequence.is_over());
        self.generations.active = active;
        worked
    }

    /// Starts queued generations as far as the limits allow.
    fn admit(&mut self) {
        self.generations.drop_abandoned();
        while let Some(next) = self.generations.waiting.front() {
            // A generation whose client is slow does not keep others from running.
            let running = self
                .generations
                .active
                .iter()
                .filter(|sequence| !sequence.is_paused())
                .count();
            if running >= self.limits.generations {
                return;
            }
            let config = self.model.decoder.config();
            let per_token = 8 * (config.layers * config.key_value_heads * config.head_dim) as u64;
            let bytes = per_token * (next.tokens.len() + next.max_tokens) as u64;
            match self.budget.reserve("the key/value cache of a generation", bytes) {
                Ok(memory) => {
                    let Some(request) = self.generations.waiting.pop_front() else {
                        return;
                    };
                    let cache = self.model.decoder.new_cache();
                    self.generations.active.push(Sequence::new(request, cache, memory));
                }
                // Running ones will give memory back; without any the limit is too small for this request.
                Err(_) if !self.generations.active.is_empty() => return,
                Err(error) => {
                    let Some(request) = self.generations.waiting.pop_front() else {
                        return;
                    };
                    let _ = request.output.try_send(Err(error));
                }
            }
        }
    }

    /// One decoding step of all sequences, and one chunk of one prompt, view by view.
    fn step_sequences(&mut self, active: &mut [Sequence]) -> bool {
        let mut views: Vec<View> = Vec::new();
        for sequence in active.iter().filter(|sequence| sequence.is_runnable()) {
            if !views.contains(&sequence.request.view) {
                views.push(sequence.request.view.clone());
            }
        }
        let shared = Arc::clone(&self.shared);
        for view in &views {
            let mut of_view: Vec<&mut Sequence> = active
                .iter_mut()
                .filter(|sequence| sequence.is_runnable() && sequence.request.view == *view)
                .collect();
            let decoder = match self.decoder(view) {
                Ok(decoder) => decoder,
                Err(error) => {
                    let status = error.to_string();
                    of_view
                        .into_iter()
                        .for_each(|sequence| sequence.fail(Error::Stale(status.clone())));
                    continue;
                }
            };
            let (mut prefilling, mut decoding): (Vec<_>, Vec<_>) =
                of_view.drain(..).partition(|sequence| sequence.is_prefilling());
            if !decoding.is_empty() {
                shared.metrics.decoded(decoding.len());
            }
            forward(decoder, &mut decoding, &shared.end_tokens);
            // Prompts are read one at a time, each in chunks of its own, in the order of arrival.
            prefilling.truncate(1);
            forward(decoder, &mut prefilling, &shared.end_tokens);
        }
        !views.is_empty()
    }
}

/// One forward pass over `sequences`.
fn forward(decoder: &Decoder, sequences: &mut [&mut Sequence], end_tokens: &[u32]) {
    if sequences.is_empty() {
        return;
    }
    let mut caches: Vec<KeyValueCache> = Vec::with_capacity(sequences.len());
    sequences
        .iter_mut()
        .for_each(|sequence| caches.push(sequence.cache.take().unwrap_or_else(|| decoder.new_cache())));
    let mut steps: Vec<SequenceStep<'_>> = sequences
        .iter()
        .zip(&mut caches)
        .map(|(sequence, cache)| {
            let next = cache.len()
                ..sequence
                    .request
                    .tokens
                    .len()
                    .min(cache.len() + super::sequence::PREFILL_CHUNK);
            SequenceStep {
                tokens: &sequence.request.tokens[next],
                cache,
            }
        })
        .collect();
    let logits = decoder
        .forward(&mut steps)
        .and_then(|logits| Ok(logits.to_vec2::<f32>()?));
    drop(steps);
    for (sequence, cache) in sequences.iter_mut().zip(caches) {
        sequence.cache = Some(cache);
    }
    match logits {
        Ok(rows) => {
            for (sequence, mut row) in sequences.iter_mut().zip(rows) {
                sequence.accept(&mut row, end_tokens);
            }
        }
        Err(error) => {
            let message = error.to_string();
            sequences
                .iter_mut()
                .for_each(|sequence| sequence.fail(Error::Internal(message.clone())));
        }
    }
}
