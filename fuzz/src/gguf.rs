//! GGUF files: header, metadata, tokenizer, template, weights.

use crate::files;

/// Loads the bytes as a GGUF file.
pub fn run(data: &[u8]) {
    files::load(&files::write("model.gguf", data));
}
