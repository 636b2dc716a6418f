//! Bytes of a file to tensors, with a look at every value.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytemuck::Pod;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};

use super::files::{invalid, io_error};
use crate::error::Result;

/// Where a tensor's bytes lie in a file whose length has been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub(super) start: u64,
    pub(super) length: usize,
}

/// A floating-point type of stored weights, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FloatType {
    F16,
    Bf16,
    F32,
    /// Becomes f32 when it is read.
    F64,
}

impl FloatType {
    /// Bytes of an element.
    pub(super) fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// Bytes of the elements of a shape; `None` if there are impossibly many.
pub(super) fn byte_length(shape: &[usize], element_bytes: usize) -> Option<u64> {
    let bytes = shape
        .iter()
        .try_fold(element_bytes as u64, |product, &size| product.checked_mul(size as u64))?;
    (bytes < 1 << 48).then_some(bytes)
}

/// Reads a dense tensor and refuses values that are not finite.
pub(super) fn read_dense(
    file: &File,
    path: &Path,
    name: &str,
    dtype: DType,
    shape: &[usize],
    range: ByteRange,
) -> Result<Tensor> {
    let kind = match dtype {
        DType::F16 => FloatType::F16,
        DType::BF16 => FloatType::Bf16,
        _ => FloatType::F32,
    };
    read_floats(kind, shape, path, name, |buffer| {
        file.read_exact_at(buffer, range.start)
            .map_err(|error| io_error(path, error))
    })
}

/// A tensor whose bytes, little-endian and row-major, `fill` provides; refuses values that are not finite as f32, or as
/// the half type that they are stored in.
pub(super) fn read_floats(
    kind: FloatType,
    shape: &[usize],
    path: &Path,
    name: &str,
    fill: impl FnOnce(&mut [u8]) -> Result<()>,
) -> Result<Tensor> {
    let elements = shape.iter().product();
    match kind {
        FloatType::F16 => dense(filled::<f16>(elements, fill)?, f16::is_finite, path, name, shape),
        FloatType::Bf16 => dense(filled::<bf16>(elements, fill)?, bf16::is_finite, path, name, shape),
        FloatType::F32 => dense(filled::<f32>(elements, fill)?, f32::is_finite, path, name, shape),
        FloatType::F64 => {
            let values = filled::<f64>(elements, fill)?.into_iter().map(|value| value as f32);
            dense(values.collect(), f32::is_finite, path, name, shape)
        }
    }
}

/// Numbers in their own memory. Files are little-endian, and so is every machine candle runs on.
fn filled<T: Pod>(elements: usize, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<Vec<T>> {
    let mut values = vec![T::zeroed(); elements];
    fill(bytemuck::cast_slice_mut(&mut values))?;
    Ok(values)
}

fn dense<T: WithDType>(
    values: Vec<T>,
    is_finite: impl Fn(T) -> bool,
    path: &Path,
    name: &str,
    shape: &[usize],
) -> Result<Tensor> {
    if let Some(index) = values.iter().position(|&value| !is_finite(value)) {
        return Err(not_finite(path, name, index));
    }
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// The error for a weight that is NaN or infinite; `index` counts elements in storage order.
pub(super) fn not_finite(path: &Path, name: &str, index: usize) -> crate::error::Error {
    invalid(
        path,
        format!("tensor {name} holds NaN or infinity at element {index}: the weights are damaged"),
    )
}

/// Reads numbers straight into their own memory. Files are little-endian, and so is every machine candle runs on.
pub(super) fn read_values<T: Pod>(file: &File, path: &Path, range: ByteRange) -> Result<Vec<T>> {
    let mut values = vec![T::zeroed(); range.length / size_of::<T>()];
    file.read_exact_at(bytemuck::cast_slice_mut(&mut values), range.start)
        .map_err(|error| io_error(path, error))?;
    Ok(values)
}
