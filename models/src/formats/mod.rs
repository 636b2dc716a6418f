//! Weight files: Hugging Face directories and GGUF, behind one trait that names tensors as transformers does.
//!
//! Opening a model reads and checks headers only: every name, dtype, shape and byte range, against the length of the
//! file. `load` then reads one tensor, so that memory stays near the size of the weights, and refuses NaN and infinity.

mod files;
pub mod gguf;
mod hugging_face;
mod safetensors;
mod source;
mod values;

pub(crate) use files::{read_bytes, read_json, read_text};
pub use gguf::{GgufMetadata, GgufModel, open_gguf};
pub use hugging_face::{HuggingFaceModel, open_hugging_face};
pub(crate) use safetensors::SafetensorsFile;
pub use source::{Orientation, StoredTensor, TensorData, TensorSource, TextAssets};
