//! General matrix product for training, on the `gemm` crate's micro-kernels and our threads.
#![allow(unsafe_code)]

use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// Rows and columns of the output that one task computes. Fixed, so that results do not depend on the number of
/// threads.
const TASK_ROWS: usize = 512;
const TASK_COLUMNS: usize = 512;

/// A borrowed matrix `[rows, columns]`.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    transposed: bool,
}

impl<'a> MatrixRef<'a> {
    /// A row-major matrix `[rows, columns]`.
    ///
    /// # Panics
    /// Where `data` has another length.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "matrix is not [{rows}, {columns}]");
        Self {
            data,
            rows,
            columns,
            transposed: false,
        }
    }

    /// The transposed view; nothing is moved.
    pub fn transpose(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            transposed: !self.transposed,
        }
    }

    /// Distances of neighbouring rows and columns in elements.
    fn strides(self) -> (isize, isize) {
        if self.transposed {
            (1, self.rows as isize)
        } else {
            (self.columns as isize, 1)
        }
    }
}

/// `out = a * b`, or `out += a * b` where `accumulate`. `a` is `[m, k]`, `b` `[k, n]`, `out` row-major `[m, n]`.
///
/// For backward passes: `dx = dy * W` and `dW += dy^T * x` with `W` `[out, in]`. The order of additions depends on the
/// shape, so that a row may differ in its last bits between batches of different sizes; not between thread counts.
///
/// # Panics
/// Where the shapes do not fit each other.
pub fn matmul(a: MatrixRef<'_>, b: MatrixRef<'_>, accumulate: bool, out: &mut [f32]) {
    let (m, k, n) = (a.rows, a.columns, b.columns);
    assert_eq!(k, b.rows, "[{m}, {k}] times [{}, {n}]", b.rows);
    assert_eq!(out.len(), m * n, "output is not [{m}, {n}]");
    if out.is_empty() {
        return;
    }
    let tiles = Tiles::new(
        out,
        n,
        Cuts::Every {
            step: TASK_ROWS,
            length: m,
        },
        Cuts::Every {
            step: TASK_COLUMNS,
            length: n,
        },
    );
    let down = m.div_ceil(TASK_ROWS);
    parallel_for(down * n.div_ceil(TASK_COLUMNS), |task| {
        let (row, column) = (task % down, task / down);
        let mut tile = tiles.take(row, column);
        let (a_row, a_column) = a.strides();
        let (b_row, b_column) = b.strides();
        let (top, left) = (row * TASK_ROWS, column * TASK_COLUMNS);
        let (height, width) = (m.min(top + TASK_ROWS) - top, n.min(left + TASK_COLUMNS) - left);
        // SAFETY: the views' lengths were checked against their shapes when they were made, the offsets stay inside
        // their shapes, and the destination is this task's tile of height x width elements.
        unsafe {
            gemm::gemm(
                height,
                width,
                k,
                tile.as_mut_ptr(),
                1,
                tile.stride() as isize,
                accumulate,
                a.data.as_ptr().wrapping_offset(top as isize * a_row),
                a_column,
                a_row,
                b.data.as_ptr().wrapping_offset(left as isize * b_column),
                b_column,
                b_row,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::{assert_close, random};

    #[test]
    fn products_of_all_orientations_agree_with_the_definition() {
        for (m, k, n) in [(1, 1, 1), (7, 33, 5), (65, 7, 130), (513, 4, 514), (3, 0, 2)] {
            let (a, b) = (random(m * k, 1), random(k * n, 2));
            let start = random(m * n, 3);
            let product = |i: usize| (0..k).map(|l| a[i / n * k + l] * b[l * n + i % n]).sum::<f32>();
            let want: Vec<f32> = (0..m * n).map(product).collect();
            let added: Vec<f32> = want.iter().zip(&start).map(|(want, start)| want + start).collect();
            let a_stored_transposed: Vec<f32> = (0..k * m).map(|i| a[i % m * k + i / m]).collect();
            let b_stored_transposed: Vec<f32> = (0..n * k).map(|i| b[i % k * n + i / k]).collect();
            for a in [
                MatrixRef::new(&a, m, k),
                MatrixRef::new(&a_stored_transposed, k, m).transpose(),
            ] {
                for b in [
                    MatrixRef::new(&b, k, n),
                    MatrixRef::new(&b_stored_transposed, n, k).transpose(),
                ] {
                    let mut out = start.clone();
                    matmul(a, b, false, &mut out);
                    assert_close(&out, &want, 1e-5);
                    let mut out = start.clone();
                    matmul(a, b, true, &mut out);
                    assert_close(&out, &added, 1e-5);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "[2, 3] times [2, 2]")]
    fn unfitting_shapes_are_named() {
        matmul(
            MatrixRef::new(&[0.0; 6], 2, 3),
            MatrixRef::new(&[0.0; 4], 2, 2),
            false,
            &mut [0.0; 4],
        );
    }
}
