//! What an adapter adds to a projection of inference.

use super::backward::add_in_place;
use super::linear::linear;
use crate::decoder::Weight;
use crate::error::Result;
use candle_core::Tensor;
use std::ops::Range;

/// Adds `scale * x A^T B[rows]^T` to `y` `[tokens, rows.len()]` in place; `x` is `[tokens, in]`, `a` `[rank, in]`, `b`
/// `[out, rank]`. On the CPU a row's result does not depend on the other rows.
pub fn add_low_rank(y: &Tensor, x: &Tensor, a: &Weight, b: &Weight, rows: Range<usize>, scale: f32) -> Result<()> {
    let rank = a.dims()[0];
    let inner = (linear(x, a, 0..rank, None)? * f64::from(scale))?;
    add_in_place(y, &linear(&inner, b, rows, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_util::{assert_close, noise};

    #[test]
    fn the_product_of_the_factors_is_added_and_rows_stand_alone() {
        let (a, b, x, y) = (
            noise(&[3, 20], 1),
            noise(&[9, 3], 2),
            noise(&[5, 20], 3),
            noise(&[5, 4], 4),
        );
        let product = b.narrow(0, 2, 4).unwrap().matmul(&a).unwrap();
        let want = (&y + (x.matmul(&product.t().unwrap()).unwrap() * 0.5).unwrap()).unwrap();
        let weights = (Weight::Dense(a), Weight::Dense(b));
        let all = y.copy().unwrap();
        add_low_rank(&all, &x, &weights.0, &weights.1, 2..6, 0.5).unwrap();
        assert_close(&all, &want, 1e-5);
        let one = y.narrow(0, 3, 1).unwrap().copy().unwrap();
        add_low_rank(
            &one,
            &x.narrow(0, 3, 1).unwrap().copy().unwrap(),
            &weights.0,
            &weights.1,
            2..6,
            0.5,
        )
        .unwrap();
        assert_eq!(one.to_vec2::<f32>().unwrap()[0], all.to_vec2::<f32>().unwrap()[3]);
    }
}
