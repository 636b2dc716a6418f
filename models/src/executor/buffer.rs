//! The elements of a tensor as little-endian bytes, as they travel.

use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::tensor_type::{ElementType, TensorType};
use crate::error::Result;
use crate::ops::storage::CpuSlice;

#[cfg(target_endian = "big")]
compile_error!("elements are copied as they lie in memory, which has to be little-endian");

/// Elements on their way into a tensor.
#[derive(Debug)]
pub struct Buffer(Elements);

#[derive(Debug)]
enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    I32(Vec<i32>),
}

impl Buffer {
    /// Zeros.
    #[must_use]
    pub fn new(tensor: &TensorType) -> Self {
        let length = tensor.elements();
        Self(match tensor.element() {
            ElementType::F32 => Elements::F32(vec![0.0; length]),
            ElementType::F16 => Elements::F16(vec![f16::ZERO; length]),
            ElementType::Bf16 => Elements::Bf16(vec![bf16::ZERO; length]),
            ElementType::I32 => Elements::I32(vec![0; length]),
        })
    }

    /// The elements of a tensor.
    ///
    /// # Errors
    /// Those of copying from the tensor's device.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let flat = tensor.flatten_all()?;
        Ok(Self(match tensor.dtype() {
            DType::F16 => Elements::F16(flat.to_vec1()?),
            DType::BF16 => Elements::Bf16(flat.to_vec1()?),
            DType::I32 => Elements::I32(flat.to_vec1()?),
            _ => Elements::F32(flat.to_vec1()?),
        }))
    }

    /// Replaces the elements from `start` on.
    ///
    /// # Panics
    /// Where `bytes` are not whole elements within the buffer.
    pub fn write(&mut self, start: usize, bytes: &[u8]) {
        let (all, size): (&mut [u8], usize) = match &mut self.0 {
            Elements::F32(elements) => (cast_slice_mut(elements), 4),
            Elements::F16(elements) => (cast_slice_mut(elements), 2),
            Elements::Bf16(elements) => (cast_slice_mut(elements), 2),
            Elements::I32(elements) => (cast_slice_mut(elements), 4),
        };
        all[start * size..start * size + bytes.len()].copy_from_slice(bytes);
    }

    /// The tensor on `device`; nothing is copied where that is the CPU.
    ///
    /// # Errors
    /// Those of copying to the device.
    pub fn into_tensor(self, shape: &[usize], device: &Device) -> Result<Tensor> {
        Ok(match self.0 {
            Elements::F32(elements) => Tensor::from_vec(elements, shape, device)?,
            Elements::F16(elements) => Tensor::from_vec(elements, shape, device)?,
            Elements::Bf16(elements) => Tensor::from_vec(elements, shape, device)?,
            Elements::I32(elements) => Tensor::from_vec(elements, shape, device)?,
        })
    }
}

/// Some elements of a contiguous tensor, in row-major order, as bytes.
///
/// # Errors
/// Those of copying from the tensor's device.
pub fn read(tensor: &Tensor, range: Range<usize>) -> Result<Vec<u8>> {
    let on_cpu;
    let (tensor, range) = match tensor.device().is_cpu() {
        true => (tensor, range),
        false => {
            on_cpu = tensor
                .flatten_all()?
                .narrow(0, range.start, range.len())?
                .to_device(&Device::Cpu)?;
            (&on_cpu, 0..range.len())
        }
    };
    let slice = CpuSlice::new(tensor)?;
    Ok(match tensor.dtype() {
        DType::F16 => cast_slice(&slice.elements::<f16>()?[range]).to_vec(),
        DType::BF16 => cast_slice(&slice.elements::<bf16>()?[range]).to_vec(),
        DType::I32 => cast_slice(&slice.elements::<i32>()?[range]).to_vec(),
        _ => cast_slice(&slice.f32()?[range]).to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_as_they_went_in() {
        for element in ElementType::ALL {
            let tensor_type = TensorType::new(element, &[3, 5]).unwrap();
            let bytes: Vec<u8> = (0..15 * element.size() as u8).collect();
            let mut buffer = Buffer::new(&tensor_type);
            let (first, second) = bytes.split_at(4 * element.size());
            buffer.write(4, second);
            buffer.write(0, first);
            let tensor = buffer.into_tensor(tensor_type.shape(), &Device::Cpu).unwrap();
            assert_eq!(tensor.dims(), [3, 5]);
            assert_eq!(read(&tensor, 0..15).unwrap(), bytes);
            assert_eq!(
                read(&tensor, 2..4).unwrap(),
                bytes[2 * element.size()..4 * element.size()]
            );
            let again = Buffer::of(&tensor).unwrap().into_tensor(&[15], &Device::Cpu).unwrap();
            assert_eq!(read(&again, 0..15).unwrap(), bytes);
        }
    }
}
