//! Matrix products.

use std::ops::RangeInclusive;

use candle_core::{DType, Tensor};
use candle_kernels_cpu::{MatrixRef, matmul_widened};
use half::{bf16, f16};

use super::{broadcast, check_floating, check_same_element};
use crate::error::{Error, Result};
use crate::executor::rows::narrowed;
use crate::executor::{Attributes, Monitor, Operation, Prepared, TensorType};
use crate::ops::storage::CpuSlice;

/// Multiplications of a block, after which the operation can be stopped: some tens of milliseconds.
const BLOCK: usize = 1 << 32;

/// `matmul`: inputs `a` `[…, m, k]` and `b` `[…, k, n]`, output `[…, m, n]`. The dimensions before the last two are
/// broadcast. Attributes `transpose_a`, `transpose_b`: the last two dimensions lie the other way round. Products and sums are
/// f32 whatever the type.
pub(super) struct Matmul;

/// Sizes of a product: `[m, k]` times `[k, n]`.
#[derive(Clone, Copy)]
struct Sizes {
    m: usize,
    k: usize,
    n: usize,
    transpose_a: bool,
    transpose_b: bool,
}

impl Operation for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn inputs(&self) -> RangeInclusive<usize> {
        2..=2
    }

    fn attributes(&self) -> &'static [&'static str] {
        &["transpose_a", "transpose_b"]
    }

    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared> {
        let (a, b) = (&inputs[0], &inputs[1]);
        check_floating(a)?;
        check_same_element(inputs)?;
        let transpose_a = attributes.boolean("transpose_a")?;
        let transpose_b = attributes.boolean("transpose_b")?;
        let matrix = |x: &TensorType, transposed: bool| match (x.shape(), transposed) {
            ([.., rows, columns], false) | ([.., columns, rows], true) => Ok((*rows, *columns)),
            _ => Err(Error::invalid_argument(format!(
                "{x} is no matrix; it needs at least 2 dimensions"
            ))),
        };
        let ((m, k), (rows, n)) = (matrix(a, transpose_a)?, matrix(b, transpose_b)?);
        if k != rows {
            return Err(Error::invalid_argument(format!(
                "matrices of {m} x {k} and {rows} x {n} cannot be multiplied: {k} is not {rows}"
            )));
        }
        let batches = [a, b].map(|x| &x.shape()[..x.rank() - 2]);
        let mut shape = broadcast(batches[0], batches[1])?;
        let batch = shape.clone();
        shape.extend([m, n]);
        let output = TensorType::new(a.element(), &shape)?;
        let pairs = Pairs {
            batch,
            inputs: batches.map(<[usize]>::to_vec),
        };
        let sizes = Sizes {
            m,
            k,
            n,
            transpose_a,
            transpose_b,
        };
        Ok(Prepared::new(output, move |inputs, monitor| {
            let (a, b) = (&inputs[0], &inputs[1]);
            match a.device().is_cpu() {
                true => on_cpu(a, b, sizes, &pairs, &shape, monitor),
                false => elsewhere(a, b, sizes, &shape),
            }
        }))
    }
}

/// Which matrix of `a` and which of `b` each product takes.
struct Pairs {
    /// The dimensions before the last two, of the output.
    batch: Vec<usize>,
    /// Likewise, of the inputs.
    inputs: [Vec<usize>; 2],
}

impl Pairs {
    /// Indices of the matrices of product `index`, below the product of `batch`.
    fn of(&self, index: usize) -> [usize; 2] {
        self.inputs.each_ref().map(|shape| {
            let (mut rest, mut stride, mut found) = (index, 1, 0);
            for (axis, size) in self.batch.iter().enumerate().rev() {
                let coordinate = rest % size;
                rest /= size;
                if let Some(own) = (axis + shape.len()).checked_sub(self.batch.len()) {
                    if shape[own] > 1 {
                        found += coordinate * stride;
                    }
                    stride *= shape[own];
                }
            }
            found
        })
    }
}

fn on_cpu(
    a: &Tensor,
    b: &Tensor,
    sizes: Sizes,
    pairs: &Pairs,
    shape: &[usize],
    monitor: &Monitor<'_>,
) -> Result<Tensor> {
    let Sizes { m, k, n, .. } = sizes;
    let step = (BLOCK / (k * n).max(1)).max(64);
    // Rows of a transposed matrix are no run of memory.
    let turned;
    let (a, transpose_a) = match sizes.transpose_a && step < m {
        true => {
            turned = a.transpose(a.rank() - 2, a.rank() - 1)?.contiguous()?;
            (&turned, false)
        }
        false => (a, sizes.transpose_a),
    };
    let (left, right) = (CpuSlice::new(a)?, CpuSlice::new(b)?);
    let total = shape.iter().product();
    let mut out = vec![0.0f32; total];
    for batch in 0..total / (m * n).max(1) {
        let [first, second] = pairs.of(batch);
        let b = match sizes.transpose_b {
            true => matrix(&right, b.dtype(), second * k * n, [n, k])?.transpose(),
            false => matrix(&right, b.dtype(), second * k * n, [k, n])?,
        };
        let step = if transpose_a { m } else { step };
        for start in (0..m).step_by(step.max(1)) {
            let end = m.min(start + step);
            let a = match transpose_a {
                true => matrix(&left, a.dtype(), first * m * k, [k, m])?.transpose(),
                false => matrix(&left, a.dtype(), (first * m + start) * k, [end - start, k])?,
            };
            let range = (batch * m + start) * n..(batch * m + end) * n;
            matmul_widened(a, b, false, &mut out[range.clone()]);
            monitor.advance(range.end, total)?;
        }
    }
    narrowed(out, shape, a.dtype())
}

/// A matrix that begins at element `start`.
fn matrix<'a>(
    slice: &'a CpuSlice<'_>,
    dtype: DType,
    start: usize,
    [rows, columns]: [usize; 2],
) -> Result<MatrixRef<'a>> {
    let range = start..start + rows * columns;
    Ok(match dtype {
        DType::F16 => MatrixRef::f16(&slice.elements::<f16>()?[range], rows, columns),
        DType::BF16 => MatrixRef::bf16(&slice.elements::<bf16>()?[range], rows, columns),
        _ => MatrixRef::new(&slice.f32()?[range], rows, columns),
    })
}

fn elsewhere(a: &Tensor, b: &Tensor, sizes: Sizes, shape: &[usize]) -> Result<Tensor> {
    let turn = |x: &Tensor, transposed: bool| match transposed {
        true => x.transpose(x.rank() - 2, x.rank() - 1)?.contiguous(),
        false => Ok(x.clone()),
    };
    if sizes.k == 0 {
        return Ok(Tensor::zeros(shape, a.dtype(), a.device())?);
    }
    Ok(turn(a, sizes.transpose_a)?.broadcast_matmul(&turn(b, sizes.transpose_b)?)?)
}
