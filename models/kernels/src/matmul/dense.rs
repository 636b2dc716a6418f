//! Products of two f32 matrices, on the `gemm` crate's micro-kernels and our threads.
#![allow(unsafe_code)]

use crate::threads::{self, parallel_for};
use crate::tiles::{Cuts, Tiles};

/// Most rows and columns of the output that one task computes, the largest first: large ones pack least per product,
/// small ones share a small product out.
const TASKS: [[usize; 2]; 5] = [[1024, 512], [512, 512], [512, 256], [256, 256], [128, 256]];

/// Pieces are multiples of these, but for the last one: the crate's micro-kernels compute 8 rows of 48 columns.
const UNITS: [usize; 2] = [8, 48];

/// Products of up to so many rows or columns the crate may sum by other rules, which depend on their shape.
const THIN: usize = 16;

/// Share of the threads' time that tasks of one size must use: a smaller size is tried below it.
const WELL_SHARED: f64 = 0.9;

/// Rows and columns of the tasks of a product `[m, n]`: even pieces, such that `threads` end at about one time.
///
/// Results do not depend on `threads`: how an element is summed depends on the inner dimension alone where no piece is
/// thin, and thin products are always cut in the same way.
fn task([m, n]: [usize; 2], threads: usize) -> [usize; 2] {
    let pieces = TASKS.map(|[rows, columns]| [piece(m, rows, UNITS[0]), piece(n, columns, UNITS[1])]);
    if m.min(n) <= THIN {
        return pieces[1];
    }
    let share = |[rows, columns]: [usize; 2]| {
        let rounds = (m.div_ceil(rows) * n.div_ceil(columns)).div_ceil(threads);
        (m * n) as f64 / (rounds * rows * columns * threads) as f64
    };
    let well = pieces.iter().find(|&&piece| share(piece) >= WELL_SHARED);
    let best = || pieces.iter().max_by(|&&a, &&b| share(a).total_cmp(&share(b)));
    well.or_else(best).copied().unwrap_or(pieces[0])
}

/// Length of even pieces of at most about `most`, of which the last is not thin.
fn piece(length: usize, most: usize, unit: usize) -> usize {
    let mut step = length.div_ceil(length.div_ceil(most)).next_multiple_of(unit);
    while step < length && (1..=THIN).contains(&(length % step)) {
        step += unit;
    }
    step
}

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
    /// Rows and columns of a task.
    task: [usize; 2],
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
        let task @ [rows, columns] = task([m, n], threads::count());
        Self {
            a,
            b,
            tiles: Tiles::new(out, n, cuts(rows, m), cuts(columns, n)),
            task,
            down: m.div_ceil(rows),
            across: n.div_ceil(columns),
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
        let (top, left) = (row * self.task[0], column * self.task[1]);
        let (height, width) = (m.min(top + self.task[0]) - top, n.min(left + self.task[1]) - left);
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
