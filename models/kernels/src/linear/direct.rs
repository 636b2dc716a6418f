//! Few rows of `x`: each row of weights is read once, decoded in registers and multiplied with all of them.

use crate::quantized::{Format, dense_tail};
use crate::simd::{LANES, Level, Simd};
use crate::tiles::Tile;
use crate::{WeightFormat, Weights};

/// Rows of `x` up to which weights are decoded in registers: what fits in the level's registers, and only one for the
/// k-quants, whose decoding is long.
pub(super) fn limit(level: Level, format: WeightFormat) -> usize {
    match level {
        _ if format.block_elements() > 32 => 1,
        Level::Avx512 => 4,
        Level::Avx2 => 2,
        Level::Portable | Level::Neon => 1,
    }
}

/// `out = x * W^T + bias` for one to [`limit`] rows of `x`.
#[inline(always)]
pub(super) fn rows<F: Format, S: Simd>(
    s: S,
    x: &[f32],
    weights: Weights<'_>,
    bias: Option<&[f32]>,
    out: &mut Tile<'_, f32>,
) {
    // Several rows of weights at a time give the processor independent chains of additions. The branches on constants
    // leave only the tiles that are used to be compiled.
    if S::ACCUMULATORS < 4 {
        tiles::<F, S, 1, 1>(s, x, weights, bias, out);
    } else if F::CHUNKS > 2 {
        tiles::<F, S, 1, 2>(s, x, weights, bias, out);
    } else if out.rows() == 1 {
        tiles::<F, S, 1, 4>(s, x, weights, bias, out);
    } else if out.rows() == 2 {
        tiles::<F, S, 2, 2>(s, x, weights, bias, out);
    } else if S::ACCUMULATORS >= 16 {
        match out.rows() {
            3 => tiles::<F, S, 3, 2>(s, x, weights, bias, out),
            _ => tiles::<F, S, 4, 2>(s, x, weights, bias, out),
        }
    }
}

/// All rows of weights, `N` at a time.
#[inline(always)]
fn tiles<F: Format, S: Simd, const M: usize, const N: usize>(
    s: S,
    x: &[f32],
    weights: Weights<'_>,
    bias: Option<&[f32]>,
    out: &mut Tile<'_, f32>,
) {
    let (n, k) = (weights.rows, weights.columns);
    let row_bytes = weights.data.len() / n;
    let x: [&[f32]; M] = std::array::from_fn(|i| &x[i * k..(i + 1) * k]);
    let row = |j: usize| &weights.data[j * row_bytes..(j + 1) * row_bytes];
    let mut store = |j: usize, sums: [f32; M]| {
        let bias = bias.map_or(0.0, |bias| bias[j]);
        for (i, sum) in sums.into_iter().enumerate() {
            out.row(i)[j] = sum + bias;
        }
    };
    for j in (0..n).step_by(N) {
        // At the end a tile repeats the last row and drops the copies.
        let mut rows: [&[u8]; N] = [&[]; N];
        for (l, to) in rows.iter_mut().enumerate() {
            *to = row((j + l).min(n - 1));
        }
        let sums = dots::<F, S, M, N>(s, x, rows);
        for (l, sums) in sums.into_iter().enumerate().take(n - j) {
            store(j + l, sums);
        }
    }
}

/// Dot products of `M` rows of `x` with `N` rows of weights.
#[inline(always)]
fn dots<F: Format, S: Simd, const M: usize, const N: usize>(s: S, x: [&[f32]; M], rows: [&[u8]; N]) -> [[f32; M]; N] {
    let k = x[0].len();
    let blocks = k / (F::CHUNKS * LANES);
    let x = x.map(|x| &x[..k]);
    let rows = rows.map(|row| &row[..rows[0].len()]);
    let mut sums = [[s.splat(0.0); M]; N];
    for block in 0..blocks {
        let x = x.map(|x| &x[block * F::CHUNKS * LANES..(block + 1) * F::CHUNKS * LANES]);
        for (row, sums) in rows.iter().zip(&mut sums) {
            F::decode(
                s,
                &row[block * F::BYTES..(block + 1) * F::BYTES],
                #[inline(always)]
                |chunk, weights| {
                    for (x, sum) in x.iter().zip(sums.iter_mut()) {
                        *sum = s.mul_add(weights, s.load_at(x, chunk * LANES), *sum);
                    }
                },
            );
        }
    }
    // Only the dense formats have rows that are not whole blocks.
    if F::CHUNKS == 1 && blocks * LANES < k {
        let done = blocks * LANES;
        for (row, sums) in rows.iter().zip(&mut sums) {
            let weights = dense_tail::<F, S>(s, &row[blocks * F::BYTES..]);
            for (x, sum) in x.iter().zip(sums.iter_mut()) {
                *sum = s.mul_add(weights, s.load_partial(&x[done..]), *sum);
            }
        }
    }
    let mut out = [[0.0; M]; N];
    for (out, sums) in out.iter_mut().zip(sums) {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = s.reduce_add(sum);
        }
    }
    out
}
