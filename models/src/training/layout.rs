//! Between the decoder's layout of a parameter ([out, in] for every matrix) and transformers' (GPT-2's are [in, out]).

use std::ops::Range;

use candle_core::Tensor;

use crate::decoder::ParameterInfo;
use crate::error::Result;
use crate::ops::storage::{is_cpu, with_mut_slice, with_slice};

/// Elements `range`, in row-major order of transformers' shape, of an f32 tensor in the decoder's layout.
pub(super) fn read_range(tensor: &Tensor, parameter: &ParameterInfo, range: Range<usize>) -> Result<Vec<f32>> {
    let tensor = if is_cpu(tensor) {
        tensor.clone()
    } else {
        tensor.to_device(&candle_core::Device::Cpu)?
    };
    with_slice(&tensor, |elements| match transposed_shape(parameter) {
        None => elements[range].to_vec(),
        Some((inputs, outputs)) => range.map(|i| elements[i % outputs * inputs + i / outputs]).collect(),
    })
}

/// Calls `change` with each of the elements `start..start + values.len()`, in row-major order of transformers' shape, of an
/// f32 tensor in the decoder's layout, and with its value of `values`. The tensor is changed in place.
pub(crate) fn change_range(
    tensor: &Tensor,
    parameter: &ParameterInfo,
    start: usize,
    values: &[f32],
    change: impl Fn(&mut f32, f32),
) -> Result<()> {
    if !is_cpu(tensor) {
        let copy = tensor.to_device(&candle_core::Device::Cpu)?;
        change_range(&copy, parameter, start, values, change)?;
        return Ok(tensor.slice_set(&copy.to_device(tensor.device())?, 0, 0)?);
    }
    with_mut_slice(tensor, |elements| match transposed_shape(parameter) {
        None => {
            let targets = &mut elements[start..start + values.len()];
            targets
                .iter_mut()
                .zip(values)
                .for_each(|(element, value)| change(element, *value));
        }
        // Along the decoder's rows: of the two, the values are the smaller and stay in the cache.
        Some((inputs, outputs)) => {
            for column in 0..outputs {
                let row_of = |element: usize| element.saturating_sub(column).div_ceil(outputs);
                for row in row_of(start)..row_of(start + values.len()) {
                    let value = values[row * outputs + column - start];
                    change(&mut elements[column * inputs + row], value);
                }
            }
        }
    })
}

/// The tensor in the decoder's layout from all its elements in transformers'.
pub(super) fn from_transformers(elements: Vec<f32>, parameter: &ParameterInfo) -> Result<Tensor> {
    let elements = match transposed_shape(parameter) {
        None => elements,
        Some((inputs, outputs)) => (0..elements.len())
            .map(|i| elements[i % inputs * outputs + i / inputs])
            .collect(),
    };
    Ok(Tensor::from_vec(
        elements,
        parameter.held_shape(),
        &candle_core::Device::Cpu,
    )?)
}

/// transformers' shape `[in, out]`, if it is not the decoder's.
fn transposed_shape(parameter: &ParameterInfo) -> Option<(usize, usize)> {
    match parameter.shape[..] {
        [inputs, outputs] if parameter.transposed => Some((inputs, outputs)),
        _ => None,
    }
}
