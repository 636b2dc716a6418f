//! The language-model head and its cross-entropy together, block by block of tokens: the logits of all tokens never
//! exist at once.

use half::{bf16, f16};

use crate::convert::{f32_to_bf16, f32_to_f16};
use crate::linear::linear_with;
use crate::matmul::{MatrixRef, matmul};
use crate::reduce::sum_rows;
use crate::rounding::{HalfType, OutOfRange, out_of_range};
use crate::simd::math::exp_below_88 as exp;
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};
use crate::{Weights, elementwise};

/// Target of tokens that have none.
const IGNORED: i64 = -100;

/// Logits that are held at once: 128 MiB. With each block the head and its gradient pass through memory once.
const BLOCK_LOGITS: usize = 1 << 25;

/// The head: logits are `hidden * weight^T + bias`.
#[derive(Clone, Copy, Debug)]
pub struct HeadMatrix<'a> {
    /// `[vocabulary, width]`, not transposed.
    pub weight: MatrixRef<'a>,
    /// `[vocabulary]`, for heads that have one.
    pub bias: Option<&'a [f32]>,
}

impl<'a> From<MatrixRef<'a>> for HeadMatrix<'a> {
    fn from(weight: MatrixRef<'a>) -> Self {
        Self { weight, bias: None }
    }
}

/// Where [`cross_entropy_head`] leaves the gradients.
#[derive(Debug)]
pub struct HeadGradients<'a> {
    /// Gradient of the hidden states `[tokens, width]`; overwritten.
    pub d_hidden: &'a mut [f32],
    /// Gradient of the head's weight `[vocabulary, width]`, if it is wanted; added to.
    pub d_weight: Option<&'a mut [f32]>,
    /// Gradient of the head's bias `[vocabulary]`, if it is wanted; added to.
    pub d_bias: Option<&'a mut [f32]>,
}

/// Tokens of a block of logits: blocks are of about one size, since a small last one would cost as much as the others.
pub(crate) fn block_tokens(tokens: usize, vocabulary: usize) -> usize {
    let most = (BLOCK_LOGITS / vocabulary.max(1)).clamp(16, 1024);
    tokens.div_ceil(tokens.div_ceil(most).max(1)).next_multiple_of(8)
}

/// Cross-entropy of the logits of `head`, and the gradients of `sum over tokens of token_weight * loss`.
///
/// `hidden` is `[tokens, width]`, not transposed, `targets` and `token_weights` `[tokens]`. `losses` `[tokens]` receives each token's unweighted loss (natural logarithm), 0 where the target is -100,
/// which also gives no gradient.
///
/// Logits and softmax are f32. Where `weight` is of a half type, the gradient of the logits is rounded to it before it is
/// multiplied; returned is what that lost.
///
/// # Panics
/// Where the lengths do not fit each other or a target is neither -100 nor below the vocabulary.
pub fn cross_entropy_head(
    hidden: MatrixRef<'_>,
    head: HeadMatrix<'_>,
    targets: &[i64],
    token_weights: &[f32],
    losses: &mut [f32],
    mut gradients: Option<HeadGradients<'_>>,
) -> OutOfRange {
    let tokens = targets.len();
    let HeadMatrix { weight, bias } = head;
    let [vocabulary, width] = weight.shape();
    assert_eq!(
        hidden.shape(),
        [tokens, width],
        "hidden states are not [{tokens}, {width}]"
    );
    assert!(
        token_weights.len() == tokens && losses.len() == tokens,
        "token weights and losses are not [{tokens}]"
    );
    check_targets(targets, vocabulary);
    check_bias(bias, vocabulary);
    if let Some(gradients) = &gradients {
        assert_eq!(
            gradients.d_hidden.len(),
            tokens * width,
            "gradient of the hidden states"
        );
        let length = gradients.d_weight.as_ref().map(|weight| weight.len());
        assert!(
            length.is_none_or(|length| length == vocabulary * width),
            "gradient of the weight"
        );
        let length = gradients.d_bias.as_ref().map(|bias| bias.len());
        assert!(length.is_none_or(|length| length == vocabulary), "gradient of the bias");
    }
    let mut lost = OutOfRange::default();
    if tokens == 0 || vocabulary == 0 || width == 0 {
        return lost;
    }
    let level = level();
    let step = block_tokens(tokens, vocabulary).min(tokens);
    let mut logits = vec![0.0; step * vocabulary];
    let mut rounded = Rounded::new(weight.half_type());
    for start in (0..tokens).step_by(step) {
        let rows = start..tokens.min(start + step);
        let count = rows.len();
        let logits = &mut logits[..count * vocabulary];
        let block = hidden.part(rows.clone());
        if let Some(bias) = bias {
            logits
                .chunks_exact_mut(vocabulary)
                .for_each(|row| row.copy_from_slice(bias));
        }
        matmul(block, weight.transpose(), bias.is_some(), logits);
        let labels = Labels {
            targets: &targets[rows.clone()],
            token_weights: &token_weights[rows.clone()],
        };
        softmax_rows(level, logits, labels, gradients.is_some(), &mut losses[rows.clone()]);
        if let Some(HeadGradients {
            d_hidden,
            d_weight,
            d_bias,
        }) = &mut gradients
        {
            if let Some(d_bias) = d_bias {
                sum_rows(logits, d_bias);
            }
            let d_logits = rounded.matrix(logits, [count, vocabulary], &mut lost);
            matmul(
                d_logits,
                weight,
                false,
                &mut d_hidden[rows.start * width..rows.end * width],
            );
            if let Some(d_weight) = d_weight {
                matmul(d_logits.transpose(), block, true, d_weight);
            }
        }
    }
    lost
}

