//! Rotary positions (arXiv:2104.09864): the two halves of a head are the components of its pairs.

use super::storage::{CpuSlice, is_cpu, with_mut_slice};
use crate::error::Result;
use candle_core::{D, Device, Tensor};
use candle_kernels_cpu::{RotaryLayout, RotaryTable};

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

/// Rotates every head of `x` `[rows, heads * head_dim]` by its row's angles, in place where the device allows it.
pub fn rotate(x: Tensor, angles: &RotaryAngles, head_dim: usize) -> Result<Tensor> {
    if !is_cpu(&x) {
        return composed(&x, angles, head_dim);
    }
    let (cosines, sines) = (CpuSlice::new(&angles.cosines)?, CpuSlice::new(&angles.sines)?);
    let table = RotaryTable {
        cos: cosines.f32()?,
        sin: sines.f32()?,
        rotary_dim: head_dim,
    };
    // The table is that of the rows, not of all positions.
    let rows: Vec<u32> = (0..x.dim(0)? as u32).collect();
    with_mut_slice(&x, |x| {
        candle_kernels_cpu::rotary(x, head_dim, &rows, table, RotaryLayout::HalfSplit, false)
    })?;
    Ok(x)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_util::{assert_close, noise};

    #[test]
    fn rotation_equals_the_composition_and_keeps_lengths() {
        let frequencies = [1.0, 0.3, 0.01];
        let angles = RotaryAngles::new(&frequencies, &[0, 7, 3, 1000], &Device::Cpu)
            .unwrap()
            .unwrap();
        let x = noise(&[4, 12], 1);
        let expected = composed(&x, &angles, 6).unwrap();
        let found = rotate(x.copy().unwrap(), &angles, 6).unwrap();
        assert_close(&found, &expected, 1e-6);
        assert_close(&found.narrow(0, 0, 1).unwrap(), &x.narrow(0, 0, 1).unwrap(), 1e-6);
        assert_close(
            &found.sqr().unwrap().sum(1).unwrap(),
            &x.sqr().unwrap().sum(1).unwrap(),
            1e-4,
        );
    }
}
