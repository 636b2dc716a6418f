//! General matrix products for training: f32, bf16 and f16 operands in either order, f32 sums and results.
//!
//! The blocks of both operands that are multiplied next are packed into panels that lie as the innermost loop reads them
//! (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008), once for all threads; elements
//! of other types are converted on that way.

mod blocks;
mod dense;
mod matrix;
mod pack;
#[cfg(target_arch = "x86_64")]
mod pair_kernels;
mod pairs;
mod tile;

pub use matrix::MatrixRef;
pub(crate) use pairs::Pairs;

use crate::simd::{Level, level};

/// `out = a * b`, or `out += a * b` where `accumulate`. `a` is `[m, k]`, `b` `[k, n]`, `out` row-major `[m, n]`.
///
/// For backward passes: `dx = dy * W` and `dW += dy^T * x` with `W` `[out, in]`. Sums are in single precision, in an order
/// that depends on the shape but not on the number of threads: a row may differ in its last bits between batches of
/// different sizes. Where both operands are of half types, AVX-512 machines round smaller elements on the way
/// (below 2^-4 of the largest of 128 neighbours, by at most 2^-12 of it), for twice the speed of f32.
///
/// # Panics
/// Where the shapes do not fit each other.
pub fn matmul(a: MatrixRef<'_>, b: MatrixRef<'_>, accumulate: bool, out: &mut [f32]) {
    matmul_with(level(), a, b, accumulate, out);
}

/// One of several products that are computed by all threads together.
#[derive(Debug)]
pub struct MatmulGroup<'a> {
    /// `[m, k]`.
    pub a: MatrixRef<'a>,
    /// `[k, n]`.
    pub b: MatrixRef<'a>,
    /// Where the product `[m, n]` goes.
    pub out: &'a mut [f32],
}

/// [`matmul`] of several products at once. Each is the same as alone; threads take pieces of all of them, so that a larger
/// product gets more of the threads.
///
/// # Panics
/// Where shapes do not fit each other.
pub fn matmul_groups(groups: Vec<MatmulGroup<'_>>, accumulate: bool) {
    let level = level();
    let mut dense = Vec::with_capacity(groups.len());
    for MatmulGroup { a, b, out } in groups {
        match (level, a.dense(), b.dense()) {
            (Level::Avx512, Some(left), Some(right)) if a.rows * a.columns * b.columns > 0 => {
                dense.push((left, right, out));
            }
            _ => matmul_with(level, a, b, accumulate, out),
        }
    }
    dense::products(dense, accumulate);
}

/// [`matmul`] at a given level.
pub(crate) fn matmul_with(level: Level, a: MatrixRef<'_>, b: MatrixRef<'_>, accumulate: bool, out: &mut [f32]) {
    if is_trivial(a, b, accumulate, out) {
        return;
    }
    if let Some(pairs) = Pairs::choose(level, a, b) {
        return pairs.product(a, b, accumulate, out);
    }
    widened(level, a, b, accumulate, out);
}

/// [`matmul`] by operations on f32 alone, whatever the types of the operands: of half types every element counts as it is.
///
/// # Panics
/// Where the shapes do not fit each other.
pub fn matmul_widened(a: MatrixRef<'_>, b: MatrixRef<'_>, accumulate: bool, out: &mut [f32]) {
    if is_trivial(a, b, accumulate, out) {
        return;
    }
    widened(level(), a, b, accumulate, out);
}

/// Whether there is nothing to multiply; then `out` is as it should be.
fn is_trivial(a: MatrixRef<'_>, b: MatrixRef<'_>, accumulate: bool, out: &mut [f32]) -> bool {
    let (m, k, n) = (a.rows, a.columns, b.columns);
    assert_eq!(k, b.rows, "[{m}, {k}] times [{}, {n}]", b.rows);
    assert_eq!(out.len(), m * n, "output is not [{m}, {n}]");
    if k == 0 && !accumulate {
        out.fill(0.0);
    }
    out.is_empty() || k == 0
}

/// The product by f32 operations; none of the matrices is empty.
pub(crate) fn widened(level: Level, a: MatrixRef<'_>, b: MatrixRef<'_>, accumulate: bool, out: &mut [f32]) {
    match (level, a.dense(), b.dense()) {
        // The crate finds AVX-512 itself.
        (Level::Avx512, Some(a), Some(b)) => dense::product(a, b, accumulate, out),
        _ => blocks::product(tile::Widened(level), a, b, accumulate, out),
    }
}

#[cfg(test)]
mod tests;
