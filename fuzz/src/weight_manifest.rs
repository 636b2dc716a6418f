//! Manifests of weights.

use crate::files;

/// Loads the bytes as a manifest beside a configuration and a file that tensors may lie in.
pub fn run(data: &[u8]) {
    files::write(
        "manifest/config.json",
        include_bytes!("../../tests/golden/gpt2/config.json"),
    );
    files::write("manifest/a.bin", &[0; 4096]);
    files::load(&files::write("manifest/model.jsonl", data));
}
