//! Forward and backward of what an adapter adds to a projection: `y += scale * x A^T B^T`.

use std::ops::Range;

use candle_core::{Device, Tensor};
use candle_kernels_cpu::{Dropout, MatrixRef, matmul};

use super::{add_in_place, drop_in_place};
use crate::error::Result;
use crate::ops::storage::{CpuSlice, is_cpu, with_mut_slice};

/// The factors of a low-rank matrix, and where their gradients are added up.
pub(crate) struct LowRankFactors<'a> {
    /// `A`, `[rank, in]` f32.
    pub(crate) a: &'a Tensor,
    /// `B`, `[out, rank]` f32.
    pub(crate) b: &'a Tensor,
    /// The rows of `B` that make up the projection.
    pub(crate) rows: Range<usize>,
    /// Factor of the product.
    pub(crate) scale: f32,
    /// `[rank, in]`; none for a frozen factor.
    pub(crate) da: Option<&'a Tensor>,
    /// `[out, rank]`; none for a frozen factor.
    pub(crate) db: Option<&'a Tensor>,
    /// What is dropped of the input of `A`, and nowhere else; none if nothing is.
    pub(crate) dropout: Option<InputDropout<'a>>,
}

/// Dropout of the input `[tokens, in]` of a low-rank matrix.
pub(crate) struct InputDropout<'a> {
    /// The masks.
    pub(crate) masks: Dropout<'a>,
    /// Where each of the packed sequences begins, and where the last ends, `[sequences + 1]`.
    pub(crate) bounds: &'a [usize],
}

impl LowRankFactors<'_> {
    /// The projection's part of `B` or its gradient; shares storage.
    fn part(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.narrow(0, self.rows.start, self.rows.len())?)
    }

    /// What `A` reads of `x`: a copy where something is dropped.
    fn input(&self, x: &Tensor) -> Result<Tensor> {
        let Some(dropout) = &self.dropout else {
            return Ok(x.clone());
        };
        let x = x.copy()?;
        drop_in_place(&x, dropout.bounds, &dropout.masks)?;
        Ok(x)
    }

    /// `scale * x A^T`, `[tokens, rank]`.
    fn inner(&self, x: &Tensor) -> Result<Tensor> {
        Ok((product(x, self.a, true)? * f64::from(self.scale))?)
    }
}

/// Adds `scale * x A^T B[rows]^T` to `y` `[tokens, rows]` in place; `x` is `[tokens, in]`.
pub(crate) fn low_rank_forward(factors: &LowRankFactors<'_>, x: &Tensor, y: &Tensor) -> Result<()> {
    let inner = factors.inner(&factors.input(x)?)?;
    add_product(y, &inner, &factors.part(factors.b)?, [false, true])
}

/// From `x` `[tokens, in]` and the gradient `dy` `[tokens, rows]` of the output: adds the gradients of the factors, and
/// that of `x` to `dx` in place.
pub(crate) fn low_rank_backward(factors: &LowRankFactors<'_>, x: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> {
    let x = factors.input(x)?;
    if let Some(sum) = factors.db {
        add_product(&factors.part(sum)?, dy, &factors.inner(&x)?, [true, false])?;
    }
    let dinner = (product(dy, &factors.part(factors.b)?, false)? * f64::from(factors.scale))?;
    if let Some(sum) = factors.da {
        add_product(sum, &dinner, &x, [true, false])?;
    }
    let Some(dropout) = &factors.dropout else {
        return add_product(dx, &dinner, factors.a, [false, false]);
    };
    // Only the adapter's way back is dropped; `dx` has the matrix' already.
    let own = product(&dinner, factors.a, false)?;
    drop_in_place(&own, dropout.bounds, &dropout.masks)?;
    add_in_place(dx, &own)
}

/// `left right`, or `left right^T`.
fn product(left: &Tensor, right: &Tensor, transposed: bool) -> Result<Tensor> {
    if !is_cpu(left) {
        return Ok(if transposed {
            left.matmul(&right.t()?)?
        } else {
            left.matmul(right)?
        });
    }
    let (rows, columns) = (left.dim(0)?, right.dim(if transposed { 0 } else { 1 })?);
    let out = Tensor::zeros((rows, columns), candle_core::DType::F32, &Device::Cpu)?;
    add_product(&out, left, right, [false, transposed])?;
    Ok(out)
}

