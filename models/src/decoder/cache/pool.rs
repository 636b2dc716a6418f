//! The pages of one model.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_kernels_cpu::CacheType;

use super::page::{Page, PageMemory, PageShape};
use super::prefix::{PrefixIndex, Scope};
use super::sequence::KeyValueCache;
use crate::config::DecoderConfig;
use crate::error::Result;

/// Makes caches whose pages come from one memory and are shared where sequences begin alike.
#[derive(Debug)]
pub struct PagePool {
    shape: PageShape,
    context_length: usize,
    memory: Arc<dyn PageMemory>,
    index: Mutex<PrefixIndex>,
    counts: Arc<Counts>,
}

/// What happened in a pool.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Pages that exist.
    pages: AtomicU64,
    evicted: AtomicU64,
}

/// What a pool holds, and what it has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheUsage {
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Pages that there are.
    pub pages: u64,
    /// Of these, full pages that later sequences can find.
    pub indexed_pages: u64,
    /// Of these, pages that no sequence uses now.
    pub unused_pages: u64,
    /// Pages given up to make room.
    pub evicted_pages: u64,
}

impl PagePool {
    /// A pool for decoders of that configuration.
    pub fn new(config: &DecoderConfig, kind: CacheType, memory: Arc<dyn PageMemory>) -> Self {
        let counts: Arc<Counts> = Arc::default();
        Self {
            shape: PageShape::new(config, kind),
            context_length: config.context_length,
            memory: Arc::new(Counted {
                memory,
                counts: Arc::clone(&counts),
            }),
            index: Mutex::default(),
            counts,
        }
    }

    /// The scope of the weights `name` in their present `version`, whatever these mean to the caller. Pages of other
    /// versions of that name are forgotten.
    pub fn scope(&self, name: &str, version: [u64; 2]) -> Scope {
        self.lock().scope(name, version)
    }

    /// Forgets the pages of all scopes but those whose version is to be kept.
    pub fn retain_scopes(&self, keep: impl Fn([u64; 2]) -> bool) {
        self.lock().retain_scopes(keep);
    }

    /// An empty cache. With a scope it shares pages with others of the scope.
    pub fn cache(self: &Arc<Self>, scope: Option<Scope>) -> KeyValueCache {
        KeyValueCache::pooled(Arc::clone(self), scope)
    }

    /// Bytes of `positions` positions in pages.
    pub fn bytes_for(&self, positions: usize) -> u64 {
        positions.div_ceil(self.shape.layout.positions) as u64 * self.shape.bytes()
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> u64 {
        self.counts.pages.load(Ordering::Relaxed) * self.shape.bytes()
    }

    /// Bytes of the pages that no sequence uses.
    pub fn unused_bytes(&self) -> u64 {
        self.lock().unused() as u64 * self.shape.bytes()
    }

    /// When the page that would be evicted first was used, on a clock that all pools have in common; none when sequences
    /// use all.
    pub fn oldest(&self) -> Option<u64> {
        self.lock().oldest()
    }

    /// Forgets all pages; those in use end with their sequences.
    pub fn clear(&self) {
        *self.lock() = PrefixIndex::default();
    }

    /// Gives up pages of at least `bytes` that no sequence uses, or as many as there are. Returns the bytes given up.
    pub fn evict(&self, bytes: u64) -> u64 {
        let wanted = usize::try_from(bytes.div_ceil(self.shape.bytes())).unwrap_or(usize::MAX);
        let evicted = self.lock().evict(wanted) as u64;
        self.counts.evicted.fetch_add(evicted, Ordering::Relaxed);
        evicted * self.shape.bytes()
    }

    /// What it holds and has done.
    pub fn usage(&self) -> CacheUsage {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let index = self.lock();
        CacheUsage {
            page_bytes: self.shape.bytes(),
            pages: read(&self.counts.pages),
            indexed_pages: index.len() as u64,
            unused_pages: index.unused() as u64,
            evicted_pages: read(&self.counts.evicted),
        }
    }

    pub(super) fn shape(&self) -> &PageShape {
        &self.shape
    }

    pub(super) fn context_length(&self) -> usize {
        self.context_length
    }

    pub(super) fn new_page(&self) -> Result<Page> {
        Page::new(&self.shape, Some(&self.memory))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, PrefixIndex> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that counts the pages made of it.
#[derive(Debug)]
struct Counted {
    memory: Arc<dyn PageMemory>,
    counts: Arc<Counts>,
}

impl PageMemory for Counted {
    fn reserve(&self, bytes: u64) -> bool {
        let granted = self.memory.reserve(bytes);
        self.counts.pages.fetch_add(u64::from(granted), Ordering::Relaxed);
        granted
    }

    fn release(&self, bytes: u64) {
        self.counts.pages.fetch_sub(1, Ordering::Relaxed);
        self.memory.release(bytes);
    }
}
