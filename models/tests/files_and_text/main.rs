//! Tokenizers, chat templates and weight files against their reference implementations, and against hostile input.
//! The fixtures are made by `tests/golden/text.py` and `tests/golden/quantized.py`.
#![allow(clippy::unwrap_used)]

mod chat_templates;
mod completions;
mod constraints;
mod conversions;
mod hostile_archives;
mod hostile_gguf;
mod hostile_hugging_face;
mod hostile_manifests;
mod quantized;
mod sampling;
mod tokenizers;
mod weight_formats;
mod word_tokenizers;

use std::path::PathBuf;

/// A file of the golden folder.
fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(name)
}
