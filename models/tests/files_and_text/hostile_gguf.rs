//! Damaged GGUF files: always a typed error, never a panic, never memory for lengths that the file does not have.

use std::path::{Path, PathBuf};

use candle_models::Error;
use candle_models::formats::{TensorSource, open_gguf};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::golden;

/// Opens a file and reads all there is in it.
fn read_all(path: &Path) -> Result<(), Error> {
    let source = open_gguf(path)?;
    source.text_assets()?;
    source.metadata().scalars();
    source
        .names()
        .into_iter()
        .try_for_each(|name| source.load(name).map(drop))
}

fn write(folder: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Panics unless reading fails with an error that blames the file.
fn refused(folder: &tempfile::TempDir, bytes: &[u8]) -> String {
    match read_all(&write(folder, bytes)) {
        Err(error @ (Error::InvalidFile { .. } | Error::Unsupported(_))) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_truncation_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["quantized.gguf", "text/sentencepiece.gguf", "text/smollm.gguf"] {
        let whole = std::fs::read(golden(name)).unwrap();
        assert!(read_all(&golden(name)).is_ok());
        let lengths = (0..whole.len()).step_by(if name.starts_with('q') { 7 } else { 137 });
        // The last tensor's padding may go; the header of a file without tensors may not.
        let needed = if name.starts_with('q') {
            whole.len() - 32
        } else {
            whole.len() - 64
        };
        for length in lengths.filter(|&length| length < needed) {
            refused(&folder, &whole[..length]);
        }
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(11);
    for name in ["quantized.gguf", "text/sentencepiece.gguf", "text/llama-bpe.gguf"] {
        let whole = std::fs::read(golden(name)).unwrap();
        for round in 0..600 {
            let mut damaged = whole.clone();
            // The header of the file with tensors is what matters there.
            let range = if name.starts_with('q') && round % 4 != 0 {
                2500
            } else {
                damaged.len()
            };
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(0..range);
                damaged[at] = if round % 2 == 0 {
                    damaged[at] ^ (1 << random.random_range(0..8))
                } else {
                    random.random()
                };
            }
            match read_all(&write(&folder, &damaged)) {
                Ok(()) | Err(Error::InvalidFile { .. } | Error::Unsupported(_)) => {}
                Err(other) => panic!("{name}, round {round}: {other:?}"),
            }
        }
    }
}

/// A GGUF file put together by hand.
#[derive(Default)]
struct Builder {
    metadata: Vec<u8>,
    metadata_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

impl Builder {
    fn new() -> Self {
        Self::default().value("general.architecture", 8, &text("llama"))
    }

    fn value(mut self, key: &str, kind: u32, bytes: &[u8]) -> Self {
        self.metadata
            .extend([&text(key), kind.to_le_bytes().as_slice(), bytes].concat());
        self.metadata_count += 1;
        self
    }

    fn tensor(mut self, name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.extend(text(name));
        self.tensors.extend((dimensions.len() as u32).to_le_bytes());
        self.tensors
            .extend(dimensions.iter().flat_map(|size| size.to_le_bytes()));
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.tensor_count += 1;
        self
    }

    fn build(self, data: usize) -> Vec<u8> {
        let counts = [self.tensor_count.to_le_bytes(), self.metadata_count.to_le_bytes()].concat();
        let mut bytes = [
            b"GGUF".as_slice(),
            &3u32.to_le_bytes(),
            &counts,
            &self.metadata,
            &self.tensors,
        ]
        .concat();
        bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
        bytes
    }
}

#[test]
fn impossible_headers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let huge = u64::MAX.to_le_bytes();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"GGML....".to_vec(), "does not begin with GGUF"),
        (Vec::new(), "truncated"),
        (
            [b"GGUF".as_slice(), &1u32.to_le_bytes(), &[0; 64]].concat(),
            "version 1",
        ),
        (
            [b"GGUF".as_slice(), &3u32.to_be_bytes(), &[0; 64]].concat(),
            "big-endian",
        ),
        (
            [b"GGUF".as_slice(), &3u32.to_le_bytes(), &huge, &huge, &[0; 64]].concat(),
            "claims 18446744073709551615",
        ),
        (
            [
                b"GGUF".as_slice(),
                &3u32.to_le_bytes(),
                &1000u64.to_le_bytes(),
                &[0; 64],
            ]
            .concat(),
            "claims 1000",
        ),
        (Builder::default().build(0), "general.architecture is missing"),
        (Builder::new().value("a", 8, &huge).build(64), "truncated"),
        (
            Builder::new()
                .value("a", 9, &[&4u32.to_le_bytes(), huge.as_slice()].concat())
                .build(64),
            "elements",
        ),
        (
            Builder::new()
                .value(
                    "a",
                    9,
                    &[&4u32.to_le_bytes(), (1u64 << 23).to_le_bytes().as_slice()].concat(),
                )
                .build(64),
            "truncated",
        ),
        (
            Builder::new()
                .value("a", 9, &[&9u32.to_le_bytes(), 1u64.to_le_bytes().as_slice()].concat())
                .build(64),
            "array of arrays",
        ),
        (Builder::new().value("a", 77, &[]).build(64), "unknown kind 77"),
        (Builder::new().value("a", 7, &[2]).build(64), "boolean"),
        (
            Builder::new()
                .value("a", 8, &[&2u64.to_le_bytes(), b"\xff\xfe".as_slice()].concat())
                .build(64),
            "not UTF-8",
        ),
        (
            Builder::new().value("a", 0, &[1]).value("a", 0, &[1]).build(0),
            "given twice",
        ),
        (
            Builder::new()
                .value("general.alignment", 4, &0u32.to_le_bytes())
                .build(0),
            "general.alignment is 0",
        ),
        (
            Builder::new()
                .value("general.alignment", 4, &33u32.to_le_bytes())
                .build(0),
            "general.alignment is 33",
        ),
        (
            Builder::new().value("general.alignment", 8, &text("x")).build(0),
            "must be an integer",
        ),
        (
            Builder::new()
                .tensor("t", &[4], 0, 0)
                .tensor("t", &[4], 0, 32)
                .build(64),
            "described twice",
        ),
        (
            Builder::new().tensor("t", &[1, 1, 1, 1, 1], 0, 0).build(64),
            "5 dimensions",
        ),
        (
            Builder::new().tensor("t", &[u64::MAX, u64::MAX], 0, 0).build(64),
            "impossible shape",
        ),
        (
            Builder::new().tensor("t", &[1 << 32, 1 << 32], 0, 0).build(64),
            "impossible shape",
        ),
        (Builder::new().tensor("t", &[0, 4], 0, 0).build(64), "impossible shape"),
        (Builder::new().tensor("t", &[1 << 40], 0, 0).build(64), "truncated"),
        (
            Builder::new().tensor("t", &[4], 0, u64::MAX - 31).build(64),
            "truncated",
        ),
        (Builder::new().tensor("t", &[4], 0, 8).build(64), "not aligned"),
        (Builder::new().tensor("t", &[31, 2], 3, 0).build(64), "do not divide"),
        (Builder::new().tensor("t", &[], 3, 0).build(64), "do not divide"),
        (
            Builder::new()
                .tensor("a", &[16], 0, 0)
                .tensor("b", &[4], 0, 32)
                .build(128),
            "overlap",
        ),
        (Builder::new().tensor("t", &[4], 28, 0).build(64), "F64"),
        (Builder::new().tensor("t", &[4], 26, 0).build(64), "I32"),
        (Builder::new().tensor("t", &[256], 17, 0).build(256), "IQ2_XS"),
        (Builder::new().tensor("t", &[4], 1234, 0).build(64), "unknown type 1234"),
        (
            Builder::new()
                .tensor("token_embd.weight", &[4], 0, 0)
                .tensor("model.embed_tokens.weight", &[4], 0, 32)
                .build(64),
            "two names",
        ),
    ];
    for (bytes, expected) in cases {
        let message = refused(&folder, &bytes);
        assert!(message.contains(expected), "{message} instead of {expected}");
    }
}

