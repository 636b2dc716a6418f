//! Weights as the kernels take them: bytes in a storage format.

use super::storage::CpuSlice;
use crate::decoder::{Weight, WeightType};
use crate::error::Result;
use candle_core::quantized::GgmlDType;
use candle_kernels_cpu::{WeightFormat, Weights};
use std::borrow::Cow;
use std::ops::Range;

/// A matrix on the CPU in a format that the kernels know, locked for reading.
pub struct KernelWeight<'a> {
    bytes: Bytes<'a>,
    format: WeightFormat,
    columns: usize,
    row_bytes: usize,
}

enum Bytes<'a> {
    Dense(CpuSlice<'a>),
    Quantized(Cow<'a, [u8]>),
}

impl<'a> KernelWeight<'a> {
    /// The matrix `weight`, or `None` when it is on another device or in a format without kernels.
    pub fn new(weight: &'a Weight) -> Result<Option<Self>> {
        let &[_, columns] = weight.dims() else { return Ok(None) };
        let Some(format) = format_of(weight.kind()) else {
            return Ok(None);
        };
        let Some(row_bytes) = format.row_bytes(columns) else {
            return Ok(None);
        };
        if !weight.device().is_cpu() {
            return Ok(None);
        }
        let bytes = match weight {
            Weight::Dense(tensor) => Bytes::Dense(CpuSlice::new(tensor)?),
            Weight::Quantized(tensor) => Bytes::Quantized(tensor.data()?),
        };
        Ok(Some(Self {
            bytes,
            format,
            columns,
            row_bytes,
        }))
    }

    /// Some of its rows. Panics when they are outside of it.
    pub fn rows(&self, rows: Range<usize>) -> Result<Weights<'_>> {
        let bytes = match &self.bytes {
            Bytes::Dense(slice) => slice.bytes()?,
            Bytes::Quantized(bytes) => bytes,
        };
        let data = &bytes[rows.start * self.row_bytes..rows.end * self.row_bytes];
        Ok(Weights {
            format: self.format,
            data,
            rows: rows.len(),
            columns: self.columns,
        })
    }
}

/// The kernels' name of a type; `None` for those without kernels.
fn format_of(kind: WeightType) -> Option<WeightFormat> {
    match kind {
        WeightType::F32 => Some(WeightFormat::F32),
        WeightType::F16 => Some(WeightFormat::F16),
        WeightType::Bf16 => Some(WeightFormat::BF16),
        WeightType::Quantized(kind) => match kind {
            GgmlDType::F32 => Some(WeightFormat::F32),
            GgmlDType::F16 => Some(WeightFormat::F16),
            GgmlDType::BF16 => Some(WeightFormat::BF16),
            GgmlDType::Q4_0 => Some(WeightFormat::Q4_0),
            GgmlDType::Q4_1 => Some(WeightFormat::Q4_1),
            GgmlDType::Q5_0 => Some(WeightFormat::Q5_0),
            GgmlDType::Q5_1 => Some(WeightFormat::Q5_1),
            GgmlDType::Q8_0 => Some(WeightFormat::Q8_0),
            GgmlDType::Q2K => Some(WeightFormat::Q2K),
            GgmlDType::Q3K => Some(WeightFormat::Q3K),
            GgmlDType::Q4K => Some(WeightFormat::Q4K),
            GgmlDType::Q5K => Some(WeightFormat::Q5K),
            GgmlDType::Q6K => Some(WeightFormat::Q6K),
            GgmlDType::Q8_1 | GgmlDType::Q8K => None,
        },
    }
}
