//! Models from one format of files to another, one tensor at a time: memory stays near the largest tensor.
//!
//! A [`Conversion`] is a plan that has been checked against the headers of the source. Writing it makes the target aside
//! and renames it, so that it is there whole or not at all.

mod documents;
mod gguf;
mod manifest;
mod npz;
mod plan;
mod safetensors;
mod target;
mod tensors;
mod writing;

pub use plan::{Conversion, ConversionOptions, Format, PlannedTensor};
pub use writing::Converted;
