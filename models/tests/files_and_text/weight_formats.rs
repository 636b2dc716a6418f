//! The same weights in every format, as numpy, PyTorch, pg_gpt2 and manifests store them (`tests/golden/formats.py`).

use std::path::{Path, PathBuf};

use candle_models::formats::{TensorData, TensorSource, open_hugging_face};
use candle_models::{DType, LoadOptions, Model, Tensor};

use crate::golden;

/// A folder with a file of weights and the configuration of a golden model, and the file in it.
fn beside(model: &str, file: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(file);
    std::fs::copy(golden("formats").join(file), &path).unwrap();
    std::fs::copy(golden(model).join("config.json"), folder.path().join("config.json")).unwrap();
    (folder, path)
}

pub(super) fn dense(source: &dyn TensorSource, name: &str) -> Tensor {
    match source.load(name).unwrap().data {
        TensorData::Dense(tensor) => tensor,
        TensorData::Quantized(_) => panic!("{name} is quantised"),
    }
}

/// Bits of the values as f32, which every other type here fits into.
pub(super) fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    values.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Asserts that a path holds the golden model's values, bit for bit; `same_type` also that they are of its types.
fn assert_holds(path: &Path, model: &str, same_type: bool) {
    let (expected, found) = (
        open_hugging_face(&golden(model)).unwrap(),
        open_hugging_face(path).unwrap(),
    );
    for name in expected.names() {
        let (expected, found) = (dense(&expected, name), dense(&found, name));
        assert_eq!(found.dims(), expected.dims(), "{}: {name}", path.display());
        assert_eq!(bits(&found), bits(&expected), "{}: {name}", path.display());
        assert!(
            !same_type || found.dtype() == expected.dtype(),
            "{}: {name}",
            path.display()
        );
    }
    let loaded = |path: &Path| Model::load(path, &LoadOptions::default()).unwrap();
    let logits = |path| bits(&loaded(path).decoder.logits(&[1, 2, 3, 5, 8]).unwrap());
    assert_eq!(logits(path), logits(&golden(model)), "{}", path.display());
}

#[test]
fn every_format_holds_the_same_weights() {
    for (model, file) in [
        ("gpt2", "gpt2.npz"),
        ("gpt2", "pg_gpt2-converted.npz"),
        ("gpt2", "pg_gpt2-exported.npz"),
        ("gpt2", "gpt2.bin"),
        ("qwen2-bf16", "qwen2-bf16.npz"),
        ("qwen2-bf16", "qwen2-bf16.bin"),
    ] {
        let (_folder, path) = beside(model, file);
        assert_holds(&path, model, true);
    }
    let manifest = golden("formats/gpt2-manifest");
    assert_holds(&manifest, "gpt2", true);
    assert_holds(&manifest.join("model.jsonl"), "gpt2", true);
    assert_holds(&golden("llama/model.safetensors"), "llama", true);
}

#[test]
fn a_directory_is_read_whatever_its_weights_are_called() {
    for (file, name) in [("gpt2.npz", "model.npz"), ("gpt2.bin", "pytorch_model.bin")] {
        let (folder, path) = beside("gpt2", file);
        std::fs::rename(path, folder.path().join(name)).unwrap();
        assert_holds(folder.path(), "gpt2", true);
    }
    let (folder, path) = beside("gpt2", "gpt2.bin");
    std::fs::rename(path, folder.path().join("pytorch_model-00001-of-00001.bin")).unwrap();
    let index = r#"{"weight_map": {"transformer.wte.weight": "pytorch_model-00001-of-00001.bin"}}"#;
    std::fs::write(folder.path().join("pytorch_model.bin.index.json"), index).unwrap();
    assert_holds(folder.path(), "gpt2", true);
}

#[test]
fn a_file_of_weights_needs_its_configuration() {
    let (folder, path) = beside("gpt2", "gpt2.npz");
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    let error = open_hugging_face(&path).unwrap_err().to_string();
    assert!(error.contains("config.json is missing"), "{error}");
}
