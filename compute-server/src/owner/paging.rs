//! The caches of generations: whose weights they were computed with, and room for their next positions.
//!
//! Where no page is to be had, the generation that started last is put back: its pages are free for the others, and it
//! computes them again, as far as they have been evicted meanwhile, when there is room. The one that started first is
//! never put back for another, so that some generation always goes on.
//!
//! A generation whose weights change while it runs computes its cache again from its tokens: every token is what one state
//! of the model says about all tokens before it.

use candle_models::KeyValueCache;

use super::AppliedAdapter;
use super::factors::Factors;
use super::generation::GenerationRequest;
use super::round::PREFILL_CHUNK;
use super::sequence::Sequence;
use super::state::Owner;
use crate::error::{Error, Result};

/// The weights that a cache is computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Weights {
    /// The committed ones.
    Committed {
        /// Their version.
        version: u64,
        /// The adapter that is added: its number, and the version of its factors.
        adapter: Option<(u64, u64)>,
    },
    /// Those of that number which a transaction staged.
    Staged(u64),
}

impl Owner {
    /// The weights of a generation, as far as its view's changes have been applied to a copy.
    fn weights(&self, request: &GenerationRequest, factors: Option<&Factors>) -> Weights {
        match self.staged_state(&request.view) {
            Some(state) => Weights::Staged(state.number),
            None => Weights::Committed {
                version: self.versions.weights,
                adapter: request
                    .adapter
                    .as_ref()
                    .map(AppliedAdapter::id)
                    .zip(factors.map(|factors| factors.version)),
            },
        }
    }

    /// An empty cache for a generation on those weights. Only committed weights share pages.
    fn cache_for(&self, request: &GenerationRequest, weights: Weights) -> KeyValueCache {
        let pages = &self.shared.pages;
        let scope = match weights {
            _ if request.ignore_cache => None,
            Weights::Committed { version, adapter: None } => Some(pages.scope("", [version, 0])),
            Weights::Committed {
                version,
                adapter: Some((adapter, factors)),
            } => Some(pages.scope(&adapter.to_string(), [version, factors])),
            Weights::Staged(_) => None,
        };
        pages.cache(scope)
    }

    /// A cache for a generation that is about to start, with what others have computed of its prompt and room for the
    /// first tokens after that; and the weights.
    ///
    /// # Errors
    /// `ResourceExhausted` when there is no page.
    pub(super) fn first_cache(&self, request: &GenerationRequest) -> candle_models::Result<(Weights, KeyValueCache)> {
        let factors = request.adapter.as_ref().and_then(|adapter| adapter.factors().ok());
        let weights = self.weights(request, factors.as_deref());
        let mut cache = self.cache_for(request, weights);
        let reused = cache.reuse(&request.tokens);
        cache.reserve(PREFILL_CHUNK.min(request.tokens.len() - reused))?;
        Ok((weights, cache))
    }

    /// Gives up pages of weights that are no more.
    pub(super) fn forget_stale_pages(&self) {
        let present = self.versions.weights;
        self.shared.pages.retain_scopes(|[version, _]| version == present);
    }

    /// Lets a generation begin its cache anew if its weights have changed.
    pub(super) fn follow_weights(&self, sequence: &mut Sequence, factors: Option<&Factors>) {
        let weights = self.weights(&sequence.request, factors);
        if sequence.weights != weights {
            let cache = self.cache_for(&sequence.request, weights);
            sequence.restart(weights, cache);
        }
    }

    /// Refuses a generation whose pages could never be there together.
    ///
    /// # Errors
    /// `Limit`.
    pub(super) fn check_pages(&self, tokens: usize) -> Result<()> {
        let (bytes, limit) = (self.shared.pages.bytes_for(tokens), self.budget.cache.limit());
        match bytes > limit {
            true => Err(Error::Limit {
                what: format!("a key/value cache of {bytes} bytes for a generation of {tokens} tokens"),
                limit,
                flag: "cache-bytes",
            }),
            false => Ok(()),
        }
    }

    /// Makes room for so many tokens of `active[index]`, if need be by putting others back; false when it was put back
    /// itself, or ended because there will never be room.
    pub(super) fn make_room(&mut self, active: &mut [Sequence], index: usize, tokens: usize) -> bool {
        loop {
            match active[index].reserve(tokens) {
                Ok(()) => return true,
                Err(candle_models::Error::ResourceExhausted(_)) => {}
                Err(error) => {
                    active[index].fail(error.into());
                    return false;
                }
            }
            // Whoever waits for his client anyway goes first, then the youngest.
            let rank = |other: usize| (active[other].is_paused(), active[other].started, other);
            let others = (0..active.len()).filter(|&other| other != index && active[other].holds_pages());
            let last = others.max_by_key(|&other| rank(other));
            self.generations.is_tight = true;
            match last {
                Some(other) if rank(other) > rank(index) => active[other].put_back(),
                Some(_) => {
                    active[index].put_back();
                    return false;
                }
                None => return self.wait_for_others(&mut active[index]),
            }
        }
    }

    /// What to do with a generation for which there is no room though it is alone: other models may give memory back.
    fn wait_for_others(&self, sequence: &mut Sequence) -> bool {
        sequence.put_back();
        if self.is_alone_with_pages() {
            sequence.fail(self.no_room());
        }
        false
    }

    /// Whether no other model holds pages that it could give back.
    pub(super) fn is_alone_with_pages(&self) -> bool {
        self.budget.cache.used() <= self.shared.pages.bytes()
    }

    /// The error of a generation for which there is no page.
    pub(super) fn no_room(&self) -> Error {
        let page = self.shared.pages.usage().page_bytes;
        match self
            .budget
            .server()
            .reserve("the key/value cache of a generation", page)
        {
            Err(error) => error,
            Ok(_) => Error::Limit {
                what: "a further page of a generation's key/value cache".to_owned(),
                limit: self.budget.cache.limit(),
                flag: "cache-bytes",
            },
        }
    }
}
