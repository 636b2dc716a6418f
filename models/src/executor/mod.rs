//! Single operations on tensors, outside of any model: what the server's executor computes with.
//!
//! - `tensor_type`: element types and shapes
//! - `buffer`: elements as little-endian bytes, in and out
//! - `attributes`: settings of an operation, from JSON
//! - `plan`: an operation with the types of its inputs, checked, and ready to run
//! - `operations`: the operations, a file each
//! - `rows`: half types computed as f32, block by block

mod attributes;
mod buffer;
mod operations;
mod plan;
mod rows;
mod tensor_type;

#[cfg(test)]
mod tests;

pub use attributes::Attributes;
pub use buffer::{Buffer, read};
pub use operations::OPERATIONS;
pub use plan::{Monitor, Operation, Plan, Prepared, plan};
pub use tensor_type::{ElementType, MAX_DIMENSIONS, TensorType};