/// A buffer for the gradients of a block's logits in the type that products read.
enum Rounded {
    F32,
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Rounded {
    fn new(kind: Option<HalfType>) -> Self {
        match kind {
            None => Self::F32,
            Some(HalfType::Bf16) => Self::Bf16(Vec::new()),
            Some(HalfType::F16) => Self::F16(Vec::new()),
        }
    }

    /// The matrix, rounded; `lost` counts.
    fn matrix<'a>(&'a mut self, x: &'a [f32], [rows, columns]: [usize; 2], lost: &mut OutOfRange) -> MatrixRef<'a> {
        match self {
            Self::F32 => MatrixRef::new(x, rows, columns),
            Self::Bf16(buffer) => {
                lost.add(out_of_range(x, HalfType::Bf16));
                buffer.resize(x.len(), bf16::ZERO);
                f32_to_bf16(x, buffer);
                MatrixRef::bf16(buffer, rows, columns)
            }
            Self::F16(buffer) => {
                lost.add(out_of_range(x, HalfType::F16));
                buffer.resize(x.len(), f16::ZERO);
                f32_to_f16(x, buffer);
                MatrixRef::f16(buffer, rows, columns)
            }
        }
    }
}

/// Log-probabilities of the targets under the head's logits `hidden * weights^T + bias`, for weights of any format.
///
/// `hidden` is `[tokens, width]`, `weights` `[vocabulary, width]`, `bias` `[vocabulary]`, `targets` and `out` `[tokens]`; `out` is 0 where the
/// target is -100. A token's value is the same whatever the other tokens are.
///
/// # Panics
/// Where the lengths do not fit each other or a target is neither -100 nor below the vocabulary.
pub fn log_probabilities(hidden: &[f32], weights: Weights<'_>, bias: Option<&[f32]>, targets: &[i64], out: &mut [f32]) {
    let (tokens, vocabulary, width) = (targets.len(), weights.rows, weights.columns);
    assert_eq!(
        hidden.len(),
        tokens * width,
        "hidden states are not [{tokens}, {width}]"
    );
    assert_eq!(out.len(), tokens, "output is not [{tokens}]");
    check_targets(targets, vocabulary);
    check_bias(bias, vocabulary);
    if tokens == 0 || vocabulary == 0 {
        return;
    }
    let level = level();
    let step = block_tokens(tokens, vocabulary).min(tokens);
    let mut logits = vec![0.0; step * vocabulary];
    for start in (0..tokens).step_by(step) {
        let rows = start..tokens.min(start + step);
        let logits = &mut logits[..rows.len() * vocabulary];
        linear_with(
            level,
            &hidden[rows.start * width..rows.end * width],
            weights,
            bias,
            logits,
        );
        let labels = Labels {
            targets: &targets[rows.clone()],
            token_weights: &[],
        };
        softmax_rows(level, logits, labels, false, &mut out[rows]);
    }
    out.iter_mut().for_each(|loss| *loss = 0.0 - *loss);
}

pub(crate) fn check_targets(targets: &[i64], vocabulary: usize) {
    let valid = |target: i64| target == IGNORED || usize::try_from(target).is_ok_and(|target| target < vocabulary);
    if let Some(target) = targets.iter().find(|&&target| !valid(target)) {
        panic!("target {target} in a vocabulary of {vocabulary}");
    }
}

pub(crate) fn check_bias(bias: Option<&[f32]>, vocabulary: usize) {
    let length = bias.map(<[f32]>::len);
    assert!(
        length.is_none_or(|length| length == vocabulary),
        "a bias of {length:?} in a vocabulary of {vocabulary}"
    );
}

#[derive(Clone, Copy)]
pub(crate) struct Labels<'a> {
    pub(crate) targets: &'a [i64],
    pub(crate) token_weights: &'a [f32],
}

