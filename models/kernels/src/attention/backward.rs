//! The backward pass: scores are computed again block by block from the kept log-sum-exp (FlashAttention-2, Dao 2023).

use std::cell::Cell;
use std::ops::Range;

use super::block::{HeadMasks, RowBlock, check_dropout, multiply};
use super::mask::HeadMask;
use super::panels::{column_words, columns, pack_columns, pack_turned, turned_keys, turned_words};
use super::product::{ColumnFactors, RowFactors, products};
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
    /// A head's panels and sums, kept for the next head.
    static BUFFER: Cell<Aligned> = const { Cell::new(Aligned::new()) };
}

/// What the forward pass read and wrote.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSaved<'a> {
    /// Queries `[tokens, heads * head_dim]`.
    pub q: &'a [f32],
    /// Keys `[tokens, key_value_heads * head_dim]`.
    pub k: &'a [f32],
    /// Values `[tokens, key_value_heads * head_dim]`.
    pub v: &'a [f32],
    /// Output `[tokens, heads * head_dim]`.
    pub out: &'a [f32],
    /// Log-sum-exp `[tokens, heads]`.
    pub log_sum_exp: &'a [f32],
}

/// Gradients of [`attention_forward`](super::attention_forward()) by queries, keys and values; the three outputs are
/// overwritten. `d_out` and `dq` are `[tokens, heads * head_dim]`, `dk` and `dv`
/// `[tokens, key_value_heads * head_dim]`. `dropout` is that of the forward pass.
///
/// # Panics
/// Where the lengths do not fit each other, or the probability of dropout is not from 0 to below 1.
pub fn attention_backward(
    heads: &AttentionHeads<'_>,
    cumulative_lengths: &[usize],
    saved: &AttentionSaved<'_>,
    dropout: Option<&Dropout<'_>>,
    d_out: &[f32],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    backward_with(level(), heads, cumulative_lengths, saved, dropout, d_out, [dq, dk, dv]);
}

pub(super) fn backward_with(
    level: Level,
    heads: &AttentionHeads<'_>,
    cumulative_lengths: &[usize],
    saved: &AttentionSaved<'_>,
    dropout: Option<&Dropout<'_>>,
    d_out: &[f32],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let (query_width, width) = (heads.query_width(), heads.key_value_width());
    let tokens = saved.q.len() / query_width.max(1);
    check_lengths(cumulative_lengths, tokens);
    heads.check(longest(cumulative_lengths));
    check_dropout(dropout, cumulative_lengths);
    let of_queries = [saved.q.len(), saved.out.len(), d_out.len(), dq.len()];
    assert!(
        of_queries == [tokens * query_width; 4],
        "queries, output and their gradients: {of_queries:?}"
    );
    let of_keys = [saved.k.len(), saved.v.len(), dk.len(), dv.len()];
    assert!(
        of_keys == [tokens * width; 4],
        "keys, values and their gradients: {of_keys:?}"
    );
    assert_eq!(saved.log_sum_exp.len(), tokens * heads.heads, "log-sum-exp");
    if tokens == 0 {
        return;
    }
    let (group, head_dim) = (heads.group(), heads.head_dim);
    let rows = Cuts::At(cumulative_lengths);
    let columns = Cuts::Every {
        step: head_dim,
        length: width,
    };
    let dq = Tiles::new(
        dq,
        query_width,
        rows,
        Cuts::Every {
            step: group * head_dim,
            length: query_width,
        },
    );
    let (dk, dv) = (
        Tiles::new(dk, width, rows, columns),
        Tiles::new(dv, width, rows, columns),
    );
    let cost: usize = cumulative_lengths
        .windows(2)
        .map(|bounds| (bounds[1] - bounds[0]).pow(2))
        .sum();
    let tasks = (cumulative_lengths.len() - 1) * heads.key_value_heads;
    parallel_for_worth(cost * query_width, tasks, |task| {
        let (sequence, head) = (task / heads.key_value_heads, task % heads.key_value_heads);
        let start = cumulative_lengths[sequence];
        let length = cumulative_lengths[sequence + 1] - start;
        if length == 0 {
            return;
        }
        let of_key = |data| Rows::new(data, width, 1, head_dim);
        let key_start = start * width + head * head_dim;
        let (k, v) = (of_key(&saved.k[key_start..]), of_key(&saved.v[key_start..]));
        let mut dq = dq.take(sequence, head);
        let stride = head_dim.next_multiple_of(LANES);
        let mut buffer = BUFFER.take();
        let turned = turned_words(length, head_dim);
        let columns = column_words(length, head_dim);
        let words = buffer.words(2 * turned + 3 * columns);
        let (panels, sums) = words.split_at_mut(2 * turned + columns);
        dispatch!(level, pack(length, head_dim, [k, v], panels));
        let (turned_k, rest) = panels.split_at(turned);
        let (turned_v, columns_k) = rest.split_at(turned);
        // Contiguous sums; the tiles' rows lie apart.
        sums.fill(0.0);
        let (dk_sums, dv_sums) = sums.split_at_mut(columns);
        for (of_group, mask) in heads.mask.runs(head * group, group) {
            let first = head * group + of_group.start;
            let [q, out, d_out] = [saved.q, saved.out, d_out].map(|data| {
                let data = &data[start * query_width + first * head_dim..];
                Rows::new(data, query_width, of_group.len(), head_dim)
            });
            let head = Head {
                q,
                out,
                d_out,
                k,
                v,
                turned: [turned_k, turned_v],
                columns_k,
                log_sum_exp: Rows::new(
                    &saved.log_sum_exp[start * heads.heads + first..],
                    heads.heads,
                    of_group.len(),
                    1,
                ),
                length,
                head_dim,
                scale: heads.scale,
                mask,
                masks: dropout.map(|dropout| HeadMasks {
                    first: dropout.masks(sequence, first),
                    group: of_group.len(),
                }),
                of_group,
            };
            dispatch!(level, head_backward(&head, &mut dq, [&mut *dk_sums, &mut *dv_sums]));
        }
        for (mut tile, sums) in [
            (dk.take(sequence, head), &*dk_sums),
            (dv.take(sequence, head), &*dv_sums),
        ] {
            for (token, sums) in sums.chunks_exact(stride).enumerate() {
                tile.row(token).copy_from_slice(&sums[..head_dim]);
            }
        }
        BUFFER.set(buffer);
    });
}

