//! The keys and values of one sequence's past: a table of pages.

use std::sync::Arc;

use candle_kernels_cpu::{CacheType, CachedSequence, PageLayout};

use super::page::{PAGE_POSITIONS, Page, PageShape};
use super::pool::PagePool;
use super::prefix::{EntryId, Place, Scope};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};

/// Keys and values of one sequence in every layer. Grows by pages; a fresh one holds nothing.
#[derive(Debug)]
pub struct KeyValueCache {
    shape: PageShape,
    context_length: usize,
    /// Pages of the positions in order; those behind the last position are reserved.
    pages: Vec<Arc<Page>>,
    length: usize,
    pool: Option<Arc<PagePool>>,
    shared: Option<Shared>,
}

/// Which of the pages can be found by other sequences.
#[derive(Debug)]
struct Shared {
    scope: Scope,
    /// The first pages' numbers in the index.
    entries: Vec<EntryId>,
    /// Set when the index has forgotten the pages before.
    forgotten: bool,
}

impl Shared {
    /// The place behind the last page.
    fn parent(&self) -> EntryId {
        self.entries.last().copied().unwrap_or(self.scope.0)
    }
}

impl KeyValueCache {
    /// A cache of its own, with elements as they are computed.
    pub(crate) fn new(config: &DecoderConfig) -> Self {
        Self::with_shape(PageShape::new(config, CacheType::F32), config.context_length)
    }

    pub(super) fn pooled(pool: Arc<PagePool>, scope: Option<Scope>) -> Self {
        Self {
            shared: scope.map(|scope| Shared {
                scope,
                entries: Vec::new(),
                forgotten: false,
            }),
            ..Self {
                pool: Some(Arc::clone(&pool)),
                ..Self::with_shape(*pool.shape(), pool.context_length())
            }
        }
    }

    fn with_shape(shape: PageShape, context_length: usize) -> Self {
        Self {
            shape,
            context_length,
            pages: Vec::new(),
            length: 0,
            pool: None,
            shared: None,
        }
    }

    /// Number of positions held.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Positions that can still be added.
    pub fn remaining(&self) -> usize {
        self.context_length - self.length
    }

