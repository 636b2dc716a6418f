//! Pages that sequences share, and the memory that they take.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Device;
use candle_kernels_cpu::CacheType;
use serde_json::json;

use super::*;
use crate::config::from_settings;
use crate::decoder::{Decoder, SequenceStep};
use crate::error::Error;

/// Memory for some number of pages.
#[derive(Debug)]
struct Memory {
    free: AtomicU64,
}

impl PageMemory for Memory {
    fn reserve(&self, bytes: u64) -> bool {
        self.free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(bytes))
            .is_ok()
    }

    fn release(&self, bytes: u64) {
        self.free.fetch_add(bytes, Ordering::Relaxed);
    }
}

fn decoder() -> Decoder {
    let settings = json!({"architecture": "llama", "layers": 2, "width": 32, "heads": 4, "key_value_heads": 2,
        "feed_forward_width": 32, "context_length": 400, "vocabulary": 61});
    let config = from_settings(settings.as_object().unwrap(), None).unwrap();
    Decoder::initialize(config, &Device::Cpu, None, 5).unwrap()
}

fn pool(decoder: &Decoder, kind: CacheType, pages: u64) -> (Arc<PagePool>, Arc<Memory>) {
    let bytes = PageShape::new(decoder.config(), kind).bytes();
    let memory = Arc::new(Memory {
        free: AtomicU64::new(pages * bytes),
    });
    let granted = Arc::clone(&memory) as Arc<dyn PageMemory>;
    (Arc::new(PagePool::new(decoder.config(), kind, granted)), memory)
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 7 + 3 * i + 1) % 61) as u32).collect()
}

/// Runs what the cache does not hold yet of the tokens, `chunk` at a time, and shares it. Returns the last logits.
fn run(decoder: &Decoder, cache: &mut KeyValueCache, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let mut logits = Vec::new();
    while cache.len() < tokens.len() {
        let end = tokens.len().min(cache.len() + chunk);
        let step = SequenceStep {
            tokens: &tokens[cache.len()..end],
            cache,
        };
        logits = decoder
            .forward(&mut [step])
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        cache.share(tokens);
    }
    logits
}

#[test]
fn logits_are_the_same_after_a_prefix_hit_whatever_the_type_of_pages() {
    let decoder = decoder();
    for kind in [CacheType::F32, CacheType::F16, CacheType::Q8] {
        let (pool, _) = pool(&decoder, kind, 100);
        let scope = pool.scope("", [0, 0]);
        let prompt = tokens(150);
        let other = [&prompt[..100], &[3, 1, 4, 1, 5]].concat();
        let mut alone = pool.cache(None);
        let expected = run(&decoder, &mut alone, &prompt, 150);
        let expected_other = run(&decoder, &mut pool.cache(None), &other, 1);
        let mut first = pool.cache(Some(scope));
        assert_eq!(first.reuse(&prompt), 0);
        assert_eq!(run(&decoder, &mut first, &prompt, 33), expected, "{kind:?}");
        let mut second = pool.cache(Some(scope));
        assert_eq!(second.reuse(&prompt), 144);
        assert_eq!(run(&decoder, &mut second, &prompt, 150), expected, "{kind:?}");
        let mut third = pool.cache(Some(scope));
        assert_eq!(third.reuse(&other), 96);
        assert_eq!(run(&decoder, &mut third, &other, 7), expected_other, "{kind:?}");
        // Of the prompt itself at least one token is computed.
        assert_eq!(pool.cache(Some(scope)).reuse(&prompt[..96]), 80);
        if kind == CacheType::F32 {
            let whole = decoder
                .logits(&prompt)
                .unwrap()
                .get(149)
                .unwrap()
                .to_vec1::<f32>()
                .unwrap();
            assert_eq!(whole, expected);
        }
    }
}

#[test]
fn eight_bits_change_the_logits_little() {
    let decoder = decoder();
    let exact = run(&decoder, &mut decoder.new_cache(), &tokens(200), 200);
    let spread = exact.iter().fold(0f32, |most, value| most.max(value.abs()));
    let mut before = 0.0;
    for (kind, tolerance) in [(CacheType::F16, 1e-3), (CacheType::Q8, 2e-2)] {
        let (pool, _) = pool(&decoder, kind, 100);
        let found = run(&decoder, &mut pool.cache(None), &tokens(200), 200);
        let worst = exact
            .iter()
            .zip(found)
            .fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(
            worst > before && worst < tolerance * spread,
            "{kind:?}: {worst} of {spread}"
        );
        before = worst;
    }
}

