//! Rotary positions (arXiv:2104.09864): elements of a head are rotated in pairs.

use super::storage::{CpuSlice, is_cpu, with_mut_slice};
use crate::error::Result;
use candle_core::{D, Device, Tensor};
use candle_kernels_cpu::{RotaryLayout, RotaryTable};

/// Cosines and sines of a batch's rows, each `[rows, pairs]` f32. The first `2 * pairs` elements of a head are rotated.
#[derive(Debug, Clone)]
pub struct RotaryAngles {
    /// Cosines.
    pub cosines: Tensor,
    /// Sines.
    pub sines: Tensor,
    /// Which elements of a head form pairs.
    pub layout: RotaryLayout,
}

impl RotaryAngles {
    /// The angles of rows at `positions`; `None` without frequencies, which means without rotation.
    pub fn new(
        inverse_frequencies: &[f32],
        layout: RotaryLayout,
        positions: &[u32],
        device: &Device,
    ) -> Result<Option<Self>> {
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
        Ok(Some(Self {
            cosines: Tensor::from_vec(cosines, shape, device)?,
            sines: Tensor::from_vec(sines, shape, device)?,
            layout,
        }))
    }

    /// The angles that rotate back.
    pub fn opposite(&self) -> Result<Self> {
        Ok(Self {
            cosines: self.cosines.clone(),
            sines: self.sines.neg()?,
            layout: self.layout,
        })
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
        rotary_dim: 2 * angles.cosines.dim(1)?,
    };
    // The table is that of the rows, not of all positions.
    let rows: Vec<u32> = (0..x.dim(0)? as u32).collect();
    with_mut_slice(&x, |x| {
        candle_kernels_cpu::rotary(x, head_dim, &rows, table, angles.layout, false)
    })?;
    Ok(x)
}

/// [`rotate`] from plain candle operations: for devices without kernels of our own, and the tests' oracle.
pub fn composed(x: &Tensor, angles: &RotaryAngles, head_dim: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let pairs = angles.cosines.dim(1)?;
    let heads = width / head_dim;
    let x = x.reshape((rows, heads, head_dim))?;
    // [rows, heads, pairs, 2], the two of a pair last.
    let rotated = x.narrow(D::Minus1, 0, 2 * pairs)?;
    let rotated = match angles.layout {
        RotaryLayout::HalfSplit => rotated.reshape((rows, heads, 2, pairs))?.transpose(2, 3)?,
        RotaryLayout::Interleaved => rotated.reshape((rows, heads, pairs, 2))?,
    };
    let (first, second) = (rotated.narrow(3, 0, 1)?, rotated.narrow(3, 1, 1)?);
    let shape = (rows, 1, pairs, 1);
    let (cosines, sines) = (angles.cosines.reshape(shape)?, angles.sines.reshape(shape)?);
    let rotated_first = (first.broadcast_mul(&cosines)? - second.broadcast_mul(&sines)?)?;
    let rotated_second = (second.broadcast_mul(&cosines)? + first.broadcast_mul(&sines)?)?;
    let rotated = Tensor::cat(&[rotated_first, rotated_second], 3)?;
    let rotated = match angles.layout {
        RotaryLayout::HalfSplit => rotated.transpose(2, 3)?.contiguous()?,
        RotaryLayout::Interleaved => rotated,
    };
    let rotated = rotated.reshape((rows, heads, 2 * pairs))?;
    let rest = x.narrow(D::Minus1, 2 * pairs, head_dim - 2 * pairs)?;
    Ok(Tensor::cat(&[rotated, rest], D::Minus1)?.reshape((rows, width))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test_util::{assert_close, noise};

    #[test]
    fn rotation_equals_the_composition_and_keeps_lengths() {
        let frequencies = [1.0, 0.3, 0.01];
        for layout in [RotaryLayout::HalfSplit, RotaryLayout::Interleaved] {
            for head_dim in [6, 7, 12] {
                let angles = RotaryAngles::new(&frequencies, layout, &[0, 7, 3, 1000], &Device::Cpu);
                let angles = angles.unwrap().unwrap();
                let x = noise(&[4, 3 * head_dim], 1);
                let expected = composed(&x, &angles, head_dim).unwrap();
                let found = rotate(x.copy().unwrap(), &angles, head_dim).unwrap();
                assert_close(&found, &expected, 1e-6);
                assert_close(&found.narrow(0, 0, 1).unwrap(), &x.narrow(0, 0, 1).unwrap(), 1e-6);
                assert_close(
                    &found.sqr().unwrap().sum(1).unwrap(),
                    &x.sqr().unwrap().sum(1).unwrap(),
                    1e-4,
                );
                let back = rotate(found, &angles.opposite().unwrap(), head_dim).unwrap();
                assert_close(&back, &x, 1e-5);
            }
        }
    }
}
