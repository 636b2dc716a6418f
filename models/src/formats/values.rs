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

/// Reads a dense tensor and refuses values that are not finite.
pub(super) fn read_dense(
    file: &File,
    path: &Path,
    name: &str,
    dtype: DType,
    shape: &[usize],
    range: ByteRange,
) -> Result<Tensor> {
    match dtype {
        DType::F16 => dense(
            read_values::<f16>(file, path, range)?,
            f16::is_finite,
            path,
            name,
            shape,
        ),
        DType::BF16 => dense(
            read_values::<bf16>(file, path, range)?,
            bf16::is_finite,
            path,
            name,
            shape,
        ),
        _ => dense(
            read_values::<f32>(file, path, range)?,
            f32::is_finite,
            path,
            name,
            shape,
        ),
    }
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
