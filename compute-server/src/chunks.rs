//! Tensors on the wire: chunks of at most 262,144 elements (1 MiB of f32), numbered from 0.

use std::ops::Range;

use candle_compute_proto::{CHUNK_BYTES, v1};
use candle_models::ParameterInfo;
use candle_models::training::Gradient;

use crate::error::{Error, Result};

/// Elements of a chunk.
pub(crate) const CHUNK_ELEMENTS: usize = CHUNK_BYTES / size_of::<f32>();

/// Number of chunks of a parameter, at least 1.
pub(crate) fn count(parameter: &ParameterInfo) -> usize {
    parameter.elements().div_ceil(CHUNK_ELEMENTS).max(1)
}

/// Elements of chunk `number`.
pub(crate) fn range(parameter: &ParameterInfo, number: usize) -> Range<usize> {
    let start = number * CHUNK_ELEMENTS;
    start..parameter.elements().min(start + CHUNK_ELEMENTS)
}

/// A chunk of a parameter without its data and dtype.
pub(crate) fn describe(parameter: &ParameterInfo, number: usize) -> v1::TensorChunk {
    let range = range(parameter, number);
    v1::TensorChunk {
        name: parameter.name.clone(),
        shape: parameter.shape.iter().map(|&dimension| dimension as u64).collect(),
        chunk: u32::try_from(number).unwrap_or(u32::MAX),
        offset: range.start as u64,
        elements: range.len() as u64,
        trainable: parameter.trainable,
        ..Default::default()
    }
}

/// The dtype in which a weight held as `held` is sent: quantised ones arrive as f32.
pub(crate) fn dtype_of(held: &str) -> v1::DataType {
    match held {
        "f16" => v1::DataType::F16,
        "bf16" => v1::DataType::Bf16,
        _ => v1::DataType::F32,
    }
}

/// Elements of a parameter that a client sent.
#[derive(Debug)]
pub(crate) struct Received {
    /// Number of the chunk.
    pub(crate) number: usize,
    /// Elements of the parameter before the chunk.
    pub(crate) start: usize,
    /// The elements.
    pub(crate) values: Vec<f32>,
}

/// Checks a chunk of `parameter` whose elements have to be finite and of `dtype`.
///
/// # Errors
/// As [`receive_any`], and for elements that are not finite.
pub(crate) fn receive(parameter: &ParameterInfo, chunk: &v1::TensorChunk, dtype: v1::DataType) -> Result<Received> {
    let received = receive_any(parameter, chunk, dtype)?;
    let values = &received.values;
    // Without an early exit the check is several times as fast.
    let finite = values.iter().fold(true, |finite, value| finite & value.is_finite());
    if !finite && let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Err(bad_chunk(
            parameter,
            received.number,
            &format!("its element {at} is {}", values[at]),
        ));
    }
    Ok(received)
}

fn bad_chunk(parameter: &ParameterInfo, number: usize, what: &str) -> Error {
    let name = &parameter.name;
    Error::invalid(format!("parameter \"{name}\", chunk {number}: {what}"))
}

