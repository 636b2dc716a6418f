//! The generations of one model: a queue, and the sequences that run together.

use std::sync::Arc;
use std::time::Instant;

use candle_compute_proto::v1;
use candle_models::sampling::Sampler;
use candle_models::{CompletionText, Constraint, Tokenizer};
use tokio::sync::mpsc;

use super::places::Queue;
use super::sequence::Sequence;
use super::state::Owner;
use super::turns::TurnQueue;
use super::{AppliedAdapter, View};
use crate::access::Caller;
use crate::cache_memory::CacheMemory;
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::metrics::ModelMetrics;
use crate::requests::RequestGuard;

/// A generation to be run: one completion of a request.
pub(crate) struct GenerationRequest {
    /// Whose weights it uses.
    pub(crate) view: View,
    /// What is added to them, where the thread is not the adapter's own.
    pub(crate) adapter: Option<AppliedAdapter>,
    /// The prompt; generated tokens are added behind it.
    pub(crate) tokens: Vec<u32>,
    /// Which completion of its request it is.
    pub(crate) choice: u32,
    /// Computes everything itself, and shares nothing of what it computes.
    pub(crate) ignore_cache: bool,
    /// Most tokens to generate, at least 1; prompt and completion together fit the context.
    pub(crate) max_tokens: usize,
    /// Chooses tokens.
    pub(crate) sampler: Sampler,
    /// What the completion must look like, if anything.
    pub(crate) constraint: Option<Constraint>,
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

impl GenerationRequest {
    /// Why it ends before its turn or in the middle, unless it goes on.
    pub(super) fn end(&self) -> Option<Error> {
        let late = |deadline: Instant| Instant::now() >= deadline;
        if self.caller.deadline.is_some_and(late) {
            return Some(Error::DeadlineExceeded);
        }
        self.adapter.as_ref().and_then(|adapter| adapter.check().err())
    }
}

/// Queue and running generations.
#[derive(Default)]
pub(super) struct Generations {
    waiting: TurnQueue<GenerationRequest>,
    pub(super) active: Vec<Sequence>,
    /// Counts rounds.
    pub(super) round: u64,
    /// Whether there was no page for a generation since the last one ended.
    pub(super) is_tight: bool,
}

impl Generations {
    /// Drops what is over, which makes room.
    fn drop_ended(&mut self, cache: &CacheMemory) {
        let before = self.active.len();
        self.active.retain(|sequence| !sequence.is_over());
        if self.active.len() < before {
            cache.trim();
        }
        if self.active.len() < before || !self.active.iter().any(Sequence::holds_pages) {
            self.is_tight = false;
        }
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.active.is_empty() && self.waiting.len() == 0
    }

    /// Whether time alone may change what is to be done: generations wait for memory or give up, or have a deadline.
    pub(super) fn watches_time(&self) -> bool {
        let watched = |sequence: &Sequence| sequence.waits_for_room() || sequence.request.caller.deadline.is_some();
        self.waiting.len() > 0 || self.active.iter().any(watched)
    }

    /// Ends all with an error.
    pub(super) fn end_all(&mut self, error: &impl Fn() -> Error) {
        self.active.drain(..).for_each(|mut sequence| sequence.fail(error()));
        for waiting in self.waiting.remove_if(|_, _| true) {
            let _ = waiting.output.try_send(Err(error()));
        }
    }

    /// Drops queued generations that nobody waits for any more, or that have waited too long.
    fn drop_abandoned(&mut self, model: &str, limits: &Limits) {
        let late = |request: &GenerationRequest| {
            let timeout = limits.queue_timeout;
            timeout.filter(|timeout| request.arrived.elapsed() >= *timeout)
        };
        let leaves = |request: &GenerationRequest| {
            request.request.is_cancelled()
                || request.output.is_closed()
                || late(request).is_some()
                || request.end().is_some()
        };
        for request in self.waiting.remove_if(|_, request| leaves(request)) {
            let error = match (late(&request), request.end()) {
                _ if request.request.is_cancelled() => Error::Cancelled,
                (_, Some(error)) => error,
                (Some(timeout), None) => Error::Limit {
                    what: format!("the wait of a generation for its turn on model \"{model}\", in seconds,"),
                    limit: timeout.as_secs(),
                    flag: "queue-timeout",
                },
                (None, None) => Error::Cancelled,
            };
            let _ = request.output.try_send(Err(error));
        }
    }
}

impl Owner {
    /// Queues the completions of a request, all or none.
    ///
    /// # Errors
    /// `Limit` when the queue has no room for them, or not for this caller; or the cache never will.
    pub(crate) fn submit_generations(&mut self, requests: Vec<GenerationRequest>) -> Result<()> {
        for request in &requests {
            self.check_pages(request.tokens.len() + request.max_tokens)?;
        }
        self.generations.drop_abandoned(&self.shared.name, &self.limits);
        let queue = Queue {
            kind: "generation",
            model: &self.shared.name,
            places: self.limits.queue,
            waiting: self.generations.waiting.callers().collect(),
        };
        if let Some(first) = requests.first() {
            queue.check(&first.caller, requests.len())?;
        }
        for request in requests {
            request.request.wake_on_cancel(Arc::clone(&self.shared.wake));
            self.generations.waiting.push(request.caller.clone(), request);
        }
        Ok(())
    }

    /// Brings every sequence that can go on one step further; false when there was none.
    pub(super) fn generate(&mut self) -> bool {
        self.generations.active.iter_mut().for_each(Sequence::poll);
        self.generations.drop_ended(&self.budget.cache);
        self.admit();
        let mut active = std::mem::take(&mut self.generations.active);
        let worked = self.run_round(&mut active);
        self.generations.active = active;
        self.generations.drop_ended(&self.budget.cache);
        worked
    }

    /// Starts queued generations as far as the limits allow, their callers in turn.
    fn admit(&mut self) {
        self.generations.drop_abandoned(&self.shared.name, &self.limits);
        if self.generations.is_tight {
            return;
        }
        // Those that were put back have started before any that waits.
        let put_back = self
            .generations
            .active
            .iter_mut()
            .filter(|sequence| sequence.waits_for_room());
        if let Some(first) = put_back.min_by_key(|sequence| sequence.started) {
            return first.resume();
        }
        loop {
            // A generation whose client is slow does not keep others from running.
            let active = self.generations.active.iter();
            let running = active.filter(|sequence| !sequence.is_paused());
            let callers: Vec<_> = running.map(|sequence| &sequence.request.caller).collect();
            if callers.len() >= self.limits.generations {
                return;
            }
            let next = self.generations.waiting.next(&callers.into_iter().collect());
            let Some((at, next)) = next.and_then(|at| Some((at, self.generations.waiting.get(at)?))) else {
                return;
            };
            let cache = self.first_cache(next);
            let holds_pages = self.generations.active.iter().any(Sequence::holds_pages);
            if cache.is_err() && (holds_pages || !self.is_alone_with_pages()) {
                // Running ones will give memory back; without any the limit is too small for this request.
                return;
            }
            let Some(request) = self.generations.waiting.take(at) else {
                return;
            };
            match cache {
                Ok((weights, cache)) => self.generations.active.push(Sequence::new(request, weights, cache)),
                Err(_) => drop(request.output.try_send(Err(self.no_room()))),
            }
        }
    }
}
