//! Nonlinearities of the feed-forward network.

use super::storage::{CpuSlice, is_cpu, new_tensor};
use crate::config::Activation;
use crate::error::Result;
use candle_core::Tensor;

/// Applies the activation to every element.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if !is_cpu(x) {
        return composed(x, activation);
    }
    let input = CpuSlice::new(x)?;
    new_tensor(x.shape(), |out| {
        match activation {
            Activation::GeluTanh => candle_kernels_cpu::gelu_tanh(input.f32()?, out),
            Activation::GeluErf => candle_kernels_cpu::gelu_erf(input.f32()?, out),
            Activation::Silu => candle_kernels_cpu::silu(input.f32()?, out),
        }
        Ok(())
    })
}

/// `activation(gate) * up`, elementwise; both of one shape (GLU variants, arXiv:2002.05202).
pub fn gate(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if !is_cpu(gate) || activation != Activation::Silu {
        return Ok((activate(gate, activation)? * up)?);
    }
    let (gate_values, up_values) = (CpuSlice::new(gate)?, CpuSlice::new(up)?);
    new_tensor(gate.shape(), |out| {
        candle_kernels_cpu::silu_gate(gate_values.f32()?, up_values.f32()?, out);
        Ok(())
    })
}

/// [`activate`] from plain candle operations: for devices without kernels of our own, and the tests' oracle.
pub fn composed(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::GeluTanh => Ok(x.gelu()?),
        Activation::GeluErf => Ok(x.gelu_erf()?),
        Activation::Silu => Ok(x.silu()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_util::{assert_close, noise};

    #[test]
    fn activations_equal_the_composition() {
        let (x, up) = ((noise(&[5, 37], 1) * 3.0).unwrap(), noise(&[5, 37], 2));
        for activation in [Activation::GeluTanh, Activation::GeluErf, Activation::Silu] {
            let oracle = composed(&x, activation).unwrap();
            assert_close(&activate(&x, activation).unwrap(), &oracle, 1e-5);
            assert_close(&gate(&x, &up, activation).unwrap(), &(oracle * &up).unwrap(), 1e-5);
        }
    }
}
