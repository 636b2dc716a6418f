//! `candle.attention_layout`: well-known block layouts as rows for `attention_layouts`.

use pgrx::prelude::*;

use crate::error::{Error, OrReport, Result};

/// Most blocks on a side: the rows of a head are at most half of its square.
const MAX_BLOCKS: i32 = 65_536;

/// Which blocks a block of queries sees, beside the newest ones.
#[derive(Clone, Copy)]
enum Preset {
    /// None.
    Banded,
    /// Every so many blocks back (the strided pattern of Sparse Transformer, arXiv:1904.10509).
    Strided { stride: u32 },
    /// The first ones, which see everything before them in turn (Longformer, arXiv:2004.05150).
    Global { count: u32 },
    /// The first ones, and some at random (BigBird, arXiv:2007.14062).
    BigBird { global: u32, random: u32, seed: u64 },
}

/// Rows of a layout: which blocks of keys each block of queries sees. `window_blocks` counts the newest blocks that are
/// seen, the block itself among them.
#[pg_extern(immutable, parallel_safe)]
#[allow(clippy::too_many_arguments)]
fn attention_layout(
    preset: Option<&str>,
    layers: Option<i32>,
    heads: Option<i32>,
    blocks: Option<i32>,
    window_blocks: default!(Option<i32>, "NULL"),
    stride: default!(Option<i32>, "NULL"),
    global_blocks: default!(Option<i32>, "NULL"),
    random_blocks: default!(Option<i32>, "NULL"),
    seed: default!(Option<i64>, "NULL"),
) -> TableIterator<
    'static,
    (
        name!(layer, i32),
        name!(head, i32),
        name!(query_block, i32),
        name!(key_block, i32),
    ),
> {
    let read = || -> Result<(Preset, [u32; 4])> {
        let layers = at_least(1, "layers", layers, i32::MAX)?;
        let heads = at_least(1, "heads", heads, i32::MAX)?;
        let blocks = at_least(1, "blocks", blocks, MAX_BLOCKS)?;
        let window = at_least(1, "window_blocks", window_blocks.or(Some(1)), i32::MAX)?;
        let global = at_least(0, "global_blocks", global_blocks.or(Some(1)), i32::MAX)?;
        let random = at_least(0, "random_blocks", random_blocks.or(Some(1)), i32::MAX)?;
        let stride = match stride {
            Some(_) => at_least(1, "stride", stride, i32::MAX)?,
            None => blocks.isqrt().max(1),
        };
        let preset = match preset.unwrap_or_default() {
            "banded" => Preset::Banded,
            "strided" => Preset::Strided { stride },
            "global" => Preset::Global { count: global },
            "bigbird" => Preset::BigBird {
                global,
                random,
                seed: seed.unwrap_or(0).cast_unsigned(),
            },
            preset => {
                let message =
                    format!("preset \"{preset}\" is not known; it must be banded, strided, global or bigbird");
                return Err(Error::bad_value(message));
            }
        };
        Ok((preset, [layers, heads, blocks, window]))
    };
    let (preset, [layers, heads, blocks, window]) = read().or_report();
    let places = (0..layers).flat_map(move |layer| (0..heads).map(move |head| (layer, head)));
    let rows = places.flat_map(move |(layer, head)| {
        (0..blocks).flat_map(move |query| {
            let keys = keys(preset, window, query, [layer, head]);
            keys.into_iter().map(move |key| (layer, head, query, key))
        })
    });
    TableIterator::new(rows.map(|(layer, head, query, key)| {
        let [layer, head, query, key] = [layer, head, query, key].map(u32::cast_signed);
        (layer, head, query, key)
    }))
}

/// The number given, within bounds. NULL is none.
fn at_least(least: i32, name: &str, value: Option<i32>, most: i32) -> Result<u32> {
    let shown = value.map_or_else(|| "NULL".to_owned(), |value| value.to_string());
    let number = value.filter(|value| (least..=most).contains(value));
    let refuse = || Error::bad_value(format!("{name} must be from {least} to {most}, not {shown}"));
    number.map(i32::cast_unsigned).ok_or_else(refuse)
}

/// The blocks that block `query` sees, ascending.
fn keys(preset: Preset, window: u32, query: u32, [layer, head]: [u32; 2]) -> Vec<u32> {
    let near = |key: &u32| query - key < window;
    match preset {
        Preset::Banded => (0..=query).filter(near).collect(),
        Preset::Strided { stride } => (0..=query)
            .filter(|key| near(key) || (query - key).is_multiple_of(stride))
            .collect(),
        Preset::Global { count } => (0..=query)
            .filter(|key| near(key) || *key < count || query < count)
            .collect(),
        Preset::BigBird { global, random, seed } => {
            let mut keys = keys(Preset::Global { count: global }, window, query, [layer, head]);
            let mut others: Vec<u32> = (0..=query)
                .filter(|key| !near(key) && *key >= global && query >= global)
                .collect();
            let mut state = seed;
            for part in [layer, head, query] {
                state = mixed(state ^ u64::from(part));
            }
            for _ in 0..random.min(others.len() as u32) {
                state = mixed(state);
                keys.push(others.swap_remove((state % others.len() as u64) as usize));
            }
            keys.sort_unstable();
            keys
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): the state's successor, as a random number.
fn mixed(state: u64) -> u64 {
    let state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    state ^ (state >> 31)
}
