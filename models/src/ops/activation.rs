//! Nonlinearities of the feed-forward network.

use crate::config::Activation;
use crate::error::Result;
use candle_core::Tensor;

/// Applies the activation to every element.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    composed(x, activation)
}

/// `activation(gate) * up`, elementwise; both of one shape (GLU variants, arXiv:2002.05202).
pub fn gate(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok((composed(gate, activation)? * up)?)
}

/// [`activate`] from plain candle operations: for devices without kernels of our own, and the tests' oracle.
pub fn composed(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::GeluTanh => Ok(x.gelu()?),
        Activation::GeluErf => Ok(x.gelu_erf()?),
        Activation::Silu => Ok(x.silu()?),
    }
}
