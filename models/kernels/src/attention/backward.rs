//! The backward pass: scores are computed again block by block from the kept log-sum-exp (FlashAttention-2, Dao 2023).

use super::forward::{HeadMasks, check_dropout, multiply};
use super::rows::Rows;
use super::tile::{KEYS, QUERY_ROWS, Scores, add_products, dot_rows};
use super::{AttentionHeads, check_lengths};
use crate::dropout::Dropout;
use crate::simd::math::exp;
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for_worth;
use crate::tiles::{Cuts, Tile, Tiles};

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
    heads: &AttentionHeads,
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
    heads: &AttentionHeads,
    cumulative_lengths: &[usize],
    saved: &AttentionSaved<'_>,
    dropout: Option<&Dropout<'_>>,
    d_out: &[f32],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    heads.check();
    check_dropout(dropout, cumulative_lengths);
    let (query_width, width) = (heads.query_width(), heads.key_value_width());
    let tokens = saved.q.len() / query_width.max(1);
    check_lengths(cumulative_lengths, tokens);
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
        let of_query = |data| Rows::new(data, query_width, group, head_dim);
        let of_key = |data| Rows::new(data, width, 1, head_dim);
        let (query_start, key_start) = (
            start * query_width + head * group * head_dim,
            start * width + head * head_dim,
        );
        let head = Head {
            q: of_query(&saved.q[query_start..]),
            out: of_query(&saved.out[query_start..]),
            d_out: of_query(&d_out[query_start..]),
            k: of_key(&saved.k[key_start..]),
            v: of_key(&saved.v[key_start..]),
            log_sum_exp: Rows::new(
                &saved.log_sum_exp[start * heads.heads + head * group..],
                heads.heads,
                group,
                1,
            ),
            length,
            group,
            head_dim,
            scale: heads.scale,
            masks: dropout.map(|dropout| HeadMasks {
                first: dropout.masks(sequence, head * group),
                group,
            }),
        };
        let index = task % heads.key_value_heads;
        let outputs = [
            dq.take(sequence, index),
            dk.take(sequence, index),
            dv.take(sequence, index),
        ];
        dispatch!(level, head_backward(&head, outputs));
    });
}

/// One sequence's rows of one key-value head.
struct Head<'a> {
    q: Rows<'a>,
    out: Rows<'a>,
    d_out: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    log_sum_exp: Rows<'a>,
    length: usize,
    group: usize,
    head_dim: usize,
    scale: f32,
    masks: Option<HeadMasks>,
}

#[inline(always)]
fn head_backward<S: Simd>(s: S, head: &Head<'_>, [mut dq, mut dk, mut dv]: [Tile<'_, f32>; 3]) {
    let (rows, head_dim) = (head.length * head.group, head.head_dim);
    // Contiguous sums; the tiles' rows lie apart.
    let mut dq_sums = vec![0.0; rows * head_dim];
    let mut dk_sums = vec![0.0; head.length * head_dim];
    let mut dv_sums = vec![0.0; head.length * head_dim];
    let mut weights: Scores = [[0.0; KEYS]; QUERY_ROWS];
    let mut gradients: Scores = [[0.0; KEYS]; QUERY_ROWS];
    for first in (0..rows).step_by(QUERY_ROWS) {
        let count = QUERY_ROWS.min(rows - first);
        let position = |row: usize| (first + row) / head.group;
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
        for start in (0..=position(count - 1)).step_by(KEYS) {
            let width = KEYS.min(position(count - 1) + 1 - start);
            let (k, v) = (head.k.block::<KEYS>(start, width), head.v.block::<KEYS>(start, width));
            dot_rows(s, q, &k[..width], &mut weights);
            dot_rows(s, d_out, &v[..width], &mut gradients);
            for row in 0..count {
                let visible = (position(row) + 1).saturating_sub(start).min(width);
                let statistics = [head.log_sum_exp.row(first + row)[0], deltas[row], head.scale];
                let factors = head.masks.as_ref();
                let factors = factors.map(|masks| masks.factors(position(row), first + row, start));
                if let Some(factors) = &factors {
                    multiply(s, &mut gradients[row], factors);
                }
                softmax_gradient(s, &mut weights[row], &mut gradients[row], visible, statistics);
                if let Some(factors) = &factors {
                    multiply(s, &mut weights[row], factors);
                }
            }
            let (weights, gradients) = (&weights, &gradients);
            add_products(
                s,
                width,
                |j, i| weights[i][j],
                d_out,
                head_dim,
                &mut dv_sums[start * head_dim..],
            );
            add_products(
                s,
                width,
                |j, i| gradients[i][j],
                q,
                head_dim,
                &mut dk_sums[start * head_dim..],
            );
            let dq_block = &mut dq_sums[first * head_dim..];
            add_products(s, count, |i, j| gradients[i][j], &k[..width], head_dim, dq_block);
        }
    }
    for token in 0..head.length {
        let width = head.group * head_dim;
        dq.row(token)
            .copy_from_slice(&dq_sums[token * width..(token + 1) * width]);
        dk.row(token)
            .copy_from_slice(&dk_sums[token * head_dim..(token + 1) * head_dim]);
        dv.row(token)
            .copy_from_slice(&dv_sums[token * head_dim..(token + 1) * head_dim]);
    }
}

/// Turns scores into softmax weights, and the weights' gradients into those of the unscaled scores:
/// `weight * (gradient - delta) * scale`. Both are zero from `visible` on.
#[inline(always)]
fn softmax_gradient<S: Simd>(
    s: S,
    weights: &mut [f32; KEYS],
    gradients: &mut [f32; KEYS],
    visible: usize,
    [log_sum_exp, delta, scale]: [f32; 3],
) {
    weights[visible..].fill(0.0);
    gradients[visible..].fill(0.0);
    let (weight_chunks, _) = weights.as_chunks_mut::<LANES>();
    let (gradient_chunks, _) = gradients.as_chunks_mut::<LANES>();
    for (weight, gradient) in weight_chunks.iter_mut().zip(gradient_chunks) {
        let value = exp(s, s.sub(s.mul(s.load(weight), s.splat(scale)), s.splat(log_sum_exp)));
        let slope = s.mul(s.mul(value, s.sub(s.load(gradient), s.splat(delta))), s.splat(scale));
        s.store(value, weight);
        s.store(slope, gradient);
    }
    weights[visible..].fill(0.0);
    gradients[visible..].fill(0.0);
}
