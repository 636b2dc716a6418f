//! Backward of the feed-forward network's nonlinearities.

use candle_core::{Device, Tensor};
use candle_kernels_cpu::{gelu_erf_backward, gelu_tanh_backward, silu_backward, silu_gate_backward};

use super::composed;
use crate::config::Activation;
use crate::error::Result;
use crate::ops::storage::{CpuSlice, is_cpu};

/// The gradients of `gate` (if there is one) and `up` from the gradient `dy` of `activation(up)` or
/// `activation(gate) * up`; all of one shape.
pub(crate) fn activate_backward(
    activation: Activation,
    gate: Option<&Tensor>,
    up: &Tensor,
    dy: &Tensor,
) -> Result<(Option<Tensor>, Tensor)> {
    match (gate, activation) {
        (None, _) if is_cpu(up) => Ok((None, plain_on_cpu(activation, up, dy)?)),
        (None, _) => Ok((None, composed::activation(activation, up, dy)?)),
        (Some(gate), Activation::Silu) if is_cpu(up) => {
            let (dgate, dup) = silu_gate_on_cpu(gate, up, dy)?;
            Ok((Some(dgate), dup))
        }
        (Some(gate), _) => {
            let (dgate, dup) = composed::gate(activation, gate, up, dy)?;
            Ok((Some(dgate), dup))
        }
    }
}

fn plain_on_cpu(activation: Activation, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let shape = x.shape().clone();
    let mut dx = vec![0.0; x.elem_count()];
    let (x, dy) = (CpuSlice::new(x)?, CpuSlice::new(dy)?);
    let kernel = match activation {
        Activation::GeluTanh => gelu_tanh_backward,
        Activation::GeluErf => gelu_erf_backward,
        Activation::Silu => silu_backward,
    };
    kernel(dy.f32()?, x.f32()?, &mut dx);
    Ok(Tensor::from_vec(dx, shape, &Device::Cpu)?)
}

fn silu_gate_on_cpu(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let shape = up.shape().clone();
    let (mut dgate, mut dup) = (vec![0.0; up.elem_count()], vec![0.0; up.elem_count()]);
    let (gate, up, dy) = (CpuSlice::new(gate)?, CpuSlice::new(up)?, CpuSlice::new(dy)?);
    silu_gate_backward(dy.f32()?, gate.f32()?, up.f32()?, &mut dgate, &mut dup);
    let dgate = Tensor::from_vec(dgate, &shape, &Device::Cpu)?;
    Ok((dgate, Tensor::from_vec(dup, &shape, &Device::Cpu)?))
}
