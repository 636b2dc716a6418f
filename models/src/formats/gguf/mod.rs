//! GGUF files: llama.cpp's container of metadata, tokenizer and quantised weights, versions 2 and 3.
//!
//! Specification: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

mod element_type;
mod metadata;
mod model;
mod names;
mod reader;
mod rows;

pub use metadata::GgufMetadata;
pub(crate) use metadata::MetadataValue;
pub use model::{GgufModel, open_gguf};
pub(crate) use names::gguf_name;
