//! The extents of tiles, and the two small matrix products of cached attention, on rows that are found by functions.

use crate::simd::{LANES, Simd};

/// Rows of queries that cached attention processes together.
pub(super) const QUERY_ROWS: usize = 16;
/// Keys of a block. Blocks start at multiples of it in the sequence, so that a row's result does not depend on which
/// other rows are processed with it.
pub(super) const KEYS: usize = 64;

/// Rows of queries of a tile of the training passes.
pub(super) const TILE_ROWS: usize = 64;

/// A tile's scores or their gradients `[query rows, keys]`.
pub(super) type TileScores = [[f32; KEYS]; TILE_ROWS];

/// A block's scores `[query rows, keys]`.
pub(super) type Scores = [[f32; KEYS]; QUERY_ROWS];

/// `scores[i][j] = a[i] . b[j]`.
#[inline(always)]
pub(super) fn dot_rows<S: Simd>(s: S, a: &[&[f32]], b: &[&[f32]], scores: &mut Scores) {
    if a.len() == 1 {
        dot_tiles::<S, 1, 4>(s, a, b, scores);
    } else if S::ACCUMULATORS >= 16 {
        dot_tiles::<S, 4, 4>(s, a, b, scores);
    } else {
        dot_tiles::<S, 2, 2>(s, a, b, scores);
    }
}

#[inline(always)]
fn dot_tiles<S: Simd, const M: usize, const N: usize>(s: S, a: &[&[f32]], b: &[&[f32]], scores: &mut Scores) {
    for i in (0..a.len()).step_by(M) {
        // At the edges a tile repeats the last row and drops the copies.
        let mut a_rows: [&[f32]; M] = [&[]; M];
        for (l, row) in a_rows.iter_mut().enumerate() {
            *row = a[(i + l).min(a.len() - 1)];
        }
        for j in (0..b.len()).step_by(N) {
            let mut b_rows: [&[f32]; N] = [&[]; N];
            for (l, row) in b_rows.iter_mut().enumerate() {
                *row = b[(j + l).min(b.len() - 1)];
            }
            let sums = crate::linear::dots::<S, M, N>(s, a_rows, b_rows);
            for (row, sums) in scores[i..a.len()].iter_mut().zip(sums) {
                for (score, sum) in row[j..b.len()].iter_mut().zip(sums) {
                    *score = sum;
                }
            }
        }
    }
}

/// `out[i] += sum over j of factor(i, j) * b[j]` for `m` rows of `out`, in ascending order of `j`.
///
/// `out` is a matrix of contiguous rows of `b`'s width.
#[inline(always)]
pub(super) fn add_products<S: Simd>(
    s: S,
    m: usize,
    factor: impl Fn(usize, usize) -> f32,
    b: &[&[f32]],
    width: usize,
    out: &mut [f32],
) {
    const M: usize = 4;
    let mut i = 0;
    while i + M <= m {
        add_products_rows::<S, M>(
            s,
            |l, j| factor(i + l, j),
            b,
            width,
            &mut out[i * width..(i + M) * width],
        );
        i += M;
    }
    while i < m {
        add_products_rows::<S, 1>(s, |_, j| factor(i, j), b, width, &mut out[i * width..(i + 1) * width]);
        i += 1;
    }
}

#[inline(always)]
fn add_products_rows<S: Simd, const M: usize>(
    s: S,
    factor: impl Fn(usize, usize) -> f32,
    b: &[&[f32]],
    width: usize,
    out: &mut [f32],
) {
    let mut column = 0;
    if S::ACCUMULATORS >= 16 {
        while column + 4 * LANES <= width {
            add_products_tile::<S, M, 4>(s, &factor, b, [width, column], out);
            column += 4 * LANES;
        }
    }
    while column + LANES <= width {
        add_products_tile::<S, M, 1>(s, &factor, b, [width, column], out);
        column += LANES;
    }
    for column in column..width {
        for l in 0..M {
            for (j, b) in b.iter().enumerate() {
                out[l * width + column] += factor(l, j) * b[column];
            }
        }
    }
}

/// The same for `C` vectors of columns, with the sums in registers.
#[inline(always)]
fn add_products_tile<S: Simd, const M: usize, const C: usize>(
    s: S,
    factor: impl Fn(usize, usize) -> f32,
    b: &[&[f32]],
    [width, column]: [usize; 2],
    out: &mut [f32],
) {
    let mut sums = [[s.splat(0.0); C]; M];
    for (l, sums) in sums.iter_mut().enumerate() {
        for (c, sum) in sums.iter_mut().enumerate() {
            *sum = s.load_at(out, l * width + column + c * LANES);
        }
    }
    for (j, b) in b.iter().enumerate() {
        let b = &b[column..column + C * LANES];
        let mut values = [s.splat(0.0); C];
        for (c, value) in values.iter_mut().enumerate() {
            *value = s.load_at(b, c * LANES);
        }
        for (l, sums) in sums.iter_mut().enumerate() {
            let factor = s.splat(factor(l, j));
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum = s.mul_add(factor, value, *sum);
            }
        }
    }
    for (l, sums) in sums.into_iter().enumerate() {
        for (c, sum) in sums.into_iter().enumerate() {
            s.store_at(sum, out, l * width + column + c * LANES);
        }
    }
}
