//! The way back through matrices that are not trained, in every storage format: a few rows are decoded at a time, so
//! that a quantised matrix is never held expanded.

use crate::Weights;
use crate::cross_entropy::{Labels, block_tokens, check_bias, check_targets, softmax_rows};
use crate::linear::linear_with;
use crate::matmul::{MatrixRef, matmul};
use crate::quantized::dequantize;
use crate::simd::level;
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// Decoded elements that are held at once: 4 MiB.
const BLOCK_ELEMENTS: usize = 1 << 20;

/// Fewest and most rows of the matrix in a block: enough for the general product, few enough for the cache.
const BLOCK_ROWS: [usize; 2] = [64, 512];

/// `dx = dy * W`, or `dx += dy * W` where `accumulate`: the gradient of the input of `y = x * W^T`.
///
/// `dy` is `[m, n]`, `weights` `[n, k]` in any format, `dx` `[m, k]`.
///
/// # Panics
/// Where the lengths do not fit the shape of `weights`.
pub fn linear_input_gradient(dy: &[f32], weights: Weights<'_>, accumulate: bool, dx: &mut [f32]) {
    let row_bytes = weights.checked_row_bytes();
    let (n, k) = (weights.rows, weights.columns);
    if dx.is_empty() {
        return;
    }
    let m = dx.len() / k;
    assert_eq!(dx.len(), m * k, "gradient of the input is not rows of {k}");
    assert_eq!(dy.len(), m * n, "gradient of the output is not [{m}, {n}]");
    let [fewest, most] = BLOCK_ROWS;
    let step = (BLOCK_ELEMENTS / k).clamp(fewest, most);
    let mut decoded = vec![0.0; step.min(n) * k];
    let mut columns = vec![0.0; m * step.min(n)];
    if n == 0 && !accumulate {
        dx.fill(0.0);
    }
    for start in (0..n).step_by(step) {
        let rows = start..n.min(start + step);
        let count = rows.len();
        let (decoded, columns) = (&mut decoded[..count * k], &mut columns[..m * count]);
        let bytes = &weights.data[rows.start * row_bytes..rows.end * row_bytes];
        dequantize(weights.format, bytes, decoded);
        take_columns(dy, n, rows.start, columns, count);
        let (dy, weight) = (MatrixRef::new(columns, m, count), MatrixRef::new(decoded, count, k));
        matmul(dy, weight, accumulate || start > 0, dx);
    }
}

/// Copies `count` columns of a matrix of `width` columns, from column `first` on.
fn take_columns(matrix: &[f32], width: usize, first: usize, out: &mut [f32], count: usize) {
    let rows = out.len() / count;
    let step = (BLOCK_ELEMENTS / 16).div_ceil(count);
    let tiles = Tiles::new(out, count, Cuts::Every { step, length: rows }, Cuts::none(count));
    parallel_for(rows.div_ceil(step), |task| {
        let mut tile = tiles.take(task, 0);
        for local in 0..tile.rows() {
            let start = (task * step + local) * width + first;
            tile.row(local).copy_from_slice(&matrix[start..start + count]);
        }
    });
}

