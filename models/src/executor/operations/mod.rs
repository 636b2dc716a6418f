//! The operations, a file for each or for a family.

mod activation;
mod cast;
mod concatenation;
mod copy;
mod elementwise;
mod embedding;
mod matmul;
mod norm;
mod reduction;
mod reshape;
mod slice;
mod softmax;
mod transpose;

use super::plan::Operation;
use super::tensor_type::TensorType;
use crate::error::{Error, Result};

/// Every operation.
pub const OPERATIONS: &[&dyn Operation] = &[
    &matmul::Matmul,
    &elementwise::Elementwise::Add,
    &elementwise::Elementwise::Sub,
    &elementwise::Elementwise::Mul,
    &elementwise::Elementwise::Div,
    &activation::Gelu,
    &activation::Silu,
    &activation::Relu,
    &softmax::Softmax::Plain,
    &softmax::Softmax::Logarithm,
    &norm::LayerNorm,
    &norm::RmsNorm,
    &reduction::Reduction::Sum,
    &reduction::Reduction::Mean,
    &transpose::Transpose,
    &reshape::Reshape,
    &slice::Slice,
    &concatenation::Concatenation,
    &embedding::Embedding,
    &cast::Cast,
    &copy::Copy,
];

/// Refuses elements that are not floating-point numbers.
fn check_floating(x: &TensorType) -> Result<()> {
    match x.element().is_floating() {
        true => Ok(()),
        false => Err(Error::invalid_argument(format!(
            "elements of {} are not floating-point numbers; cast them first",
            x.element()
        ))),
    }
}

/// Refuses inputs of different element types.
fn check_same_element(inputs: &[TensorType]) -> Result<()> {
    match inputs.windows(2).find(|pair| pair[0].element() != pair[1].element()) {
        None => Ok(()),
        Some(pair) => Err(Error::invalid_argument(format!(
            "the inputs have the types {} and {}, which must be the same; cast one first",
            pair[0].element(),
            pair[1].element()
        ))),
    }
}

/// The shape that both have once dimensions of 1 are repeated, as NumPy and PyTorch do.
fn broadcast(first: &[usize], second: &[usize]) -> Result<Vec<usize>> {
    let rank = first.len().max(second.len());
    let size = |shape: &[usize], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |axis| shape[axis]);
    (0..rank)
        .map(|axis| match (size(first, axis), size(second, axis)) {
            (a, b) if a == b => Ok(a),
            (1, size) | (size, 1) => Ok(size),
            _ => Err(Error::invalid_argument(format!(
                "the shapes {first:?} and {second:?} cannot be broadcast to one"
            ))),
        })
        .collect()
}
