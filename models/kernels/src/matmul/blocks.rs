//! The outer loops of a product: blocks of the operands are packed, then multiplied tile by tile in parallel.

use std::cell::RefCell;
use std::ops::Range;

use super::matrix::MatrixRef;
use super::tile::TileShape;
use crate::threads::parallel_for_worth;
use crate::tiles::{Cuts, Tile, Tiles};

/// Rows and columns of the output, about, for which operands are packed at once: the panels stay in the last-level cache.
const BLOCK_ROWS: usize = 4096;
const BLOCK_COLUMNS: usize = 4096;
/// Rows and columns, about, of one task, whose panels stay in a second-level cache.
const TASK_ROWS: usize = 512;
const TASK_COLUMNS: usize = 384;
/// Panels that are packed by one task.
const PANELS: usize = 4;

/// Bytes of a cache line: packed elements begin at one, since loads across two are slower.
const LINE: usize = 64;

/// A buffer of packed words.
struct Packed(Vec<f32>);

impl Packed {
    const fn new() -> Self {
        Self(Vec::new())
    }

    /// `length` words, of any value.
    fn words(&mut self, length: usize) -> &mut [f32] {
        let needed = length + LINE / size_of::<f32>();
        if self.0.len() < needed {
            self.0.resize(needed, 0.0);
        }
        let start = self.0.as_ptr().align_offset(LINE);
        &mut self.0[start..start + length]
    }
}

impl Default for Packed {
    fn default() -> Self {
        Self::new()
    }
}

thread_local! {
    /// The packed blocks of both operands, kept for the next product.
    static SCRATCH: RefCell<[Packed; 2]> = const { RefCell::new([Packed::new(), Packed::new()]) };
}

/// How blocks are packed and multiplied. Panels are of 32-bit words, whatever they hold.
pub(super) trait Kernel: Copy + Sync {
    /// Elements of the common dimension in a block. The sums over blocks are added in memory.
    const DEPTH: usize;
    /// Rows and columns of a tile.
    fn shape(self) -> TileShape;
    /// Words of a panel of `width` lanes.
    fn panel_words(self, width: usize, depth: usize) -> usize;
    /// Packs the part `depth` of the common dimension for `width` lanes from `first` on (zeros beyond the operand's).
    /// `operand` is `[lanes, common dimension]`.
    fn pack(self, operand: MatrixRef<'_>, first: usize, depth: Range<usize>, width: usize, panel: &mut [f32]);
    /// Adds to `out`, or overwrites it, the products of whole panels of both operands.
    fn multiply(self, panels: [&[f32]; 2], depth: usize, add: bool, out: &mut Tile<'_, f32>);
}

/// `out (+)= a * b`, none of them empty.
pub(super) fn product<K: Kernel>(kernel: K, a: MatrixRef<'_>, b: MatrixRef<'_>, accumulate: bool, out: &mut [f32]) {
    let shape = kernel.shape();
    let (m, k, n) = (a.rows, a.columns, b.columns);
    let task = [
        TASK_ROWS.next_multiple_of(shape.rows),
        TASK_COLUMNS.next_multiple_of(shape.columns),
    ];
    let block_rows = BLOCK_ROWS.next_multiple_of(task[0]);
    let block_columns = BLOCK_COLUMNS.next_multiple_of(task[1]);
    // Taken out while they are used: were this called by a task of another product, it would begin with empty ones.
    let [mut packed_a, mut packed_b] = SCRATCH.take();
    for left in (0..n).step_by(block_columns) {
        let columns = left..n.min(left + block_columns);
        for start in (0..k).step_by(K::DEPTH) {
            let depth = start..k.min(start + K::DEPTH);
            let right = Lanes {
                operand: b.transpose(),
                lanes: columns.clone(),
                width: shape.columns,
            };
            let packed_b = pack(kernel, &right, depth.clone(), &mut packed_b);
            for top in (0..m).step_by(block_rows) {
                let rows = top..m.min(top + block_rows);
                let left = Lanes {
                    operand: a,
                    lanes: rows.clone(),
                    width: shape.rows,
                };
                let packed_a = pack(kernel, &left, depth.clone(), &mut packed_a);
                let part = Part {
                    rows,
                    columns: columns.clone(),
                    depth: depth.len(),
                    task,
                };
                multiply(
                    kernel,
                    &part,
                    [packed_a, packed_b],
                    accumulate || start > 0,
                    [m, n],
                    out,
                );
            }
        }
    }
    SCRATCH.set([packed_a, packed_b]);
}

/// Some lanes of an operand `[lanes, common dimension]`, and how many make a panel.
struct Lanes<'a> {
    operand: MatrixRef<'a>,
    lanes: Range<usize>,
    width: usize,
}

/// Packs lanes into panels.
fn pack<'a, K: Kernel>(kernel: K, from: &Lanes<'_>, depth: Range<usize>, packed: &'a mut Packed) -> &'a [f32] {
    let panels = from.lanes.len().div_ceil(from.width);
    let words = kernel.panel_words(from.width, depth.len());
    let length = panels * words;
    let packed = packed.words(length);
    let step = PANELS * words;
    let tiles = Tiles::new(packed, length, Cuts::none(1), Cuts::Every { step, length });
    parallel_for_worth(length, panels.div_ceil(PANELS), |task| {
        let mut tile = tiles.take(0, task);
        for (index, panel) in tile.row(0).chunks_exact_mut(words).enumerate() {
            let first = from.lanes.start + (task * PANELS + index) * from.width;
            kernel.pack(from.operand, first, depth.clone(), from.width, panel);
        }
    });
    packed
}

/// The part of the output that packed blocks belong to.
struct Part {
    rows: Range<usize>,
    columns: Range<usize>,
    depth: usize,
    /// Rows and columns of a task.
    task: [usize; 2],
}

/// Multiplies packed blocks into their part of `out` `[m, n]`.
fn multiply<K: Kernel>(kernel: K, part: &Part, [a, b]: [&[f32]; 2], add: bool, [m, n]: [usize; 2], out: &mut [f32]) {
    let (shape, depth, [task_rows, task_columns]) = (kernel.shape(), part.depth, part.task);
    let cuts = |step: usize, length: usize| Cuts::Every { step, length };
    let outputs = Tiles::new(out, n, cuts(task_rows, m), cuts(task_columns, n));
    let down = part.rows.len().div_ceil(task_rows);
    let tasks = down * part.columns.len().div_ceil(task_columns);
    parallel_for_worth(part.rows.len() * part.columns.len() * depth, tasks, |task| {
        // Neighbouring tasks share their columns' panels.
        let (row, column) = (task % down, task / down);
        let mut out = outputs.take(
            part.rows.start / task_rows + row,
            part.columns.start / task_columns + column,
        );
        let panels = |packed: &'_ [f32], task: usize, lanes: usize, width: usize| {
            let words = lanes / width * kernel.panel_words(width, depth);
            task * words..((task + 1) * words).min(packed.len())
        };
        let a = &a[panels(a, row, task_rows, shape.rows)];
        let b = &b[panels(b, column, task_columns, shape.columns)];
        kernel.multiply([a, b], depth, add, &mut out);
    });
}
