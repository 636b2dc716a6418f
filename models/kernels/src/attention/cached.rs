//! Attention of new tokens over a cache in pages, for inference.

use super::AttentionHeads;
use super::attend::attend;
use super::block::Query;
use super::page::{PageLayout, PagedPast};
use super::rows::Rows;
use crate::simd::{Level, dispatch, level};
use crate::threads::parallel_for_worth;
use crate::tiles::{Cuts, Tiles};

/// One sequence's cache, the new tokens' keys and values already in it, at its end.
#[derive(Clone, Copy, Debug)]
pub struct CachedSequence<'a> {
    /// One layer's part of each of its pages, in the order of positions.
    pub pages: &'a [&'a [f32]],
    /// Positions held; the last page may be partly filled, and further ones empty.
    pub positions: usize,
    /// How many of the last positions are new tokens, whose queries are given.
    pub new_tokens: usize,
}

/// Causal attention of each sequence's new tokens over its cache, from the pages as they lie.
///
/// `q` and `out` are `[new tokens of all sequences, heads * head_dim]`, sequence after sequence.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn attention_decode(
    heads: &AttentionHeads<'_>,
    layout: &PageLayout,
    q: &[f32],
    sequences: &[CachedSequence<'_>],
    out: &mut [f32],
) {
    decode_with(level(), heads, layout, q, sequences, out);
}

pub(super) fn decode_with(
    level: Level,
    heads: &AttentionHeads<'_>,
    layout: &PageLayout,
    q: &[f32],
    sequences: &[CachedSequence<'_>],
    out: &mut [f32],
) {
    /// Tokens of a task.
    const TASK_TOKENS: usize = 64;
    let positions = sequences.iter().map(|sequence| sequence.positions);
    heads.check(positions.max().unwrap_or(0));
    assert_eq!(q.len(), out.len(), "queries and output");
    let mut bounds = vec![0];
    // Sequence and first new token of each piece.
    let mut pieces = Vec::new();
    let mut cost = 0;
    for (index, sequence) in sequences.iter().enumerate() {
        let positions = sequence.positions;
        assert!(
            positions <= sequence.pages.len() * layout.positions
                && sequence.pages.iter().all(|page| page.len() == layout.words()),
            "sequence {index} has {} pages for {positions} positions",
            sequence.pages.len()
        );
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
        let past = PagedPast::new(heads, layout, sequence.pages, head);
        let mut out = out.take(piece, head);
        for (of_group, mask) in heads.mask.runs(head * group, group) {
            let query_start = bounds[piece] * heads.query_width() + (head * group + of_group.start) * head_dim;
            let query = Query {
                rows: Rows::new(&q[query_start..], heads.query_width(), of_group.len(), head_dim),
                tokens: bounds[piece + 1] - bounds[piece],
                position: sequence.positions - sequence.new_tokens + first,
                head: of_group.start,
                group: of_group.len(),
                scale: heads.scale,
                mask,
            };
            dispatch!(level, attend(query, &past, head_dim, &mut out));
        }
    });
}
