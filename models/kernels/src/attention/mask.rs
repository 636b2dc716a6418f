//! Which keys a query sees: at most its own and those before it, and of these a band or chosen blocks.
//!
//! The keys that a block of queries may see are taken as one *list*, in ascending order and without gaps: all positions
//! without a layout, those of the present blocks with one. The kernels go through that list, so that absent blocks are
//! never read, and cut it at multiples of [`KEYS`](super::tile::KEYS), so that a row's result depends on its own list
//! alone.

use std::ops::Range;
use std::sync::Arc;

/// The blocks that one head's queries see (block-sparse attention; Child et al., "Generating Long Sequences with Sparse
/// Transformers", arXiv:1904.10509): positions are cut into blocks of the same length, and every block of queries sees
/// the keys of some blocks. Attention is causal within them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockLayout {
    size: usize,
    /// The key blocks of query block `i` are `keys[starts[i]..starts[i + 1]]`, ascending.
    starts: Vec<u32>,
    keys: Vec<u32>,
}

impl BlockLayout {
    /// A layout of blocks of `size` positions: `rows` has for each block of queries the blocks of keys that it sees.
    ///
    /// # Panics
    /// For a size of 0, and for rows that are not ascending or reach beyond their own block.
    pub fn new<'a>(size: usize, rows: impl IntoIterator<Item = &'a [u32]>) -> Self {
        assert!(size > 0, "blocks of no position");
        let (mut starts, mut keys) = (vec![0], Vec::new());
        for (block, row) in rows.into_iter().enumerate() {
            assert!(
                row.is_sorted_by(|a, b| a < b) && row.last().is_none_or(|last| *last as usize <= block),
                "block {block} of queries cannot see the blocks {row:?}"
            );
            keys.extend_from_slice(row);
            starts.push(keys.len() as u32);
        }
        Self { size, starts, keys }
    }

    /// Positions of a block.
    pub fn block_size(&self) -> usize {
        self.size
    }

    /// Blocks of queries.
    pub fn query_blocks(&self) -> usize {
        self.starts.len() - 1
    }

    /// The blocks of keys that a block of queries sees, ascending.
    ///
    /// # Panics
    /// Beyond the last block.
    pub fn keys(&self, query_block: usize) -> &[u32] {
        &self.keys[self.starts[query_block] as usize..self.starts[query_block + 1] as usize]
    }

    /// Pairs of a block of queries and a block of keys that it sees.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether no block sees another.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// Which of the keys up to its own a query sees. The default: all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttentionMask<'a> {
    /// How many of the newest keys, its own among them, a query sees (locally banded attention).
    pub window: Option<usize>,
    /// The layout of each query head; none for heads that see every block. Empty where all do.
    pub layouts: &'a [Option<Arc<BlockLayout>>],
}

impl<'a> AttentionMask<'a> {
    /// Whether the query at position `query` sees the key at position `key`, by the head `head`.
    ///
    /// # Panics
    /// For a query beyond the blocks of the head's layout.
    pub fn sees(&self, head: usize, query: usize, key: usize) -> bool {
        let present = |layout: &BlockLayout| {
            let blocks = layout.keys(query / layout.size);
            blocks.binary_search(&((key / layout.size) as u32)).is_ok()
        };
        let near = query
            .checked_sub(key)
            .is_some_and(|distance| self.window.is_none_or(|window| distance < window));
        near && self.of_head(head).layout.is_none_or(present)
    }

    /// What one head sees.
    pub(super) fn of_head(&self, head: usize) -> HeadMask<'a> {
        HeadMask {
            window: self.window.unwrap_or(usize::MAX),
            layout: self.layouts.get(head).and_then(Option::as_deref),
        }
    }

    /// The query heads `first..first + count` in runs that see the same: the offset and the number of each run's heads.
    pub(super) fn runs(&self, first: usize, count: usize) -> Vec<(Range<usize>, HeadMask<'a>)> {
        let mut runs: Vec<(Range<usize>, HeadMask<'a>)> = Vec::with_capacity(1);
        for head in 0..count {
            let mask = self.of_head(first + head);
            match runs.last_mut() {
                Some((heads, last)) if *last == mask => heads.end = head + 1,
                _ => runs.push((head..head + 1, mask)),
            }
        }
        runs
    }

    /// Panics on masks that hide everything, or that are not those of `heads` heads and `positions` positions.
    pub(super) fn check(&self, heads: usize, positions: usize) {
        assert!(self.window != Some(0), "a window of no key");
        assert!(
            self.layouts.is_empty() || self.layouts.len() == heads,
            "{} layouts for {heads} heads",
            self.layouts.len()
        );
        for layout in self.layouts.iter().flatten() {
            let held = layout.query_blocks().saturating_mul(layout.size);
            assert!(positions <= held, "a layout of {held} positions for {positions}");
        }
    }
}

/// What the queries of a head see.
#[derive(Clone, Copy)]
pub(super) struct HeadMask<'a> {
    window: usize,
    layout: Option<&'a BlockLayout>,
}

impl PartialEq for HeadMask<'_> {
    fn eq(&self, other: &Self) -> bool {
        let same = match (self.layout, other.layout) {
            (Some(own), Some(other)) => std::ptr::eq(own, other) || own == other,
            (own, other) => own.is_none() && other.is_none(),
        };
        self.window == other.window && same
    }
}

