//! Sums over a buffer or over a matrix' rows, and the check for non-finite values.

use std::sync::Mutex;
use std::sync::PoisonError;

use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// Elements that are summed in single precision before their sum goes to double precision.
const STEP: usize = 1 << 12;

/// Sum of the squares of all elements, in double precision over partial sums of 4096 elements; the same for any number
/// of threads.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    sum_of_squares_with(level(), x)
}

fn sum_of_squares_with(level: Level, x: &[f32]) -> f64 {
    const GROUP: usize = 16 * STEP;
    let groups = x.len().div_ceil(GROUP);
    let sums = Mutex::new(vec![0.0; groups]);
    parallel_for(groups, |group| {
        let x = &x[group * GROUP..x.len().min((group + 1) * GROUP)];
        let sum: f64 = x
            .chunks(STEP)
            .map(|x| f64::from(dispatch!(level, squares_body(x))))
            .sum();
        sums.lock().unwrap_or_else(PoisonError::into_inner)[group] = sum;
    });
    sums.into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .into_iter()
        .sum()
}

#[inline(always)]
fn squares_body<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    let (quads, rest) = x.as_chunks::<{ 4 * LANES }>();
    for quad in quads {
        for (i, sum) in sums.iter_mut().enumerate() {
            let x = s.load_at(quad, i * LANES);
            *sum = s.mul_add(x, x, *sum);
        }
    }
    for x in rest.chunks(LANES) {
        let x = s.load_partial(x);
        sums[0] = s.mul_add(x, x, sums[0]);
    }
    s.reduce_add(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

/// Whether no element is infinite or NaN.
pub fn all_finite(x: &[f32]) -> bool {
    let level = level();
    let finite = std::sync::atomic::AtomicBool::new(true);
    crate::threads::parallel_ranges(x.len(), 1 << 15, |range| {
        if !dispatch!(level, finite_body(&x[range])) {
            finite.store(false, std::sync::atomic::Ordering::Relaxed);
        }
    });
    finite.into_inner()
}

#[inline(always)]
fn finite_body<S: Simd>(s: S, x: &[f32]) -> bool {
    // x * 0 is 0 for finite values and NaN for the others, and NaN stays in a sum.
    let zero = s.splat(0.0);
    let mut sum = zero;
    for x in x.chunks(LANES) {
        let x = match x.first_chunk() {
            Some(lanes) => s.load(lanes),
            None => s.load_partial(x),
        };
        sum = s.mul_add(x, zero, sum);
    }
    s.reduce_add(sum) == 0.0
}

/// `out[j] += sum over i of x[i, j]`: the gradient of a bias. `x` is `[rows, columns]`, `out` `[columns]`.
///
/// # Panics
/// Where `x` is not whole rows.
pub fn sum_rows(x: &[f32], out: &mut [f32]) {
    const WIDTH: usize = 8 * LANES;
    let columns = out.len();
    if columns == 0 {
        assert!(x.is_empty(), "rows without columns");
        return;
    }
    assert!(
        x.len().is_multiple_of(columns),
        "{} elements are not rows of {columns}",
        x.len()
    );
    let level = level();
    let tiles = Tiles::new(
        out,
        columns,
        Cuts::none(1),
        Cuts::Every {
            step: WIDTH,
            length: columns,
        },
    );
    let task = |task: usize| {
        dispatch!(
            level,
            sum_rows_body(x, columns, task * WIDTH, tiles.take(0, task).row(0))
        );
    };
    if x.len() < crate::elementwise::STEP {
        (0..columns.div_ceil(WIDTH)).for_each(task);
    } else {
        parallel_for(columns.div_ceil(WIDTH), task);
    }
}

#[inline(always)]
fn sum_rows_body<S: Simd>(s: S, x: &[f32], columns: usize, start: usize, out: &mut [f32]) {
    let width = out.len();
    for row in x.chunks_exact(columns) {
        crate::elementwise::update_lanes(
            s,
            out,
            &row[start..start + width],
            #[inline(always)]
            |sum, x| s.add(sum, x),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::available;
    use crate::test_util::{assert_close, at_every_level, random};

    #[test]
    fn squares_sum_like_a_plain_loop() {
        for length in [0, 1, 7, 65, 5000, 70_001] {
            let x = random(length, 1);
            let want: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            for level in available() {
                let got = sum_of_squares_with(level, &x);
                assert!((got - want).abs() <= 1e-6 * want, "{level}: {got}, not {want}");
            }
        }
    }

    #[test]
    fn one_bad_element_is_found() {
        at_every_level(|| {
            for length in [1, 16, 33, 70_000] {
                let mut x = random(length, 1);
                assert!(all_finite(&x));
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    x[length - 1] = bad;
                    assert!(!all_finite(&x));
                }
            }
            assert!(all_finite(&[f32::MAX; 40]) && all_finite(&[]));
        });
    }

    #[test]
    fn rows_are_summed_into_the_output() {
        at_every_level(|| {
            for (rows, columns) in [(0, 3), (1, 1), (5, 7), (40, 700)] {
                let x = random(rows * columns, 1);
                let mut out = random(columns, 2);
                let want: Vec<f32> = (0..columns)
                    .map(|j| out[j] + (0..rows).map(|i| x[i * columns + j]).sum::<f32>())
                    .collect();
                sum_rows(&x, &mut out);
                assert_close(&out, &want, 1e-5);
            }
        });
    }
}
