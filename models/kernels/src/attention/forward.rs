//! The forward pass of training over packed sequences: tiles of queries times blocks of keys, as products of panels
//! (Dao, "FlashAttention-2", 2023).

use std::cell::Cell;
use std::ops::Range;

use super::block::{HeadMasks, Query, RowBlock, check_dropout, multiply};
use super::packed::{Packed, PackedHead};
use super::panels::{columns, turned_keys};
use super::product::{RowFactors, products};
use super::rows::Rows;
use super::tile::{KEYS, TILE_ROWS, TileScores};
use super::{AttentionHeads, check_lengths, longest};
use crate::aligned::Aligned;
use crate::dropout::Dropout;
use crate::simd::math::exp_below_88;
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for_worth;
use crate::tiles::{Cuts, Tile, Tiles};

thread_local! {
    /// The keys and values of all heads, packed, kept for the next layer.
    static PANELS: Cell<Aligned> = const { Cell::new(Aligned::new()) };
}

/// Tokens of a task.
const TASK_TOKENS: usize = 64;

/// Causal attention of packed sequences: `out = softmax(scale * q k^T) v` per sequence and head.
///
/// `q` and `out` are `[tokens, heads * head_dim]`, `k` and `v` `[tokens, key_value_heads * head_dim]`; sequence `i` is
/// tokens `cumulative_lengths[i]..cumulative_lengths[i + 1]`. With `log_sum_exp` (`[tokens, heads]`) the logarithms of
/// the softmax' denominators are kept for the backward pass. With `dropout` the probabilities are dropped after the
/// softmax, head `h` at the site `h` further.
///
/// # Panics
/// Where the lengths do not fit each other, or the probability of dropout is not from 0 to below 1.
pub fn attention_forward(
    heads: &AttentionHeads<'_>,
    cumulative_lengths: &[usize],
    [q, k, v]: [&[f32]; 3],
    dropout: Option<&Dropout<'_>>,
    out: &mut [f32],
    log_sum_exp: Option<&mut [f32]>,
) {
    forward_with(level(), heads, cumulative_lengths, [q, k, v], dropout, out, log_sum_exp);
}

pub(super) fn forward_with(
    level: Level,
    heads: &AttentionHeads<'_>,
    cumulative_lengths: &[usize],
    [q, k, v]: [&[f32]; 3],
    dropout: Option<&Dropout<'_>>,
    out: &mut [f32],
    log_sum_exp: Option<&mut [f32]>,
) {
    let tokens = q.len() / heads.query_width().max(1);
    check_lengths(cumulative_lengths, tokens);
    heads.check(longest(cumulative_lengths));
    check_dropout(dropout, cumulative_lengths);
    assert_eq!(q.len(), tokens * heads.query_width(), "queries");
    assert_eq!(out.len(), q.len(), "output");
    assert!(
        k.len() == tokens * heads.key_value_width() && v.len() == k.len(),
        "keys and values"
    );
    assert!(
        log_sum_exp
            .as_ref()
            .is_none_or(|values| values.len() == tokens * heads.heads),
        "log-sum-exp"
    );
    if tokens == 0 {
        return;
    }
    let mut buffer = PANELS.take();
    let packed = Packed::new(level, heads, cumulative_lengths, [k, v], &mut buffer);
    let blocks = token_blocks(cumulative_lengths);
    let bounds: Vec<usize> = blocks.iter().map(|block| block.start).chain([tokens]).collect();
    let (group, head_dim) = (heads.group(), heads.head_dim);
    let columns = Cuts::Every {
        step: group * head_dim,
        length: heads.query_width(),
    };
    let out = Tiles::new(out, heads.query_width(), Cuts::At(&bounds), columns);
    let log_sum_exp = log_sum_exp.map(|values| {
        Tiles::new(
            values,
            heads.heads,
            Cuts::At(&bounds),
            Cuts::Every {
                step: group,
                length: heads.heads,
            },
        )
    });
    let cost: usize = blocks
        .iter()
        .map(|block| block.length * (block.offset + block.length))
        .sum();
    parallel_for_worth(
        cost * heads.query_width(),
        blocks.len() * heads.key_value_heads,
        |task| {
            // The longest rows of keys first, so that the last task is short.
            let (index, head) = (
                blocks.len() - 1 - task / heads.key_value_heads,
                task % heads.key_value_heads,
            );
            let block = &blocks[index];
            let past = packed.head(block.sequence, head);
            let mut out = out.take(index, head);
            let mut log_sum_exp = log_sum_exp.as_ref().map(|tiles| tiles.take(index, head));
            for (of_group, mask) in heads.mask.runs(head * group, group) {
                let first = head * group + of_group.start;
                let query = Query {
                    rows: Rows::new(
                        &q[block.start * heads.query_width() + first * head_dim..],
                        heads.query_width(),
                        of_group.len(),
                        head_dim,
                    ),
                    tokens: block.length,
                    position: block.offset,
                    head: of_group.start,
                    group: of_group.len(),
                    scale: heads.scale,
                    mask,
                };
                let masks = dropout.map(|dropout| HeadMasks {
                    first: dropout.masks(block.sequence, first),
                    group: of_group.len(),
                });
                dispatch!(
                    level,
                    attend(query, &past, masks.as_ref(), &mut out, log_sum_exp.as_mut())
                );
            }
        },
    );
    PANELS.set(buffer);
}

