//! The innermost loop: a tile of the output, whose sums stay in registers, from one panel of each operand.

use std::ops::Range;

use super::blocks::Kernel;
use super::matrix::MatrixRef;
use super::pack;
use crate::simd::{LANES, Level, Simd, dispatch};
use crate::tiles::Tile;

/// The kernel of f32 panels: elements of other types are widened when they are packed.
#[derive(Clone, Copy)]
pub(super) struct Widened(pub(super) Level);

impl Kernel for Widened {
    const DEPTH: usize = 384;

    fn shape(self) -> TileShape {
        TileShape::of(self.0)
    }

    fn panel_words(self, width: usize, depth: usize) -> usize {
        width * depth
    }

    fn pack(self, operand: MatrixRef<'_>, first: usize, depth: Range<usize>, _width: usize, panel: &mut [f32]) {
        pack::panel(self.0, operand, first, depth, panel);
    }

    fn multiply(self, [a, b]: [&[f32]; 2], depth: usize, add: bool, out: &mut Tile<'_, f32>) {
        dispatch!(self.0, tiles(a, b, depth, add, out));
    }
}

/// Rows and columns of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TileShape {
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl TileShape {
    /// What fits into the level's registers: as [`tiles`] decides.
    pub(super) fn of(level: Level) -> Self {
        let (rows, vectors) = match level {
            Level::Avx512 => (8, 3),
            Level::Avx2 | Level::Neon => (6, 1),
            Level::Portable => (2, 1),
        };
        Self {
            rows,
            columns: vectors * LANES,
        }
    }
}

/// Adds to the tiles of `out`, or overwrites them, from whole panels: `a` holds panels of `shape.rows` rows, `b` of
/// `shape.columns` columns, both of depth `depth` (see [`super::pack`]).
#[inline(always)]
fn tiles<S: Simd>(s: S, a: &[f32], b: &[f32], depth: usize, add: bool, out: &mut Tile<'_, f32>) {
    // The branches on constants leave only the level's own shape to be compiled.
    if S::ACCUMULATORS >= 16 {
        tiles_of::<S, 8, 3>(s, a, b, depth, add, out);
    } else if S::ACCUMULATORS >= 4 {
        tiles_of::<S, 6, 1>(s, a, b, depth, add, out);
    } else {
        tiles_of::<S, 2, 1>(s, a, b, depth, add, out);
    }
}

#[inline(always)]
fn tiles_of<S: Simd, const M: usize, const N: usize>(
    s: S,
    a: &[f32],
    b: &[f32],
    depth: usize,
    add: bool,
    out: &mut Tile<'_, f32>,
) {
    for (i, a) in a.chunks_exact(M * depth).enumerate() {
        for (j, b) in b.chunks_exact(N * LANES * depth).enumerate() {
            let sums = tile::<S, M, N>(s, a, b);
            store::<S, M, N>(s, sums, [i * M, j * N * LANES], add, out);
        }
    }
}

/// The tile's sums, in ascending order of the common dimension.
#[inline(always)]
fn tile<S: Simd, const M: usize, const N: usize>(s: S, a: &[f32], b: &[f32]) -> [[S::F32; N]; M] {
    let mut sums = [[s.splat(0.0); N]; M];
    for (a, b) in a.chunks_exact(M).zip(b.chunks_exact(N * LANES)) {
        let mut columns = [s.splat(0.0); N];
        for (c, column) in columns.iter_mut().enumerate() {
            *column = s.load_at(b, c * LANES);
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let factor = s.splat(a[r]);
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = s.mul_add(factor, column, *sum);
            }
        }
    }
    sums
}

/// The part of the sums that lies inside of `out`, from element `[row, column]` on.
#[inline(always)]
pub(super) fn store<S: Simd, const M: usize, const N: usize>(
    s: S,
    sums: [[S::F32; N]; M],
    [row, column]: [usize; 2],
    add: bool,
    out: &mut Tile<'_, f32>,
) {
    let rows = M.min(out.rows() - row);
    for (r, sums) in sums.into_iter().enumerate().take(rows) {
        let out = &mut out.row(row + r)[column..];
        if out.len() >= N * LANES {
            for (c, sum) in sums.into_iter().enumerate() {
                let sum = if add {
                    s.add(s.load_at(out, c * LANES), sum)
                } else {
                    sum
                };
                s.store_at(sum, out, c * LANES);
            }
        } else {
            for (sum, out) in sums.into_iter().zip(out.chunks_mut(LANES)) {
                let sum = if add { s.add(s.load_partial(out), sum) } else { sum };
                s.store_partial(sum, out);
            }
        }
    }
}
