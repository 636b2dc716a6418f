//! The backward pass: scores are computed again block by block from the kept log-sum-exp (FlashAttention-2, Dao 2023).

use super::forward::{HeadMasks, RowBlock, check_dropout, key_rows, multiply};
use super::mask::HeadMask;
use super::rows::Rows;
use super::tile::{KEYS, QUERY_ROWS, Scores, add_products, dot_rows};
use super::{AttentionHeads, check_lengths, longest};
use crate::dropout::Dropout;
use crate::simd::math::exp;
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for_worth;
use crate::tiles::{Cuts, Tile, Tiles};
use std::ops::Range;

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
        // Contiguous sums; the tiles' rows lie apart.
        let mut sums = [(); 2].map(|()| vec![0.0; length * head_dim]);
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
            let sums = sums.each_mut().map(Vec::as_mut_slice);
            dispatch!(level, head_backward(&head, &mut dq, sums));
        }
        for (mut tile, sums) in [dk.take(sequence, head), dv.take(sequence, head)]
            .into_iter()
            .zip(&sums)
        {
            for (token, sums) in sums.chunks_exact(head_dim).enumerate() {
                tile.row(token).copy_from_slice(sums);
            }
        }
    });
}

/// One sequence's rows of one key-value head, and of those of its query heads that see the same.
struct Head<'a> {
    q: Rows<'a>,
    out: Rows<'a>,
    d_out: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
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
fn head_backward<S: Simd>(s: S, head: &Head<'_>, dq: &mut Tile<'_, f32>, [dk_sums, dv_sums]: [&mut [f32]; 2]) {
    let (group, head_dim) = (head.of_group.len(), head.head_dim);
    let rows = head.length * group;
    let mut dq_sums = vec![0.0; rows * head_dim];
    let mut weights: Scores = [[0.0; KEYS]; QUERY_ROWS];
    let mut gradients: Scores = [[0.0; KEYS]; QUERY_ROWS];
    let mut first = 0;
    while first < rows {
        let block = RowBlock::new(&head.mask, [first, rows, group], |row| row / group);
        let count = block.count;
        let (q, d_out) = (
            head.q.block::<QUERY_ROWS>(first, count),
            head.d_out.block::<QUERY_ROWS>(first, count),
        );
        let (q, d_out) = (&q[..count], &d_out[..count]);
        // sum over j of weight[j] * d_weight[j] is the product of the output and its gradient.
        let mut deltas = [0.0; QUERY_ROWS];
        for (row, delta) in deltas.iter_mut().enumerate().take(count) {
            let [[dot]] = crate::linear::dots::<S, 1, 1>(s, [head.out.row(first + row)], [d_out[row]]);
            *delta = dot;
        }
        for start in block.starts() {
            let width = block.width(start);
            let keys = block.keys.runs(start..start + width);
            let (k, v) = (key_rows(&head.k, keys.clone()), key_rows(&head.v, keys.clone()));
            dot_rows(s, q, &k[..width], &mut weights);
            dot_rows(s, d_out, &v[..width], &mut gradients);
            for row in 0..count {
                let visible = block.visible(row, start, width);
                let statistics = [head.log_sum_exp.row(first + row)[0], deltas[row], head.scale];
                let factors = head.masks.as_ref();
                let factors = factors.map(|masks| masks.factors((first + row) / group, first + row, keys.clone()));
                if let Some(factors) = &factors {
                    multiply(s, &mut gradients[row], factors);
                }
                softmax_gradient(s, &mut weights[row], &mut gradients[row], visible, statistics);
                if let Some(factors) = &factors {
                    multiply(s, &mut weights[row], factors);
                }
            }
            let (weights, gradients) = (&weights, &gradients);
            let mut done = 0;
            for (key, run) in keys {
                let (dv, dk) = (&mut dv_sums[key * head_dim..], &mut dk_sums[key * head_dim..]);
                add_products(s, run, |j, i| weights[i][done + j], d_out, head_dim, dv);
                add_products(s, run, |j, i| gradients[i][done + j], q, head_dim, dk);
                done += run;
            }
            let dq_block = &mut dq_sums[first * head_dim..];
            add_products(s, count, |i, j| gradients[i][j], &k[..width], head_dim, dq_block);
        }
        first += count;
    }
    for (token, sums) in dq_sums.chunks_exact(group * head_dim).enumerate() {
        dq.row(token)[head.of_group.start * head_dim..head.of_group.end * head_dim].copy_from_slice(sums);
    }
}

/// Turns scores into softmax weights, and the weights' gradients into those of the unscaled scores:
/// `weight * (gradient - delta) * scale`. Both are zero outside of `visible`.
#[inline(always)]
fn softmax_gradient<S: Simd>(
    s: S,
    weights: &mut [f32; KEYS],
    gradients: &mut [f32; KEYS],
    visible: Range<usize>,
    [log_sum_exp, delta, scale]: [f32; 3],
) {
    for values in [&mut *weights, &mut *gradients] {
        values[..visible.start].fill(0.0);
        values[visible.end..].fill(0.0);
    }
    let (weight_chunks, _) = weights.as_chunks_mut::<LANES>();
    let (gradient_chunks, _) = gradients.as_chunks_mut::<LANES>();
    for (weight, gradient) in weight_chunks.iter_mut().zip(gradient_chunks) {
        let value = exp(s, s.sub(s.mul(s.load(weight), s.splat(scale)), s.splat(log_sum_exp)));
        let slope = s.mul(s.mul(value, s.sub(s.load(gradient), s.splat(delta))), s.splat(scale));
        s.store(value, weight);
        s.store(slope, gradient);
    }
    for values in [weights, gradients] {
        values[..visible.start].fill(0.0);
        values[visible.end..].fill(0.0);
    }
}
