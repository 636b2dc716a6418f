//! Products of training with the matrices of experts, on rows that are grouped by expert.

use candle_core::{DType, Device, Tensor};
use candle_kernels_cpu::{MatmulGroup, MatrixRef, matmul_groups};

use super::add_in_place;
use crate::decoder::RemoteExperts;
use crate::error::Result;
use crate::ops::experts::{RowsOf, split_rows};
use crate::ops::half::widened;
use crate::ops::storage::{CpuSlice, is_cpu, with_mut_slice};

/// The same matrix of all experts, and where its gradient is added up.
#[derive(Clone, Copy)]
pub(crate) struct ExpertMatrix<'a> {
    /// The experts' matrices one after another, `[experts' rows, in]`, f32 or in half precision.
    pub(crate) weight: &'a Tensor,
    /// The rows of each expert, ascending.
    pub(crate) rows: RowsOf<'a>,
    /// Like `weight`, f32; none for a frozen matrix.
    pub(crate) dweight: Option<&'a Tensor>,
    /// Where the rows of each expert begin in what it is multiplied with, and where the last's end, `[experts + 1]`.
    pub(crate) bounds: &'a [usize],
    /// Who computes experts that are left out here: their rows of results are 0.
    pub(crate) elsewhere: Option<&'a dyn RemoteExperts>,
}

impl ExpertMatrix<'_> {
    /// Rows of the products with it.
    fn outputs(&self) -> usize {
        (self.rows)(0).len()
    }

    /// Whether an expert is computed here.
    fn is_here(&self, expert: usize) -> bool {
        !self.elsewhere.is_some_and(|servers| servers.holds(expert))
    }

    /// Experts that are computed here and have rows, with where these are.
    fn busy(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let bounds = self.bounds.windows(2).enumerate();
        bounds
            .map(|(expert, bounds)| (expert, bounds[0], bounds[1]))
            .filter(|(expert, start, end)| start < end && self.is_here(*expert))
    }

    /// The rows `a` of each expert that is computed here times what `b` gives for it, into its rows of `out`, which are
    /// `width` wide.
    fn products<'a>(
        &self,
        a: MatrixRef<'a>,
        b: impl Fn(usize) -> MatrixRef<'a>,
        out: &'a mut [f32],
        width: usize,
    ) -> Vec<MatmulGroup<'a>> {
        let parts = split_rows(out, self.bounds, width).into_iter().enumerate();
        let here = parts.filter(|(expert, out)| !out.is_empty() && self.is_here(*expert));
        let product = |(expert, out)| MatmulGroup {
            a: a.part(self.bounds[expert]..self.bounds[expert + 1]),
            b: b(expert),
            out,
        };
        here.map(product).collect()
    }
}

/// `x` `[rows, in]`, of the matrix' type, times the expert of each row: `[rows, out]` f32.
pub(crate) fn experts_forward(matrix: ExpertMatrix<'_>, x: &Tensor) -> Result<Tensor> {
    let (rows, inputs) = x.dims2()?;
    let outputs = matrix.outputs();
    if !is_cpu(x) {
        let y = Tensor::zeros((rows, outputs), DType::F32, x.device())?;
        for (expert, start, end) in matrix.busy() {
            let part = (matrix.rows)(expert);
            let weight = widened(&matrix.weight.narrow(0, part.start, part.len())?)?;
            let product = widened(&x.narrow(0, start, end - start)?)?.matmul(&weight.t()?)?;
            y.slice_set(&product, 0, start)?;
        }
        return Ok(y);
    }
    let (x, weight) = (CpuSlice::new(x)?, CpuSlice::new(matrix.weight)?);
    let x = x.matrix(rows, inputs)?;
    let weight = weight.matrix(matrix.weight.dims2()?.0, inputs)?;
    let mut y = vec![0.0; rows * outputs];
    let of_expert = |expert| weight.part((matrix.rows)(expert)).transpose();
    matmul_groups(matrix.products(x, of_expert, &mut y, outputs), false);
    Ok(Tensor::from_vec(y, (rows, outputs), &Device::Cpu)?)
}

/// The gradient `dy` `[rows, out]` of [`experts_forward`]'s result, of the matrix' type: adds the gradient of the matrices,
/// for which `x` is the input `[rows, in]`, and returns that of the input, f32, added to `dx` in place if given.
pub(crate) fn experts_backward(
    matrix: ExpertMatrix<'_>,
    x: &Tensor,
    dy: &Tensor,
    dx: Option<Tensor>,
) -> Result<Tensor> {
    let (rows, outputs) = dy.dims2()?;
    let inputs = matrix.weight.dims2()?.1;
    let dx = match dx {
        Some(dx) => dx,
        None => Tensor::zeros((rows, inputs), DType::F32, dy.device())?,
    };
    if !is_cpu(dy) {
        return elsewhere(matrix, x, dy, dx);
    }
    let (x, dy, weight) = (CpuSlice::new(x)?, CpuSlice::new(dy)?, CpuSlice::new(matrix.weight)?);
    let dy = dy.matrix(rows, outputs)?;
    if let Some(sum) = matrix.dweight {
        let x = x.matrix(rows, inputs)?;
        with_mut_slice(sum, |sum| add_weight_gradients(matrix, x, dy, sum))?;
    }
    let weight = weight.matrix(matrix.weight.dims2()?.0, inputs)?;
    with_mut_slice(&dx, |dx| {
        let of_expert = |expert| weight.part((matrix.rows)(expert));
        matmul_groups(matrix.products(dy, of_expert, dx, inputs), true);
    })?;
    Ok(dx)
}

/// Adds `dy^T x` of each expert's rows to its part of `sum`.
fn add_weight_gradients(matrix: ExpertMatrix<'_>, x: MatrixRef<'_>, dy: MatrixRef<'_>, mut sum: &mut [f32]) {
    let inputs = matrix.weight.dims()[1];
    let mut groups = vec![];
    let mut taken = 0;
    for (expert, start, end) in matrix.busy() {
        let part = (matrix.rows)(expert);
        // The rows of an expert follow those of the one before, perhaps with others between.
        let before = sum.split_off_mut(..(part.start - taken) * inputs);
        debug_assert!(before.is_some());
        let Some(out) = sum.split_off_mut(..part.len() * inputs) else {
            break;
        };
        taken = part.end;
        groups.push(MatmulGroup {
            a: dy.part(start..end).transpose(),
            b: x.part(start..end),
            out,
        });
    }
    matmul_groups(groups, true);
}

fn elsewhere(matrix: ExpertMatrix<'_>, x: &Tensor, dy: &Tensor, dx: Tensor) -> Result<Tensor> {
    for (expert, start, end) in matrix.busy() {
        let part = (matrix.rows)(expert);
        let dy = widened(&dy.narrow(0, start, end - start)?)?;
        if let Some(sum) = matrix.dweight {
            let x = widened(&x.narrow(0, start, end - start)?)?;
            add_in_place(&sum.narrow(0, part.start, part.len())?, &dy.t()?.matmul(&x)?)?;
        }
        let weight = widened(&matrix.weight.narrow(0, part.start, part.len())?)?;
        add_in_place(&dx.narrow(0, start, end - start)?, &dy.matmul(&weight)?)?;
    }
    Ok(dx)
}
