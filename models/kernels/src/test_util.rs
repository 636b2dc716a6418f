//! Helpers of the tests.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::WeightFormat;
use crate::simd::{available, with_level};

/// Runs a test at every level that the machine has.
pub(crate) fn at_every_level(test: impl Fn()) {
    for level in available() {
        with_level(level, &test);
    }
}

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

/// candle's name of a format.
pub(crate) fn ggml_type(format: WeightFormat) -> GgmlDType {
    match format {
        WeightFormat::F32 => GgmlDType::F32,
        WeightFormat::F16 => GgmlDType::F16,
        WeightFormat::BF16 => GgmlDType::BF16,
        WeightFormat::Q4_0 => GgmlDType::Q4_0,
        WeightFormat::Q4_1 => GgmlDType::Q4_1,
        WeightFormat::Q5_0 => GgmlDType::Q5_0,
        WeightFormat::Q5_1 => GgmlDType::Q5_1,
        WeightFormat::Q8_0 => GgmlDType::Q8_0,
        WeightFormat::Q2K => GgmlDType::Q2K,
        WeightFormat::Q3K => GgmlDType::Q3K,
        WeightFormat::Q4K => GgmlDType::Q4K,
        WeightFormat::Q5K => GgmlDType::Q5K,
        WeightFormat::Q6K => GgmlDType::Q6K,
    }
}

/// Random weights stored by candle, and what candle reads back.
pub(crate) fn stored(format: WeightFormat, elements: usize) -> (Vec<u8>, Vec<f32>) {
    let values = Tensor::from_vec(random(elements, 5), elements, &Device::Cpu).unwrap();
    let quantized = QTensor::quantize(&values, ggml_type(format)).unwrap();
    let read = quantized.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap();
    (quantized.data().unwrap().into_owned(), read)
}
