//! Many rows of `x`: panels of weights are decoded once and multiplied with all rows, tile by tile.

use std::cell::RefCell;

use crate::quantized::dequantize_row;
use crate::simd::{LANES, Level, Simd, dispatch};
use crate::tiles::Tile;
use crate::{WeightFormat, Weights};

/// Rows of weights in a panel. A panel of a thousand columns is 64 KiB and stays in the second-level cache.
const PANEL_ROWS: usize = 16;

/// Elements of `x` that are used again and again: 512 KiB, a part of the second-level cache.
const CACHED_ELEMENTS: usize = 1 << 17;

/// `out = x * W^T + bias`.
pub(super) fn rows(level: Level, x: &[f32], weights: Weights<'_>, bias: Option<&[f32]>, out: &mut Tile<'_, f32>) {
    thread_local! {
        static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let k = weights.columns;
    let row_bytes = weights.data.len() / weights.rows;
    // Rows of x that stay in the second-level cache while all panels pass; a multiple of every tile's height.
    let block = (CACHED_ELEMENTS / k.max(1)).next_multiple_of(4).max(4);
    SCRATCH.with_borrow_mut(|scratch| {
        for first in (0..out.rows()).step_by(block) {
            let last = out.rows().min(first + block);
            let x = &x[first * k..last * k];
            for start in (0..weights.rows).step_by(PANEL_ROWS) {
                let end = weights.rows.min(start + PANEL_ROWS);
                let data = &weights.data[start * row_bytes..end * row_bytes];
                let panel = match bytemuck::try_cast_slice(data) {
                    Ok(panel) if weights.format == WeightFormat::F32 => panel,
                    _ => {
                        scratch.resize((end - start) * k, 0.0);
                        for (row, out) in data
                            .chunks_exact(row_bytes.max(1))
                            .zip(scratch.chunks_exact_mut(k.max(1)))
                        {
                            dequantize_row(level, weights.format, row, out);
                        }
                        scratch.as_slice()
                    }
                };
                dispatch!(level, multiply(x, panel, bias, [first, start], k, out));
            }
        }
    });
}

/// Rows `first..` and columns `start..` of `out` from some rows of `x` and a panel `[rows, k]`.
#[inline(always)]
fn multiply<S: Simd>(
    s: S,
    x: &[f32],
    panel: &[f32],
    bias: Option<&[f32]>,
    [first, start]: [usize; 2],
    k: usize,
    out: &mut Tile<'_, f32>,
) {
    if S::ACCUMULATORS >= 16 {
        multiply_tiles::<S, 4, 4>(s, x, panel, bias, [first, start], k, out);
    } else {
        multiply_tiles::<S, 2, 2>(s, x, panel, bias, [first, start], k, out);
    }
}

#[inline(always)]
fn multiply_tiles<S: Simd, const M: usize, const N: usize>(
    s: S,
    x: &[f32],
    panel: &[f32],
    bias: Option<&[f32]>,
    [first, start]: [usize; 2],
    k: usize,
    out: &mut Tile<'_, f32>,
) {
    let rows = panel.len().checked_div(k).unwrap_or(0);
    let m = x.len().checked_div(k).unwrap_or(out.rows() - first);
    for i in (0..m).step_by(M) {
        for j in (0..rows).step_by(N) {
            // At the edges a tile repeats the last row and drops the copies.
            let (mut x_rows, mut w_rows): ([&[f32]; M], [&[f32]; N]) = ([&[]; M], [&[]; N]);
            for (l, x_row) in x_rows.iter_mut().enumerate() {
                *x_row = row(x, (i + l).min(m - 1), k);
            }
            for (l, w_row) in w_rows.iter_mut().enumerate() {
                *w_row = row(panel, (j + l).min(rows - 1), k);
            }
            let sums = dots::<S, M, N>(s, x_rows, w_rows);
            for (l, sums) in sums.into_iter().enumerate().take(m - i) {
                let out = &mut out.row(first + i + l)[start + j..start + rows.min(j + N)];
                for (column, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
                    *out = sum + bias.map_or(0.0, |bias| bias[start + j + column]);
                }
            }
        }
    }
}

#[inline(always)]
fn row(matrix: &[f32], index: usize, k: usize) -> &[f32] {
    &matrix[index * k..(index + 1) * k]
}

/// Dot products of `M` rows with `N` rows.
#[inline(always)]
pub(crate) fn dots<S: Simd, const M: usize, const N: usize>(s: S, x: [&[f32]; M], w: [&[f32]; N]) -> [[f32; N]; M] {
    let k = x[0].len();
    let (x, w) = (x.map(|x| &x[..k]), w.map(|w| &w[..k]));
    let mut sums = [[s.splat(0.0); N]; M];
    let mut offset = 0;
    let mut w_lanes = [s.splat(0.0); N];
    while offset + LANES <= k {
        for (lanes, w) in w_lanes.iter_mut().zip(&w) {
            *lanes = s.load_at(w, offset);
        }
        for (x, sums) in x.iter().zip(&mut sums) {
            let x = s.load_at(x, offset);
            for (w, sum) in w_lanes.iter().zip(sums) {
                *sum = s.mul_add(*w, x, *sum);
            }
        }
        offset += LANES;
    }
    if offset < k {
        for (lanes, w) in w_lanes.iter_mut().zip(&w) {
            *lanes = s.load_partial(&w[offset..]);
        }
        for (x, sums) in x.iter().zip(&mut sums) {
            let x = s.load_partial(&x[offset..]);
            for (w, sum) in w_lanes.iter().zip(sums) {
                *sum = s.mul_add(*w, x, *sum);
            }
        }
    }
    reduce(s, sums)
}

/// Sums of the lanes of each vector.
#[inline(always)]
fn reduce<S: Simd, const M: usize, const N: usize>(s: S, sums: [[S::F32; N]; M]) -> [[f32; N]; M] {
    let mut out = [[0.0; N]; M];
    if M * N == LANES {
        let mut all = [s.splat(0.0); LANES];
        for i in 0..LANES {
            all[i] = sums[i / N][i % N];
        }
        let reduced = s.reduce_add_each(all);
        for i in 0..LANES {
            out[i / N][i % N] = reduced[i];
        }
    } else {
        for i in 0..M * N {
            out[i / N][i % N] = s.reduce_add(sums[i / N][i % N]);
        }
    }
    out
}