/// One sequence's rows of one key-value head, and of those of its query heads that see the same.
struct Head<'a> {
    q: Rows<'a>,
    out: Rows<'a>,
    d_out: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    /// Keys and values, turned: see [`pack_turned`].
    turned: [&'a [f32]; 2],
    /// Columns of the keys: see [`pack_columns`].
    columns_k: &'a [f32],
    log_sum_exp: Rows<'a>,
    length: usize,
    /// The query heads, among those of the key-value head.
    of_group: Range<usize>,
    head_dim: usize,
    scale: f32,
    mask: HeadMask<'a>,
    masks: Option<HeadMasks>,
}

#[inline(always)]
fn pack<S: Simd>(s: S, length: usize, head_dim: usize, [k, v]: [Rows<'_>; 2], panels: &mut [f32]) {
    let (turned, columns) = panels.split_at_mut(2 * turned_words(length, head_dim));
    let (turned_k, turned_v) = turned.split_at_mut(turned.len() / 2);
    pack_turned(s, length, |index| k.row(index), head_dim, turned_k);
    pack_turned(s, length, |index| v.row(index), head_dim, turned_v);
    pack_columns(s, length, |index| k.row(index), 1.0, columns);
}

/// A tile's queries and output gradients, as factors `[rows, head_dim]` and as columns; the queries are scaled.
struct QueryTile<'a> {
    factors: [&'a mut [f32]; 2],
    columns: [&'a mut [f32]; 2],
    /// Of each row the product of the output and its gradient: the sum over j of weight[j] * d_weight[j].
    deltas: [f32; TILE_ROWS],
}

impl<'a> QueryTile<'a> {
    fn words(head_dim: usize) -> usize {
        2 * (TILE_ROWS * head_dim + column_words(TILE_ROWS, head_dim))
    }

    fn new(words: &'a mut [f32], head_dim: usize) -> Self {
        let (factors, columns) = words.split_at_mut(2 * TILE_ROWS * head_dim);
        Self {
            factors: halves(factors),
            columns: halves(columns),
            deltas: [0.0; TILE_ROWS],
        }
    }

    /// Fills it with the rows `first..first + count`.
    #[inline(always)]
    fn fill<S: Simd>(&mut self, s: S, head: &Head<'_>, first: usize, count: usize) {
        let rows = [(&head.q, head.scale), (&head.d_out, 1.0)];
        let to = self.factors.iter_mut().zip(&mut self.columns);
        for ((rows, scale), (factors, columns)) in rows.into_iter().zip(to) {
            for (row, to) in factors.chunks_exact_mut(head.head_dim).enumerate().take(count) {
                let from = rows.row(first + row);
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from * scale);
            }
            pack_columns(s, count, |row| rows.row(first + row), scale, columns);
        }
        for (row, delta) in self.deltas.iter_mut().enumerate().take(count) {
            let rows = [[head.out.row(first + row)], [head.d_out.row(first + row)]];
            let [[dot]] = crate::linear::dots::<S, 1, 1>(s, rows[0], rows[1]);
            *delta = dot;
        }
    }
}

fn halves(words: &mut [f32]) -> [&mut [f32]; 2] {
    let (first, second) = words.split_at_mut(words.len() / 2);
    [first, second]
}

#[inline(always)]
fn head_backward<S: Simd>(s: S, head: &Head<'_>, dq: &mut Tile<'_, f32>, [dk_sums, dv_sums]: [&mut [f32]; 2]) {
    let (group, head_dim) = (head.of_group.len(), head.head_dim);
    let rows = head.length * group;
    let stride = head_dim.next_multiple_of(LANES);
    let mut scratch = Aligned::new();
    let lengths = [TILE_ROWS * stride, 2 * KEYS * head_dim];
    let words = scratch.words(lengths.iter().sum::<usize>() + QueryTile::words(head_dim));
    let (dq_sums, words) = words.split_at_mut(lengths[0]);
    let (turned, words) = words.split_at_mut(lengths[1]);
    let mut tile = QueryTile::new(words, head_dim);
    let mut weights: TileScores = [[0.0; KEYS]; TILE_ROWS];
    let mut gradients: TileScores = [[0.0; KEYS]; TILE_ROWS];
    let mut first = 0;
    while first < rows {
        let block = RowBlock::<TILE_ROWS>::new(&head.mask, [first, rows, group], |row| row / group);
        let count = block.count;
        tile.fill(s, head, first, count);
        dq_sums[..count * stride].fill(0.0);
        for start in block.starts() {
            let keys = block.keys.runs(start..start + block.width(start));
            let visible = block.visible_rows(start);
            let (turned_k, turned_v) = turned.split_at_mut(KEYS * head_dim);
            let (k, v) = (&head.k, &head.v);
            let k_panels = turned_keys(s, head.turned[0], keys.clone(), |key| k.row(key), head_dim, turned_k);
            let v_panels = turned_keys(s, head.turned[1], keys.clone(), |key| v.row(key), head_dim, turned_v);
            let scores = [
                (&*tile.factors[0], k_panels, &mut weights),
                (&*tile.factors[1], v_panels, &mut gradients),
            ];
            for (factors, panels, scores) in scores {
                products(
                    s,
                    false,
                    RowFactors::of_heads(factors, head_dim),
                    |vector| panels[vector],
                    [count, KEYS],
                    |rows| visible.scores(rows, head_dim),
                    scores.as_flattened_mut(),
                );
            }
            for row in 0..count {
                let statistics = [head.log_sum_exp.row(first + row)[0], tile.deltas[row]];
                let factors = head.masks.as_ref();
                let factors = factors.map(|masks| masks.factors((first + row) / group, first + row, keys.clone()));
                let tiles = [&mut weights[row], &mut gradients[row]];
                softmax_gradient(s, tiles, visible.of(row), statistics, factors.as_ref());
            }
            let (weights, gradients) = (&weights, &gradients);
            let mut done = 0;
            for (key, run) in keys {
                let of_keys = [
                    (weights, &*tile.columns[1], &mut *dv_sums),
                    (gradients, &*tile.columns[0], &mut *dk_sums),
                ];
                for (factors, rows, sums) in of_keys {
                    products(
                        s,
                        true,
                        ColumnFactors {
                            scores: factors,
                            first: done,
                        },
                        |vector| columns(rows, count, vector, 0..count),
                        [run, stride],
                        |keys| visible.turned(done + keys.start..done + keys.end, count, stride),
                        &mut sums[key * stride..],
                    );
                }
                products(
                    s,
                    true,
                    RowFactors::of_scores(gradients, done),
                    |vector| columns(head.columns_k, head.length, vector, key..key + run),
                    [count, stride],
                    |rows| visible.sums(rows, done..done + run, stride),
                    dq_sums,
                );
                done += run;
            }
        }
        for (row, sums) in dq_sums.chunks_exact(stride).enumerate().take(count) {
            let (token, of_group) = ((first + row) / group, (first + row) % group + head.of_group.start);
            let to = &mut dq.row(token)[of_group * head_dim..(of_group + 1) * head_dim];
            to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum * head.scale);
        }
        first += count;
    }
}

