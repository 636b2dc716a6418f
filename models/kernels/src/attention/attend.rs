//! The block loop of cached inference: a row's result is the same whatever rows are processed with it.

use std::ops::Range;

use super::block::{Query, RowBlock};
use super::page::PagedPast;
use super::tile::{KEYS, QUERY_ROWS, Scores, add_products, dot_rows};
use crate::simd::math::exp;
use crate::simd::{LANES, Simd};
use crate::tiles::Tile;

/// Attention of neighbouring tokens' queries over their sequence's keys and values, for one key-value head.
#[inline(always)]
pub(super) fn attend<S: Simd>(s: S, query: Query<'_>, past: &PagedPast<'_>, head_dim: usize, out: &mut Tile<'_, f32>) {
    let rows = query.tokens * query.group;
    let mut sums = vec![0.0; QUERY_ROWS.min(rows) * head_dim];
    let mut scratch = vec![0.0; past.scratch(query.position + query.tokens)];
    let mut scores: Scores = [[0.0; KEYS]; QUERY_ROWS];
    let mut first = 0;
    while first < rows {
        let position = |row: usize| query.position + row / query.group;
        let block = RowBlock::<QUERY_ROWS>::new(&query.mask, [first, rows, query.group], position);
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
