//! Dot products of a few rows with a few others, in the order of additions of every path of this module.

use crate::simd::{LANES, Simd};

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
