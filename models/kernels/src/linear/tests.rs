use super::*;
use crate::WeightFormat;
use crate::simd::available;
use crate::test_util::{assert_close, random, stored};

/// `x * W^T + bias` in double precision.
fn oracle(x: &[f32], w: &[f32], bias: Option<&[f32]>, m: usize, n: usize, k: usize) -> Vec<f32> {
    let at = |i: usize| {
        let (row, column) = (i / n, i % n);
        let dot: f64 = (0..k)
            .map(|l| f64::from(x[row * k + l]) * f64::from(w[column * k + l]))
            .sum();
        (dot + bias.map_or(0.0, |bias| f64::from(bias[column]))) as f32
    };
    (0..m * n).map(at).collect()
}

#[test]
fn every_format_shape_and_level_agrees_with_the_oracle() {
    for format in WeightFormat::ALL {
        // Of the long rows scales and inputs are kept a part at a time.
        let ks: &[usize] = match format.block_elements() {
            1 => &[1, 7, 16, 33, 1601, 65],
            32 => &[32, 288, 4704, 2080],
            _ => &[256, 768, 2304],
        };
        for (&k, n) in ks.iter().zip([1, 5, 8, 17, 3, 40]) {
            let (data, w) = stored(format, n * k);
            let weights = Weights {
                format,
                data: &data,
                rows: n,
                columns: k,
            };
            for m in [1, 2, 3, 4, 5, 7, 9, 11, 33] {
                let (x, bias) = (random(m * k, 1), random(n, 2));
                for bias in [None, Some(bias.as_slice())] {
                    let want = oracle(&x, &w, bias, m, n, k);
                    for level in available() {
                        let mut out = vec![f32::NAN; m * n];
                        linear_with(level, &x, weights, bias, &mut out);
                        assert_close(&out, &want, 1e-4);
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_is_bitwise_the_same_in_every_batch() {
    for format in WeightFormat::ALL {
        let (n, k) = (37, 1280);
        let (data, _) = stored(format, n * k);
        let weights = Weights {
            format,
            data: &data,
            rows: n,
            columns: k,
        };
        let x = random(35 * k, 4);
        for level in available() {
            let mut whole = vec![0.0; 35 * n];
            linear_with(level, &x, weights, None, &mut whole);
            for m in [1, 2, 3, 4, 6, 8, 13, 32] {
                let mut some = vec![0.0; m * n];
                linear_with(level, &x[..m * k], weights, None, &mut some);
                assert_eq!(some, whole[..m * n], "{format:?} at {level}, {m} rows");
            }
        }
    }
}

#[test]
fn layers_of_one_input_are_each_as_if_alone() {
    let k = 320;
    let shapes = [
        (WeightFormat::Q4_1, 70),
        (WeightFormat::F32, 0),
        (WeightFormat::BF16, 9),
    ];
    let stored = shapes.map(|(format, n)| stored(format, n * k).0);
    let bias = random(70, 3);
    for m in [1, 5, 40] {
        let x = random(m * k, 4);
        let mut outputs = shapes.map(|(_, n)| vec![f32::NAN; m * n]);
        let mut layers: Vec<_> = shapes
            .into_iter()
            .zip(&stored)
            .zip(&mut outputs)
            .map(|(((format, rows), data), out)| LinearLayer {
                weights: Weights {
                    format,
                    data,
                    rows,
                    columns: k,
                },
                bias: (rows == 70).then_some(bias.as_slice()),
                out,
            })
            .collect();
        linear_each(&x, &mut layers);
        let alone: Vec<_> = layers
            .iter()
            .map(|layer| {
                let mut out = vec![0.0; layer.out.len()];
                linear(&x, layer.weights, layer.bias, &mut out);
                out
            })
            .collect();
        assert_eq!(outputs.as_slice(), alone, "{m} rows");
    }
    linear_each(&[], &mut []);
}

#[test]
fn unaligned_single_precision_weights_are_read() {
    let (m, n, k) = (6, 9, 20);
    let (x, w) = (random(m * k, 1), random(n * k, 2));
    let mut bytes = vec![0];
    bytes.extend_from_slice(bytemuck::cast_slice(&w));
    let weights = Weights {
        format: WeightFormat::F32,
        data: &bytes[1..],
        rows: n,
        columns: k,
    };
    let mut out = vec![0.0; m * n];
    linear(&x, weights, None, &mut out);
    assert_close(&out, &oracle(&x, &w, None, m, n, k), 1e-5);
}

#[test]
fn empty_shapes_are_fine() {
    linear(&[], Weights::from_f32(&[1.0, 2.0], 1, 2), None, &mut []);
    linear(&[], Weights::from_f32(&[], 0, 2), None, &mut []);
    let mut out = [5.0; 2];
    linear(&[], Weights::from_f32(&[], 2, 0), Some(&[1.0, 2.0]), &mut out);
    assert_eq!(out, [1.0, 2.0]);
}

#[test]
#[should_panic(expected = "input is not [2, 3]")]
fn a_wrong_input_length_is_named() {
    linear(&[0.0; 5], Weights::from_f32(&[0.0; 12], 4, 3), None, &mut [0.0; 8]);
}

#[test]
fn groups_are_the_same_as_each_alone() {
    let (k, n) = (37, 21);
    let weights: Vec<Vec<f32>> = (0..3).map(|seed| random(n * k, seed)).collect();
    for level in available() {
        let inputs: Vec<Vec<f32>> = [1, 70, 0].iter().map(|m| random(m * k, 9)).collect();
        let mut outputs: Vec<Vec<f32>> = inputs.iter().map(|x| vec![0.0; x.len() / k * n]).collect();
        let mut groups: Vec<_> = inputs
            .iter()
            .zip(&weights)
            .zip(&mut outputs)
            .map(|((x, weights), out)| super::LinearGroup {
                x,
                layer: super::LinearLayer {
                    weights: Weights::from_f32(weights, n, k),
                    bias: None,
                    out,
                },
            })
            .collect();
        super::groups::groups_with(level, &mut groups);
        drop(groups);
        for ((x, weights), found) in inputs.iter().zip(&weights).zip(&outputs) {
            let mut alone = vec![0.0; found.len()];
            super::linear_with(level, x, Weights::from_f32(weights, n, k), None, &mut alone);
            assert_eq!(*found, alone);
        }
    }
}
