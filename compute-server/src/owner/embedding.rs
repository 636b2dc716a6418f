//! The embeddings of one model: a queue, from which one batch is computed between the steps of generations.

use std::collections::VecDeque;

use candle_compute_proto::v1;
use candle_models::{KeyValueCache, Pooled, Pooling, SequenceStep};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::View;
use super::places::Queue;
use super::state::Owner;
use crate::access::Caller;
use crate::error::{Error, Result};
use crate::memory::Reservation;
use crate::requests::{Phase, RequestGuard};

/// Tokens that a pass reads of one input at most.
const CHUNK: usize = 256;

/// Tokens of a batch when nothing else runs. One chunk while generations do, which wait for it.
const BATCH_TOKENS: usize = 4 * CHUNK;

/// Inputs of a batch: their caches are small but not nothing.
const BATCH_INPUTS: usize = 64;

/// Inputs to be embedded.
pub(crate) struct EmbeddingRequest {
    /// Whose weights are used.
    pub(crate) view: View,
    /// Tokens of each input, at least one and no more than the context holds.
    pub(crate) inputs: Vec<Vec<u32>>,
    /// How the states of the tokens become one vector.
    pub(crate) pooling: Pooling,
    /// Scale the vectors to length 1.
    pub(crate) normalize: bool,
    /// Keeps it listed.
    pub(crate) request: RequestGuard,
    /// Who asked.
    pub(crate) caller: Caller,
    /// Where the vectors go. A full channel pauses the work, a closed one ends it.
    pub(crate) output: mpsc::Sender<Result<v1::EmbedResponse, Error>>,
}

/// A request in the queue.
struct Queued {
    request: EmbeddingRequest,
    /// The first input that has not begun.
    next: usize,
    /// Inputs that have begun.
    begun: Vec<Begun>,
    /// Vectors that the client has not had room for.
    outbox: Option<Result<v1::EmbedResponse, Error>>,
    /// Vectors made so far.
    done: usize,
}

/// An input of which some tokens may have been read.
struct Begun {
    index: usize,
    /// None while a batch has it.
    cache: Option<KeyValueCache>,
    pooled: Pooled,
    _memory: Reservation,
}

/// The queue.
#[derive(Default)]
pub(super) struct Embeddings(VecDeque<Queued>);

impl Embeddings {
    /// Whether something is queued.
    pub(super) fn is_waiting(&self) -> bool {
        !self.0.is_empty()
    }

    /// Ends all with an error.
    pub(super) fn end_all(&mut self, error: &impl Fn() -> Error) {
        for mut queued in self.0.drain(..) {
            queued.fail(error());
        }
    }

    /// Sends what waits, and drops what is over or what nobody waits for.
    fn tidy(&mut self) {
        self.0.retain_mut(|queued| {
            if queued.request.request.is_cancelled() && !queued.is_finished() {
                queued.fail(Error::Cancelled);
            }
            queued.flush() && !(queued.is_finished() && queued.outbox.is_none())
        });
    }
}

impl Queued {
    fn is_finished(&self) -> bool {
        self.done == self.request.inputs.len()
    }

    /// Ends it with an error.
    fn fail(&mut self, error: Error) {
        self.done = self.request.inputs.len();
        self.begun.clear();
        self.next = self.done;
        self.outbox = Some(Err(error));
        self.flush();
    }

    /// Sends what waits if there is room; false when the client is gone.
    fn flush(&mut self) -> bool {
        let Some(message) = self.outbox.take() else {
            return !self.request.output.is_closed();
        };
        match self.request.output.try_send(message) {
            Ok(()) => true,
            Err(TrySendError::Full(message)) => {
                self.outbox = Some(message);
                true
            }
            Err(TrySendError::Closed(_)) => false,
        }
    }

    /// The next tokens of a begun input.
    fn chunk(&self, begun: &Begun) -> &[u32] {
        let tokens = &self.request.inputs[begun.index];
        let read = begun.cache.as_ref().map_or(0, KeyValueCache::len);
        &tokens[read..tokens.len().min(read + CHUNK)]
    }
}

impl Owner {
    /// Queues inputs.
    ///
    /// # Errors
    /// `Limit` when the queue is full, or this caller's part of it.
    pub(crate) fn submit_embedding(&mut self, request: EmbeddingRequest) -> Result<()> {
        self.embeddings.tidy();
        let queue = Queue {
            kind: "embedding",
            model: &self.shared.name,
            places: self.limits.queue,
            waiting: self.embeddings.0.iter().map(|queued| &queued.request.caller).collect(),
        };
        queue.check(&request.caller, 1)?;
        request.request.wake_on_cancel(std::sync::Arc::clone(&self.shared.wake));
        request.request.set_progress(0, request.inputs.len() as u64);
        self.embeddings.0.push_back(Queued {
            request,
            next: 0,
            begun: Vec::new(),
            outbox: None,
            done: 0,
        });
        Ok(())
    }

    /// Computes the next batch; false when there was none.
    pub(super) fn embed(&mut self) -> bool {
        self.embeddings.tidy();
        let mut queue = std::mem::take(&mut self.embeddings.0);
        let batch = self.gather(&mut queue);
        let worked = !batch.is_empty();
        if worked && let Err(error) = self.embed_batch(&mut queue, &batch) {
            for &(queued, _) in &batch {
                if !queue[queued].is_finished() {
                    queue[queued].fail(error.for_another());
                }
            }
        }
        self.embeddings.0 = queue;
        self.embeddings.tidy();
        worked
    }