#[test]
fn pages_of_other_weights_are_not_reused_and_are_given_back() {
    let decoder = decoder();
    let (pool, memory) = pool(&decoder, CacheType::F32, 100);
    let free = memory.free.load(Ordering::Relaxed);
    let prompt = tokens(40);
    let (model, adapter) = (pool.scope("", [1, 0]), pool.scope("style", [1, 7]));
    let mut running = pool.cache(Some(model));
    run(&decoder, &mut running, &prompt, 40);
    assert_eq!(pool.cache(Some(adapter)).reuse(&prompt), 0);
    assert_eq!(pool.cache(None).reuse(&prompt), 0);
    assert_eq!(pool.scope("", [1, 0]), model);
    assert_eq!(pool.cache(Some(model)).reuse(&prompt), 32);
    let trained = pool.scope("", [2, 0]);
    assert_eq!(pool.cache(Some(trained)).reuse(&prompt), 0);
    assert_eq!(pool.cache(Some(model)).reuse(&prompt), 0);
    assert_eq!(pool.usage().indexed_pages, 0);
    // What still runs on the old weights goes on, and shares nothing any more.
    run(&decoder, &mut running, &tokens(80), 40);
    assert_eq!(pool.usage().indexed_pages, 0);
    drop(running);
    assert_eq!((pool.bytes(), memory.free.load(Ordering::Relaxed)), (0, free));
}

#[test]
fn unused_pages_are_evicted_by_recency_from_the_ends() {
    let decoder = decoder();
    let (pool, memory) = pool(&decoder, CacheType::F32, 12);
    let scope = Some(pool.scope("", [0, 0]));
    let common = tokens(64);
    let [first, second] = [[7; 32], [9; 32]].map(|end| [&common[..], &end].concat());
    for prompt in [&first, &second] {
        let mut cache = pool.cache(scope);
        cache.reuse(prompt);
        run(&decoder, &mut cache, prompt, 50);
    }
    assert_eq!((pool.usage().pages, pool.usage().indexed_pages), (8, 8));
    // The older end goes first, then the younger one; the beginning is behind neither.
    let page = PageShape::new(decoder.config(), CacheType::F32).bytes();
    assert_eq!(pool.evict(2 * page), 2 * page);
    assert_eq!(pool.cache(scope).reuse(&[&first[..], &[0]].concat()), 64);
    let mut held = pool.cache(scope);
    assert_eq!(held.reuse(&[&second[..], &[0]].concat()), 96);
    assert_eq!((pool.evict(10 * page), pool.oldest()), (0, None), "a sequence uses all");
    held.truncate(70);
    assert_eq!(pool.evict(10 * page), page);
    drop(held);
    assert_eq!(pool.evict(10 * page), 5 * page);
    assert_eq!(
        (pool.usage().pages, memory.free.load(Ordering::Relaxed)),
        (0, 12 * page)
    );
    assert_eq!(pool.usage().evicted_pages, 8);
}

#[test]
fn a_pool_without_room_refuses_and_leaves_the_cache_as_it_was() {
    let decoder = decoder();
    let (pool, _) = pool(&decoder, CacheType::F32, 3);
    let mut cache = pool.cache(None);
    run(&decoder, &mut cache, &tokens(40), 40);
    let step = SequenceStep {
        tokens: &tokens(20),
        cache: &mut cache,
    };
    assert!(matches!(decoder.forward(&mut [step]), Err(Error::ResourceExhausted(_))));
    assert_eq!(cache.len(), 40);
    let expected = decoder
        .logits(&tokens(48))
        .unwrap()
        .get(47)
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    assert_eq!(run(&decoder, &mut cache, &tokens(48), 8), expected);
}

#[test]
fn a_cut_sequence_changes_no_page_of_another() {
    let decoder = decoder();
    let (pool, _) = pool(&decoder, CacheType::F32, 100);
    let scope = Some(pool.scope("", [0, 0]));
    let prompt = tokens(64);
    run(&decoder, &mut pool.cache(scope), &prompt, 64);
    let mut cut = pool.cache(scope);
    cut.reuse(&[&prompt[..], &[0]].concat());
    cut.truncate(40);
    let other = [&prompt[..40], &[2; 24]].concat();
    let expected = decoder
        .logits(&other)
        .unwrap()
        .get(63)
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    assert_eq!(run(&decoder, &mut cut, &other, 24), expected);
    let mut again = pool.cache(scope);
    let longer = [&prompt[..], &[5]].concat();
    assert_eq!(again.reuse(&longer), 64);
    let expected = decoder
        .logits(&longer)
        .unwrap()
        .get(64)
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    assert_eq!(run(&decoder, &mut again, &longer, 1), expected);
}

#[test]
fn sequences_that_compute_the_same_at_once_end_up_with_one_copy() {
    let decoder = decoder();
    let (pool, _) = pool(&decoder, CacheType::F32, 100);
    let scope = Some(pool.scope("", [0, 0]));
    let prompt = tokens(33);
    let mut caches = [pool.cache(scope), pool.cache(scope)];
    for cache in &mut caches {
        run(&decoder, cache, &prompt, 33);
    }
    assert_eq!((pool.usage().pages, pool.usage().indexed_pages), (4, 2));
    // A prompt of which another sequence has computed more meanwhile goes on behind that.
    let mut slow = pool.cache(scope);
    slow.reuse(&prompt[..17]);
    slow.reserve(17).unwrap();
    assert_eq!((slow.reuse(&prompt), slow.len()), (16, 32));
}
