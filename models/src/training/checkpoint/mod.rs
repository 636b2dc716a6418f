//! Durable copies of a model with the state of its training.
//!
//! A checkpoint is a folder that transformers can open as a model, and that holds what an exact continuation needs:
//!
//! | File | Holds |
//! | --- | --- |
//! | `model.safetensors` | every parameter, f32, under transformers' name and in its layout |
//! | `optimizer.safetensors` | AdamW's moments `exp_avg.NAME` and `exp_avg_sq.NAME`, f32, in the same layout |
//! | `config.json`, `generation_config.json` | transformers' description |
//! | `tokenizer.json`, `tokenizer_config.json` | the tokenizer and the chat template, if there are any |
//! | `manifest.json` | step, exact configuration, training log, and size and SHA-256 of every file and tensor |
//! | `manifest.sha256` | SHA-256 of the manifest, as `sha256sum` writes it |

mod files;
mod hugging_face;
mod load;
mod manifest;
mod save;

pub use load::{Restored, load, read_manifest, verify};
pub use manifest::{FileEntry, Manifest, TensorEntry};
pub use save::{Details, Saved, save};

/// Name of the file with the parameters.
const MODEL_FILE: &str = "model.safetensors";
/// Name of the file with the moments.
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// What the names of first moments begin with.
const FIRST_MOMENT: &str = "exp_avg.";
/// What the names of second moments begin with.
const SECOND_MOMENT: &str = "exp_avg_sq.";
