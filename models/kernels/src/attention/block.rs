//! Neighbouring rows of queries, what they see, and what is dropped of it.

use std::ops::Range;

use super::mask::{HeadMask, KeyList, Runs};
use super::product::Extent;
use super::rows::Rows;
use super::tile::{KEYS, TILE_ROWS};
use crate::dropout::{Dropout, Masks};
use crate::simd::{LANES, Simd};

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

/// Neighbouring rows of queries that are processed together.
pub(super) struct RowBlock<'a, const ROWS: usize> {
    /// Number of rows.
    pub(super) count: usize,
    /// The keys that they may see.
    pub(super) keys: KeyList<'a>,
    /// The part of those that each sees.
    pub(super) seen: [Range<usize>; ROWS],
}

impl<'a, const ROWS: usize> RowBlock<'a, ROWS> {
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
        let count = ROWS.min(rows - first).min(same);
        let mut seen = [const { 0..0 }; ROWS];
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

/// What each row of a tile sees of a block of keys, of which later rows see neither the start nor the end before earlier
/// ones.
pub(super) struct Visible([Range<usize>; TILE_ROWS]);

impl RowBlock<'_, TILE_ROWS> {
    /// What the rows see of the block that starts at `start`.
    #[inline(always)]
    pub(super) fn visible_rows(&self, start: usize) -> Visible {
        let width = self.width(start);
        let mut visible = [const { 0..0 }; TILE_ROWS];
        for (row, visible) in visible.iter_mut().enumerate().take(self.count) {
            *visible = self.visible(row, start, width);
        }
        Visible(visible)
    }
}

impl Visible {
    #[inline(always)]
    pub(super) fn of(&self, row: usize) -> Range<usize> {
        self.0[row].clone()
    }

    /// The keys that some of the neighbouring rows see, and perhaps others between them.
    #[inline(always)]
    fn of_rows(&self, rows: Range<usize>) -> Range<usize> {
        self.0[rows.start].start..self.0[rows.end - 1].end
    }

    /// What is needed of the scores of some rows: sums over the elements of a head.
    #[inline(always)]
    pub(super) fn scores(&self, rows: Range<usize>, head_dim: usize) -> Extent {
        let keys = self.of_rows(rows);
        Extent {
            depth: 0..head_dim,
            vectors: keys.start / LANES..keys.end.div_ceil(LANES),
        }
    }

    /// What is needed of sums over the keys `run` of the block, for some rows of `width` elements.
    #[inline(always)]
    pub(super) fn sums(&self, rows: Range<usize>, run: Range<usize>, width: usize) -> Extent {
        let keys = self.of_rows(rows);
        let length = run.len();
        Extent {
            depth: keys.start.saturating_sub(run.start).min(length)..keys.end.saturating_sub(run.start).min(length),
            vectors: 0..width / LANES,
        }
    }

    /// What is needed of sums over the first `count` rows, for some of the block's keys; each has `width` elements.
    #[inline(always)]
    pub(super) fn turned(&self, keys: Range<usize>, count: usize, width: usize) -> Extent {
        let rows = &self.0[..count];
        let first = rows.partition_point(|seen| seen.end <= keys.start);
        let last = rows.partition_point(|seen| seen.start < keys.end);
        Extent {
            depth: first..last.max(first),
            vectors: 0..width / LANES,
        }
    }
}