    /// Forgets the positions from `length` on. Longer than what is held changes nothing.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        self.pages.truncate(self.length.div_ceil(PAGE_POSITIONS));
        if let Some(shared) = &mut self.shared {
            shared.entries.truncate(self.length / PAGE_POSITIONS);
        }
    }

    /// Bytes of its pages, shared ones included.
    pub fn memory_bytes(&self) -> u64 {
        self.pages.len() as u64 * self.shape.bytes()
    }

    /// Takes over pages that hold the next of `tokens`, all tokens of the sequence, which begin with those held. At least
    /// one is left to be computed. Returns the number of positions taken over.
    ///
    /// Numbers do not depend on it: a page holds what computing it again would give.
    pub fn reuse(&mut self, tokens: &[u32]) -> usize {
        let before = self.length;
        let (Some(pool), Some(shared)) = (&self.pool, &mut self.shared) else {
            return 0;
        };
        if shared.entries.len() * PAGE_POSITIONS != self.length {
            return 0;
        }
        let mut index = pool.lock();
        let ahead = tokens
            .get(self.length..tokens.len().saturating_sub(1))
            .unwrap_or_default();
        for tokens in ahead.as_chunks::<PAGE_POSITIONS>().0 {
            let Some((entry, page)) = index.find(shared.parent(), tokens) else {
                break;
            };
            match self.pages.get_mut(shared.entries.len()) {
                Some(reserved) => *reserved = page,
                None => self.pages.push(page),
            }
            shared.entries.push(entry);
            self.length += PAGE_POSITIONS;
        }
        self.length - before
    }

    /// Where the next page of `tokens`, all tokens of the sequence, will be found once it has been computed and
    /// [shared](Self::share). Whoever has the same place is about to compute the same page, and could
    /// [take it over](Self::reuse) instead. None where no full page is left to be computed, or nothing is shared.
    pub fn next_place(&self, tokens: &[u32]) -> Option<Place> {
        let shared = self.shared.as_ref().filter(|shared| !shared.forgotten)?;
        let ahead = tokens.get(self.length..tokens.len().saturating_sub(1))?;
        let is_next = shared.entries.len() * PAGE_POSITIONS == self.length;
        Some(Place {
            parent: shared.parent(),
            tokens: *ahead.first_chunk().filter(|_| is_next)?,
        })
    }

    /// Lets other sequences find the full pages. `tokens` are those of the positions held, or more.
    pub fn share(&mut self, tokens: &[u32]) {
        let (Some(pool), Some(shared)) = (&self.pool, &mut self.shared) else {
            return;
        };
        let full = self.length.min(tokens.len()) / PAGE_POSITIONS;
        if shared.forgotten || shared.entries.len() >= full {
            return;
        }
        let mut index = pool.lock();
        let chunks = tokens.as_chunks::<PAGE_POSITIONS>().0;
        for (tokens, page) in chunks[..full].iter().zip(&mut self.pages).skip(shared.entries.len()) {
            let Some((entry, present)) = index.insert(shared.parent(), tokens, page) else {
                shared.forgotten = true;
                return;
            };
            // Another sequence may have computed the same meanwhile.
            *page = present;
            shared.entries.push(entry);
        }
    }

    /// Makes room for `added` more positions.
    ///
    /// Fails with [`Error::InvalidArgument`] when the context does not hold them, and with
    /// [`Error::ResourceExhausted`] when the pool has no page; pages taken until then stay reserved.
    pub fn reserve(&mut self, added: usize) -> Result<()> {
        if added > self.remaining() {
            return Err(Error::InvalidArgument(format!(
                "{} positions do not fit the context of {}",
                self.length + added,
                self.context_length
            )));
        }
        // A cut sequence goes on in a page that others may read.
        if added > 0
            && let Some(page) = self.pages.get_mut(self.length / PAGE_POSITIONS)
            && Arc::get_mut(page).is_none()
        {
            *page = Arc::new(page.copy(&self.shape)?);
        }
        while self.pages.len() * PAGE_POSITIONS < self.length + added {
            let page = match &self.pool {
                Some(pool) => pool.new_page()?,
                None => Page::new(&self.shape, None)?,
            };
            self.pages.push(Arc::new(page));
        }
        Ok(())
    }

    /// Whether this cache was made for a decoder of that configuration.
    pub(crate) fn fits(&self, config: &DecoderConfig) -> bool {
        self.shape == PageShape::new(config, self.shape.layout.kind) && self.context_length == config.context_length
    }

    /// Writes the keys and values `[added, key_value_width]` of new positions behind those held. They count as held only
    /// after [`advance`](Self::advance). Fails when there is no room [reserved](Self::reserve) for them.
    pub(crate) fn append(&mut self, layer: usize, keys: &[f32], values: &[f32]) -> Result<()> {
        let width = self.shape.key_value_width();
        let (mut position, mut start) = (self.length, 0);
        while start < keys.len() {
            let first = position % PAGE_POSITIONS;
            let end = keys.len().min(start + (PAGE_POSITIONS - first) * width);
            let page = self.pages.get_mut(position / PAGE_POSITIONS).and_then(Arc::get_mut);
            let page = page.ok_or_else(|| Error::FailedPrecondition("no room was reserved in the cache".into()))?;
            let part = page.layer_mut(&self.shape, layer);
            self.shape
                .layout
                .store(part, first, &keys[start..end], &values[start..end]);
            position += (end - start) / width;
            start = end;
        }
        Ok(())
    }

    /// Counts `added` appended positions as held.
    pub(crate) fn advance(&mut self, added: usize) {
        self.length += added;
    }

    /// The layout of each layer's part of its pages.
    pub(crate) fn layout(&self) -> &PageLayout {
        &self.shape.layout
    }

    /// One layer's part of each page.
    pub(crate) fn table(&self, layer: usize) -> Vec<&[f32]> {
        self.pages.iter().map(|page| page.layer(&self.shape, layer)).collect()
    }

    /// The sequence as the kernels see it with `new_tokens` appended: `pages` is its [`table`](Self::table).
    pub(crate) fn sequence<'a>(&self, pages: &'a [&'a [f32]], new_tokens: usize) -> CachedSequence<'a> {
        CachedSequence {
            pages,
            positions: self.length + new_tokens,
            new_tokens,
        }
    }

    /// Keys and values of the first `positions` in one layer as f32, each `[positions, key_value_width]`.
    pub(crate) fn gather(&self, layer: usize, positions: usize) -> [Vec<f32>; 2] {
        let width = self.shape.key_value_width();
        let [mut keys, mut values] = [(); 2].map(|()| vec![0.0; positions * width]);
        let step = PAGE_POSITIONS * width;
        let parts = keys.chunks_mut(step).zip(values.chunks_mut(step));
        for ((keys, values), page) in parts.zip(self.table(layer)) {
            self.shape.layout.load(page, keys, values);
        }
        [keys, values]
    }
}
