//! Damaged Hugging Face directories: always a typed error that names the file or tensor.

use std::path::Path;

use candle_models::formats::{TensorSource, open_hugging_face};
use candle_models::{Error, Tokenizer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::golden;

/// A directory with the given files.
fn directory(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn read_all(path: &Path) -> Result<(), Error> {
    let source = open_hugging_face(path)?;
    source.text_assets()?;
    source
        .names()
        .into_iter()
        .try_for_each(|name| source.load(name).map(drop))
}

fn refused(files: &[(&str, Vec<u8>)]) -> String {
    match read_all(directory(files).path()) {
        Err(error @ (Error::InvalidFile { .. } | Error::Unsupported(_))) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn config() -> (&'static str, Vec<u8>) {
    ("config.json", b"{}".to_vec())
}

#[test]
fn bad_safetensors_are_refused() {
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let good = tensor("F32", "[2]", "[0,8]");
    let nan = [1f32.to_le_bytes(), f32::NAN.to_le_bytes()].concat();
    let cases = [
        (vec![], "shorter than"),
        (vec![1; 7], "shorter than"),
        (u64::MAX.to_le_bytes().to_vec(), "claims 18446744073709551615"),
        ((1u64 << 40).to_le_bytes().repeat(4), "truncated or no safetensors"),
        (safetensors("{", &[]), "header is damaged"),
        (safetensors("[]", &[]), "header is damaged"),
        (safetensors(&"[".repeat(100_000), &[]), "header is damaged"),
        (safetensors("\u{0}\u{1}", &[]), "header is damaged"),
        (safetensors(&good, &[0; 7]), "truncated"),
        (safetensors(&tensor("F32", "[3]", "[0,8]"), &[0; 8]), "does not fit"),
        (safetensors(&tensor("F32", "[2]", "[8,0]"), &[0; 8]), "bytes 8 to 0"),
        (
            safetensors(&tensor("F32", "[2]", "[0,18446744073709551615]"), &[0; 8]),
            "truncated",
        ),
        (
            safetensors(&tensor("F32", "[4611686018427387904,4]", "[0,0]"), &[0; 8]),
            "does not fit",
        ),
        (
            safetensors(&tensor("F32", "[-1]", "[0,8]"), &[0; 8]),
            "header is damaged",
        ),
        (
            safetensors(&tensor("F32", "[1,1,1,1,1,1,1,1,2]", "[0,8]"), &[0; 8]),
            "9 dimensions",
        ),
        (safetensors(&tensor("Q9", "[2]", "[0,8]"), &[0; 8]), "unknown dtype Q9"),
        (safetensors(&tensor("F64", "[1]", "[0,8]"), &[0; 8]), "F64"),
        (safetensors(&tensor("I64", "[1]", "[0,8]"), &[0; 8]), "I64"),
        (safetensors(&tensor("U8", "[8]", "[0,8]"), &[0; 8]), "U8"),
        (safetensors(&good, &nan), "tensor t holds NaN or infinity at element 1"),
        (
            safetensors(&tensor("F16", "[4]", "[0,8]"), &[0x7c; 8]),
            "tensor t holds NaN",
        ),
        (
            safetensors(&tensor("BF16", "[4]", "[0,8]"), &[0x80, 0x7f, 0, 0, 0, 0, 0, 0]),
            "tensor t holds NaN",
        ),
        (
            safetensors(&format!("{},{}", &good[..good.len() - 1], &good[1..]), &[0; 8]),
            "described twice",
        ),
        (
            safetensors(
                &format!("{},{}", &good[..good.len() - 1], good[1..].replace("\"t\"", "\"u\"")),
                &[0; 8],
            ),
            "overlap",
        ),
    ];
    for (bytes, expected) in cases {
        let message = refused(&[config(), ("model.safetensors", bytes)]);
        assert!(message.contains(expected), "{message} instead of {expected}");
    }
    assert!(read_all(directory(&[config(), ("model.safetensors", safetensors(&good, &[0; 8]))]).path()).is_ok());
}

#[test]
fn truncated_and_flipped_files_never_panic() {
    let whole = std::fs::read(golden("llama/model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in (0..whole.len()).step_by(97) {
        refused(&[config(), ("model.safetensors", whole[..length].to_vec())]);
    }
    let mut random = ChaCha8Rng::seed_from_u64(12);
    for _ in 0..600 {
        let mut damaged = whole.clone();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..header);
            damaged[at] ^= 1 << random.random_range(0..8);
        }
        match read_all(directory(&[config(), ("model.safetensors", damaged)]).path()) {
            Ok(()) | Err(Error::InvalidFile { .. } | Error::Unsupported(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn bad_directories_are_refused() {
    let weights = || ("model.safetensors", safetensors("{}", &[]));
    let index = |map: &str| {
        (
            "model.safetensors.index.json",
            format!(r#"{{"weight_map":{map}}}"#).into_bytes(),
        )
    };
    let shard = || {
        (
            "a.safetensors",
            safetensors(r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]),
        )
    };
    let both = r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"u":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}"#;
    let both = safetensors(both, &[0; 4]);
    let cases = [
        (vec![weights()], "config.json is missing"),
        (vec![("config.json", b"[]".to_vec()), weights()], "not a JSON object"),
        (vec![("config.json", b"{".to_vec()), weights()], "not JSON"),
        (vec![("config.json", vec![0xff, 0xfe]), weights()], "not UTF-8"),
        (vec![config()], "there are no weights: none of model.safetensors"),
        (vec![config(), ("pytorch_model.bin", vec![])], "shorter than 4 bytes"),
        (vec![config(), index("[]")], "weight_map"),
        (vec![config(), index(r#"{"t":1}"#)], "no text"),
        (
            vec![config(), index(r#"{"t":"a.safetensors"}"#)],
            "shard a.safetensors is missing",
        ),
        (
            vec![config(), shard(), index(r#"{"u":"a.safetensors"}"#)],
            "tensor u is not in its shard",
        ),
        (
            vec![config(), index(r#"{"t":"../a.safetensors"}"#)],
            "not the name of a file",
        ),
        (
            vec![config(), index(r#"{"t":"/etc/passwd"}"#)],
            "not the name of a file",
        ),
        (vec![config(), index(r#"{"t":".."}"#)], "not the name of a file"),
        (vec![config(), index(r#"{"t":""}"#)], "not the name of a file"),
        (vec![config(), index(r#"{"t":"a\u0000b"}"#)], "not the name of a file"),
        (
            vec![
                config(),
                shard(),
                ("b.safetensors", both),
                index(r#"{"t":"a.safetensors","u":"b.safetensors"}"#),
            ],
            "there twice",
        ),
        (
            vec![config(), weights(), ("tokenizer.json", b"{}".to_vec())],
            "tokenizer.json",
        ),
        (vec![config(), weights(), ("vocab.json", b"{}".to_vec())], "merges.txt"),
        (
            vec![config(), weights(), ("tokenizer.model", vec![])],
            "tokenizer.model",
        ),
        (
            vec![
                config(),
                weights(),
                ("tokenizer_config.json", br#"{"chat_template": 5}"#.to_vec()),
            ],
            "chat_template",
        ),
        (
            vec![config(), weights(), ("chat_template.jinja", b"{% x %}".to_vec())],
            "chat_template",
        ),
        (
            vec![
                config(),
                weights(),
                ("generation_config.json", br#"{"eos_token_id": "x"}"#.to_vec()),
            ],
            "eos_token_id",
        ),
    ];
    for (files, expected) in cases {
        let message = refused(&files);
        assert!(message.contains(expected), "{message} instead of {expected}");
    }
    assert!(matches!(
        read_all(Path::new("/nowhere/at/all")),
        Err(Error::NotFound(_))
    ));
    assert!(read_all(directory(&[config(), shard(), index(r#"{"t":"a.safetensors"}"#)]).path()).is_ok());
}

#[test]
fn text_assets_are_found() {
    let named = br#"{"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}!"}],
        "bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#;
    let weights = ("model.safetensors", safetensors("{}", &[]));
    let eos = ("generation_config.json", br#"{"eos_token_id": [7, 3, 7]}"#.to_vec());
    let folder = directory(&[
        config(),
        weights.clone(),
        ("tokenizer_config.json", named.to_vec()),
        eos,
    ]);
    let assets = open_hugging_face(folder.path()).unwrap().text_assets().unwrap();
    assert!(assets.tokenizer.is_none());
    assert_eq!(assets.end_tokens, [3, 7]);
    let user = candle_models::ChatMessage {
        role: "user".into(),
        content: "x".into(),
    };
    assert_eq!(
        assets
            .chat_template
            .unwrap()
            .render(std::slice::from_ref(&user))
            .unwrap(),
        "<s>!"
    );

    let config = ("config.json", br#"{"eos_token_id": 2}"#.to_vec());
    let folder = directory(&[
        config,
        weights,
        ("chat_template.jinja", b"file".to_vec()),
        ("tokenizer_config.json", named.to_vec()),
    ]);
    let assets = open_hugging_face(folder.path()).unwrap().text_assets().unwrap();
    assert_eq!(assets.end_tokens, [2]);
    assert_eq!(assets.chat_template.unwrap().render(&[user]).unwrap(), "file");
}

#[test]
fn names_get_their_prefix_and_buffers_are_no_weights() {
    let entry = |name: &str, dtype: &str, at: u64| {
        format!(
            r#""{name}":{{"dtype":"{dtype}","shape":[1],"data_offsets":[{at},{}]}}"#,
            at + 4
        )
    };
    let header = [
        entry("wte.weight", "F32", 0),
        entry("h.0.attn.bias", "I32", 4),
        entry("h.0.attn.c_attn.bias", "F32", 8),
        entry("lm_head.weight", "F32", 12),
    ];
    let weights = (
        "model.safetensors",
        safetensors(&format!("{{{}}}", header.join(",")), &[0; 16]),
    );
    let folder = directory(&[config(), weights]);
    let source = open_hugging_face(folder.path()).unwrap();
    assert_eq!(
        source.names(),
        [
            "lm_head.weight",
            "transformer.h.0.attn.c_attn.bias",
            "transformer.wte.weight"
        ]
    );
    assert!(matches!(source.load("wte.weight"), Err(Error::NotFound(_))));
    assert_eq!(source.load("transformer.wte.weight").unwrap().shape(), [1]);
}

#[test]
fn damaged_tokenizer_files_never_panic() {
    let mut random = ChaCha8Rng::seed_from_u64(13);
    for folder in ["llama-bpe", "llama-legacy"] {
        let whole = std::fs::read_to_string(golden(&format!("text/{folder}/tokenizer.json"))).unwrap();
        let rules = whole.find("\"vocab\"").unwrap();
        for round in 0..600 {
            let mut damaged = whole.clone().into_bytes();
            let range = if round % 2 == 0 { rules } else { damaged.len() };
            for _ in 0..random.random_range(1..3) {
                damaged[random.random_range(0..range)] = b"0129[]{}\",:aZ-_ \\\xff"[random.random_range(0..18)];
            }
            let Ok(damaged) = String::from_utf8(damaged) else {
                continue;
            };
            match Tokenizer::from_json(&damaged) {
                Ok(tokenizer) => {
                    let _ = tokenizer
                        .encode("Hello 123 <s> é 语 \u{0}  ")
                        .map(|ids| tokenizer.decode(&ids));
                }
                Err(Error::InvalidFile { .. } | Error::Unsupported(_)) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn odd_tokenizers_are_refused_by_name() {
    let with = |decoder: &str, vocabulary: &str| {
        let json = format!(
            r#"{{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,"post_processor":null,
            "decoder":{decoder},"model":{{"type":"BPE","vocab":{vocabulary},"merges":[]}}}}"#
        );
        Tokenizer::from_json(&json).unwrap_err().to_string()
    };
    assert!(with("null", r#"{"a":0}"#).contains("no decoder"));
    assert!(
        with(
            r#"{"type":"CTC","pad_token":"<pad>","word_delimiter_token":"|","cleanup":true}"#,
            r#"{"a":0}"#
        )
        .contains("CTC")
    );
    let byte_level = r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}"#;
    assert!(with(byte_level, "{}").contains("empty"));
    assert!(with(byte_level, r#"{"a":4294967295}"#).contains("4294967295"));
}