    /// Which inputs come next: positions in the queue and among the begun inputs there. All are of one view.
    fn gather(&mut self, queue: &mut VecDeque<Queued>) -> Vec<(usize, usize)> {
        let most_tokens = match self.generations.is_empty() {
            true => BATCH_TOKENS,
            false => CHUNK,
        };
        let mut batch: Vec<(usize, usize)> = Vec::new();
        let mut tokens = 0;
        let mut view: Option<View> = None;
        for (place, queued) in queue.iter_mut().enumerate() {
            let other_view = view.as_ref().is_some_and(|view| *view != queued.request.view);
            if queued.outbox.is_some() || queued.is_finished() || other_view {
                continue;
            }
            for position in 0.. {
                if position == queued.begun.len() && !self.begin_input(queued, batch.is_empty()) {
                    break;
                }
                let length = queued.chunk(&queued.begun[position]).len();
                let full = tokens + length > most_tokens || batch.len() == BATCH_INPUTS;
                if full && !batch.is_empty() {
                    return batch;
                }
                tokens += length;
                batch.push((place, position));
                view.get_or_insert_with(|| queued.request.view.clone());
            }
        }
        batch
    }

    /// Begins the next input of a request; false when there is none, or no memory for it yet. `alone` says that nothing
    /// else will give memory back.
    fn begin_input(&mut self, queued: &mut Queued, alone: bool) -> bool {
        let Some(tokens) = queued.request.inputs.get(queued.next) else {
            return false;
        };
        let config = self.model.decoder.config();
        let bytes = 8 * (config.layers * config.key_value_heads * config.head_dim * tokens.len()) as u64;
        match self.budget.reserve("the keys and values of an embedding", bytes) {
            Ok(memory) => {
                queued.request.request.set_phase(Phase::Running);
                queued.begun.push(Begun {
                    index: queued.next,
                    cache: Some(self.model.decoder.new_cache()),
                    pooled: Pooled::new(queued.request.pooling, config.width),
                    _memory: memory,
                });
                queued.next += 1;
                true
            }
            Err(_) if !alone || !self.generations.is_empty() => false,
            Err(error) => {
                queued.fail(error);
                false
            }
        }
    }

    /// One forward pass over the batch, and what it finishes.
    fn embed_batch(&mut self, queue: &mut VecDeque<Queued>, batch: &[(usize, usize)]) -> Result<()> {
        let view = queue[batch[0].0].request.view.clone();
        let shared = std::sync::Arc::clone(&self.shared);
        let decoder = self.decoder(&view)?;
        let mut caches: Vec<KeyValueCache> = batch
            .iter()
            .filter_map(|&(queued, position)| queue[queued].begun[position].cache.take())
            .collect();
        let lengths = |(&(queued, position), cache): (&(usize, usize), &KeyValueCache)| {
            let tokens = &queue[queued].request.inputs[queue[queued].begun[position].index];
            cache.len()..tokens.len().min(cache.len() + CHUNK)
        };
        let ranges: Vec<_> = batch.iter().zip(&caches).map(lengths).collect();
        let mut steps: Vec<SequenceStep<'_>> = batch
            .iter()
            .zip(&ranges)
            .zip(&mut caches)
            .map(|((&(queued, position), range), cache)| SequenceStep {
                tokens: &queue[queued].request.inputs[queue[queued].begun[position].index][range.clone()],
                cache,
            })
            .collect();
        let waited_for = |&(queued, _): &(usize, usize)| {
            let request = &queue[queued].request;
            !request.output.is_closed() && !request.request.is_cancelled()
        };
        let states = decoder.states(&mut steps, &|| shared.is_unloaded() || !batch.iter().any(waited_for))?;
        let states = states
            .flatten_all()
            .and_then(|flat| flat.to_vec1::<f32>())
            .map_err(candle_models::Error::from)?;
        drop(steps);
        let width = decoder.config().width;
        let mut first = 0;
        for ((&(queued, position), range), cache) in batch.iter().zip(&ranges).zip(caches) {
            let begun = &mut queue[queued].begun[position];
            begun.cache = Some(cache);
            begun.pooled.add(&states[first * width..(first + range.len()) * width]);
            first += range.len();
        }
        queue.iter_mut().for_each(Queued::collect);
        Ok(())
    }
}

impl Queued {
    /// Sends the vectors of inputs that have been read as a whole.
    fn collect(&mut self) {
        let inputs = &self.request.inputs;
        let is_read =
            |begun: &mut Begun| begun.cache.as_ref().map_or(0, KeyValueCache::len) == inputs[begun.index].len();
        let read: Vec<Begun> = self.begun.extract_if(.., is_read).collect();
        if read.is_empty() {
            return;
        }
        self.done += read.len();
        let total = inputs.len() as u64;
        self.request.request.set_progress(self.done as u64, total);
        let normalize = self.request.normalize;
        let embedding = |begun: Begun| {
            let values = begun.pooled.finish(normalize)?;
            Ok(v1::Embedding {
                index: u32::try_from(begun.index).unwrap_or(u32::MAX),
                tokens: u32::try_from(inputs[begun.index].len()).unwrap_or(u32::MAX),
                values: values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect::<Vec<u8>>()
                    .into(),
            })
        };
        let embeddings: Result<Vec<_>> = read.into_iter().map(embedding).collect();
        match embeddings {
            Ok(embeddings) => {
                self.outbox = Some(Ok(v1::EmbedResponse { embeddings }));
                self.flush();
            }
            Err(error) => self.fail(error),
        }
    }
}
