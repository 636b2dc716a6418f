//! Rotary positions (arXiv:2104.09864): the two halves of a head are the components of its pairs.

use crate::error::Result;
use candle_core::{D, Device, Tensor};

/// Cosines and sines of a batch's rows, each `[rows, head_dim / 2]` f32.
#[derive(Debug, Clone)]
pub struct RotaryAngles {
    /// Cosines.
    pub cosines: Tensor,
    /// Sines.
    pub sines: Tensor,
}

impl RotaryAngles {
    /// The angles of rows at `positions`; `None` without frequencies, which means without rotation.
    pub fn new(inverse_frequencies: &[f32], positions: &[u32], device: &Device) -> Result<Option<Self>> {
        if inverse_frequencies.is_empty() {
            return Ok(None);
        }
        let shape = (positions.len(), inverse_frequencies.len());
        let angles = positions.iter().flat_map(|position| {
            inverse_frequencies
                .iter()
                .map(move |frequency| *position as f32 * frequency)
        });
        let (sines, cosines): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
        let cosines = Tensor::from_vec(cosines, shape, device)?;
        let sines = Tensor::from_vec(sines, shape, device)?;
        Ok(Some(Self { cosines, sines }))
    }
}

/// Rotates every head of `x` `[rows, heads * head_dim]` by its row's angles.
pub fn rotate(x: &Tensor, angles: &RotaryAngles, head_dim: usize) -> Result<Tensor> {
    composed(x, angles, head_dim)
}

/// [`rotate`] from plain candle operations: for devices without kernels of our own, and the tests' oracle.
pub fn composed(x: &Tensor, angles: &RotaryAngles, head_dim: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let half = head_dim / 2;
    let heads = x.reshape((rows, width / head_dim, head_dim))?;
    let (first, second) = (heads.narrow(D::Minus1, 0, half)?, heads.narrow(D::Minus1, half, half)?);
    let (cosines, sines) = (angles.cosines.unsqueeze(1)?, angles.sines.unsqueeze(1)?);
    let rotated_first = (first.broadcast_mul(&cosines)? - second.broadcast_mul(&sines)?)?;
    let rotated_second = (second.broadcast_mul(&cosines)? + first.broadcast_mul(&sines)?)?;
    Ok(Tensor::cat(&[rotated_first, rotated_second], D::Minus1)?.reshape((rows, width))?)
}
