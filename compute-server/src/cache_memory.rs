//! The memory of key/value caches: pages of all models together, within a limit of their own and the memory limit.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_models::{PageMemory, PagePool};

use crate::memory::MemoryBudget;

/// What pages hold, and where there are some to be given up.
#[derive(Debug)]
pub(crate) struct CacheMemory {
    limit: u64,
    /// Bytes of pages that may be kept though no sequence uses them.
    kept: u64,
    used: AtomicU64,
    pools: Mutex<Vec<Weak<PagePool>>>,
}

impl CacheMemory {
    /// Room for pages of `limit` bytes, of which `kept` may be of pages that no sequence uses.
    pub(crate) fn new(limit: u64, kept: u64) -> Self {
        Self {
            limit,
            kept,
            used: AtomicU64::new(0),
            pools: Mutex::default(),
        }
    }

    /// Bytes that pages may hold.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that pages hold.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Makes the pages of `pool` known that no sequence uses, so that they can be given up.
    pub(crate) fn add_pool(&self, pool: &Arc<PagePool>) {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }

    /// Gives up what no sequence uses beyond what may be kept.
    pub(crate) fn trim(&self) {
        // Pages that are used come on top, so that they need not be told apart where all together may be kept.
        if self.used() <= self.kept {
            return;
        }
        let unused = self.pools().iter().map(|pool| pool.unused_bytes()).sum::<u64>();
        if unused > self.kept {
            self.evict(unused - self.kept);
        }
    }

    fn pools(&self) -> Vec<Arc<PagePool>> {
        let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.iter().filter_map(Weak::upgrade).collect()
    }

    /// Gives up pages of about `bytes` that no sequence uses, those first that were not used for the longest. Returns how
    /// many bytes they had; 0 when there were none.
    pub(crate) fn evict(&self, bytes: u64) -> u64 {
        let pools = self.pools();
        let mut freed = 0;
        while freed < bytes {
            let oldest = pools.iter().filter_map(|pool| Some((pool.oldest()?, pool)));
            let Some((_, pool)) = oldest.min_by_key(|(used, _)| *used) else {
                break;
            };
            freed += pool.evict(bytes - freed);
        }
        freed
    }
}

impl PageMemory for MemoryBudget {
    fn reserve(&self, bytes: u64) -> bool {
        let cache = &self.cache;
        let grow = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= cache.limit);
        loop {
            let counted = cache.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow);
            if counted.is_ok() {
                if self.try_add(bytes).is_ok() {
                    return true;
                }
                cache.used.fetch_sub(bytes, Ordering::Relaxed);
            }
            if cache.evict(bytes) == 0 {
                return false;
            }
        }
    }

    fn release(&self, bytes: u64) {
        self.cache.used.fetch_sub(bytes, Ordering::Relaxed);
        self.subtract(bytes);
    }
}

#[cfg(test)]
mod tests {
    use candle_models::{CacheType, DecoderConfig, config::from_settings};
    use serde_json::json;

    use super::*;

    fn config() -> DecoderConfig {
        let settings = json!({"architecture": "gpt2", "layers": 1, "width": 8, "heads": 1, "context_length": 400,
            "vocabulary": 61});
        from_settings(settings.as_object().unwrap(), None).unwrap()
    }

    /// A pool with `pages` indexed pages of 1024 bytes.
    fn pool(budget: &Arc<MemoryBudget>, pages: usize) -> Arc<PagePool> {
        let memory = Arc::clone(budget) as Arc<dyn PageMemory>;
        let pool = Arc::new(PagePool::new(&config(), CacheType::F32, memory));
        budget.cache.add_pool(&pool);
        fill(&pool, pages);
        pool
    }

    fn fill(pool: &Arc<PagePool>, pages: usize) {
        let decoder = candle_models::Decoder::initialize(config(), &candle_models::Device::Cpu, None, 1).unwrap();
        let scope = pool.scope("", [0, 0]);
        let tokens: Vec<u32> = (0..16 * pages as u32).map(|token| token % 61).collect();
        let mut cache = pool.cache(Some(scope));
        let reused = cache.reuse(&tokens);
        let step = candle_models::SequenceStep {
            tokens: &tokens[reused..],
            cache: &mut cache,
        };
        decoder.forward(&mut [step]).unwrap();
        cache.share(&tokens);
    }

    #[test]
    fn unused_pages_make_way_for_other_work_and_for_other_models() {
        let budget = MemoryBudget::new(20 << 10, CacheMemory::new(8 << 10, 4 << 10));
        let first = pool(&budget, 5);
        let second = pool(&budget, 3);
        assert_eq!(
            (first.bytes(), second.bytes(), budget.used()),
            (5 << 10, 3 << 10, 8 << 10)
        );
        // The limit of caches: the older model's pages make way.
        fill(&second, 5);
        assert_eq!((first.bytes(), second.bytes()), (3 << 10, 5 << 10));
        let weights = budget.reserve("weights", 14 << 10).unwrap();
        assert_eq!(
            (first.bytes(), second.bytes(), budget.used()),
            (1 << 10, 5 << 10, 20 << 10)
        );
        // What no eviction could make room for evicts nothing.
        assert!(budget.reserve("more", 7 << 10).is_err());
        assert_eq!(budget.cache.used(), 6 << 10);
        drop(weights);
        budget.cache.trim();
        assert_eq!((first.bytes(), second.bytes()), (0, 4 << 10));
        drop((first, second));
        assert_eq!((budget.cache.used(), budget.used()), (0, 0));
    }

    #[test]
    fn pages_in_use_stay() {
        let budget = MemoryBudget::new(3 << 10, CacheMemory::new(3 << 10, 3 << 10));
        let pool = pool(&budget, 2);
        let mut cache = pool.cache(Some(pool.scope("", [0, 0])));
        let tokens: Vec<u32> = (0..33).collect();
        assert_eq!(cache.reuse(&tokens), 32);
        cache.reserve(16).unwrap();
        assert!(cache.reserve(17).is_err());
        assert!(budget.reserve("weights", 1).is_err());
    }
}
