//! The forward pass over packed sequences, and the block loop that cached inference shares.

use super::mask::{HeadMask, KeyList, Runs};
use super::page::Past;
use super::rows::Rows;
use super::tile::{KEYS, QUERY_ROWS, Scores, add_products, dot_rows};
use super::{AttentionHeads, check_lengths, longest};
use crate::dropout::{Dropout, Masks};
use crate::simd::math::exp;
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for_worth;
use crate::tiles::{Cuts, Tile, Tiles};
use std::ops::Range;

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
            let sequence = (block.start - block.offset) * heads.key_value_width() + head * head_dim;
            let keys = Rows::new(&k[sequence..], heads.key_value_width(), 1, head_dim);
            let values = Rows::new(&v[sequence..], heads.key_value_width(), 1, head_dim);
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
                    attend(
                        query,
                        &[keys, values],
                        head_dim,
                        masks.as_ref(),
                        &mut out,
                        log_sum_exp.as_mut()
                    )
                );
            }
        },
    );
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

/// The queries of neighbouring tokens for one key-value head, of those heads that see the same.
#[derive(Clone, Copy)]
pub(super) struct Query<'a> {
    pub(super) rows: Rows<'a>,
    pub(super) tokens: usize,
    /// Position of the first token in its sequence.
    pub(super) position: usize,
    /// The first of the query heads, among those of the key-value head.
    pub(super) head: usize,
    /// Query heads per token.
    pub(super) group: usize,
    pub(super) scale: f32,
    pub(super) mask: HeadMask<'a>,
}

/// What is dropped of the probabilities of one key-value head's query heads.
pub(super) struct HeadMasks {
    /// Of the first query head.
    pub(super) first: Masks,
    /// Query heads.
    pub(super) group: usize,
}

impl HeadMasks {
    /// Factors of the probabilities of row `row` (as [`Rows`] counts them from `position`) for at most [`KEYS`] keys.
    #[inline(always)]
    pub(super) fn factors(&self, position: usize, row: usize, keys: Runs<'_>) -> [f32; KEYS] {
        let masks = self.first.shifted(row % self.group);
        let (mut factors, mut done) = ([0.0; KEYS], 0);
        for (first, count) in keys {
            // Masks are made for aligned groups of keys.
            let mut key = first;
            while key < first + count {
                let length = (KEYS - key % KEYS).min(first + count - key);
                let made = masks.factors(position as u32, (key / KEYS) as u32);
                factors[done..done + length].copy_from_slice(&made[key % KEYS..][..length]);
                done += length;
                key += length;
            }
        }
        factors
    }
}

/// Panics on dropout that does not fit the sequences.
pub(super) fn check_dropout(dropout: Option<&Dropout<'_>>, cumulative_lengths: &[usize]) {
    if let Some(dropout) = dropout {
        dropout.check(cumulative_lengths.len().saturating_sub(1));
    }
}

/// `scores[i] *= factors[i]`.
#[inline(always)]
pub(super) fn multiply<S: Simd>(s: S, scores: &mut [f32; KEYS], factors: &[f32; KEYS]) {
    let ((scores, _), (factors, _)) = (scores.as_chunks_mut::<LANES>(), factors.as_chunks::<LANES>());
    for (scores, factors) in scores.iter_mut().zip(factors) {
        s.store(s.mul(s.load(scores), s.load(factors)), scores);
    }
}

impl Past for [Rows<'_>; 2] {
    #[inline(always)]
    fn scratch(&self, _: usize) -> usize {
        0
    }

    #[inline(always)]
    fn rows<'a, S: Simd>(&'a self, _: S, which: usize, keys: Runs<'_>, _: &'a mut [f32]) -> [&'a [f32]; KEYS] {
        key_rows(&self[which], keys)
    }
}

/// The rows of at most [`KEYS`] keys; the others are empty.
#[inline(always)]
pub(super) fn key_rows<'a>(rows: &Rows<'a>, keys: Runs<'_>) -> [&'a [f32]; KEYS] {
    let mut found: [&[f32]; KEYS] = [&[]; KEYS];
    let mut done = 0;
    for (first, count) in keys {
        for (offset, row) in found[done..done + count].iter_mut().enumerate() {
            *row = rows.row(first + offset);
        }
        done += count;
    }
    found
}

/// Neighbouring rows of queries that are processed together.
pub(super) struct RowBlock<'a> {
    /// Number of rows.
    pub(super) count: usize,
    /// The keys that they may see.
    pub(super) keys: KeyList<'a>,
    /// The part of those that each sees.
    pub(super) seen: [Range<usize>; QUERY_ROWS],
}

impl<'a> RowBlock<'a> {
    /// The rows from `first` of `rows` on, whose positions `position` tells; `group` rows have the same.
    #[inline(always)]
    pub(super) fn new(
        mask: &HeadMask<'a>,
        [first, rows, group]: [usize; 3],
        position: impl Fn(usize) -> usize,
    ) -> Self {
        let (keys, end) = mask.list(position(first));
        // Rows of one list only.
        let same = end.saturating_sub(position(first)).saturating_mul(group) - first % group;
        let count = QUERY_ROWS.min(rows - first).min(same);
        let mut seen = [const { 0..0 }; QUERY_ROWS];
        for (row, seen) in seen.iter_mut().enumerate().take(count) {
            *seen = keys.seen(position(first + row));
        }
        Self { count, keys, seen }
    }