/// Some tokens of one sequence.
struct TokenBlock {
    sequence: usize,
    /// First token in the packed matrix.
    start: usize,
    /// The first token's position in its sequence.
    offset: usize,
    length: usize,
}

fn token_blocks(cumulative_lengths: &[usize]) -> Vec<TokenBlock> {
    let sequences = cumulative_lengths.windows(2).enumerate();
    sequences
        .flat_map(|(sequence, bounds)| {
            let (start, length) = (bounds[0], bounds[1] - bounds[0]);
            (0..length).step_by(TASK_TOKENS).map(move |offset| TokenBlock {
                sequence,
                start: start + offset,
                offset,
                length: TASK_TOKENS.min(length - offset),
            })
        })
        .collect()
}

/// Attention of neighbouring tokens' queries over their sequence's keys and values, for one key-value head.
#[inline(always)]
fn attend<S: Simd>(
    s: S,
    query: Query<'_>,
    past: &PackedHead<'_>,
    masks: Option<&HeadMasks>,
    out: &mut Tile<'_, f32>,
    mut log_sum_exp: Option<&mut Tile<'_, f32>>,
) {
    let rows = query.tokens * query.group;
    let head_dim = past.head_dim;
    let stride = head_dim.next_multiple_of(LANES);
    let mut scratch = Aligned::new();
    let lengths = [TILE_ROWS * stride, KEYS * head_dim, TILE_ROWS * head_dim];
    let (sums, rest) = scratch.words(lengths.iter().sum()).split_at_mut(lengths[0]);
    let (turned, queries) = rest.split_at_mut(lengths[1]);
    let mut scores: TileScores = [[0.0; KEYS]; TILE_ROWS];
    let mut first = 0;
    while first < rows {
        let position = |row: usize| query.position + row / query.group;
        let block = RowBlock::<TILE_ROWS>::new(&query.mask, [first, rows, query.group], position);
        let count = block.count;
        for (row, to) in queries.chunks_exact_mut(head_dim).enumerate().take(count) {
            let from = query.rows.row(first + row);
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from * query.scale);
        }
        sums[..count * stride].fill(0.0);
        let mut softmax = Softmax::new();
        for start in block.starts() {
            let keys = block.keys.runs(start..start + block.width(start));
            let visible = block.visible_rows(start);
            let panels = turned_keys(s, past.turned, keys.clone(), |key| past.keys.row(key), head_dim, turned);
            let (queries, scores) = (&*queries, &mut scores);
            products(
                s,
                false,
                RowFactors::of_heads(queries, head_dim),
                |vector| panels[vector],
                [count, KEYS],
                |rows| visible.scores(rows, head_dim),
                scores.as_flattened_mut(),
            );
            for row in 0..count {
                let rescale = softmax.block(s, row, &mut scores[row], visible.of(row));
                if let Some(factor) = rescale {
                    scale_row(s, factor, &mut sums[row * stride..(row + 1) * stride]);
                }
                if let Some(masks) = masks {
                    let factors = masks.factors(position(first + row), first + row, keys.clone());
                    multiply(s, &mut scores[row], &factors);
                }
            }
            let (scores, mut done) = (&*scores, 0);
            for (key, run) in keys {
                products(
                    s,
                    true,
                    RowFactors::of_scores(scores, done),
                    |vector| columns(past.values, past.length, vector, key..key + run),
                    [count, stride],
                    |rows| visible.sums(rows, done..done + run, stride),
                    sums,
                );
                done += run;
            }
        }
        for row in 0..count {
            let (token, head) = ((first + row) / query.group, (first + row) % query.group);
            let head = query.head + head;
            let (total, largest) = softmax.finish(s, row);
            let sums = &mut sums[row * stride..(row + 1) * stride];
            scale_row(s, s.splat(1.0 / total), sums);
            out.row(token)[head * head_dim..(head + 1) * head_dim].copy_from_slice(&sums[..head_dim]);
            if let Some(values) = log_sum_exp.as_deref_mut() {
                values.row(token)[head] = largest + total.ln();
            }
        }
        first += count;
    }
}