/// Losses of a block's rows of logits; with `differentiate` the logits become their gradients.
pub(crate) fn softmax_rows(
    level: Level,
    logits: &mut [f32],
    labels: Labels<'_>,
    differentiate: bool,
    losses: &mut [f32],
) {
    let rows = labels.targets.len();
    let vocabulary = logits.len() / rows;
    let step = (elementwise::STEP / vocabulary).max(1);
    let cuts = Cuts::Every { step, length: rows };
    let logits = Tiles::new(logits, vocabulary, cuts, Cuts::none(vocabulary));
    let losses = Tiles::new(losses, 1, cuts, Cuts::none(1));
    parallel_for(rows.div_ceil(step), |task| {
        let (mut logits, mut losses) = (logits.take(task, 0), losses.take(task, 0));
        for local in 0..logits.rows() {
            let row = task * step + local;
            let logits = logits.row(local);
            let Ok(target) = usize::try_from(labels.targets[row]) else {
                losses.row(local)[0] = 0.0;
                if differentiate {
                    logits.fill(0.0);
                }
                continue;
            };
            let target_logit = logits[target];
            let log_sum_exp = if differentiate {
                let weight = labels.token_weights[row];
                let log_sum_exp = dispatch!(level, softmax_scaled(logits, weight));
                logits[target] -= weight;
                log_sum_exp
            } else {
                dispatch!(level, log_sum_exp(logits))
            };
            losses.row(local)[0] = log_sum_exp - target_logit;
        }
    });
}

#[inline(always)]
fn maximum<S: Simd>(s: S, logits: &[f32]) -> f32 {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut largest = s.load_partial_or(rest, f32::NEG_INFINITY);
    for chunk in chunks {
        largest = s.max(s.load(chunk), largest);
    }
    s.reduce_max(largest)
}

#[inline(always)]
fn log_sum_exp<S: Simd>(s: S, logits: &[f32]) -> f32 {
    let largest = maximum(s, logits);
    let shift = s.splat(largest);
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut sum = exp(s, s.sub(s.load_partial_or(rest, f32::NEG_INFINITY), shift));
    for chunk in chunks {
        sum = s.add(sum, exp(s, s.sub(s.load(chunk), shift)));
    }
    largest + s.reduce_add(sum).ln()
}

