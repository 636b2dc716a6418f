//! Log-probabilities of given tokens under the head, without keeping the logits.

use super::linear;
use super::storage::{CpuSlice, is_cpu};
use super::weights::KernelWeight;
use crate::decoder::Weight;
use crate::error::Result;
use candle_core::{D, Tensor};

/// `log softmax(hidden head^T + bias)[target]` for every row of `hidden` `[rows, width]` and its target; `head` is
/// `[vocabulary, width]`, `bias` `[vocabulary]`. Natural logarithms. The targets must be below the vocabulary's size.
pub fn log_probabilities(hidden: &Tensor, head: &Weight, bias: Option<&Tensor>, targets: &[u32]) -> Result<Vec<f32>> {
    match KernelWeight::new(head)? {
        Some(matrix) if is_cpu(hidden) => {
            let targets: Vec<i64> = targets.iter().map(|target| i64::from(*target)).collect();
            let mut values = vec![0.0; targets.len()];
            let rows = CpuSlice::new(hidden)?;
            let vocabulary = head.dims().first().copied().unwrap_or(0);
            let bias = bias.map(CpuSlice::new).transpose()?;
            let bias = bias.as_ref().map(CpuSlice::f32).transpose()?;
            let matrix = matrix.rows(0..vocabulary)?;
            candle_kernels_cpu::log_probabilities(rows.f32()?, matrix, bias, &targets, &mut values);
            Ok(values)
        }
        _ => composed(hidden, head, bias, targets),
    }
}

/// [`log_probabilities`] from plain candle operations: for devices without kernels of our own, and the tests' oracle.
pub fn composed(hidden: &Tensor, head: &Weight, bias: Option<&Tensor>, targets: &[u32]) -> Result<Vec<f32>> {
    let vocabulary = head.dims().first().copied().unwrap_or(0);
    let logits = linear::composed(hidden, head, 0..vocabulary, bias)?;
    let max = logits.max_keepdim(D::Minus1)?;
    let shifted = logits.broadcast_sub(&max)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let targets = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    Ok((shifted.gather(&targets, D::Minus1)? - log_sum)?
        .flatten_all()?
        .to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::WeightType;
    use crate::ops::test_util::{assert_close, noise};
    use candle_core::Device;

    #[test]
    fn dense_and_quantised_heads_equal_the_composition() {
        let hidden = noise(&[9, 32], 1);
        let targets = [0, 60, 3, 3, 17, 8, 59, 1, 44];
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, 9, &Device::Cpu).unwrap();
        for name in ["f32", "bf16", "q8_0"] {
            let head = Weight::Dense(noise(&[61, 32], 2))
                .convert("head", WeightType::from_name(name).unwrap())
                .unwrap();
            let bias = noise(&[61], 3);
            for bias in [None, Some(&bias)] {
                let found = log_probabilities(&hidden, &head, bias, &targets).unwrap();
                let expected = composed(&hidden, &head, bias, &targets).unwrap();
                assert_close(&tensor(found), &tensor(expected), 1e-4);
            }
        }
    }
}