impl<'a> HeadMask<'a> {
    /// The list of the queries from `position` on, and the position before which the list is the same for all.
    #[inline(always)]
    pub(super) fn list(&self, position: usize) -> (KeyList<'a>, usize) {
        let (window, blocks, end) = match self.layout {
            None => (self.window, None, usize::MAX),
            Some(layout) => {
                let block = position / layout.size;
                let blocks = Blocks {
                    keys: layout.keys(block),
                    size: layout.size,
                };
                (self.window, Some(blocks), (block + 1) * layout.size)
            }
        };
        (KeyList { window, blocks }, end)
    }
}

/// The keys that neighbouring queries may see.
#[derive(Clone, Copy)]
pub(super) struct KeyList<'a> {
    window: usize,
    blocks: Option<Blocks<'a>>,
}

#[derive(Clone, Copy)]
struct Blocks<'a> {
    keys: &'a [u32],
    size: usize,
}

impl Blocks<'_> {
    /// Keys of the list that lie before `position`.
    fn before(&self, position: usize) -> usize {
        let block = position / self.size;
        let whole = self.keys.partition_point(|key| (*key as usize) < block);
        let rest = match self.keys.get(whole) {
            Some(key) if *key as usize == block => position % self.size,
            _ => 0,
        };
        whole * self.size + rest
    }
}

impl<'a> KeyList<'a> {
    /// The part of the list that the query at `position` sees.
    #[inline(always)]
    pub(super) fn seen(&self, position: usize) -> Range<usize> {
        let first = (position + 1).saturating_sub(self.window);
        match &self.blocks {
            None => first..position + 1,
            Some(blocks) if first == 0 => 0..blocks.before(position + 1),
            Some(blocks) => blocks.before(first)..blocks.before(position + 1),
        }
    }

    /// The positions of a part of the list.
    #[inline(always)]
    pub(super) fn runs(&self, part: Range<usize>) -> Runs<'a> {
        Runs {
            blocks: self.blocks,
            part,
        }
    }
}

/// Neighbouring positions of a part of a list: the first, and how many.
#[derive(Clone)]
pub(super) struct Runs<'a> {
    blocks: Option<Blocks<'a>>,
    part: Range<usize>,
}

impl Iterator for Runs<'_> {
    type Item = (usize, usize);

    #[inline(always)]
    fn next(&mut self) -> Option<(usize, usize)> {
        let Range { start, end } = self.part;
        if start >= end {
            return None;
        }
        let Some(blocks) = &self.blocks else {
            self.part.start = end;
            return Some((start, end - start));
        };
        let (mut block, offset) = (start / blocks.size, start % blocks.size);
        let first = blocks.keys[block] as usize * blocks.size + offset;
        let mut count = blocks.size - offset;
        // Blocks that follow each other are one run.
        while count < end - start && blocks.keys.get(block + 1) == Some(&(blocks.keys[block] + 1)) {
            block += 1;
            count += blocks.size;
        }
        let count = count.min(end - start);
        self.part.start += count;
        Some((first, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_the_positions_of_the_present_blocks() {
        let rows: [&[u32]; 4] = [&[0], &[0, 1], &[0, 2], &[1, 2, 3]];
        let layout = BlockLayout::new(3, rows);
        assert_eq!((layout.query_blocks(), layout.len(), layout.block_size()), (4, 8, 3));
        let layouts = [Some(Arc::new(layout.clone()))];
        for window in [None, Some(1), Some(4), Some(100)] {
            let mask = AttentionMask {
                window,
                layouts: &layouts,
            };
            for position in 0..12 {
                let (list, end) = mask.of_head(0).list(position);
                assert_eq!(end, (position / 3 + 1) * 3);
                let seen = list.runs(list.seen(position));
                let seen: Vec<usize> = seen.flat_map(|(first, count)| first..first + count).collect();
                let present = |key: &usize| layout.keys(position / 3).contains(&((key / 3) as u32));
                let first = (position + 1).saturating_sub(window.unwrap_or(100));
                let expected: Vec<usize> = (first..=position).filter(present).collect();
                assert_eq!(seen, expected, "{position} {window:?}");
            }
        }
    }

    #[test]
    fn neighbouring_blocks_are_one_run() {
        let layout = BlockLayout::new(2, [&[0][..], &[1], &[0, 1, 2], &[0, 2, 3]]);
        let mask = AttentionMask {
            window: None,
            layouts: &[Some(Arc::new(layout))],
        };
        let (list, _) = mask.of_head(0).list(4);
        assert_eq!(list.runs(1..6).collect::<Vec<_>>(), [(1, 5)]);
        assert_eq!(list.runs(2..3).collect::<Vec<_>>(), [(2, 1)]);
        let (list, _) = mask.of_head(0).list(7);
        assert_eq!(list.runs(0..5).collect::<Vec<_>>(), [(0, 2), (4, 3)]);
    }

    #[test]
    fn heads_that_see_the_same_are_one_run() {
        let layout = || Some(Arc::new(BlockLayout::new(2, [&[0][..]])));
        let layouts = [layout(), layout(), None, None, layout()];
        let mask = AttentionMask {
            window: None,
            layouts: &layouts,
        };
        let runs: Vec<_> = mask.runs(0, 5).into_iter().map(|(heads, _)| heads).collect();
        assert_eq!(runs, [0..2, 2..4, 4..5]);
        let dense = AttentionMask::default();
        assert_eq!(dense.runs(3, 2).len(), 1);
    }

    #[test]
    #[should_panic(expected = "cannot see the blocks")]
    fn blocks_above_the_diagonal_are_refused() {
        BlockLayout::new(4, [&[0, 1][..]]);
    }
}
