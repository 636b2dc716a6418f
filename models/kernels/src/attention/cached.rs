//! Attention of new tokens over a cache, for inference.

use super::AttentionHeads;
use super::forward::{Query, attend};
use super::rows::Rows;
use crate::simd::{Level, dispatch, level};
use crate::threads::parallel_for_worth;
use crate::tiles::{Cuts, Tiles};

/// One sequence's cache, the new tokens' keys and values already in it, at its end.
#[derive(Clone, Copy, Debug)]
pub struct CachedSequence<'a> {
    /// Keys `[positions, key_value_heads * head_dim]`.
    pub keys: &'a [f32],
    /// Values `[positions, key_value_heads * head_dim]`.
    pub values: &'a [f32],
    /// How many of the last positions are new tokens, whose queries are given.
    pub new_tokens: usize,
}

/// Causal attention of each sequence's new tokens over its cache.
///
/// `q` and `out` are `[new tokens of all sequences, heads * head_dim]`, sequence after sequence.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn attention_decode(heads: &AttentionHeads, q: &[f32], sequences: &[CachedSequence<'_>], out: &mut [f32]) {
    decode_with(level(), heads, q, sequences, out);
}

pub(super) fn decode_with(
    level: Level,
    heads: &AttentionHeads,
    q: &[f32],
    sequences: &[CachedSequence<'_>],
    out: &mut [f32],
) {
    /// Tokens of a task.
    const TASK_TOKENS: usize = 64;
    heads.check();
    assert_eq!(q.len(), out.len(), "queries and output");
    let mut bounds = vec![0];
    // Sequence and first new token of each piece.
    let mut pieces = Vec::new();
    let mut cost = 0;
    for (index, sequence) in sequences.iter().enumerate() {
        let positions = sequence.keys.len() / heads.key_value_width();
        assert_eq!(
            sequence.keys.len(),
            positions * heads.key_value_width(),
            "keys of sequence {index}"
        );
        assert_eq!(sequence.values.len(), sequence.keys.len(), "values of sequence {index}");
        assert!(
            sequence.new_tokens <= positions,
            "sequence {index} has more new tokens than positions"
        );
        cost += sequence.new_tokens * positions * heads.query_width();
        for first in (0..sequence.new_tokens).step_by(TASK_TOKENS) {
            pieces.push((index, first));
            bounds.push(bounds[bounds.len() - 1] + TASK_TOKENS.min(sequence.new_tokens - first));
        }
    }
    let tokens = bounds[bounds.len() - 1];
    assert_eq!(
        q.len(),
        tokens * heads.query_width(),
        "queries are not those of {tokens} new tokens"
    );
    if tokens == 0 {
        return;
    }
    let (group, head_dim) = (heads.group(), heads.head_dim);
    let columns = Cuts::Every {
        step: group * head_dim,
        length: heads.query_width(),
    };
    let out = Tiles::new(out, heads.query_width(), Cuts::At(&bounds), columns);
    parallel_for_worth(cost, pieces.len() * heads.key_value_heads, |task| {
        let (piece, head) = (
            pieces.len() - 1 - task / heads.key_value_heads,
            task % heads.key_value_heads,
        );
        let (index, first) = pieces[piece];
        let sequence = &sequences[index];
        let positions = sequence.keys.len() / heads.key_value_width();
        let query_start = bounds[piece] * heads.query_width() + head * group * head_dim;
        let query = Query {
            rows: Rows::new(&q[query_start..], heads.query_width(), group, head_dim),
            tokens: bounds[piece + 1] - bounds[piece],
            position: positions - sequence.new_tokens + first,
            group,
            scale: heads.scale,
        };
        let rows = |data| Rows::new(data, heads.key_value_width(), 1, head_dim);
        let (keys, values) = (
            rows(&sequence.keys[head * head_dim..]),
            rows(&sequence.values[head * head_dim..]),
        );
        dispatch!(
            level,
            attend(query, [keys, values], head_dim, None, &mut out.take(piece, head), None)
        );
    });
}
