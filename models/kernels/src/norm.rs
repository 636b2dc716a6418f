//! Layer normalisation (Ba et al., 2016) and RMS normalisation (Zhang and Sennrich, 2019), forward and backward.

use crate::elementwise;
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// What the forward pass keeps of each row for the backward pass.
#[derive(Debug)]
pub struct NormStatistics<'a> {
    /// Means `[rows]`; RMS normalisation writes zeros.
    pub mean: &'a mut [f32],
    /// Reciprocal standard deviations (or root mean squares) `[rows]`.
    pub rstd: &'a mut [f32],
}

/// `out = (x - mean) / sqrt(variance + epsilon) * weight + bias`, row by row.
///
/// `x` and `out` are `[rows, width]`, `weight` and `bias` `[width]`. The variance is the biased one, as in PyTorch.
/// With `statistics` each row's mean and reciprocal standard deviation are kept.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn layer_norm(
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    epsilon: f32,
    out: &mut [f32],
    statistics: Option<NormStatistics<'_>>,
) {
    forward::<true>(level(), x, Affine { weight, bias }, epsilon, out, statistics);
}

/// `out = x / sqrt(mean(x^2) + epsilon) * weight`, row by row.
///
/// `x` and `out` are `[rows, width]`, `weight` `[width]`. With `statistics` each row's reciprocal root mean square is
/// kept (and a mean of 0).
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32], statistics: Option<NormStatistics<'_>>) {
    forward::<false>(level(), x, Affine { weight, bias: None }, epsilon, out, statistics);
}

/// Gradients of [`layer_norm`] by its input, weight and bias; all three are added to `dx`, `d_weight` and `d_bias`.
///
/// `dy`, `x` and `dx` are `[rows, width]`, `mean` and `rstd` `[rows]` as kept by the forward pass, the others `[width]`.
/// Adding to `dx` serves residual connections: it already holds the gradient that goes around the norm.
///
/// # Panics
/// Where the lengths do not fit each other.
#[allow(clippy::too_many_arguments)] // a flat kernel interface: inputs, then outputs
pub fn layer_norm_backward(
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    mean: &[f32],
    rstd: &[f32],
    dx: &mut [f32],
    d_weight: &mut [f32],
    d_bias: Option<&mut [f32]>,
) {
    backward::<true>(level(), Upstream { dy, x, mean, rstd }, weight, dx, d_weight, d_bias);
}

/// Gradients of [`rms_norm`] by its input and weight; both are added to `dx` and `d_weight`.
///
/// `dy`, `x` and `dx` are `[rows, width]`, `rstd` `[rows]` as kept by the forward pass, the others `[width]`.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn rms_norm_backward(dy: &[f32], x: &[f32], weight: &[f32], rstd: &[f32], dx: &mut [f32], d_weight: &mut [f32]) {
    backward::<false>(level(), Upstream { dy, x, mean: &[], rstd }, weight, dx, d_weight, None);
}

#[derive(Clone, Copy)]
struct Affine<'a> {
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
}

#[derive(Clone, Copy)]
struct Upstream<'a> {
    dy: &'a [f32],
    x: &'a [f32],
    mean: &'a [f32],
    rstd: &'a [f32],
}

/// Rows that make a task worth a thread.
fn task_rows(width: usize) -> usize {
    (elementwise::STEP / width).max(1)
}

fn forward<const CENTERED: bool>(
    level: Level,
    x: &[f32],
    affine: Affine<'_>,
    epsilon: f32,
    out: &mut [f32],
    statistics: Option<NormStatistics<'_>>,
) {
    let width = affine.weight.len();
    assert!(
        affine.bias.is_none_or(|bias| bias.len() == width),
        "bias is not [{width}]"
    );
    assert_eq!(x.len(), out.len(), "input and output");
    if x.is_empty() {
        return;
    }
    let rows = x.len() / width.max(1);
    assert_eq!(rows * width, x.len(), "input is not rows of {width}");
    let (mut no_mean, mut no_rstd) = (Vec::new(), Vec::new());
    let NormStatistics { mean, rstd } = statistics.unwrap_or_else(|| {
        (no_mean, no_rstd) = (vec![0.0; rows], vec![0.0; rows]);
        NormStatistics {
            mean: &mut no_mean,
            rstd: &mut no_rstd,
        }
    });
    assert!(mean.len() == rows && rstd.len() == rows, "statistics are not [{rows}]");

    let cuts = Cuts::Every {
        step: task_rows(width),
        length: rows,
    };
    let out = Tiles::new(out, width, cuts, Cuts::none(width));
    let mean = Tiles::new(mean, 1, cuts, Cuts::none(1));
    let rstd = Tiles::new(rstd, 1, cuts, Cuts::none(1));
    parallel_for(rows.div_ceil(task_rows(width)), |task| {
        let (mut out, mut mean, mut rstd) = (out.take(task, 0), mean.take(task, 0), rstd.take(task, 0));
        let x = x[task * task_rows(width) * width..].chunks_exact(width);
        for (row, x) in (0..out.rows()).zip(x) {
            let [row_mean, row_rstd] = dispatch!(
                level,
                forward_row::<Centered<CENTERED>>(x, affine, epsilon, out.row(row))
            );
            mean.row(row)[0] = row_mean;
            rstd.row(row)[0] = row_rstd;
        }
    });
}

