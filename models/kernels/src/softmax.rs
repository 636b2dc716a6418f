//! Softmax and its logarithm, row by row.

use crate::elementwise::STEP;
use crate::simd::math::exp;
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// `out = exp(x) / sum(exp(x))` over each row of `width` elements; the largest element is subtracted first. A row that has
/// a NaN or infinity, or nothing but negative infinities, becomes NaN where PyTorch's does.
///
/// # Panics
/// Where the lengths differ or are not rows of `width`.
pub fn softmax(x: &[f32], width: usize, out: &mut [f32]) {
    softmax_with::<false>(level(), x, width, out);
}

/// `out = x - log(sum(exp(x)))` over each row of `width` elements, otherwise as [`softmax`].
///
/// # Panics
/// Where the lengths differ or are not rows of `width`.
pub fn log_softmax(x: &[f32], width: usize, out: &mut [f32]) {
    softmax_with::<true>(level(), x, width, out);
}

fn softmax_with<const LOGARITHM: bool>(level: Level, x: &[f32], width: usize, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "input and output");
    if x.is_empty() {
        return;
    }
    let rows = x.len() / width.max(1);
    assert_eq!(rows * width, x.len(), "input is not rows of {width}");
    let step = (STEP / width).max(1);
    let cuts = Cuts::Every { step, length: rows };
    let out = Tiles::new(out, width, cuts, Cuts::none(width));
    parallel_for(rows.div_ceil(step), |task| {
        let mut out = out.take(task, 0);
        for (row, x) in (0..out.rows()).zip(x[task * step * width..].chunks_exact(width)) {
            let out = out.row(row);
            match LOGARITHM {
                true => dispatch!(level, log_softmax_row(x, out)),
                false => dispatch!(level, softmax_row(x, out)),
            }
        }
    });
}

#[inline(always)]
fn softmax_row<S: Simd>(s: S, x: &[f32], out: &mut [f32]) {
    let shift = s.splat(largest(s, x));
    let mut sum = s.splat(0.0);
    let (lanes, rest) = x.as_chunks::<LANES>();
    let (out_lanes, out_rest) = out.as_chunks_mut::<LANES>();
    for (x, out) in lanes.iter().zip(out_lanes.iter_mut()) {
        let value = exp(s, s.sub(s.load(x), shift));
        sum = s.add(sum, value);
        s.store(value, out);
    }
    if !rest.is_empty() {
        let value = exp(s, s.sub(s.load_partial_or(rest, f32::NEG_INFINITY), shift));
        sum = s.add(sum, value);
        s.store_partial(value, out_rest);
    }
    let scale = 1.0 / s.reduce_add(sum);
    out.iter_mut().for_each(|value| *value *= scale);
}

#[inline(always)]
fn log_softmax_row<S: Simd>(s: S, x: &[f32], out: &mut [f32]) {
    let largest = largest(s, x);
    let shift = s.splat(largest);
    let mut sum = s.splat(0.0);
    let (lanes, rest) = x.as_chunks::<LANES>();
    for x in lanes {
        sum = s.add(sum, exp(s, s.sub(s.load(x), shift)));
    }
    if !rest.is_empty() {
        let x = s.load_partial_or(rest, f32::NEG_INFINITY);
        sum = s.add(sum, exp(s, s.sub(x, shift)));
    }
    let logarithm = s.reduce_add(sum).ln();
    // Two subtractions: the sum of the two might lose the smaller one.
    for (x, out) in x.iter().zip(out) {
        *out = (x - largest) - logarithm;
    }
}

#[inline(always)]
fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (lanes, rest) = x.as_chunks::<LANES>();
    let mut largest = s.load_partial_or(rest, f32::NEG_INFINITY);
    for x in lanes {
        largest = s.max(s.load(x), largest);
    }
    s.reduce_max(largest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::{assert_close, at_every_level, random};

    fn reference(x: &[f32]) -> Vec<f32> {
        let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps: Vec<f64> = x.iter().map(|x| f64::from(x - largest).exp()).collect();
        let sum: f64 = exps.iter().sum();
        exps.iter().map(|e| (e / sum) as f32).collect()
    }

    #[test]
    fn rows_are_normalised_at_every_width() {
        at_every_level(|| {
            for width in [1, 2, 15, 16, 17, 40, 333] {
                let x: Vec<f32> = random(3 * width, width as u64).iter().map(|x| x * 20.0).collect();
                let (mut found, mut logarithm) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                softmax(&x, width, &mut found);
                log_softmax(&x, width, &mut logarithm);
                let expected: Vec<f32> = x.chunks(width).flat_map(reference).collect();
                assert_close(&found, &expected, 1e-6);
                let exps: Vec<f32> = logarithm.iter().map(|x| x.exp()).collect();
                assert_close(&exps, &expected, 1e-5);
            }
        });
    }

    #[test]
    fn values_that_are_not_finite_spoil_their_row_alone() {
        at_every_level(|| {
            for at in [0, 7, 16, 18] {
                let mut x = vec![0.5f32; 2 * 19];
                x[at] = f32::NAN;
                let mut out = vec![0.0; x.len()];
                softmax(&x, 19, &mut out);
                assert!(out[..19].iter().all(|value| value.is_nan()), "{at}: {out:?}");
                assert!(out[19..].iter().all(|value| (value - 1.0 / 19.0).abs() < 1e-6));
            }
            let mut out = vec![0.0; 3];
            softmax(&[f32::NEG_INFINITY, 0.0, 0.0], 3, &mut out);
            assert_eq!(out, [0.0, 0.5, 0.5]);
            softmax(&[f32::NEG_INFINITY; 3], 3, &mut out);
            assert!(out.iter().all(|value| value.is_nan()));
        });
    }
}