/// `logits = weight * softmax(logits)`; returns what [`log_sum_exp`] does. Denormal results are flushed to 0: the products
/// that read them would be many times slower.
#[inline(always)]
fn softmax_scaled<S: Simd>(s: S, logits: &mut [f32], weight: f32) -> f32 {
    let largest = maximum(s, logits);
    let shift = s.splat(largest);
    let (chunks, rest) = logits.as_chunks_mut::<LANES>();
    let mut sum = exp(s, s.sub(s.load_partial_or(rest, f32::NEG_INFINITY), shift));
    s.store_partial(sum, rest);
    for chunk in chunks.iter_mut() {
        let exponential = exp(s, s.sub(s.load(chunk), shift));
        s.store(exponential, chunk);
        sum = s.add(sum, exponential);
    }
    let sum = s.reduce_add(sum);
    let (factor, smallest) = (weight / sum, f32::MIN_POSITIVE * (sum / weight.abs()));
    let (factor, smallest) = (s.splat(factor), s.splat(smallest));
    let scaled = |x| s.select_less(x, smallest, s.splat(0.0), s.mul(factor, x));
    s.store_partial(scaled(s.load_partial(rest)), rest);
    for chunk in chunks {
        s.store(scaled(s.load(chunk)), chunk);
    }
    largest + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WeightFormat;
    use crate::test_util::{assert_close, at_every_level, numeric_gradient, random};

    /// Losses by the definition in double precision.
    fn oracle(hidden: &[f32], weight: &[f32], vocabulary: usize, targets: &[i64]) -> Vec<f32> {
        let width = weight.len() / vocabulary;
        let loss = |(hidden, &target): (&[f32], &i64)| {
            let Ok(target) = usize::try_from(target) else {
                return 0.0;
            };
            let logit = |row: &[f32]| {
                row.iter()
                    .zip(hidden)
                    .map(|(w, h)| f64::from(*w) * f64::from(*h))
                    .sum::<f64>()
            };
            let logits: Vec<f64> = weight.chunks(width).map(logit).collect();
            (logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[target]) as f32
        };
        hidden.chunks(width).zip(targets).map(loss).collect()
    }

    fn targets(tokens: usize, vocabulary: usize) -> Vec<i64> {
        (0..tokens)
            .map(|i| {
                if i % 5 == 3 {
                    IGNORED
                } else {
                    (i * 7 % vocabulary) as i64
                }
            })
            .collect()
    }

    #[test]
    fn losses_agree_with_the_definition() {
        at_every_level(|| {
            for (tokens, width, vocabulary) in [(1, 1, 1), (7, 33, 65), (40, 16, 100)] {
                let (hidden, weight) = (random(tokens * width, 1), random(vocabulary * width, 2));
                let targets = targets(tokens, vocabulary);
                let want = oracle(&hidden, &weight, vocabulary, &targets);
                let mut losses = vec![f32::NAN; tokens];
                cross_entropy_head(
                    MatrixRef::new(&hidden, tokens, width),
                    MatrixRef::new(&weight, vocabulary, width).into(),
                    &targets,
                    &vec![1.0; tokens],
                    &mut losses,
                    None,
                );
                assert_close(&losses, &want, 1e-5);
                let mut out = vec![f32::NAN; tokens];
                log_probabilities(
                    &hidden,
                    Weights::from_f32(&weight, vocabulary, width),
                    None,
                    &targets,
                    &mut out,
                );
                assert_close(&out.iter().map(|value| -value).collect::<Vec<_>>(), &want, 1e-5);
            }
        });
    }

    #[test]
    fn a_head_in_half_precision_gives_log_probabilities() {
        at_every_level(|| {
            let (width, vocabulary) = (32, 50);
            let weight: Vec<half::f16> = random(vocabulary * width, 2)
                .into_iter()
                .map(half::f16::from_f32)
                .collect();
            let expanded: Vec<f32> = weight.iter().map(|value| value.to_f32()).collect();
            let hidden = random(6 * width, 1);
            let weights = Weights {
                format: WeightFormat::F16,
                data: bytemuck::cast_slice(&weight),
                rows: vocabulary,
                columns: width,
            };
            let mut out = [0.0; 6];
            log_probabilities(&hidden, weights, None, &targets(6, vocabulary), &mut out);
            let want = oracle(&hidden, &expanded, vocabulary, &targets(6, vocabulary));
            assert_close(&out.map(|value| -value), &want, 1e-5);
        });
    }

    #[test]
    fn gradients_agree_with_differences() {
        at_every_level(|| {
            let (tokens, width, vocabulary) = (6, 5, 19);
            let (hidden, weight) = (random(tokens * width, 1), random(vocabulary * width, 2));
            let (targets, token_weights) = (targets(tokens, vocabulary), random(tokens, 3));
            let loss = |hidden: &[f32], weight: &[f32]| {
                let losses = oracle(hidden, weight, vocabulary, &targets);
                crate::test_util::weighted_sum(&token_weights, &losses)
            };
            let want_hidden = numeric_gradient(&hidden, 1e-2, |hidden| loss(hidden, &weight));
            let want_weight = numeric_gradient(&weight, 1e-2, |weight| loss(&hidden, weight));
            let (mut d_hidden, mut d_weight) = (vec![f32::NAN; hidden.len()], vec![0.5; weight.len()]);
            let gradients = HeadGradients {
                d_hidden: &mut d_hidden,
                d_weight: Some(&mut d_weight),
                d_bias: None,
            };
            let mut losses = vec![0.0; tokens];
            cross_entropy_head(
                MatrixRef::new(&hidden, tokens, width),
                MatrixRef::new(&weight, vocabulary, width).into(),
                &targets,
                &token_weights,
                &mut losses,
                Some(gradients),
            );
            assert_close(&d_hidden, &want_hidden, 1e-3);
            d_weight.iter_mut().for_each(|value| *value -= 0.5);
            assert_close(&d_weight, &want_weight, 1e-3);
        });
    }

    /// A bias is a column of the weight whose input is 1.
    #[test]
    fn a_bias_is_one_more_column() {
        at_every_level(|| {
            let (tokens, width, vocabulary) = (7, 6, 37);
            let (hidden, weight, bias) = (
                random(tokens * width, 1),
                random(vocabulary * width, 2),
                random(vocabulary, 3),
            );
            let join = |rows: &[f32], last: &dyn Fn(usize) -> f32| -> Vec<f32> {
                let rows = rows.chunks(width).enumerate();
                rows.flat_map(|(index, row)| row.iter().copied().chain([last(index)]))
                    .collect()
            };
            let (wide_hidden, wide_weight) = (join(&hidden, &|_| 1.0), join(&weight, &|index| bias[index]));
            let (targets, token_weights) = (targets(tokens, vocabulary), random(tokens, 4));
            let run = |hidden: &[f32], head: HeadMatrix<'_>| {
                let width = hidden.len() / tokens;
                let (mut losses, mut d_hidden) = (vec![0.0; tokens], vec![0.0; hidden.len()]);
                let (mut d_weight, mut d_bias) = (vec![0.0; vocabulary * width], vec![0.5; vocabulary]);
                let gradients = HeadGradients {
                    d_hidden: &mut d_hidden,
                    d_weight: Some(&mut d_weight),
                    d_bias: Some(&mut d_bias),
                };
                let hidden = MatrixRef::new(hidden, tokens, width);
                cross_entropy_head(hidden, head, &targets, &token_weights, &mut losses, Some(gradients));
                (losses, d_hidden, d_weight, d_bias)
            };
            let want = run(&wide_hidden, MatrixRef::new(&wide_weight, vocabulary, width + 1).into());
            let head = HeadMatrix {
                weight: MatrixRef::new(&weight, vocabulary, width),
                bias: Some(&bias),
            };
            let found = run(&hidden, head);
            assert_close(&found.0, &want.0, 1e-5);
            let without_last = |rows: &[f32]| -> Vec<f32> {
                let rows = rows.chunks(width + 1);
                rows.flat_map(|row| &row[..width]).copied().collect()
            };
            assert_close(&found.1, &without_last(&want.1), 1e-5);
            assert_close(&found.2, &without_last(&want.2), 1e-5);
            let last: Vec<f32> = want.2.chunks(width + 1).map(|row| row[width] + 0.5).collect();
            assert_close(&found.3, &last, 1e-5);
            let weights = Weights::from_f32(&weight, vocabulary, width);
            let mut out = vec![f32::NAN; tokens];
            log_probabilities(&hidden, weights, Some(&bias), &targets, &mut out);
            assert_close(&out.iter().map(|value| -value).collect::<Vec<_>>(), &want.0, 1e-5);
            let (mut losses, mut d_hidden) = (vec![0.0; tokens], vec![1.0; hidden.len()]);
            let labels = (&targets[..], &token_weights[..]);
            crate::cross_entropy_frozen_head(&hidden, weights, Some(&bias), labels, &mut losses, &mut d_hidden);
            assert_close(&losses, &want.0, 1e-5);
            assert_close(&d_hidden, &found.1, 1e-5);
        });
    }

    /// Half operands give what f32 ones of the same values give, but for the rounding of the logits' gradient.
    #[test]
    fn half_operands_round_the_gradient_of_the_logits() {
        let (tokens, width, vocabulary) = (9, 8, 21);
        let halves = |length, seed| random(length, seed).into_iter().map(f16::from_f32).collect::<Vec<_>>();
        let (hidden, weight) = (halves(tokens * width, 1), halves(vocabulary * width, 2));
        let wide = |x: &[f16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let (wide_hidden, wide_weight) = (wide(&hidden), wide(&weight));
        let targets = targets(tokens, vocabulary);
        let run = |[hidden, weight]: [MatrixRef<'_>; 2], scale: f32| {
            let (mut losses, mut d_hidden) = (vec![0.0; tokens], vec![0.0; tokens * width]);
            let mut d_weight = vec![0.0; vocabulary * width];
            let gradients = HeadGradients {
                d_hidden: &mut d_hidden,
                d_weight: Some(&mut d_weight),
                d_bias: None,
            };
            let scales = vec![scale; tokens];
            let lost = cross_entropy_head(hidden, weight.into(), &targets, &scales, &mut losses, Some(gradients));
            (losses, d_hidden, d_weight, lost)
        };
        let exact = [
            MatrixRef::new(&wide_hidden, tokens, width),
            MatrixRef::new(&wide_weight, vocabulary, width),
        ];
        let rounded = [
            MatrixRef::f16(&hidden, tokens, width),
            MatrixRef::f16(&weight, vocabulary, width),
        ];
        let (want, got) = (run(exact, 1.0), run(rounded, 1.0));
        // Products of halves may round their operands in groups, see `matmul`.
        assert_close(&got.0, &want.0, 1e-4);
        assert_close(&got.1, &want.1, 1e-3);
        assert_close(&got.2, &want.2, 1e-3);
        assert_ne!(got.1, want.1);
        assert_eq!((want.3, got.3), (OutOfRange::default(), OutOfRange::default()));
        // Too small and too large for f16: some elements, and all of the largest.
        let with_target = targets.iter().filter(|target| **target >= 0).count() as u64;
        let small = run(rounded, 2e-7).3;
        assert!(small.underflows > 0 && small.overflows == 0, "{small:?}");
        let large = run(rounded, 1e7).3;
        assert!(large.overflows >= with_target && large.underflows == 0, "{large:?}");
    }

    #[test]
    fn blocks_of_tokens_join_seamlessly() {
        // A vocabulary so large that a block holds fewer tokens than there are.
        let (tokens, width, vocabulary) = (40, 2, BLOCK_LOGITS / 16);
        let (hidden, weight) = (random(tokens * width, 1), random(vocabulary * width, 2));
        let targets = targets(tokens, vocabulary);
        let mut losses = vec![0.0; tokens];
        cross_entropy_head(
            MatrixRef::new(&hidden, tokens, width),
            MatrixRef::new(&weight, vocabulary, width).into(),
            &targets,
            &vec![1.0; tokens],
            &mut losses,
            None,
        );
        for token in [0, 15, 16, 39] {
            let mut alone = [0.0];
            let hidden = &hidden[token * width..(token + 1) * width];
            cross_entropy_head(
                MatrixRef::new(hidden, 1, width),
                MatrixRef::new(&weight, vocabulary, width).into(),
                &targets[token..=token],
                &[1.0],
                &mut alone,
                None,
            );
            assert_close(&alone, &losses[token..=token], 1e-5);
        }
    }

    #[test]
    #[should_panic(expected = "target 4 in a vocabulary of 4")]
    fn a_target_outside_the_vocabulary_is_named() {
        let (hidden, weight) = (MatrixRef::new(&[0.0; 2], 1, 2), MatrixRef::new(&[0.0; 8], 4, 2));
        cross_entropy_head(hidden, weight.into(), &[4], &[1.0], &mut [0.0], None);
    }
}
