//! The two small matrix products of attention, on rows that are found by functions.

use crate::simd::{LANES, Simd};

/// Rows of queries that are processed together.
pub(super) const QUERY_ROWS: usize = 16;
/// Keys of a block. Blocks start at multiples of it in the sequence, so that a row's result does not depend on which
/// other rows are processed with it.
pub(super) const KEYS: usize = 64;

/// A block's scores or their gradients `[query rows, keys]`.
pub(super) type Scores = [[f32; KEYS]; QUERY_ROWS];

/// `scores[i][j] = a(i) . b(j)` for so many rows of each.
#[inline(always)]
pub(super) fn dot_rows<'a, S: Simd>(
    s: S,
    [m, n]: [usize; 2],
    a: impl Fn(usize) -> &'a [f32],
    b: impl Fn(usize) -> &'a [f32],
    scores: &mut Scores,
) {
    if m == 1 {
        dot_tiles::<S, 1, 4>(s, [m, n], a, b, scores);
    } else if S::ACCUMULATORS >= 16 {
        dot_tiles::<S, 4, 4>(s, [m, n], a, b, scores);
    } else {
        dot_tiles::<S, 2, 2>(s, [m, n], a, b, scores);
    }
}

#[inline(always)]
fn dot_tiles<'a, S: Simd, const M: usize, const N: usize>(
    s: S,
    [m, n]: [usize; 2],
    a: impl Fn(usize) -> &'a [f32],
    b: impl Fn(usize) -> &'a [f32],
    scores: &mut Scores,
) {
    for i in (0..m).step_by(M) {
        // At the edges a tile repeats the last row and drops the copies.
        let a_rows: [&[f32]; M] = std::array::from_fn(|l| a((i + l).min(m - 1)));
        for j in (0..n).step_by(N) {
            let b_rows: [&[f32]; N] = std::array::from_fn(|l| b((j + l).min(n - 1)));
            let sums = crate::linear::dots::<S, M, N>(s, a_rows, b_rows);
            for (row, sums) in scores[i..m].iter_mut().zip(sums) {
                let columns = N.min(n - j);
                row[j..j + columns].copy_from_slice(&sums[..columns]);
            }
        }
    }
}

/// `out(i) += sum over j of factor(i, j) * b(j)` for `m` rows of `out` and `n` rows of `b`, in ascending order of `j`.
///
/// `out` is a matrix of contiguous rows of `b`'s width.
#[inline(always)]
pub(super) fn add_products<'a, S: Simd>(
    s: S,
    [m, n]: [usize; 2],
    factor: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize) -> &'a [f32],
    width: usize,
    out: &mut [f32],
) {
    const M: usize = 4;
    let mut i = 0;
    while i + M <= m {
        add_products_tile::<S, M>(s, n, |l, j| factor(i + l, j), &b, width, &mut out[i * width..]);
        i += M;
    }
    while i < m {
        add_products_tile::<S, 1>(s, n, |_, j| factor(i, j), &b, width, &mut out[i * width..]);
        i += 1;
    }
}

#[inline(always)]
fn add_products_tile<'a, S: Simd, const M: usize>(
    s: S,
    n: usize,
    factor: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize) -> &'a [f32],
    width: usize,
    out: &mut [f32],
) {
    let mut column = 0;
    while column + LANES <= width {
        let mut sums = [s.splat(0.0); M];
        for (l, sum) in sums.iter_mut().enumerate() {
            *sum = s.load_at(out, l * width + column);
        }
        for j in 0..n {
            let b = s.load_at(b(j), column);
            for (l, sum) in sums.iter_mut().enumerate() {
                *sum = s.mul_add(s.splat(factor(l, j)), b, *sum);
            }
        }
        for (l, sum) in sums.into_iter().enumerate() {
            s.store_partial(sum, &mut out[l * width + column..][..LANES]);
        }
        column += LANES;
    }
    for column in column..width {
        for l in 0..M {
            for j in 0..n {
                out[l * width + column] += factor(l, j) * b(j)[column];
            }
        }
    }
}