/// The online softmax of a tile's rows.
struct Softmax {
    largest: [f32; TILE_ROWS],
    /// Sums of each row, lane by lane.
    totals: [[f32; LANES]; TILE_ROWS],
}

impl Softmax {
    #[inline(always)]
    fn new() -> Self {
        Self {
            largest: [f32::NEG_INFINITY; TILE_ROWS],
            totals: [[0.0; LANES]; TILE_ROWS],
        }
    }

    /// Turns a row's scores into `e^(score - largest)`, with zeros outside of `visible`, and updates the row's largest
    /// score and its sum. Returns the factor, in all lanes, for what was summed under the former largest score, if it has
    /// to change.
    #[inline(always)]
    fn block<S: Simd>(&mut self, s: S, row: usize, scores: &mut [f32; KEYS], visible: Range<usize>) -> Option<S::F32> {
        if visible.is_empty() {
            scores.fill(0.0);
            return None;
        }
        let chunks = visible.start / LANES..visible.end.div_ceil(LANES);
        // Only at the border, which few blocks lie on.
        if visible.len() < KEYS {
            scores[..chunks.start * LANES].fill(0.0);
            scores[chunks.end * LANES..].fill(0.0);
            scores[chunks.start * LANES..visible.start].fill(f32::NEG_INFINITY);
            scores[visible.end..chunks.end * LANES].fill(f32::NEG_INFINITY);
        }
        let (lanes, _) = scores.as_chunks_mut::<LANES>();
        let former = self.largest[row];
        let mut maximum = s.splat(former);
        for lanes in &lanes[chunks.clone()] {
            maximum = s.max(maximum, s.load(lanes));
        }
        let largest = s.reduce_max(maximum);
        // Nothing was summed before the first block.
        let rescale = match former == largest || former == f32::NEG_INFINITY {
            true => None,
            false => Some(exp_below_88(s, s.splat(former - largest))),
        };
        let mut total = s.load(&self.totals[row]);
        if let Some(factor) = rescale {
            total = s.mul(total, factor);
        }
        for lanes in &mut lanes[chunks] {
            let weight = exp_below_88(s, s.sub(s.load(lanes), s.splat(largest)));
            s.store(weight, lanes);
            total = s.add(total, weight);
        }
        s.store(total, &mut self.totals[row]);
        self.largest[row] = largest;
        rescale
    }

    /// A row's sum and its largest score.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, row: usize) -> (f32, f32) {
        (s.reduce_add(s.load(&self.totals[row])), self.largest[row])
    }
}

/// Scales a row of whole vectors by a factor that is in all lanes.
#[inline(always)]
fn scale_row<S: Simd>(s: S, factor: S::F32, row: &mut [f32]) {
    let (chunks, _) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        s.store(s.mul(s.load(chunk), factor), chunk);
    }
}
