//! Few rows of `x`: each row of weights is read once, decoded in registers and multiplied with all of them.

use crate::Weights;
use crate::quantized::{Format, dense_tail};
use crate::simd::{LANES, Simd};
use crate::tiles::Tile;

/// `out = x * W^T + bias` for one to four rows of `x`.
#[inline(always)]
pub(super) fn rows<F: Format, S: Simd>(
    s: S,
    x: &[f32],
    weights: Weights<'_>,
    bias: Option<&[f32]>,
    out: &mut Tile<'_, f32>,
) {
    // Several rows of weights at a time give the processor independent chains of additions.
    match out.rows() {
        1 if S::ACCUMULATORS >= 16 => tiles::<F, S, 1, 8>(s, x, weights, bias, out),
        1 => tiles::<F, S, 1, 4>(s, x, weights, bias, out),
        2 if S::ACCUMULATORS >= 16 => tiles::<F, S, 2, 4>(s, x, weights, bias, out),
        2 => tiles::<F, S, 2, 2>(s, x, weights, bias, out),
        3 if S::ACCUMULATORS >= 16 => tiles::<F, S, 3, 4>(s, x, weights, bias, out),
        3 => tiles::<F, S, 3, 1>(s, x, weights, bias, out),
        4 if S::ACCUMULATORS >= 16 => tiles::<F, S, 4, 4>(s, x, weights, bias, out),
        4 => tiles::<F, S, 4, 1>(s, x, weights, bias, out),
        rows => unreachable!("{rows} rows"),
    }
}

/// All rows of weights, `N` at a time and the rest one by one.
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
    let mut j = 0;
    while j + N <= n {
        let sums = dots::<F, S, M, N>(s, x, std::array::from_fn(|l| row(j + l)));
        for (l, sums) in sums.into_iter().enumerate() {
            store(j + l, sums);
        }
        j += N;
    }
    while j < n {
        let [sums] = dots::<F, S, M, 1>(s, x, [row(j)]);
        store(j, sums);
        j += 1;
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
    let done = blocks * F::CHUNKS * LANES;
    if done < k {
        let x = x.map(|x| s.load_partial(&x[done..]));
        for (row, sums) in rows.iter().zip(&mut sums) {
            dense_tail::<F, S>(
                s,
                &row[blocks * F::BYTES..],
                #[inline(always)]
                |weights| {
                    for (x, sum) in x.iter().zip(sums.iter_mut()) {
                        *sum = s.mul_add(weights, *x, *sum);
                    }
                },
            );
        }
    }
    sums.map(|sums| sums.map(|sum| s.reduce_add(sum)))
}
