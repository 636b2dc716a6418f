//! Rows of a table: token embeddings and learned positions.

use super::storage::new_tensor;
use super::weights::KernelWeight;
use crate::decoder::Weight;
use crate::error::Result;
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// The rows `ids` of `table` `[rows, width]` as f32 `[ids, width]`. The ids must be below the number of rows.
pub fn gather(table: &Weight, ids: &[u32]) -> Result<Tensor> {
    let Some(matrix) = KernelWeight::new(table)? else {
        return composed(table, ids);
    };
    let &[rows, width] = table.dims() else {
        return composed(table, ids);
    };
    new_tensor((ids.len(), width), |out| {
        candle_kernels_cpu::embedding_gather(matrix.rows(0..rows)?, ids, out);
        Ok(())
    })
}

/// [`gather`] from plain candle operations: for devices without kernels of our own, and the tests' oracle.
pub fn composed(table: &Weight, ids: &[u32]) -> Result<Tensor> {
    match table {
        Weight::Dense(tensor) => {
            let ids = Tensor::from_slice(ids, ids.len(), tensor.device())?;
            Ok(tensor.index_select(&ids, 0)?.to_dtype(DType::F32)?)
        }
        Weight::Quantized(tensor) => gather_quantized(tensor, ids),
    }
}

fn gather_quantized(table: &QTensor, ids: &[u32]) -> Result<Tensor> {
    let device = table.device();
    let rows = ids
        .iter()
        .map(|id| dequantize_rows(table, *id as usize..*id as usize + 1));
    let rows: Vec<Tensor> = rows.collect::<Result<_>>()?;
    Ok(Tensor::cat(&rows, 0)?.to_device(&device)?)
}

/// Whole rows of a quantised matrix as f32 on the CPU, without expanding the others.
pub fn dequantize_rows(table: &QTensor, rows: Range<usize>) -> Result<Tensor> {
    let (_, width) = table.shape().dims2()?;
    let row_bytes = width / table.dtype().block_size() * table.dtype().type_size();
    let data = table.data()?;
    let bytes = &data[rows.start * row_bytes..rows.end * row_bytes];
    // A copy in candle's own type, since its blocks have an alignment.
    let storage = candle_core::quantized::QStorage::from_data(bytes.to_vec().into(), &Device::Cpu, table.dtype())?;
    Ok(QTensor::new(storage, (rows.len(), width))?.dequantize(&Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::WeightType;

    #[test]
    fn rows_are_those_of_the_whole() {
        let table = Tensor::randn(0f32, 1f32, (7, 64), &Device::Cpu).unwrap();
        let table = Weight::Dense(table)
            .convert("table", WeightType::from_name("q4_0").unwrap())
            .unwrap();
        let rows: Vec<Vec<f32>> = gather(&table, &[6, 0, 6]).unwrap().to_vec2().unwrap();
        let whole: Vec<Vec<f32>> = table.to_f32().unwrap().to_vec2().unwrap();
        assert_eq!(rows, [whole[6].clone(), whole[0].clone(), whole[6].clone()]);
    }
}
