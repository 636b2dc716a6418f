//! Durable copies of a model with the state of its training.
//!
//! A checkpoint is a folder that transformers can open as a model, and that holds what an exact continuation needs:
//!
//! | File | Holds |
//! | --- | --- |
//! | `model.safetensors` | every parameter, f32, under transformers' name and in its layout |
//! | `optimizer.safetensors` | AdamW's moments `exp_avg.NAME` and `exp_avg_sq.NAME`, f32, in the same layout |
//! | `model-0000N-of-00002.safetensors`, … | both in two files where some parameters are frozen: those first, the others second |
//! | `model.safetensors.index.json` | which parameter is in which of the two |
//! | `config.json`, `generation_config.json` | transformers' description |
//! | `tokenizer.json`, `tokenizer_config.json` | the tokenizer and the chat template, if there are any |
//! | `manifest.json` | step, exact configuration, training log, and size and SHA-256 of every file and tensor |
//! | `manifest.sha256` | SHA-256 of the manifest, as `sha256sum` writes it |
//!
//! That of an adapter is a folder that PEFT can open: `adapter_model.safetensors` and `adapter_config.json` instead of what
//! describes a model.

mod files;
mod hugging_face;
mod library;
mod load;
mod manifest;
mod save;

pub(crate) use hugging_face::documents;
pub use library::Library;
pub use load::{Restored, load, load_adapter, read_manifest, verify};
pub use manifest::{FileEntry, Manifest, TensorEntry};
pub use save::{Details, Saved, Writing, save, save_with};

/// What the names of the files with parameters begin with.
const MODEL: &str = "model";
/// What the names of the files with moments begin with.
const OPTIMIZER: &str = "optimizer";
/// What the names of both end with.
const EXTENSION: &str = ".safetensors";
/// What the names of first moments begin with.
const FIRST_MOMENT: &str = "exp_avg.";
/// What the names of second moments begin with.
const SECOND_MOMENT: &str = "exp_avg_sq.";