/// Carries a constant as a type.
struct Centered<const CENTERED: bool>;

trait Centering {
    const CENTERED: bool;
}

impl<const CENTERED: bool> Centering for Centered<CENTERED> {
    const CENTERED: bool = CENTERED;
}

/// One row; returns its mean and reciprocal standard deviation.
#[inline(always)]
fn forward_row<C: Centering, S: Simd>(s: S, x: &[f32], affine: Affine<'_>, epsilon: f32, out: &mut [f32]) -> [f32; 2] {
    let scale = 1.0 / x.len() as f32;
    let mean = if C::CENTERED {
        scale
            * sum_lanes(
                s,
                x,
                0.0,
                #[inline(always)]
                |x, sum| s.add(x, sum),
            )
    } else {
        0.0
    };
    let center = s.splat(mean);
    // Two passes over a row in the cache: no cancellation. Behind the row's end the mean stands in.
    let squares = sum_lanes(
        s,
        x,
        mean,
        #[inline(always)]
        |x, sum| {
            let x = s.sub(x, center);
            s.mul_add(x, x, sum)
        },
    );
    let rstd = 1.0 / (scale * squares + epsilon).sqrt();
    let factor = s.splat(rstd);
    let inputs = x.chunks(LANES).zip(affine.weight.chunks(LANES));
    for (i, ((x, weight), out)) in inputs.zip(out.chunks_mut(LANES)).enumerate() {
        let normal = s.mul(s.sub(load(s, x), center), factor);
        let value = match affine.bias {
            Some(bias) => s.mul_add(normal, load(s, weight), load(s, &bias[i * LANES..][..x.len()])),
            None => s.mul(normal, load(s, weight)),
        };
        store(s, value, out);
    }
    [mean, rstd]
}

/// A chunk of up to sixteen elements.
#[inline(always)]
fn load<S: Simd>(s: S, chunk: &[f32]) -> S::F32 {
    match chunk.first_chunk() {
        Some(lanes) => s.load(lanes),
        None => s.load_partial(chunk),
    }
}

/// To a chunk of up to sixteen elements.
#[inline(always)]
fn store<S: Simd>(s: S, value: S::F32, chunk: &mut [f32]) {
    match chunk.first_chunk_mut() {
        Some(lanes) => s.store(value, lanes),
        None => s.store_partial(value, chunk),
    }
}

/// Folds a row in lanes, `fill` behind its end, and adds the lanes up.
#[inline(always)]
fn sum_lanes<S: Simd>(s: S, x: &[f32], fill: f32, step: impl Fn(S::F32, S::F32) -> S::F32) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut sum = s.splat(0.0);
    for chunk in chunks {
        sum = step(s.load(chunk), sum);
    }
    if !rest.is_empty() {
        sum = step(s.load_partial_or(rest, fill), sum);
    }
    s.reduce_add(sum)
}

