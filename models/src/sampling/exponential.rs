//! exp and log-sum-exp over a whole vocabulary, in loops that the compiler vectorises for any processor.

/// exp(x) for x of at most 0, to about 2 units in the last place; 0 below -87, where f32 has no normal numbers left.
///
/// Cephes' reduction: x = n ln 2 + r, then a polynomial in r. No branches and no calls, unlike `f32::exp`.
#[inline]
pub(super) fn exp_of_negative(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer; the sum's low bits hold it.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.max(-87.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, so that the remainder keeps its precision.
    let r = (clamped - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let power = p * r * r + r + 1.0;
    let scale = f32::from_bits(((shifted.to_bits() as i32 - ROUND.to_bits() as i32 + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { power * scale }
}

/// Sum of the exponentials of numbers of at most 0.
pub(super) fn sum_of_exponentials(values: &[f32], shift: f32) -> f64 {
    // Lanes in f32 for speed, flushed to f64 before rounding errors can grow.
    let mut total = 0.0;
    for block in values.chunks(1024) {
        let mut lanes = [0.0f32; 16];
        let mut chunks = block.chunks_exact(16);
        for chunk in &mut chunks {
            for (lane, &value) in lanes.iter_mut().zip(chunk) {
                *lane += exp_of_negative(value - shift);
            }
        }
        let rest: f64 = chunks
            .remainder()
            .iter()
            .map(|&value| f64::from(exp_of_negative(value - shift)))
            .sum();
        total += rest + lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
    }
    total
}

/// The largest value, and whether any is NaN.
pub(super) fn largest(values: &[f32]) -> (f32, bool) {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let mut invalid = false;
    let mut chunks = values.chunks_exact(16);
    for chunk in &mut chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
            invalid |= value.is_nan();
        }
    }
    let rest = chunks.remainder();
    invalid |= rest.iter().any(|value| value.is_nan());
    (
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b)),
        invalid,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_accurate() {
        for step in 0..87_000 {
            let x = -(step as f32) / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_of_negative(x)) - exact).abs() / exact;
            assert!(error < 3e-7, "{x}: {error}");
        }
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(-87.5), 0.0);
        assert_eq!(exp_of_negative(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_of_negative(f32::MIN), 0.0);
    }

    #[test]
    fn sums_and_maxima_of_every_length() {
        for length in [1, 15, 16, 17, 1023, 1024, 1025, 5000] {
            let values: Vec<f32> = (0..length).map(|i| -((i * 7919 % 1000) as f32) / 100.0 + 3.0).collect();
            let (largest, invalid) = largest(&values);
            assert!(!invalid);
            assert_eq!(largest, values.iter().copied().fold(f32::MIN, f32::max));
            let exact: f64 = values.iter().map(|&value| f64::from(value - largest).exp()).sum();
            assert!(
                (sum_of_exponentials(&values, largest) / exact - 1.0).abs() < 1e-6,
                "{length}"
            );
        }
        assert!(super::largest(&[0.0; 20].map(|_: f32| f32::NAN)).1);
        assert!(super::largest(&[1.0, f32::NAN]).1);
    }
}
