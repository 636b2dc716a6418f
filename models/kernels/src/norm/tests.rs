use super::*;
use crate::simd::available;
use crate::test_util::{assert_close, numeric_gradient, random, weighted_sum};

const EPSILON: f32 = 1e-5;

/// The definition in double precision; also the row's mean and reciprocal deviation.
fn oracle(x: &[f32], weight: &[f32], bias: Option<&[f32]>, centered: bool) -> Vec<f32> {
    let width = weight.len();
    let mut out = Vec::new();
    for row in x.chunks(width) {
        let mean = if centered {
            row.iter().map(|x| f64::from(*x)).sum::<f64>() / width as f64
        } else {
            0.0
        };
        let variance = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / width as f64;
        let rstd = 1.0 / (variance + f64::from(EPSILON)).sqrt();
        for (i, x) in row.iter().enumerate() {
            let value = (f64::from(*x) - mean) * rstd * f64::from(weight[i]);
            out.push((value + bias.map_or(0.0, |bias| f64::from(bias[i]))) as f32);
        }
    }
    out
}

#[test]
fn values_agree_with_the_definitions() {
    for (rows, width) in [(1, 1), (3, 7), (2, 33), (40, 65), (5, 768)] {
        // A mean far from zero shows cancellation.
        let x: Vec<f32> = random(rows * width, 1).iter().map(|x| x + 10.0).collect();
        let (weight, bias) = (random(width, 2), random(width, 3));
        for level in available() {
            let mut out = vec![0.0; rows * width];
            forward::<true>(
                level,
                &x,
                Affine {
                    weight: &weight,
                    bias: Some(&bias),
                },
                EPSILON,
                &mut out,
                None,
            );
            assert_close(&out, &oracle(&x, &weight, Some(&bias), true), 1e-4);
            forward::<true>(
                level,
                &x,
                Affine {
                    weight: &weight,
                    bias: None,
                },
                EPSILON,
                &mut out,
                None,
            );
            assert_close(&out, &oracle(&x, &weight, None, true), 1e-4);
            forward::<false>(
                level,
                &x,
                Affine {
                    weight: &weight,
                    bias: None,
                },
                EPSILON,
                &mut out,
                None,
            );
            assert_close(&out, &oracle(&x, &weight, None, false), 1e-5);
        }
    }
}

#[test]
fn statistics_are_the_rows() {
    let x = [1.0, 3.0, 2.0, 2.0];
    let (mut mean, mut rstd, mut out) = ([0.0; 2], [0.0; 2], [0.0; 4]);
    let statistics = NormStatistics {
        mean: &mut mean,
        rstd: &mut rstd,
    };
    layer_norm(&x, &[1.0, 1.0], None, 0.25, &mut out, Some(statistics));
    assert_eq!(mean, [2.0, 2.0]);
    assert_close(&rstd, &[1.0 / 1.25f32.sqrt(), 2.0], 1e-6);
}

fn check_gradients<const CENTERED: bool>(rows: usize, width: usize) {
    let (x, dy) = (random(rows * width, 1), random(rows * width, 2));
    let (weight, bias) = (random(width, 3), random(width, 4));
    let loss = |x: &[f32], weight: &[f32]| weighted_sum(&dy, &oracle(x, weight, None, CENTERED));
    let want_dx = numeric_gradient(&x, 1e-2, |x| loss(x, &weight));
    let want_dw = numeric_gradient(&weight, 1e-2, |weight| loss(&x, weight));
    let want_db: Vec<f32> = (0..width).map(|j| dy.iter().skip(j).step_by(width).sum()).collect();
    for level in available() {
        let (mut mean, mut rstd, mut out) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows * width]);
        let statistics = NormStatistics {
            mean: &mut mean,
            rstd: &mut rstd,
        };
        let affine = Affine {
            weight: &weight,
            bias: Some(&bias),
        };
        forward::<CENTERED>(level, &x, affine, EPSILON, &mut out, Some(statistics));
        // The gradients are added to what is there.
        let (mut dx, mut d_weight, mut d_bias) = (vec![0.5; x.len()], vec![0.25; width], vec![1.0; width]);
        let upstream = Upstream {
            dy: &dy,
            x: &x,
            mean: &mean,
            rstd: &rstd,
        };
        backward::<CENTERED>(level, upstream, &weight, &mut dx, &mut d_weight, Some(&mut d_bias));
        let minus = |values: &[f32], offset: f32| values.iter().map(|value| value - offset).collect::<Vec<_>>();
        assert_close(&minus(&dx, 0.5), &want_dx, 2e-3);
        assert_close(&minus(&d_weight, 0.25), &want_dw, 2e-3);
        assert_close(&minus(&d_bias, 1.0), &want_db, 1e-5);
    }
}

#[test]
fn gradients_agree_with_differences() {
    for (rows, width) in [(1, 7), (3, 33), (5, 65)] {
        check_gradients::<true>(rows, width);
        check_gradients::<false>(rows, width);
    }
}

#[test]
#[should_panic(expected = "input is not rows of 3")]
fn a_wrong_width_is_named() {
    rms_norm(&[0.0; 4], &[1.0; 3], EPSILON, &mut [0.0; 4], None);
}
