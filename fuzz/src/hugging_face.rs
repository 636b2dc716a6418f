//! The JSON files of a Hugging Face folder: configuration, tokenizer's configuration, index of shards.

use crate::files;

/// Weights that fit some of the configurations.
const WEIGHTS: &[u8] = include_bytes!("../../tests/golden/llama/model.safetensors");

/// Loads a folder with the bytes before the first zero byte as its configuration, those up to the next as its index of
/// shards, and the rest as its tokenizer's configuration; absent where they are empty.
pub fn run(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == 0);
    let mut next = || parts.next().unwrap_or_default();
    let path = files::write("folder/config.json", next());
    let Some(folder) = path.parent() else { return };
    for (name, bytes) in [
        ("model.safetensors.index.json", next()),
        ("tokenizer_config.json", next()),
    ] {
        let path = files::write(&format!("folder/{name}"), bytes);
        if bytes.is_empty() {
            let _ = std::fs::remove_file(path);
        }
    }
    let sharded = folder.join("model.safetensors.index.json").exists();
    let (present, absent) = if sharded {
        ("model-00001-of-00001.safetensors", "model.safetensors")
    } else {
        ("model.safetensors", "model-00001-of-00001.safetensors")
    };
    if !folder.join(present).exists() {
        files::write(&format!("folder/{present}"), WEIGHTS);
    }
    let _ = std::fs::remove_file(folder.join(absent));
    files::load(folder);
}