fn backward<const CENTERED: bool>(
    level: Level,
    upstream: Upstream<'_>,
    weight: &[f32],
    dx: &mut [f32],
    d_weight: &mut [f32],
    d_bias: Option<&mut [f32]>,
) {
    let Upstream { dy, x, mean, rstd } = upstream;
    let (width, rows) = (weight.len(), rstd.len());
    assert!(
        dy.len() == rows * width && x.len() == dy.len() && dx.len() == dy.len(),
        "rows are not [{rows}, {width}]"
    );
    assert!(!CENTERED || mean.len() == rows, "means are not [{rows}]");
    assert_eq!(d_weight.len(), width, "gradient of the weight");
    if dy.is_empty() {
        return;
    }
    let mean_of = |row: usize| if CENTERED { mean[row] } else { 0.0 };
    let step = task_rows(width);
    let dx = Tiles::new(dx, width, Cuts::Every { step, length: rows }, Cuts::none(width));
    parallel_for(rows.div_ceil(step), |task| {
        let mut dx = dx.take(task, 0);
        for local in 0..dx.rows() {
            let row = task * step + local;
            let elements = row * width..(row + 1) * width;
            let inputs = [&dy[elements.clone()], &x[elements], weight];
            let statistics = [mean_of(row), rstd[row]];
            dispatch!(
                level,
                backward_row::<Centered<CENTERED>>(inputs, statistics, dx.row(local))
            );
        }
    });

    // The parameters' gradients: tasks own columns and go through the rows in order.
    const COLUMNS: usize = 4 * LANES;
    let tiles = Tiles::new(
        d_weight,
        width,
        Cuts::none(1),
        Cuts::Every {
            step: COLUMNS,
            length: width,
        },
    );
    let columns = |task: usize| {
        let mut tile = tiles.take(0, task);
        let d_weight = tile.row(0);
        for (row, &rstd) in rstd.iter().enumerate() {
            let start = row * width + task * COLUMNS;
            let (dy, x) = (&dy[start..start + d_weight.len()], &x[start..start + d_weight.len()]);
            dispatch!(level, weight_row(dy, x, [mean_of(row), rstd], d_weight));
        }
    };
    if x.len() < elementwise::STEP {
        (0..width.div_ceil(COLUMNS)).for_each(columns);
    } else {
        parallel_for(width.div_ceil(COLUMNS), columns);
    }
    if let Some(d_bias) = d_bias {
        assert_eq!(d_bias.len(), width, "gradient of the bias");
        crate::reduce::sum_rows(dy, d_bias);
    }
}

/// With `n` the normalised row and `g = dy * weight`: `dx += rstd * (g - mean(g) - n * mean(g * n))`; the mean of `g`
/// is left out without centering.
#[inline(always)]
fn backward_row<C: Centering, S: Simd>(s: S, [dy, x, weight]: [&[f32]; 3], [mean, rstd]: [f32; 2], dx: &mut [f32]) {
    let scale = 1.0 / x.len() as f32;
    let (center, factor) = (s.splat(mean), s.splat(rstd));
    let (mut sum, mut product) = (s.splat(0.0), s.splat(0.0));
    for ((dy, x), weight) in dy.chunks(LANES).zip(x.chunks(LANES)).zip(weight.chunks(LANES)) {
        // Behind the end g is zero, so that what n is there does not matter.
        let gradient = s.mul(load(s, dy), load(s, weight));
        let normal = s.mul(s.sub(load(s, x), center), factor);
        sum = s.add(sum, gradient);
        product = s.mul_add(gradient, normal, product);
    }
    let mean_gradient = s.splat(if C::CENTERED { scale * s.reduce_add(sum) } else { 0.0 });
    let mean_product = s.splat(-scale * s.reduce_add(product));
    let inputs = dy.chunks(LANES).zip(x.chunks(LANES)).zip(weight.chunks(LANES));
    for (((dy, x), weight), dx) in inputs.zip(dx.chunks_mut(LANES)) {
        let gradient = s.mul(load(s, dy), load(s, weight));
        let normal = s.mul(s.sub(load(s, x), center), factor);
        let inner = s.mul_add(normal, mean_product, s.sub(gradient, mean_gradient));
        let value = s.mul_add(inner, factor, load(s, dx));
        store(s, value, dx);
    }
}

/// `d_weight += dy * n` for some columns of one row.
#[inline(always)]
fn weight_row<S: Simd>(s: S, dy: &[f32], x: &[f32], [mean, rstd]: [f32; 2], d_weight: &mut [f32]) {
    let (center, factor) = (s.splat(mean), s.splat(rstd));
    for ((dy, x), sum) in dy.chunks(LANES).zip(x.chunks(LANES)).zip(d_weight.chunks_mut(LANES)) {
        let normal = s.mul(s.sub(load(s, x), center), factor);
        let value = s.mul_add(load(s, dy), normal, load(s, sum));
        store(s, value, sum);
    }
}

#[cfg(test)]
mod tests;