#[test]
fn heads_that_do_not_divide_and_missing_files() {
    let folder = tempfile::tempdir().unwrap();
    let heads = |count: u32| Builder::new().value("llama.attention.head_count", 4, &count.to_le_bytes());
    for (builder, expected) in [
        (heads(3).tensor("blk.0.attn_q.weight", &[32, 4], 3, 0), "not 3 heads"),
        (heads(0).tensor("blk.0.attn_q.weight", &[32, 4], 0, 0), "not 0 heads"),
        (heads(4).tensor("blk.0.attn_k.weight", &[4, 4], 0, 0), "not 4 heads"),
        (
            Builder::new().tensor("blk.0.attn_k.weight", &[4, 4], 0, 0),
            "head_count is missing",
        ),
    ] {
        let message = refused(&folder, &builder.build(1024));
        assert!(message.contains(expected), "{message}");
    }
    assert!(matches!(
        read_all(&folder.path().join("absent.gguf")),
        Err(Error::NotFound(_))
    ));
    assert!(matches!(read_all(folder.path()), Err(Error::InvalidFile { .. })));
    assert!(matches!(
        read_all(Path::new("/dev/zero")),
        Err(Error::InvalidFile { .. })
    ));
}

#[test]
fn damaged_scales_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(golden("quantized.gguf")).unwrap();
    let source = open_gguf(&golden("quantized.gguf")).unwrap();
    let names = source.names();
    let total: u64 = names.iter().map(|name| source.bytes(name).next_multiple_of(32)).sum();
    let data = whole.len() - total as usize;
    // Every element type has its scale, or a value, within the first block: 65504 < 0x7c00 in f16, all ones in any float.
    let mut damaged = whole.clone();
    damaged[data..].fill(0xff);
    std::fs::write(folder.path().join("model.gguf"), &damaged).unwrap();
    let source = open_gguf(&folder.path().join("model.gguf")).unwrap();
    for name in source.names() {
        let message = source.load(name).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("NaN"), "{message}");
    }
}

