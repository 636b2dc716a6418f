//! The keys and values of all sequences, packed once for all tiles of queries.

use super::AttentionHeads;
use super::panels::{column_words, pack_columns, pack_turned, turned_words};
use super::rows::Rows;
use crate::aligned::Aligned;
use crate::simd::{LANES, Level, Simd, dispatch};
use crate::threads::parallel_for_worth;
use crate::tiles::{Cuts, Tiles};

/// The keys and values of all sequences and heads in panels.
pub(super) struct Packed<'a> {
    /// Keys and values as they are.
    keys: [&'a [f32]; 2],
    heads: AttentionHeads<'a>,
    cumulative_lengths: &'a [usize],
    /// Where the panels of each head of each sequence begin, head after head.
    bounds: Vec<usize>,
    panels: &'a [f32],
}

/// One sequence's keys and values of one head.
pub(super) struct PackedHead<'a> {
    pub(super) keys: Rows<'a>,
    /// Keys, turned: see [`pack_turned`].
    pub(super) turned: &'a [f32],
    /// Columns of the values: see [`pack_columns`].
    pub(super) values: &'a [f32],
    pub(super) length: usize,
    pub(super) head_dim: usize,
}

impl<'a> Packed<'a> {
    /// Packs `keys` and values into `buffer`.
    pub(super) fn new(
        level: Level,
        heads: &AttentionHeads<'a>,
        cumulative_lengths: &'a [usize],
        keys: [&'a [f32]; 2],
        buffer: &'a mut Aligned,
    ) -> Self {
        let head_dim = heads.head_dim;
        let lengths = cumulative_lengths.windows(2).map(|bounds| bounds[1] - bounds[0]);
        let mut bounds = vec![0];
        let mut end = 0;
        for _ in 0..heads.key_value_heads {
            for length in lengths.clone() {
                end += turned_words(length, head_dim) + column_words(length, head_dim);
                bounds.push(end);
            }
        }
        let panels = buffer.words(end);
        let mut packed = Self {
            keys,
            heads: *heads,
            cumulative_lengths,
            bounds,
            panels: &[],
        };
        {
            let tiles = Tiles::new(&mut *panels, end, Cuts::none(1), Cuts::At(&packed.bounds));
            let work = keys[0].len() * LANES;
            parallel_for_worth(work, packed.bounds.len() - 1, |task| {
                let sequences = cumulative_lengths.len() - 1;
                let (head, sequence) = (task / sequences, task % sequences);
                let mut tile = tiles.take(0, task);
                let length = cumulative_lengths[sequence + 1] - cumulative_lengths[sequence];
                let (turned, values) = tile.row(0).split_at_mut(turned_words(length, head_dim));
                let rows = [0, 1].map(|which| packed.rows(which, sequence, head));
                dispatch!(level, pack(rows, length, head_dim, turned, values));
            });
        }
        packed.panels = panels;
        packed
    }

    /// The keys (`which` 0) or values of one sequence and head as they are.
    fn rows(&self, which: usize, sequence: usize, head: usize) -> Rows<'a> {
        let (width, head_dim) = (self.heads.key_value_width(), self.heads.head_dim);
        let start = self.cumulative_lengths[sequence] * width + head * head_dim;
        // Of a sequence without tokens nothing is read.
        let data = self.keys[which].get(start..).unwrap_or_default();
        Rows::new(data, width, 1, head_dim)
    }

    /// Those of one head of one sequence.
    pub(super) fn head(&self, sequence: usize, head: usize) -> PackedHead<'a> {
        let sequences = self.cumulative_lengths.len() - 1;
        let index = head * sequences + sequence;
        let length = self.cumulative_lengths[sequence + 1] - self.cumulative_lengths[sequence];
        let head_dim = self.heads.head_dim;
        let panels = &self.panels[self.bounds[index]..self.bounds[index + 1]];
        let (turned, values) = panels.split_at(turned_words(length, head_dim));
        PackedHead {
            keys: self.rows(0, sequence, head),
            turned,
            values,
            length,
            head_dim,
        }
    }
}

#[inline(always)]
fn pack<S: Simd>(
    s: S,
    [keys, values]: [Rows<'_>; 2],
    length: usize,
    head_dim: usize,
    turned: &mut [f32],
    columns: &mut [f32],
) {
    pack_turned(s, length, |index| keys.row(index), head_dim, turned);
    pack_columns(s, length, |index| values.row(index), 1.0, columns);
}