    /// Where blocks of keys start that some row sees.
    #[inline(always)]
    pub(super) fn starts(&self) -> std::iter::StepBy<Range<usize>> {
        // What later rows see neither begins nor ends before what earlier ones see.
        let first = self.seen[0].start / KEYS * KEYS;
        (first..self.seen[self.count - 1].end).step_by(KEYS)
    }

    /// Keys of the block that starts at `start`.
    #[inline(always)]
    pub(super) fn width(&self, start: usize) -> usize {
        KEYS.min(self.seen[self.count - 1].end - start)
    }

    /// Of the block that starts at `start` and has `width` keys, those that a row sees.
    #[inline(always)]
    pub(super) fn visible(&self, row: usize, start: usize, width: usize) -> Range<usize> {
        let seen = &self.seen[row];
        seen.start.saturating_sub(start).min(width)..seen.end.saturating_sub(start).min(width)
    }
}

/// Attention of neighbouring tokens' queries over their sequence's keys and values, for one key-value head.
#[inline(always)]
pub(super) fn attend<P: Past, S: Simd>(
    s: S,
    query: Query<'_>,
    past: &P,
    head_dim: usize,
    masks: Option<&HeadMasks>,
    out: &mut Tile<'_, f32>,
    mut log_sum_exp: Option<&mut Tile<'_, f32>>,
) {
    let rows = query.tokens * query.group;
    let mut sums = vec![0.0; QUERY_ROWS.min(rows) * head_dim];
    let mut scratch = vec![0.0; past.scratch(query.position + query.tokens)];
    let mut scores: Scores = [[0.0; KEYS]; QUERY_ROWS];
    let mut first = 0;
    while first < rows {
        let position = |row: usize| query.position + row / query.group;
        let block = RowBlock::new(&query.mask, [first, rows, query.group], position);
        let count = block.count;
        let query_rows = query.rows.block::<QUERY_ROWS>(first, count);
        sums.fill(0.0);
        let mut largest = [f32::NEG_INFINITY; QUERY_ROWS];
        let mut total = [0.0; QUERY_ROWS];
        for start in block.starts() {
            let width = block.width(start);
            let keys = block.keys.runs(start..start + width);
            let key_rows = past.rows(s, 0, keys.clone(), &mut scratch);
            dot_rows(s, &query_rows[..count], &key_rows[..width], &mut scores);
            for row in 0..count {
                let visible = block.visible(row, start, width);
                let rescale = softmax_block(
                    s,
                    &mut scores[row],
                    visible,
                    query.scale,
                    &mut largest[row],
                    &mut total[row],
                );
                scale_row(s, rescale, &mut sums[row * head_dim..(row + 1) * head_dim]);
                if let Some(masks) = masks {
                    let factors = masks.factors(position(first + row), first + row, keys.clone());
                    multiply(s, &mut scores[row], &factors);
                }
            }
            let factor = |row: usize, key: usize| scores[row][key];
            let value_rows = past.rows(s, 1, keys, &mut scratch);
            add_products(s, count, factor, &value_rows[..width], head_dim, &mut sums);
        }
        for row in 0..count {
            let (token, head) = ((first + row) / query.group, (first + row) % query.group);
            let head = query.head + head;
            let sums = &mut sums[row * head_dim..(row + 1) * head_dim];
            scale_row(s, 1.0 / total[row], sums);
            out.row(token)[head * head_dim..(head + 1) * head_dim].copy_from_slice(sums);
            if let Some(values) = log_sum_exp.as_deref_mut() {
                values.row(token)[head] = largest[row] + total[row].ln();
            }
        }
        first += count;
    }
}

/// Turns a row's scores into `e^(scale * score - largest)`, with zeros outside of `visible`, and updates the row's largest
/// scaled score and its sum. Returns the factor for what was summed under the former largest score.
#[inline(always)]
fn softmax_block<S: Simd>(
    s: S,
    scores: &mut [f32; KEYS],
    visible: Range<usize>,
    scale: f32,
    largest: &mut f32,
    total: &mut f32,
) -> f32 {
    if visible.is_empty() {
        scores.fill(0.0);
        return 1.0;
    }
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    let factor = s.splat(scale);
    let (chunks, _) = scores.as_chunks_mut::<LANES>();
    let mut maximum = s.splat(*largest);
    for chunk in chunks.iter_mut() {
        // The scale may be negative or zero: masked scores must stay masked.
        let scaled = s.mul(s.load(chunk), factor);
        s.store(scaled, chunk);
        maximum = s.max(maximum, scaled);
    }
    let new = s.reduce_max(maximum);
    let mut sum = s.splat(0.0);
    for chunk in chunks.iter_mut() {
        let weight = exp(s, s.sub(s.load(chunk), s.splat(new)));
        s.store(weight, chunk);
        sum = s.add(sum, weight);
    }
    let rescale = (*largest - new).exp();
    *total = *total * rescale + s.reduce_add(sum);
    *largest = new;
    rescale
}

#[inline(always)]
fn scale_row<S: Simd>(s: S, factor: f32, row: &mut [f32]) {
    if factor == 1.0 {
        return;
    }
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        s.store(s.mul(s.load(chunk), s.splat(factor)), chunk);
    }
    rest.iter_mut().for_each(|value| *value *= factor);
}
