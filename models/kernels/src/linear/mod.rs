//! Linear layers: `x * W^T + b` for weights in every storage format.
//!
//! Each output is one chain of fused multiplications and additions over sixteen lanes in ascending order, reduced at the
//! end, whichever path computes it. So a row's result depends neither on how many rows there are nor on threads.
//! For very few rows weights are decoded in registers and used at once; for more, rows of weights are decoded
//! to a scratch buffer that stays in the cache.

mod direct;
mod panel;

pub(crate) use panel::dots;

use self::direct::rows as direct_rows;
use crate::Weights;
use crate::quantized::with_format;
use crate::simd::{Level, dispatch, level};
use crate::threads::{INLINE_PRODUCTS, parallel_for, range_step};
use crate::tiles::{Cuts, Tiles};

/// Smallest number of weight rows in a task; a multiple of every tile's height.
const TASK_ROWS: usize = 8;

/// `out = x * W^T + bias`.
///
/// `x` is `[m, k]`, `weights` `[n, k]`, `bias` `[n]` and `out` `[m, n]`. Accumulates in single precision, in the same
/// order for every `m` and any number of threads.
///
/// # Panics
/// Where the lengths do not fit the shape of `weights`.
pub fn linear(x: &[f32], weights: Weights<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    linear_with(level(), x, weights, bias, out);
}

/// [`linear`] at a given level.
pub(crate) fn linear_with(level: Level, x: &[f32], weights: Weights<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    let row_bytes = weights.checked_row_bytes();
    let (n, k) = (weights.rows, weights.columns);
    if n == 0 || out.is_empty() {
        assert_eq!(out.len(), 0, "output of a layer without outputs");
        return;
    }
    let m = out.len() / n;
    assert_eq!(out.len(), m * n, "output is not rows of {n}");
    assert_eq!(x.len(), m * k, "input is not [{m}, {k}]");
    assert!(bias.is_none_or(|bias| bias.len() == n), "bias is not [{n}]");

    let step = if m * n * k <= INLINE_PRODUCTS {
        n
    } else {
        range_step(n, TASK_ROWS)
    };
    let tiles = Tiles::new(out, n, Cuts::none(m), Cuts::Every { step, length: n });
    parallel_for(n.div_ceil(step), |task| {
        let rows = task * step..n.min((task + 1) * step);
        let part = Weights {
            data: &weights.data[rows.start * row_bytes..rows.end * row_bytes],
            rows: rows.len(),
            ..weights
        };
        let bias = bias.map(|bias| &bias[rows]);
        let mut out = tiles.take(0, task);
        if m <= direct::limit(level, weights.format) {
            with_format!(weights.format, F => {
                dispatch!(level, direct_rows::<F>(x, part, bias, &mut out))
            });
        } else {
            panel::rows(level, x, part, bias, &mut out);
        }
    });
}

#[cfg(test)]
mod tests;
