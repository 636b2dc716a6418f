//! Element-wise sums and products.

use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// Elements that one task handles: below that a second thread does not pay.
pub(crate) const STEP: usize = 1 << 14;

/// Calls `body` in parallel for the parts of `out`, with the range of their elements.
pub(crate) fn parallel_parts(out: &mut [f32], body: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync) {
    let length = out.len();
    if length == 0 {
        return;
    }
    let tiles = Tiles::new(out, length, Cuts::none(1), Cuts::Every { step: STEP, length });
    parallel_for(length.div_ceil(STEP), |task| {
        let range = task * STEP..length.min((task + 1) * STEP);
        body(range, tiles.take(0, task).row(0));
    });
}

/// `out[i] = operation(a[i], b[i])` in lanes.
#[inline(always)]
pub(crate) fn zip_lanes<S: Simd>(
    s: S,
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
    operation: impl Fn(S::F32, S::F32) -> S::F32,
) {
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    let (out_lanes, out_rest) = out.as_chunks_mut::<LANES>();
    for ((a, b), out) in a_lanes.iter().zip(b_lanes).zip(out_lanes) {
        s.store(operation(s.load(a), s.load(b)), out);
    }
    if !out_rest.is_empty() {
        s.store_partial(operation(s.load_partial(a_rest), s.load_partial(b_rest)), out_rest);
    }
}

/// `x[i] = operation(x[i], b[i])` in lanes.
#[inline(always)]
pub(crate) fn update_lanes<S: Simd>(s: S, x: &mut [f32], b: &[f32], operation: impl Fn(S::F32, S::F32) -> S::F32) {
    let (x_lanes, x_rest) = x.as_chunks_mut::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    for (x, b) in x_lanes.iter_mut().zip(b_lanes) {
        s.store(operation(s.load(x), s.load(b)), x);
    }
    if !x_rest.is_empty() {
        s.store_partial(operation(s.load_partial(x_rest), s.load_partial(b_rest)), x_rest);
    }
}

/// `out = a + b`, all of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn add(a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(
        a.len() == out.len() && b.len() == out.len(),
        "lengths {}, {}, {}",
        a.len(),
        b.len(),
        out.len()
    );
    let level = level();
    parallel_parts(out, |range, out| {
        dispatch!(level, add_body(&a[range.clone()], &b[range], out))
    });
}

#[inline(always)]
fn add_body<S: Simd>(s: S, a: &[f32], b: &[f32], out: &mut [f32]) {
    zip_lanes(
        s,
        a,
        b,
        out,
        #[inline(always)]
        |a, b| s.add(a, b),
    );
}

/// `x += y`, of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn add_assign(x: &mut [f32], y: &[f32]) {
    axpy_with(level(), 1.0, y, x);
}

/// `y += a * x`, of one length.
///
/// # Panics
/// Where the lengths differ.
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    axpy_with(level(), a, x, y);
}

fn axpy_with(level: Level, a: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "lengths differ");
    parallel_parts(y, |range, y| dispatch!(level, axpy_body(a, &x[range], y)));
}

#[inline(always)]
pub(crate) fn axpy_body<S: Simd>(s: S, a: f32, x: &[f32], y: &mut [f32]) {
    let a = s.splat(a);
    update_lanes(
        s,
        y,
        x,
        #[inline(always)]
        |y, x| s.mul_add(a, x, y),
    );
}

/// `x *= factor`.
pub fn scale(factor: f32, x: &mut [f32]) {
    let level = level();
    parallel_parts(x, |_, x| dispatch!(level, scale_body(factor, x)));
}

#[inline(always)]
pub(crate) fn scale_body<S: Simd>(s: S, factor: f32, x: &mut [f32]) {
    let (lanes, rest) = x.as_chunks_mut::<LANES>();
    let factor = s.splat(factor);
    for x in lanes {
        s.store(s.mul(s.load(x), factor), x);
    }
    if !rest.is_empty() {
        s.store_partial(s.mul(s.load_partial(rest), factor), rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::available;
    use crate::test_util::{assert_close, random};

    #[test]
    fn sums_and_products_agree_with_plain_loops() {
        for length in [0, 1, 7, 16, 33, 65, STEP + 5] {
            let (a, b) = (random(length, 1), random(length, 2));
            let mut out = vec![0.0; length];
            add(&a, &b, &mut out);
            let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            assert_eq!(out, want);
            add_assign(&mut out, &b);
            let want: Vec<f32> = want.iter().zip(&b).map(|(a, b)| a + b).collect();
            assert_eq!(out, want);
            scale(-0.5, &mut out);
            let want: Vec<f32> = want.iter().map(|a| a * -0.5).collect();
            assert_eq!(out, want);
            let want: Vec<f32> = want.iter().zip(&a).map(|(y, x)| 0.3 * x + y).collect();
            for level in available() {
                let mut y = out.clone();
                axpy_with(level, 0.3, &a, &mut y);
                assert_close(&y, &want, 1e-6);
            }
        }
    }
}
