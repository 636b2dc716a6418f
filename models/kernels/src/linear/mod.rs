//! Linear layers: `x * W^T + b` for weights in every storage format.
//!
//! Each output is one chain of fused multiplications and additions over sixteen lanes in ascending order, reduced at the
//! end, whichever path computes it. So a row's result depends neither on how many rows there are nor on threads.
//! For few rows, or formats that are decoded quickly, weights are decoded in registers and used at once; otherwise rows of
//! weights are decoded to a scratch buffer that stays in the cache.

mod direct;
mod dots;
mod groups;
mod panel;

pub(crate) use dots::dots;
pub use groups::{LinearGroup, linear_groups};

use std::borrow::Cow;

use self::direct::rows as direct_rows;
use crate::Weights;
use crate::quantized::with_format;
use crate::simd::{LANES, Level, dispatch, level};
use crate::threads::{INLINE_PRODUCTS, parallel_for, range_step};
use crate::tiles::{Cuts, Tiles};

/// Smallest number of weight rows in a task; a multiple of every tile's height.
const TASK_ROWS: usize = 8;

/// `out = x * W^T + bias`.
///
/// `x` is `[m, k]`, `weights` `[n, k]`, `bias` `[n]` and `out` `[m, n]`. Accumulates in single precision, in the same
/// order for every `m` and any number of threads.
///
/// # Panics
/// Where the lengths do not fit the shape of `weights`.
pub fn linear(x: &[f32], weights: Weights<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    linear_with(level(), x, weights, bias, out);
}

/// One of several linear layers of one input.
#[derive(Debug)]
pub struct LinearLayer<'a> {
    /// `[n, k]`.
    pub weights: Weights<'a>,
    /// `[n]`.
    pub bias: Option<&'a [f32]>,
    /// Where the output `[m, n]` goes.
    pub out: &'a mut [f32],
}

/// [`linear()`] for several layers with the same input `x` `[m, k]`, by all threads together: for a few rows the threads'
/// meeting takes as long as a small layer.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn linear_each(x: &[f32], layers: &mut [LinearLayer<'_>]) {
    each_with(level(), x, layers);
}

/// [`linear()`] at a given level.
pub(crate) fn linear_with(level: Level, x: &[f32], weights: Weights<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    each_with(level, x, &mut [LinearLayer { weights, bias, out }]);
}

fn each_with(level: Level, x: &[f32], layers: &mut [LinearLayer<'_>]) {
    let mut products = 0;
    let mut rows = 0;
    let mut m = 0;
    for layer in &*layers {
        layer.check(x);
        products += x.len() * layer.weights.rows;
        rows += layer.weights.rows;
        m = m.max(layer.input_rows());
    }
    if m == 0 {
        return;
    }
    let step = match products <= INLINE_PRODUCTS {
        true => rows,
        false => range_step(rows, TASK_ROWS),
    };
    let input = Input::new(level, x, m);
    let parts: Vec<_> = layers
        .iter_mut()
        .filter(|layer| layer.weights.rows > 0)
        .map(|layer| LayerTasks::new(layer, step, m))
        .collect();
    let tasks = parts.iter().map(|layer| layer.tasks).sum();
    parallel_for(tasks, |mut task| {
        for layer in &parts {
            if task < layer.tasks {
                return layer.run(&input, task);
            }
            task -= layer.tasks;
        }
    });
}

impl LinearLayer<'_> {
    /// Rows of the input, by the output; 0 without outputs.
    fn input_rows(&self) -> usize {
        self.out.len().checked_div(self.weights.rows).unwrap_or(0)
    }

    fn check(&self, x: &[f32]) {
        self.weights.checked_row_bytes();
        let (n, k, m) = (self.weights.rows, self.weights.columns, self.input_rows());
        if n == 0 {
            assert_eq!(self.out.len(), 0, "output of a layer without outputs");
            return;
        }
        assert_eq!(self.out.len(), m * n, "output is not rows of {n}");
        assert_eq!(x.len(), m * k, "input is not [{m}, {k}]");
        assert!(self.bias.is_none_or(|bias| bias.len() == n), "bias is not [{n}]");
    }
}

/// What all tasks multiply with.
struct Input<'a> {
    level: Level,
    rows: usize,
    /// Packed as [`direct`] reads it.
    x: Cow<'a, [f32]>,
}

impl<'a> Input<'a> {
    fn new(level: Level, x: &'a [f32], rows: usize) -> Self {
        Self {
            level,
            rows,
            x: direct::pack(x, rows, direct::tile_rows(level)),
        }
    }
}

/// A layer cut into ranges of its weights' rows.
struct LayerTasks<'a> {
    weights: Weights<'a>,
    bias: Option<&'a [f32]>,
    out: Tiles<'a, f32>,
    step: usize,
    tasks: usize,
}

impl<'a> LayerTasks<'a> {
    fn new(layer: &'a mut LinearLayer<'_>, step: usize, m: usize) -> Self {
        let length = layer.weights.rows;
        Self {
            weights: layer.weights,
            bias: layer.bias,
            out: Tiles::new(layer.out, length, Cuts::none(m), Cuts::Every { step, length }),
            step,
            tasks: length.div_ceil(step),
        }
    }

    fn run(&self, input: &Input<'_>, task: usize) {
        let weights = self.weights;
        let row_bytes = weights.data.len() / weights.rows;
        let rows = task * self.step..weights.rows.min((task + 1) * self.step);
        let part = Weights {
            data: &weights.data[rows.start * row_bytes..rows.end * row_bytes],
            rows: rows.len(),
            ..weights
        };
        let bias = self.bias.map(|bias| &bias[rows]);
        let mut out = self.out.take(0, task);
        if input.rows > direct::limit(input.level, weights.format) {
            return panel::rows(input.level, &input.x, part, bias, &mut out);
        }
        for first in (0..input.rows).step_by(direct::tile_rows(input.level)) {
            let x = &input.x[first * weights.columns.next_multiple_of(LANES)..];
            with_format!(weights.format, F => {
                dispatch!(input.level, direct_rows::<F>(x, part, bias, &mut out, [first, 0]))
            });
        }
    }
}

#[cfg(test)]
mod tests;