/// Adds the product of two matrices, each transposed first where `transposed` says, to `out` in place.
fn add_product(out: &Tensor, left: &Tensor, right: &Tensor, transposed: [bool; 2]) -> Result<()> {
    if !is_cpu(left) {
        let turned = |tensor: &Tensor, turn| if turn { tensor.t() } else { Ok(tensor.clone()) };
        let product = turned(left, transposed[0])?.matmul(&turned(right, transposed[1])?)?;
        return add_in_place(out, &product);
    }
    let (left_shape, right_shape) = (left.dims2()?, right.dims2()?);
    let (left, right) = (CpuSlice::new(left)?, CpuSlice::new(right)?);
    let mut left = MatrixRef::new(left.f32()?, left_shape.0, left_shape.1);
    let mut right = MatrixRef::new(right.f32()?, right_shape.0, right_shape.1);
    for (matrix, turn) in [&mut left, &mut right].into_iter().zip(transposed) {
        if turn {
            *matrix = matrix.transpose();
        }
    }
    with_mut_slice(out, |out| {
        matmul(left, right, true, out);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_util::{assert_close, noise};

    /// Central differences of the sum of `weights * y` by every element.
    fn check_gradients(probability: f64) {
        let dropout = || {
            let masks = Dropout {
                probability,
                key: 3,
                site: 1,
                sequences: &[0, 4],
            };
            (probability > 0.0).then_some(InputDropout {
                masks,
                bounds: &[0, 1, 3],
            })
        };
        let (a, b, x) = (noise(&[2, 5], 1), noise(&[7, 2], 2), noise(&[3, 5], 3));
        let dy = noise(&[3, 4], 4);
        let (da, db) = (a.zeros_like().unwrap(), b.zeros_like().unwrap());
        let rows = 2..6;
        let factors = LowRankFactors {
            a: &a,
            b: &b,
            rows: rows.clone(),
            scale: 1.5,
            da: Some(&da),
            db: Some(&db),
            dropout: dropout(),
        };
        let dx = x.ones_like().unwrap();
        low_rank_backward(&factors, &x, &dy, &dx).unwrap();
        let loss = |a: &Tensor, b: &Tensor, x: &Tensor| -> f64 {
            let factors = LowRankFactors {
                a,
                b,
                rows: rows.clone(),
                scale: 1.5,
                da: None,
                db: None,
                dropout: dropout(),
            };
            let y = dy.zeros_like().unwrap();
            low_rank_forward(&factors, x, &y).unwrap();
            let products = (y * &dy).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            products.iter().map(|product| f64::from(*product)).sum()
        };
        let numeric = |of: &Tensor, loss: &dyn Fn(&Tensor) -> f64| {
            let values = of.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let difference = |index: usize| {
                let moved = |by: f32| {
                    let mut values = values.clone();
                    values[index] += by;
                    loss(&Tensor::from_vec(values, of.shape(), &Device::Cpu).unwrap())
                };
                ((moved(0.05) - moved(-0.05)) / 0.1) as f32
            };
            let values: Vec<f32> = (0..values.len()).map(difference).collect();
            Tensor::from_vec(values, of.shape(), &Device::Cpu).unwrap()
        };
        assert_close(&da, &numeric(&a, &|a| loss(a, &b, &x)), 1e-3);
        assert_close(&db, &numeric(&b, &|b| loss(&a, b, &x)), 1e-3);
        let want = (numeric(&x, &|x| loss(&a, &b, x)) + 1.0).unwrap();
        assert_close(&dx, &want, 1e-3);
        let untouched = db.to_vec2::<f32>().unwrap();
        assert!(untouched[0].iter().chain(&untouched[6]).all(|element| *element == 0.0));
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        check_gradients(0.0);
    }

    /// The masks are the same in every evaluation of the loss.
    #[test]
    fn gradients_agree_with_finite_differences_where_inputs_are_dropped() {
        check_gradients(0.4);
    }
}
