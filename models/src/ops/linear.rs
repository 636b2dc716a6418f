//! The linear map of a projection: `y = x W^T + b`.

use super::storage::{CpuSlice, is_cpu, new_tensor};
use super::weights::KernelWeight;
use crate::decoder::Weight;
use crate::error::Result;
use candle_core::{DType, Tensor};
use candle_kernels_cpu::LinearLayer;
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

/// A projection of [`linear_each`].
#[derive(Debug, Clone)]
pub struct Part<'a> {
    /// The matrix `[out, in]`.
    pub weight: &'a Weight,
    /// Its rows that are applied.
    pub rows: Range<usize>,
    /// Added to the outputs, `[out]`.
    pub bias: Option<&'a Tensor>,
}

/// [`linear`] for several projections of the same `x` at once, which for a few rows is faster than one by one.
pub fn linear_each<const N: usize>(x: &Tensor, parts: [Part<'_>; N]) -> Result<[Tensor; N]> {
    let mut matrices = Vec::with_capacity(N);
    let mut biases = Vec::with_capacity(N);
    for part in &parts {
        matrices.push(KernelWeight::new(part.weight)?);
        let (start, length) = (part.rows.start, part.rows.len());
        biases.push(part.bias.map(|bias| bias.narrow(0, start, length)).transpose()?);
    }
    if !is_cpu(x) || matrices.iter().any(Option::is_none) {
        let mut outputs = Vec::with_capacity(N);
        for (part, bias) in parts.iter().zip(&biases) {
            outputs.push(composed(x, part.weight, part.rows.clone(), bias.as_ref())?);
        }
        return Ok(std::array::from_fn(|index| outputs[index].clone()));
    }
    let (rows, _) = x.dims2()?;
    let biases: Vec<_> = biases
        .iter()
        .map(|bias| bias.as_ref().map(CpuSlice::new).transpose())
        .collect::<Result<_>>()?;
    let mut outputs: Vec<_> = parts.iter().map(|part| vec![0.0f32; rows * part.rows.len()]).collect();
    let mut layers = Vec::with_capacity(N);
    for (((part, matrix), bias), out) in parts
        .iter()
        .zip(matrices.iter().flatten())
        .zip(&biases)
        .zip(&mut outputs)
    {
        layers.push(LinearLayer {
            weights: matrix.rows(part.rows.clone())?,
            bias: bias.as_ref().map(CpuSlice::f32).transpose()?,
            out,
        });
    }
    candle_kernels_cpu::linear_each(CpuSlice::new(x)?.f32()?, &mut layers);
    drop(layers);
    let mut tensors = Vec::with_capacity(N);
    for (part, out) in parts.iter().zip(outputs) {
        tensors.push(Tensor::from_vec(out, (rows, part.rows.len()), x.device())?);
    }
    Ok(std::array::from_fn(|index| tensors[index].clone()))
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

    #[test]
    fn projections_together_equal_each_alone() {
        let q4_0 = WeightType::from_name("q4_0").unwrap();
        let weights = [
            Weight::Dense(noise(&[21, 64], 1)).convert("weight", q4_0).unwrap(),
            Weight::Dense(noise(&[300, 64], 2)),
        ];
        let bias = noise(&[300], 3);
        for rows in [1, 3, 40] {
            let x = noise(&[rows, 64], 4);
            let part = |index: usize, rows: Range<usize>, bias| Part {
                weight: &weights[index],
                rows,
                bias,
            };
            let parts = [part(0, 0..21, None), part(1, 7..300, Some(&bias)), part(1, 3..4, None)];
            let together = linear_each(&x, parts.clone()).unwrap();
            for (found, Part { weight, rows, bias }) in together.iter().zip(parts) {
                let alone = linear(&x, weight, rows, bias).unwrap();
                assert_eq!(found.to_vec2::<f32>().unwrap(), alone.to_vec2::<f32>().unwrap());
            }
        }
    }
}