/// Checks a chunk of `parameter` whose elements have to be of `dtype`, and may be infinite or NaN.
///
/// # Errors
/// `InvalidArgument` that names the parameter, for a chunk that is not one of the parameter's, and of another shape, dtype
/// or size.
pub(crate) fn receive_any(parameter: &ParameterInfo, chunk: &v1::TensorChunk, dtype: v1::DataType) -> Result<Received> {
    let number = chunk.chunk as usize;
    let refuse = |what: String| bad_chunk(parameter, number, &what);
    let chunks = count(parameter);
    if number >= chunks {
        return Err(refuse(format!("the parameter has {chunks} chunks, numbered from 0")));
    }
    let shape = parameter.shape.iter().map(|&dimension| dimension as u64);
    if !chunk.shape.is_empty() && !shape.eq(chunk.shape.iter().copied()) {
        let (given, expected) = (&chunk.shape, &parameter.shape);
        return Err(refuse(format!(
            "its shape is given as {given:?}, but the parameter's is {expected:?}"
        )));
    }
    if ![v1::DataType::Unspecified, dtype].contains(&chunk.dtype()) || v1::DataType::try_from(chunk.dtype).is_err() {
        let (given, expected) = (dtype_name(chunk.dtype()), dtype_name(dtype));
        return Err(refuse(format!("its dtype is {given}, but {expected} is needed")));
    }
    let range = range(parameter, number);
    if chunk.elements != 0 && chunk.elements != range.len() as u64 {
        let (given, expected) = (chunk.elements, range.len());
        return Err(refuse(format!("it is given as {given} elements, but has {expected}")));
    }
    let values = decode(&chunk.data, dtype);
    if values.len() != range.len() || !chunk.data.len().is_multiple_of(size_of_element(dtype)) {
        let (given, expected) = (chunk.data.len(), range.len() * size_of_element(dtype));
        return Err(refuse(format!("its data has {given} bytes, but {expected} are needed")));
    }
    Ok(Received {
        number,
        start: range.start,
        values,
    })
}

fn dtype_name(dtype: v1::DataType) -> &'static str {
    match dtype {
        v1::DataType::Unspecified => "unknown",
        v1::DataType::F32 => "f32",
        v1::DataType::F16 => "f16",
        v1::DataType::Bf16 => "bf16",
        v1::DataType::I32 => "i32",
        v1::DataType::Q8 => "q8",
    }
}

fn size_of_element(dtype: v1::DataType) -> usize {
    match dtype {
        v1::DataType::F16 | v1::DataType::Bf16 => 2,
        _ => 4,
    }
}

/// Elements of a floating-point dtype from little-endian bytes; an incomplete last one is left out.
fn decode(data: &[u8], dtype: v1::DataType) -> Vec<f32> {
    match dtype {
        v1::DataType::F16 => elements(data)
            .map(|bytes| half::f16::from_le_bytes(bytes).to_f32())
            .collect(),
        v1::DataType::Bf16 => elements(data)
            .map(|bytes| half::bf16::from_le_bytes(bytes).to_f32())
            .collect(),
        _ => elements(data).map(f32::from_le_bytes).collect(),
    }
}

fn elements<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> {
    data.as_chunks().0.iter().copied()
}

/// Gives `message` its elements, rounded to `dtype`.
pub(crate) fn fill(message: &mut v1::TensorChunk, values: &[f32], dtype: v1::DataType) {
    let data: Vec<u8> = match dtype {
        v1::DataType::F16 => values
            .iter()
            .flat_map(|&value| half::f16::from_f32(value).to_le_bytes())
            .collect(),
        v1::DataType::Bf16 => values
            .iter()
            .flat_map(|&value| half::bf16::from_f32(value).to_le_bytes())
            .collect(),
        _ => little_endian(values),
    };
    message.norm = norm(values);
    message.data = data.into();
}

/// A chunk of the token-weighted mean over gradients.
pub(crate) fn gradient_chunk(
    parts: &[&Gradient],
    parameter: &ParameterInfo,
    number: usize,
    without_data: bool,
) -> Result<v1::TensorChunk> {
    let mut message = describe(parameter, number);
    message.dtype = v1::DataType::F32.into();
    if without_data {
        return Ok(message);
    }
    let range = range(parameter, number);
    let values = match parts {
        [only] => only.read(&parameter.name, range)?,
        parts => {
            let total: u64 = parts.iter().map(|part| part.tokens()).sum();
            let mut sum = vec![0.0f64; range.len()];
            for part in parts {
                let weight = part.tokens() as f64 / total.max(1) as f64;
                let mean = part.read(&parameter.name, range.clone())?;
                sum.iter_mut()
                    .zip(mean)
                    .for_each(|(sum, element)| *sum += weight * f64::from(element));
            }
            sum.into_iter().map(|element| element as f32).collect()
        }
    };
    message.norm = norm(&values);
    message.data = little_endian(&values).into();
    Ok(message)
}