#[test]
fn contradicting_tokenizers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let strings = |values: &[&str]| {
        let values: Vec<u8> = values.iter().flat_map(|value| text(value)).collect();
        [8u32.to_le_bytes().to_vec(), values].concat()
    };
    let array = |values: &[&str]| {
        let bytes = strings(values);
        [&bytes[..4], &(values.len() as u64).to_le_bytes(), &bytes[4..]].concat()
    };
    let floats = |values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        [
            6u32.to_le_bytes().as_slice(),
            &(values.len() as u64).to_le_bytes(),
            &bytes,
        ]
        .concat()
    };
    let model = |name: &str| Builder::new().value("tokenizer.ggml.model", 8, &text(name));
    let tokens = |builder: Builder, tokens: &[&str]| builder.value("tokenizer.ggml.tokens", 9, &array(tokens));
    let merges = |builder: Builder, merges: &[&str]| builder.value("tokenizer.ggml.merges", 9, &array(merges));
    let id = |value: u32| value.to_le_bytes();
    let gpt2 = || merges(tokens(model("gpt2"), &["a", "b", "ab"]), &["a b"]);
    let cases = [
        (model("bert"), "bert"),
        (model("gpt2"), "tokens is missing"),
        (tokens(model("gpt2"), &["a"]), "merges is missing"),
        (merges(tokens(model("gpt2"), &["a", "a"]), &[]), "are both"),
        (merges(tokens(model("gpt2"), &["a", "b"]), &["a b"]), "needs \"ab\""),
        (merges(tokens(model("gpt2"), &["a", "b"]), &["ab"]), "not two tokens"),
        (gpt2().value("tokenizer.ggml.pre", 8, &text("tekken")), "tekken"),
        (
            gpt2().value("tokenizer.ggml.bos_token_id", 4, &id(3)),
            "bos_token_id is 3",
        ),
        (
            gpt2().value("tokenizer.ggml.add_bos_token", 8, &text("yes")),
            "must be a boolean",
        ),
        (
            gpt2().value("tokenizer.chat_template", 8, &text("{% if")),
            "chat_template",
        ),
        (tokens(model("llama"), &["a", "b"]), "scores is missing"),
        (
            tokens(model("llama"), &["a", "b"]).value("tokenizer.ggml.scores", 9, &floats(&[1.0])),
            "one number for each",
        ),
        (
            tokens(model("llama"), &["a", "b"]).value("tokenizer.ggml.scores", 9, &floats(&[1.0, f32::NAN])),
            "one number",
        ),
    ];
    for (builder, expected) in cases {
        let message = refused(&folder, &builder.build(0));
        assert!(message.contains(expected), "{message} instead of {expected}");
    }
    assert!(read_all(&write(&folder, &gpt2().build(0))).is_ok());
}
