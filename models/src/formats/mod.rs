//! Weight files, behind one trait that names tensors as transformers does: Hugging Face directories with safetensors or
//! PyTorch's `.bin`, manifests, numpy's `.npz`, and GGUF. `docs/weight-formats.md` describes each.
//!
//! Opening a model reads and checks headers only: every name, dtype, shape and byte range, against the length of the
//! file. `load` then reads one tensor, so that memory stays near the size of the weights, and refuses NaN and infinity.

mod archive;
mod documents;
mod files;
pub mod gguf;
mod gzip;
mod hugging_face;
mod inflate;
mod locating;
pub(crate) mod manifest;
pub(crate) mod npy;
mod npz;
mod pickle;
mod safetensors;
mod source;
mod values;
mod weight_file;

pub(crate) use files::{read_bytes, read_json, read_text};
pub use gguf::{GgufMetadata, GgufModel, open_gguf};
pub use hugging_face::{HuggingFaceModel, open_hugging_face};
pub use locating::{has_documents_beside, weight_files};
pub(crate) use safetensors::SafetensorsFile;
pub use source::{Orientation, StoredTensor, TensorData, TensorSource, TextAssets};