/// A chunk of a tensor of f32.
pub(crate) fn f32_chunk(name: &str, shape: &[u64], number: usize, offset: usize, values: &[f32]) -> v1::TensorChunk {
    v1::TensorChunk {
        name: name.to_owned(),
        dtype: v1::DataType::F32.into(),
        shape: shape.to_vec(),
        chunk: u32::try_from(number).unwrap_or(u32::MAX),
        offset: offset as u64,
        elements: values.len() as u64,
        data: little_endian(values).into(),
        norm: norm(values),
        trainable: false,
    }
}

/// Euclidean norm. Several sums side by side: one alone would wait for each addition.
fn norm(values: &[f32]) -> f64 {
    let mut sums = [0.0f64; 16];
    let (groups, rest) = values.as_chunks::<16>();
    for group in groups {
        for (sum, value) in sums.iter_mut().zip(group) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    let rest = rest.iter().map(|&value| f64::from(value) * f64::from(value));
    (sums.iter().sum::<f64>() + rest.sum::<f64>()).sqrt()
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    let mut data = vec![0; size_of_val(values)];
    for (bytes, value) in data.as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
    data
}

/// Puts a tensor of f32 together from chunks that arrive in order.
#[derive(Debug)]
pub(crate) struct Assembly {
    name: &'static str,
    rows: usize,
    columns: usize,
    /// Elements so far, row-major.
    pub(crate) values: Vec<f32>,
}

impl Assembly {
    /// Nothing yet of the matrix called `name`.
    pub(crate) fn new(name: &'static str) -> Self {
        Self {
            name,
            rows: 0,
            columns: 0,
            values: Vec::new(),
        }
    }

    /// Adds a chunk. `most` is the largest number of elements accepted.
    ///
    /// # Errors
    /// `InvalidArgument` for another dtype, shape, or order.
    pub(crate) fn add(&mut self, chunk: &v1::TensorChunk, most: usize) -> Result<()> {
        let refuse = |what: String| Error::invalid(format!("tensor {}: {what}", self.name));
        if chunk.dtype() != v1::DataType::F32 {
            return Err(refuse(format!(
                "its dtype is {}; only f32 is accepted",
                chunk.dtype().as_str_name()
            )));
        }
        let [rows, columns] = chunk.shape[..] else {
            return Err(refuse(format!(
                "its shape {:?} does not have 2 dimensions",
                chunk.shape
            )));
        };
        let elements = rows
            .checked_mul(columns)
            .and_then(|count| usize::try_from(count).ok())
            .filter(|&n| n <= most);
        let elements =
            elements.ok_or_else(|| refuse(format!("its shape {:?} has more than {most} elements", chunk.shape)))?;
        if self.values.is_empty() {
            (self.rows, self.columns) = (rows as usize, columns as usize);
        } else if (rows as usize, columns as usize) != self.shape() {
            return Err(refuse(format!(
                "its chunks disagree on its shape: {:?} after {:?}",
                chunk.shape,
                self.shape()
            )));
        }
        if chunk.offset != self.values.len() as u64 {
            return Err(refuse(format!(
                "a chunk has the offset {}, expected {}",
                chunk.offset,
                self.values.len()
            )));
        }
        if chunk.data.len() as u64 != chunk.elements.saturating_mul(4)
            || self.values.len() + chunk.data.len() / 4 > elements
        {
            return Err(refuse(format!(
                "a chunk has {} bytes for {} elements",
                chunk.data.len(),
                chunk.elements
            )));
        }
        let read = |bytes: &[u8]| bytes.try_into().map(f32::from_le_bytes).unwrap_or(f32::NAN);
        self.values.extend(chunk.data.chunks_exact(4).map(read));
        Ok(())
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Fails unless every element has arrived, and there is one.
    pub(crate) fn check_complete(&self) -> Result<()> {
        if self.values.is_empty() || self.values.len() != self.rows * self.columns {
            return Err(Error::invalid(format!(
                "tensor {}: {} of {} elements arrived",
                self.name,
                self.values.len(),
                self.rows * self.columns
            )));
        }
        Ok(())
    }
}
