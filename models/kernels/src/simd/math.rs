//! Vectorised elementary functions with about single-precision accuracy.

use super::Simd;

/// Below it `e^x` is denormal.
const SMALLEST: f32 = -87.336_54;

/// `e^x`, relative error below 2e-7; 0 below -87.3 (denormal results are flushed), infinity above 88.7.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F32) -> S::F32 {
    const LARGEST: f32 = 88.722_84;
    // min and max return their second operand where one is NaN, so that NaN stays NaN.
    let clamped = s.max(s.splat(SMALLEST), s.min(s.splat(LARGEST), x));
    let (p, n) = reduced_exp(s, clamped);
    // 2^128 does not exist: the power is applied in two steps.
    let half = s.round(s.mul(n, s.splat(0.5)));
    let scaled = s.scale_by_power_of_two(s.scale_by_power_of_two(p, half), s.sub(n, half));
    let scaled = s.select_less(x, s.splat(SMALLEST), s.splat(0.0), scaled);
    s.select_less(s.splat(LARGEST), x, s.splat(f32::INFINITY), scaled)
}

/// [`exp`] of numbers up to 88, with fewer instructions and the same results; e^88 above.
#[inline(always)]
pub(crate) fn exp_below_88<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let clamped = s.max(s.splat(SMALLEST), s.min(s.splat(88.0), x));
    let (p, n) = reduced_exp(s, clamped);
    let scaled = s.scale_by_power_of_two(p, n);
    s.select_less(x, s.splat(SMALLEST), s.splat(0.0), scaled)
}

/// `e^x = p * 2^n` as `(p, n)`. Cody-Waite: x = n ln 2 + r with ln 2 in two parts, then a polynomial in r (Cephes expf).
#[inline(always)]
fn reduced_exp<S: Simd>(s: S, x: S::F32) -> (S::F32, S::F32) {
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.mul_add(n, s.splat(-0.693_359_4), x);
    let r = s.mul_add(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_2e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = s.mul_add(p, r, s.splat(coefficient));
    }
    (s.add(s.mul_add(p, s.mul(r, r), r), s.splat(1.0)), n)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// The error function, absolute error below 3e-7: the rational approximation on [-4, 4] that Eigen and XLA use.
#[inline(always)]
pub(crate) fn erf<S: Simd>(s: S, x: S::F32) -> S::F32 {
    const NUMERATOR: [f32; 7] = [
        -2.726_142_4e-10,
        2.770_681_5e-8,
        -2.101_024e-6,
        -5.692_506_3e-5,
        -7.349_906_4e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const DENOMINATOR: [f32; 5] = [
        -1.456_607_2e-5,
        -2.133_740_6e-4,
        -1.682_827e-3,
        -7.373_329_3e-3,
        -1.426_473_9e-2,
    ];
    /// Where the error function is nearer to 1 than the next smaller number.
    const ONE: f32 = 3.92;
    let x = s.max(s.splat(-4.0), s.min(s.splat(4.0), x));
    let square = s.mul(x, x);
    let mut numerator = s.splat(NUMERATOR[0]);
    for &coefficient in &NUMERATOR[1..] {
        numerator = s.mul_add(numerator, square, s.splat(coefficient));
    }
    let mut denominator = s.splat(DENOMINATOR[0]);
    for &coefficient in &DENOMINATOR[1..] {
        denominator = s.mul_add(denominator, square, s.splat(coefficient));
    }
    let approximate = s.div(s.mul(x, numerator), denominator);
    // What f32 cannot tell from one must be one: GELU multiplies the difference by any x.
    let approximate = s.select_less(x, s.splat(-ONE), s.splat(-1.0), approximate);
    s.select_less(s.splat(ONE), x, s.splat(1.0), approximate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Level, available, dispatch};

    #[inline(always)]
    fn exp_body<S: Simd>(s: S, x: &[f32; 16], y: &mut [f32; 16]) {
        s.store(exp(s, s.load(x)), y);
    }

    #[inline(always)]
    fn erf_body<S: Simd>(s: S, x: &[f32; 16], y: &mut [f32; 16]) {
        s.store(erf(s, s.load(x)), y);
    }

    fn exp_at(level: Level, x: f32) -> f32 {
        let mut y = [0.0; 16];
        dispatch!(level, exp_body(&[x; 16], &mut y));
        y[3]
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        for level in available() {
            for i in -8700..=8870 {
                let x = i as f32 / 100.0;
                let (got, want) = (f64::from(exp_at(level, x)), f64::from(x).exp());
                assert!((got / want - 1.0).abs() < 2e-7, "{level}: exp({x}) = {got}, not {want}");
            }
        }
    }

    #[test]
    fn exp_of_special_values() {
        for level in available() {
            assert_eq!(exp_at(level, 0.0), 1.0);
            assert_eq!(exp_at(level, f32::NEG_INFINITY), 0.0);
            assert_eq!(exp_at(level, -1000.0), 0.0);
            assert_eq!(exp_at(level, 1000.0), f32::INFINITY);
            assert_eq!(exp_at(level, f32::INFINITY), f32::INFINITY);
            assert!(exp_at(level, f32::NAN).is_nan());
        }
    }

    #[test]
    fn erf_is_accurate() {
        // Values of the error function from the standard tables.
        let table = [
            (0.0, 0.0),
            (0.1, 0.112_462_92),
            (0.5, 0.520_499_9),
            (1.0, 0.842_700_8),
            (2.0, 0.995_322_3),
        ];
        for level in available() {
            for (x, want) in table {
                let mut y = [0.0; 16];
                dispatch!(level, erf_body(&[x; 16], &mut y));
                assert!((y[0] - want).abs() < 3e-7, "{level}: erf({x}) = {}", y[0]);
                dispatch!(level, erf_body(&[-x; 16], &mut y));
                assert!((y[0] + want).abs() < 3e-7);
            }
        }
    }
}
