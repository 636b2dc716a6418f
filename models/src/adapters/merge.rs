//! Adding an adapter to the weights of its base.

use candle_core::{DType, Tensor};
use candle_kernels_cpu::{MatrixRef, matmul};

use crate::decoder::{Decoder, LowRank, ParameterId, Weight};
use crate::error::{Error, Result};
use crate::ops::backward::add_in_place;
use crate::ops::storage::{CpuSlice, is_cpu, with_mut_slice};

/// What an adapter adds to the matrices of its base: a copy of its factors, apart from both.
pub struct Delta {
    /// Each matrix with `scale * B` `[out, rank]` and `A` `[rank, in]`.
    products: Vec<(ParameterId, Tensor, Tensor)>,
}

/// One matrix's part of a [`Delta`]: elements in row-major order, f32.
#[derive(Clone, Debug, PartialEq)]
pub struct ProductData {
    /// Number of the matrix among the base's parameters.
    pub parameter: usize,
    /// Columns of `b` and rows of `a`.
    pub rank: usize,
    /// `scale * B`, `[out, rank]`.
    pub b: Vec<f32>,
    /// `A`, `[rank, in]`.
    pub a: Vec<f32>,
}

impl Delta {
    /// What the adapter of an adapted decoder adds now.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] when it has been merged already; [`Error::Candle`].
    pub fn of(adapted: &Decoder) -> Result<Self> {
        if adapted.is_merged() {
            return Err(Error::FailedPrecondition(
                "the adapter has been merged into its base already".into(),
            ));
        }
        let product = |(matrix, low_rank): &(ParameterId, LowRank)| -> Result<_> {
            let b = (adapted.weight(low_rank.b).as_f32()? * f64::from(low_rank.scale))?;
            Ok((*matrix, b, adapted.weight(low_rank.a).as_f32()?.copy()?))
        };
        Ok(Self {
            products: adapted.adapted_modules().iter().map(product).collect::<Result<_>>()?,
        })
    }

    /// The factors as plain data, so that a log can keep them exactly.
    ///
    /// # Errors
    /// [`Error::Candle`].
    pub fn to_data(&self) -> Result<Vec<ProductData>> {
        let data = |(matrix, b, a): &(ParameterId, Tensor, Tensor)| {
            Ok(ProductData {
                parameter: matrix.0,
                rank: a.dim(0)?,
                b: b.flatten_all()?.to_vec1()?,
                a: a.flatten_all()?.to_vec1()?,
            })
        };
        self.products.iter().map(data).collect()
    }

    /// What [`to_data`](Self::to_data) was called on, for a base of the same shape.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the data is of another model.
    pub fn from_data(base: &Decoder, data: Vec<ProductData>) -> Result<Self> {
        let product = |data: ProductData| -> Result<_> {
            let misfit = || Error::InvalidArgument("the adapter's product is of another model".into());
            let info = base.parameters().get(data.parameter).ok_or_else(misfit)?;
            let [rows, columns] = *info.held_shape() else {
                return Err(misfit());
            };
            if (data.b.len(), data.a.len()) != (rows * data.rank, data.rank * columns) {
                return Err(misfit());
            }
            let b = Tensor::from_vec(data.b, (rows, data.rank), base.device())?;
            let a = Tensor::from_vec(data.a, (data.rank, columns), base.device())?;
            Ok((ParameterId(data.parameter), b, a))
        };
        Ok(Self {
            products: data.into_iter().map(product).collect::<Result<_>>()?,
        })
    }

    /// Bytes that the copy takes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let elements = |(_, b, a): &(ParameterId, Tensor, Tensor)| (b.elem_count() + a.elem_count()) as u64;
        4 * self.products.iter().map(elements).sum::<u64>()
    }

    /// Refuses a base that cannot take it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when one of the matrices is quantised: rounding the sum to a few bits would lose most of
    /// what was learnt.
    pub fn check(&self, base: &Decoder) -> Result<()> {
        for (matrix, ..) in &self.products {
            if let Weight::Quantized(_) = base.weight(*matrix) {
                let info = &base.parameters()[matrix.0];
                return Err(Error::Unsupported(format!(
                    "parameter `{}` is held as {} and an adapter cannot be merged into it; load the model with dtype f32",
                    info.name, info.dtype
                )));
            }
        }
        Ok(())
    }

    /// Adds it. f32 weights are changed in place: clones that share their storage see the change. bf16 and f16 ones keep
    /// their type, to which the sum is rounded.
    ///
    /// # Errors
    /// As [`check`](Self::check); nothing has changed then.
    pub fn apply(&self, base: &mut Decoder) -> Result<()> {
        self.check(base)?;
        for (matrix, b, a) in &self.products {
            let Weight::Dense(weight) = base.weight(*matrix) else {
                continue;
            };
            let dtype = weight.dtype();
            if dtype == DType::F32 {
                add_product(weight, b, a)?;
                continue;
            }
            let sum = weight.to_dtype(DType::F32)?;
            add_product(&sum, b, a)?;
            *base.weight_mut(*matrix) = Weight::Dense(sum.to_dtype(dtype)?);
        }
        Ok(())
    }
}

/// Adds `left right` to `sum` in place.
fn add_product(sum: &Tensor, left: &Tensor, right: &Tensor) -> Result<()> {
    if !is_cpu(sum) {
        return add_in_place(sum, &left.matmul(right)?);
    }
    let (rows, rank) = left.dims2()?;
    let columns = right.dim(1)?;
    let (left, right) = (CpuSlice::new(left)?, CpuSlice::new(right)?);
    let left = MatrixRef::new(left.f32()?, rows, rank);
    let right = MatrixRef::new(right.f32()?, rank, columns);
    with_mut_slice(sum, |sum| matmul(left, right, true, sum))
}
