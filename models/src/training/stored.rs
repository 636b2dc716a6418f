//! An activation as it is stored between the forward and the backward pass.

use candle_core::{DType, Device, Shape, Tensor};
use candle_kernels_cpu::{BLOCK_SIZE, dequantize_blocks, quantize_blocks};

use super::Compression;
use crate::error::Result;
use crate::ops::half::{rounded, widened};
use crate::ops::storage::{CpuSlice, new_tensor, with_slice};

/// An activation that waits for the backward pass.
pub(super) enum Stored {
    /// In a type of candle's.
    Plain(Tensor),
    /// As signed bytes in blocks.
    Blocks(Blocks),
}

/// Signed bytes with one scale a block, on the CPU, as [`quantize_blocks`] makes them.
pub(super) struct Blocks {
    codes: Vec<i8>,
    scales: Vec<f32>,
    shape: Shape,
    /// Where the tensor goes when it is wanted again.
    device: Device,
}

impl Stored {
    /// Stores `tensor`. `base`, of the same shape, is something near it that will be at hand when it is
    /// [restored](Self::restore).
    pub(super) fn new(tensor: Tensor, compression: Compression, base: Option<&Tensor>) -> Result<Self> {
        match compression {
            Compression::None => Ok(Self::Plain(tensor)),
            Compression::Bf16 => Ok(Self::Plain(rounded(&tensor, DType::BF16)?)),
            Compression::Q8 => Ok(Self::Blocks(Blocks::new(&widened(&tensor)?, base)?)),
        }
    }

    /// The f32 tensor again, to the rounding. `base` is what [`new`](Self::new) got.
    pub(super) fn restore(&self, base: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => widened(tensor),
            Self::Blocks(blocks) => blocks.restore(base),
        }
    }

    /// Name of the type.
    pub(super) fn dtype(&self) -> &'static str {
        match self {
            Self::Plain(tensor) => tensor.dtype().as_str(),
            Self::Blocks(_) => Compression::Q8.name(),
        }
    }

    /// Whether it is not as it was computed, in the type `computed`.
    pub(super) fn is_compressed(&self, computed: DType) -> bool {
        !matches!(self, Self::Plain(tensor) if tensor.dtype() == computed)
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> u64 {
        let bytes = match self {
            Self::Plain(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Blocks(blocks) => blocks.codes.len() + 4 * blocks.scales.len(),
        };
        bytes as u64
    }
}

impl Blocks {
    fn new(tensor: &Tensor, base: Option<&Tensor>) -> Result<Self> {
        let elements = tensor.elem_count();
        let (mut codes, mut scales) = (vec![0; elements], vec![0.0; elements.div_ceil(BLOCK_SIZE)]);
        let (values, base) = (tensor.to_device(&Device::Cpu)?, on_cpu(base)?);
        let base = base.as_ref().map(CpuSlice::new).transpose()?;
        let base = base.as_ref().map(CpuSlice::f32).transpose()?;
        with_slice(&values, |values| quantize_blocks(values, base, &mut codes, &mut scales))?;
        Ok(Self {
            codes,
            scales,
            shape: tensor.shape().clone(),
            device: tensor.device().clone(),
        })
    }

    fn restore(&self, base: Option<&Tensor>) -> Result<Tensor> {
        let base = on_cpu(base)?;
        let base = base.as_ref().map(CpuSlice::new).transpose()?;
        let base = base.as_ref().map(CpuSlice::f32).transpose()?;
        let restored = new_tensor(self.shape.clone(), |out| {
            dequantize_blocks(&self.codes, &self.scales, base, out);
            Ok(())
        })?;
        Ok(restored.to_device(&self.device)?)
    }
}

fn on_cpu(tensor: Option<&Tensor>) -> Result<Option<Tensor>> {
    Ok(tensor.map(|tensor| tensor.to_device(&Device::Cpu)).transpose()?)
}
