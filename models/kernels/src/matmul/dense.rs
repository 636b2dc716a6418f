//! Products of two f32 matrices, on the `gemm` crate's micro-kernels and our threads.
#![allow(unsafe_code)]

use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// Rows and columns of the output that one task computes. Fixed, so that results do not depend on the number of
/// threads.
const TASK_ROWS: usize = 512;
const TASK_COLUMNS: usize = 512;

/// A matrix `[rows, columns]` of f32 with the distances of neighbouring rows and columns in elements.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a> {
    /// At least what the strides reach.
    pub(super) data: &'a [f32],
    pub(super) shape: [usize; 2],
    pub(super) strides: [usize; 2],
}

impl Strided<'_> {
    /// Panics where the strides leave `data`.
    fn check(&self) {
        let last = |dimension: usize| self.shape[dimension].saturating_sub(1) * self.strides[dimension];
        let empty = self.shape.contains(&0);
        assert!(empty || last(0) + last(1) < self.data.len(), "strides leave the matrix");
    }
}

/// `out (+)= a * b`, `out` not empty and row-major.
pub(super) fn product(a: Strided<'_>, b: Strided<'_>, accumulate: bool, out: &mut [f32]) {
    products(vec![(a, b, out)], accumulate);
}

/// [`product`] of several at once.
pub(super) fn products(list: Vec<(Strided<'_>, Strided<'_>, &mut [f32])>, accumulate: bool) {
    let list: Vec<_> = list.into_iter().map(|(a, b, out)| Product::new(a, b, out)).collect();
    parallel_for(list.iter().map(Product::tasks).sum(), |mut task| {
        for product in &list {
            if task < product.tasks() {
                return product.run(task, accumulate);
            }
            task -= product.tasks();
        }
    });
}

/// A product cut into tasks.
struct Product<'a> {
    a: Strided<'a>,
    b: Strided<'a>,
    tiles: Tiles<'a, f32>,
    /// Tasks in a column of them, and columns.
    down: usize,
    across: usize,
}

impl<'a> Product<'a> {
    fn new(a: Strided<'a>, b: Strided<'a>, out: &'a mut [f32]) -> Self {
        a.check();
        b.check();
        let ([m, k], [inner, n]) = (a.shape, b.shape);
        assert!(inner == k && out.len() == m * n, "shapes of a product");
        let cuts = |step: usize, length: usize| Cuts::Every { step, length };
        Self {
            a,
            b,
            tiles: Tiles::new(out, n, cuts(TASK_ROWS, m), cuts(TASK_COLUMNS, n)),
            down: m.div_ceil(TASK_ROWS),
            across: n.div_ceil(TASK_COLUMNS),
        }
    }

    fn tasks(&self) -> usize {
        self.down * self.across
    }

    fn run(&self, task: usize, accumulate: bool) {
        let (a, b) = (self.a, self.b);
        let ([m, k], [_, n]) = (a.shape, b.shape);
        let (row, column) = (task % self.down, task / self.down);
        let mut tile = self.tiles.take(row, column);
        let (top, left) = (row * TASK_ROWS, column * TASK_COLUMNS);
        let (height, width) = (m.min(top + TASK_ROWS) - top, n.min(left + TASK_COLUMNS) - left);
        let [a_row, a_column] = a.strides;
        let [b_row, b_column] = b.strides;
        // SAFETY: shapes and strides were checked to stay inside the data, the offsets stay inside the shapes, and the
        // destination is this task's tile of height x width elements.
        unsafe {
            gemm::gemm(
                height,
                width,
                k,
                tile.as_mut_ptr(),
                1,
                tile.stride() as isize,
                accumulate,
                a.data.as_ptr().wrapping_add(top * a_row),
                a_column as isize,
                a_row as isize,
                b.data.as_ptr().wrapping_add(left * b_column),
                b_column as isize,
                b_row as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}
