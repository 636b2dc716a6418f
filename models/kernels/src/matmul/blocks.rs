//! The outer loops of a product: blocks of the operands are packed, then multiplied tile by tile in parallel.

use std::cell::RefCell;
use std::ops::Range;

use super::matrix::MatrixRef;
use super::pack;
use super::tile::{TileShape, tiles};
use crate::simd::{Level, dispatch};
use crate::threads::parallel_for_worth;
use crate::tiles::{Cuts, Tiles};

/// Elements of the common dimension in a block. The sums over blocks are added in memory.
const DEPTH: usize = 384;
/// Rows and columns of the output, about, for which operands are packed at once: the panels stay in the last-level cache.
const BLOCK_ROWS: usize = 4096;
const BLOCK_COLUMNS: usize = 4096;
/// Rows and columns, about, of one task, whose panels stay in a second-level cache.
const TASK_ROWS: usize = 128;
const TASK_COLUMNS: usize = 768;
/// Panels that are packed by one task.
const PANELS: usize = 4;

thread_local! {
    /// The packed blocks of both operands, kept for the next product.
    static SCRATCH: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// `out (+)= a * b`, none of them empty.
pub(super) fn product(level: Level, a: MatrixRef<'_>, b: MatrixRef<'_>, accumulate: bool, out: &mut [f32]) {
    let shape = TileShape::of(level);
    let (m, k, n) = (a.rows, a.columns, b.columns);
    let [task_rows, task_columns] = [
        TASK_ROWS.next_multiple_of(shape.rows),
        TASK_COLUMNS.next_multiple_of(shape.columns),
    ];
    let (block_rows, block_columns) = (
        BLOCK_ROWS.next_multiple_of(task_rows),
        BLOCK_COLUMNS.next_multiple_of(task_columns),
    );
    // Taken out while they are used: were this called by a task of another product, it would begin with empty ones.
    let [mut packed_a, mut packed_b] = SCRATCH.take();
    for left in (0..n).step_by(block_columns) {
        let columns = left..n.min(left + block_columns);
        for start in (0..k).step_by(DEPTH) {
            let depth = start..k.min(start + DEPTH);
            block(
                level,
                b.transpose(),
                columns.clone(),
                depth.clone(),
                shape.columns,
                &mut packed_b,
            );
            for top in (0..m).step_by(block_rows) {
                let rows = top..m.min(top + block_rows);
                block(level, a, rows.clone(), depth.clone(), shape.rows, &mut packed_a);
                let grid = Grid {
                    shape,
                    rows,
                    columns: columns.clone(),
                    task_rows,
                    task_columns,
                    depth: depth.len(),
                };
                multiply(
                    level,
                    &grid,
                    [&packed_a, &packed_b],
                    accumulate || start > 0,
                    [m, n],
                    out,
                );
            }
        }
    }
    SCRATCH.set([packed_a, packed_b]);
}

/// Packs a block `[lanes, depth]` of an operand `[lanes, common dimension]` into panels of `width` lanes.
fn block(
    level: Level,
    operand: MatrixRef<'_>,
    lanes: Range<usize>,
    depth: Range<usize>,
    width: usize,
    packed: &mut Vec<f32>,
) {
    let panels = lanes.len().div_ceil(width);
    let length = width * depth.len();
    packed.resize(panels * length, 0.0);
    let whole = packed.len();
    let step = PANELS * length;
    let tiles = Tiles::new(packed, whole, Cuts::none(1), Cuts::Every { step, length: whole });
    parallel_for_worth(whole, panels.div_ceil(PANELS), |task| {
        let mut tile = tiles.take(0, task);
        for (index, panel) in tile.row(0).chunks_exact_mut(length).enumerate() {
            let first = lanes.start + (task * PANELS + index) * width;
            pack::panel(level, operand, first, depth.clone(), panel);
        }
    });
}

/// The part of the output that packed blocks belong to, and how it is divided.
struct Grid {
    shape: TileShape,
    rows: Range<usize>,
    columns: Range<usize>,
    task_rows: usize,
    task_columns: usize,
    depth: usize,
}

/// Multiplies packed blocks into their part of `out` `[m, n]`.
fn multiply(level: Level, grid: &Grid, [a, b]: [&[f32]; 2], add: bool, [m, n]: [usize; 2], out: &mut [f32]) {
    let &Grid {
        shape,
        task_rows,
        task_columns,
        depth,
        ..
    } = grid;
    let cuts = |step: usize, length: usize| Cuts::Every { step, length };
    let outputs = Tiles::new(out, n, cuts(task_rows, m), cuts(task_columns, n));
    let down = grid.rows.len().div_ceil(task_rows);
    let tasks = down * grid.columns.len().div_ceil(task_columns);
    parallel_for_worth(grid.rows.len() * grid.columns.len() * depth, tasks, |task| {
        // Neighbouring tasks share their columns' panels.
        let (row, column) = (task % down, task / down);
        let mut out = outputs.take(
            grid.rows.start / task_rows + row,
            grid.columns.start / task_columns + column,
        );
        let part = |packed: &[f32], from: usize, length: usize, tile: usize| {
            let panels = from / tile..(from + length).div_ceil(tile);
            panels.start * tile * depth..(panels.end * tile * depth).min(packed.len())
        };
        let a = &a[part(a, row * task_rows, task_rows, shape.rows)];
        let b = &b[part(b, column * task_columns, task_columns, shape.columns)];
        dispatch!(level, tiles(a, b, depth, add, &mut out));
    });
}