/// Turns scores into softmax weights, and the weights' gradients into those of the scores: `weight * (gradient - delta)`.
/// Both are zero outside of `visible`. With `factors` of dropout the gradients are those of what is left, and so are the
/// weights in the end.
#[inline(always)]
fn softmax_gradient<S: Simd>(
    s: S,
    [weights, gradients]: [&mut [f32; KEYS]; 2],
    visible: Range<usize>,
    [log_sum_exp, delta]: [f32; 2],
    factors: Option<&[f32; KEYS]>,
) {
    if let Some(factors) = factors {
        multiply(s, gradients, factors);
    }
    let chunks = match visible.is_empty() {
        true => 0..0,
        false => visible.start / LANES..visible.end.div_ceil(LANES),
    };
    let (weight_lanes, _) = weights.as_chunks_mut::<LANES>();
    let (gradient_lanes, _) = gradients.as_chunks_mut::<LANES>();
    let lanes = weight_lanes.iter_mut().zip(gradient_lanes);
    for (weight, gradient) in lanes.take(chunks.end).skip(chunks.start) {
        let value = exp_below_88(s, s.sub(s.load(weight), s.splat(log_sum_exp)));
        let slope = s.mul(value, s.sub(s.load(gradient), s.splat(delta)));
        s.store(value, weight);
        s.store(slope, gradient);
    }
    // Only at the border, which few blocks lie on.
    if visible.is_empty() {
        weights.fill(0.0);
        gradients.fill(0.0);
    } else if visible.len() < KEYS {
        for values in [&mut *weights, gradients] {
            values[..visible.start].fill(0.0);
            values[visible.end..].fill(0.0);
        }
    }
    if let Some(factors) = factors {
        multiply(s, weights, factors);
    }
}
