//! The elements of CPU tensors as slices: the border between candle and the kernels.

use crate::error::Result;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor, WithDType};
use candle_kernels_cpu::MatrixRef;
use std::cell::Cell;

/// Whether the kernels can compute on this tensor.
pub fn is_cpu(tensor: &Tensor) -> bool {
    tensor.device().is_cpu()
}

/// A contiguous tensor on the CPU, locked for reading.
pub struct CpuSlice<'a> {
    storage: StorageRef<'a>,
    start: usize,
    end: usize,
}

impl<'a> CpuSlice<'a> {
    /// Locks a tensor. Fails when it is not contiguous or not on the CPU.
    pub fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(_), Some((start, end))) => Ok(Self { storage, start, end }),
            _ => Err(unsuitable("a contiguous tensor on the CPU is needed", layout)),
        }
    }

    fn cpu(&self) -> &CpuStorage {
        match &*self.storage {
            Storage::Cpu(storage) => storage,
            _ => unreachable!("checked by `new`"),
        }
    }

    /// The elements of an f32 tensor. Fails for another dtype.
    pub fn f32(&self) -> Result<&[f32]> {
        self.elements()
    }

    /// The elements of a tensor of that type. Fails for another dtype.
    pub fn elements<T: WithDType>(&self) -> Result<&[T]> {
        Ok(&self.cpu().as_slice::<T>()?[self.start..self.end])
    }

    /// The bytes of an f32, f16 or bf16 tensor. Fails for another dtype.
    pub fn bytes(&self) -> Result<&[u8]> {
        let range = self.start..self.end;
        match self.cpu() {
            CpuStorage::F32(values) => Ok(bytemuck::cast_slice(&values[range])),
            CpuStorage::F16(values) => Ok(bytemuck::cast_slice(&values[range])),
            CpuStorage::BF16(values) => Ok(bytemuck::cast_slice(&values[range])),
            _ => Err(not_floating()),
        }
    }
}

impl<'a> CpuSlice<'a> {
    /// The elements of an f32, bf16 or f16 tensor as a matrix `[rows, columns]`. Fails for another dtype.
    pub fn matrix(&self, rows: usize, columns: usize) -> Result<MatrixRef<'_>> {
        let range = self.start..self.end;
        match self.cpu() {
            CpuStorage::F32(values) => Ok(MatrixRef::new(&values[range], rows, columns)),
            CpuStorage::F16(values) => Ok(MatrixRef::f16(&values[range], rows, columns)),
            CpuStorage::BF16(values) => Ok(MatrixRef::bf16(&values[range], rows, columns)),
            _ => Err(not_floating()),
        }
    }
}

/// The error of using a tensor that is of none of the three types.
fn not_floating() -> crate::error::Error {
    candle_core::Error::Msg("a tensor of f32, f16 or bf16 is needed".into())
        .bt()
        .into()
}

fn unsuitable(message: &str, layout: &Layout) -> crate::error::Error {
    candle_core::Error::Msg(format!("{message}, not {layout:?}"))
        .bt()
        .into()
}

/// Calls `read` with the elements of a contiguous f32 tensor on the CPU.
pub fn with_slice<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
    Ok(read(CpuSlice::new(tensor)?.f32()?))
}

/// Calls `write` with the elements of a contiguous f32 tensor on the CPU, to be changed in place. All tensors that share
/// the storage see the change; the tensor must not be locked for reading.
pub fn with_mut_slice<T>(tensor: &Tensor, write: impl FnOnce(&mut [f32]) -> T) -> Result<T> {
    let operation = InPlace {
        write: Cell::new(Some(write)),
        result: Cell::new(None),
    };
    tensor.inplace_op1(&operation)?;
    let missing = || candle_core::Error::Msg("the operation did not run".into()).bt().into();
    operation.result.into_inner().ok_or_else(missing)
}

/// Calls `visit` with the number and the elements of each row of an f32 tensor `[rows, width]`. On the CPU they are the
/// tensor's own and may be changed in place, on other devices copies.
pub fn visit_rows(rows: &Tensor, mut visit: impl FnMut(usize, &mut [f32])) -> Result<()> {
    let (_, width) = rows.dims2()?;
    if is_cpu(rows) {
        return with_mut_slice(rows, |values| {
            for (index, row) in values.chunks_exact_mut(width.max(1)).enumerate() {
                visit(index, row);
            }
        });
    }
    for (index, mut row) in rows.to_vec2()?.into_iter().enumerate() {
        visit(index, &mut row);
    }
    Ok(())
}

/// A new f32 tensor of the shape on the CPU, written by `write`, which gets zeros.
pub fn new_tensor(shape: impl Into<Shape>, write: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<Tensor> {
    let shape = shape.into();
    let mut values = vec![0.0f32; shape.elem_count()];
    write(&mut values)?;
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Runs a closure as candle's in-place operation, the one way to a tensor's elements for writing.
struct InPlace<F, T> {
    write: Cell<Option<F>>,
    result: Cell<Option<T>>,
}

impl<T, F: FnOnce(&mut [f32]) -> T> InplaceOp1 for InPlace<F, T> {
    fn name(&self) -> &'static str {
        "write in place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a contiguous tensor is needed, not {layout:?}")
        };
        let CpuStorage::F32(values) = storage else {
            candle_core::bail!("a tensor of {:?} is needed", DType::F32)
        };
        if let Some(write) = self.write.take() {
            self.result.set(Some(write(&mut values[start..end])));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_read_and_written_in_place() {
        let tensor = Tensor::from_vec(vec![0.0f32, 1.0, 2.0, 3.0], (2, 2), &Device::Cpu).unwrap();
        let second = tensor.narrow(0, 1, 1).unwrap();
        let sum = with_mut_slice(&second, |values| {
            values[0] = 5.0;
            values.iter().sum::<f32>()
        });
        assert_eq!(sum.unwrap(), 8.0);
        assert_eq!(with_slice(&tensor, <[f32]>::to_vec).unwrap(), [0.0, 1.0, 5.0, 3.0]);
        assert!(with_slice(&tensor.t().unwrap(), |_| ()).is_err());
        let mut seen = vec![];
        visit_rows(&tensor, |index, row| {
            seen.push((index, row.to_vec()));
            row[0] = 7.0;
        })
        .unwrap();
        assert_eq!(seen, [(0, vec![0.0, 1.0]), (1, vec![5.0, 3.0])]);
        assert_eq!(tensor.to_vec2::<f32>().unwrap(), [[7.0, 1.0], [7.0, 3.0]]);
    }
}
