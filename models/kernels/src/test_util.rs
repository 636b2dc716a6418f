//! Helpers of the tests.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Values uniform in [-1, 1), the same for the same seed.
pub(crate) fn random(length: usize, seed: u64) -> Vec<f32> {
    let mut generator = StdRng::seed_from_u64(seed);
    (0..length).map(|_| generator.random_range(-1.0..1.0)).collect()
}

/// Panics unless the values agree to `tolerance`, absolute for small and relative for large ones.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * want.abs().max(1.0),
            "element {i}: {got}, not {want}"
        );
    }
}

/// Derivative of `loss` by each element of `x`, by central differences in steps of `step`.
pub(crate) fn numeric_gradient(x: &[f32], step: f32, mut loss: impl FnMut(&[f32]) -> f64) -> Vec<f32> {
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let original = x[i];
            x[i] = original + step;
            let (above, upper) = (loss(&x), x[i]);
            x[i] = original - step;
            let (below, lower) = (loss(&x), x[i]);
            x[i] = original;
            ((above - below) / f64::from(upper - lower)) as f32
        })
        .collect()
}

/// The loss `sum(weights * values)`, in double precision.
pub(crate) fn weighted_sum(weights: &[f32], values: &[f32]) -> f64 {
    weights
        .iter()
        .zip(values)
        .map(|(w, v)| f64::from(*w) * f64::from(*v))
        .sum()
}