/// As [`cross_entropy_head`](crate::cross_entropy_head()), for a head in any format that is not trained: leaves the
/// gradient of the hidden states `[tokens, width]` in `d_hidden`. `labels` are targets and token weights.
///
/// # Panics
/// Where the lengths do not fit each other or a target is neither -100 nor below the vocabulary.
pub fn cross_entropy_frozen_head(
    hidden: &[f32],
    weights: Weights<'_>,
    bias: Option<&[f32]>,
    (targets, token_weights): (&[i64], &[f32]),
    losses: &mut [f32],
    d_hidden: &mut [f32],
) {
    let (tokens, vocabulary, width) = (targets.len(), weights.rows, weights.columns);
    assert_eq!(
        hidden.len(),
        tokens * width,
        "hidden states are not [{tokens}, {width}]"
    );
    assert!(
        token_weights.len() == tokens && losses.len() == tokens,
        "token weights and losses are not [{tokens}]"
    );
    assert_eq!(d_hidden.len(), hidden.len(), "gradient of the hidden states");
    check_targets(targets, vocabulary);
    check_bias(bias, vocabulary);
    if tokens == 0 || vocabulary == 0 || width == 0 {
        return;
    }
    let level = level();
    let step = block_tokens(tokens, vocabulary).min(tokens);
    let mut logits = vec![0.0; step * vocabulary];
    for start in (0..tokens).step_by(step) {
        let rows = start..tokens.min(start + step);
        let elements = rows.start * width..rows.end * width;
        let logits = &mut logits[..rows.len() * vocabulary];
        linear_with(level, &hidden[elements.clone()], weights, bias, logits);
        let labels = Labels {
            targets: &targets[rows.clone()],
            token_weights: &token_weights[rows.clone()],
        };
        softmax_rows(level, logits, labels, true, &mut losses[rows]);
        linear_input_gradient(logits, weights, false, &mut d_hidden[elements]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::{assert_close, at_every_level, random, stored};
    use crate::{HeadGradients, WeightFormat, cross_entropy_head};

    #[test]
    fn gradients_agree_with_the_product_of_the_decoded_matrix() {
        at_every_level(|| {
            for format in WeightFormat::ALL {
                for (m, n) in [(1, 1), (5, 70), (33, 1030)] {
                    let k = 256;
                    let (bytes, _) = stored(format, n * k);
                    let weights = Weights {
                        format,
                        data: &bytes,
                        rows: n,
                        columns: k,
                    };
                    let mut decoded = vec![0.0; n * k];
                    dequantize(format, &bytes, &mut decoded);
                    let (dy, start) = (random(m * n, 1), random(m * k, 2));
                    for accumulate in [false, true] {
                        let (mut want, mut found) = (start.clone(), start.clone());
                        let product = (MatrixRef::new(&dy, m, n), MatrixRef::new(&decoded, n, k));
                        matmul(product.0, product.1, accumulate, &mut want);
                        linear_input_gradient(&dy, weights, accumulate, &mut found);
                        assert_close(&found, &want, 1e-4);
                    }
                }
            }
        });
    }

    #[test]
    fn a_frozen_head_gives_the_losses_and_gradients_of_a_trained_one() {
        at_every_level(|| {
            let (tokens, vocabulary, width) = (9, 77, 32);
            for format in [
                WeightFormat::F32,
                WeightFormat::BF16,
                WeightFormat::Q4_1,
                WeightFormat::Q8_0,
            ] {
                let (bytes, _) = stored(format, vocabulary * width);
                let mut decoded = vec![0.0; vocabulary * width];
                dequantize(format, &bytes, &mut decoded);
                let hidden = random(tokens * width, 4);
                let mut targets: Vec<i64> = (0..tokens as i64).map(|token| token * 8).collect();
                targets[3] = -100;
                let factors: Vec<f32> = (0..tokens).map(|token| 0.5 + token as f32).collect();
                let (mut want, mut losses) = (vec![0.0; tokens], vec![0.0; tokens]);
                let (mut d_want, mut d_hidden) = (vec![0.0; hidden.len()], vec![1.0; hidden.len()]);
                let mut d_weight = vec![0.0; decoded.len()];
                let gradients = HeadGradients {
                    d_hidden: &mut d_want,
                    d_weight: Some(&mut d_weight),
                    d_bias: None,
                };
                cross_entropy_head(
                    MatrixRef::new(&hidden, tokens, width),
                    MatrixRef::new(&decoded, vocabulary, width).into(),
                    &targets,
                    &factors,
                    &mut want,
                    Some(gradients),
                );
                let weights = Weights {
                    format,
                    data: &bytes,
                    rows: vocabulary,
                    columns: width,
                };
                let labels = (&targets[..], &factors[..]);
                cross_entropy_frozen_head(&hidden, weights, None, labels, &mut losses, &mut d_hidden);
                assert_close(&losses, &want, 1e-5);
                assert_close(&d_hidden, &d_want, 1e-5);
                assert_eq!(losses[3], 0.0);
            }
        });
    }
}
