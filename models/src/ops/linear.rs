//! The linear map of a projection: `y = x W^T + b`.

use super::storage::{CpuSlice, is_cpu, new_tensor};
use super::weights::KernelWeight;
use crate::decoder::Weight;
use crate::error::Result;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Applies rows of `weight` `[out, in]`, and the same elements of `bias` `[out]`, to `x` `[rows, in]` f32.
/// Returns `[rows, range.len()]` f32. On the CPU a row's result does not depend on the other rows.
pub fn linear(x: &Tensor, weight: &Weight, range: Range<usize>, bias: Option<&Tensor>) -> Result<Tensor> {
    let bias = bias.map(|bias| bias.narrow(0, range.start, range.len())).transpose()?;
    match KernelWeight::new(weight)? {
        Some(matrix) if is_cpu(x) => fused(x, &matrix, range, bias.as_ref()),
        _ => composed(x, weight, range, bias.as_ref()),
    }
}

fn fused(x: &Tensor, matrix: &KernelWeight<'_>, range: Range<usize>, bias: Option<&Tensor>) -> Result<Tensor> {
    let (rows, _) = x.dims2()?;
    let bias = bias.map(CpuSlice::new).transpose()?;
    let bias = bias.as_ref().map(CpuSlice::f32).transpose()?;
    let x = CpuSlice::new(x)?;
    new_tensor((rows, range.len()), |out| {
        candle_kernels_cpu::linear(x.f32()?, matrix.rows(range)?, bias, out);
        Ok(())
    })
}

/// [`linear`] from plain candle operations: for devices without kernels of our own, and the tests' oracle. `bias` is
/// that of the rows alone.
pub fn composed(x: &Tensor, weight: &Weight, range: Range<usize>, bias: Option<&Tensor>) -> Result<Tensor> {
    let matrix = match weight {
        Weight::Dense(tensor) => tensor.narrow(0, range.start, range.len())?.to_dtype(DType::F32)?,
        Weight::Quantized(tensor) => tensor.dequantize(x.device())?.narrow(0, range.start, range.len())?,
    };
    let product = x.matmul(&matrix.t()?)?;
    match bias {
        Some(bias) => Ok(product.broadcast_add(bias)?),
        None => Ok(product),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::WeightType;
    use crate::ops::test_util::{assert_close, noise};

    #[test]
    fn every_type_and_row_range_equals_the_composition() {
        for kind in WeightType::REQUESTABLE {
            let weight = Weight::Dense(noise(&[21, 256], 1)).convert("weight", *kind).unwrap();
            let bias = noise(&[21], 2);
            for (rows, range, bias) in [(1, 0..21, None), (3, 5..12, Some(&bias)), (40, 20..21, Some(&bias))] {
                let x = noise(&[rows, 256], 3);
                let found = linear(&x, &weight, range.clone(), bias).unwrap();
                let bias = bias.map(|bias| bias.narrow(0, range.start, range.len()).unwrap());
                assert_close(&found, &composed(&x, &weight, range, bias.as_ref()).unwrap(), 2e-4);
            }
        }
    }
}
