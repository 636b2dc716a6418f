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
        Some(shape) => {
            let mut found = vec![0.0; range.len()];
            for_each_transposed(range, shape, |element, held| found[element] = elements[held]);
            found
        }
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
        Some(shape) => for_each_transposed(start..start + values.len(), shape, |element, held| {
            change(&mut elements[held], values[element]);
        }),
    })
}

/// Calls `visit` for each of the elements `range` of a matrix in transformers' shape `[in, out]`, with its place in the range
/// and its place in the decoder's layout `[out, in]`. In tiles, so that of both layouts whole cache lines are used.
fn for_each_transposed(range: Range<usize>, (inputs, outputs): (usize, usize), mut visit: impl FnMut(usize, usize)) {
    /// Rows of a tile: a cache line of the decoder's layout.
    const ROWS: usize = 16;
    /// Columns of a tile: few enough that lines a power of two apart do not push each other out.
    const COLUMNS: usize = 8;
    if outputs == 0 {
        return;
    }
    let last = range.end.div_ceil(outputs);
    for rows in (range.start / outputs..last).step_by(ROWS) {
        for column in (0..outputs).step_by(COLUMNS) {
            for row in rows..last.min(rows + ROWS) {
                let first = row * outputs;
                let start = range.start.max(first + column);
                let end = range.end.min(first + outputs.min(column + COLUMNS));
                for element in start..end {
                    visit(element - range.start, (element - first) * inputs + row);
                }
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_of_a_range_is_visited_once_at_its_place() {
        let (inputs, outputs) = (37, 21);
        for range in [0..777, 5..6, 20..22, 100..100, 3..700, 776..777] {
            let mut seen = vec![0; range.len()];
            for_each_transposed(range.clone(), (inputs, outputs), |element, held| {
                let at = range.start + element;
                assert_eq!(held, at % outputs * inputs + at / outputs);
                seen[element] += 1;
            });
            assert!(seen.iter().all(|count| *count == 1), "{range:?}");
        }
    }
}
