//! Manifests that contradict themselves or their files: always an error that names the tensor.

use std::path::Path;

use candle_models::Error;
use candle_models::formats::{TensorSource, open_hugging_face};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The bytes of every file: 24 numbers.
fn numbers() -> Vec<u8> {
    (0..24).flat_map(|number| (number as f32).to_le_bytes()).collect()
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A line for a stretch of `a.bin`, with some fields changed; null takes one away.
fn line(name: &str, shape: Value, range: [u64; 2], changes: Value) -> Value {
    let bytes = numbers();
    let stretch = bytes.get(range[0] as usize..range[1] as usize).unwrap_or_default();
    let mut line = json!({"name": name, "dtype": "F32", "shape": shape, "file": "a.bin", "byte_range": range,
        "sha256": digest(stretch)});
    for (field, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(line.as_object_mut().unwrap().remove(field)),
            value => line[field] = value.clone(),
        }
    }
    line
}

/// A piece of a `[6, 2]` tensor `t`: rows `start` to `end`.
fn rows(start: u64, end: u64) -> Value {
    let range = [8 * start.min(6), 8 * end.min(6)];
    line(
        "t",
        json!([6, 2]),
        range,
        json!({"shard": {"axis": 0, "range": [start, end]}}),
    )
}

fn folder(lines: &[Value]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(folder.path().join("model.jsonl"), text.join("\n")).unwrap();
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    std::fs::write(folder.path().join("a.bin"), numbers()).unwrap();
    folder
}

fn read_all(path: &Path) -> Result<(), Error> {
    let source = open_hugging_face(path)?;
    source
        .names()
        .into_iter()
        .try_for_each(|name| source.load(name).map(drop))
}

#[test]
fn bad_lines_are_refused_by_the_tensors_name() {
    let plain = |changes: Value| vec![line("t", json!([2, 3]), [0, 24], changes)];
    let header = |changes: Value| {
        let mut header = json!({"format": "candle_fdw.weights", "version": 1});
        header
            .as_object_mut()
            .unwrap()
            .extend(changes.as_object().unwrap().clone());
        vec![header, line("t", json!([2]), [0, 8], json!({}))]
    };
    let cases = [
        (
            plain(json!({"file": "/etc/passwd"})),
            "tensor t: file \"/etc/passwd\" must be a relative path",
        ),
        (plain(json!({"file": "../a.bin"})), "must be a relative path"),
        (plain(json!({"file": "x/../../a.bin"})), "must be a relative path"),
        (plain(json!({"file": ""})), "must be a relative path"),
        (plain(json!({"file": "a\u{0}b"})), "must be a relative path"),
        (
            plain(json!({"file": "missing.bin"})),
            "tensor t: file \"missing.bin\" is missing",
        ),
        (
            plain(json!({"file": "model.jsonl", "byte_range": [0, 4000]})),
            "byte_range is 0 to 4000",
        ),
        (
            plain(json!({"byte_range": [80, 104]})),
            "has 96 bytes, and byte_range is 80 to 104",
        ),
        (plain(json!({"byte_range": [24, 0]})), "does not fit [2, 3]"),
        (plain(json!({"byte_range": [0, 20]})), "takes 24 bytes"),
        (plain(json!({"byte_range": [0]})), "line 1, tensor t"),
        (plain(json!({"byte_range": null})), "missing field `byte_range`"),
        (plain(json!({"dtype": "F16"})), "takes 12 bytes"),
        (plain(json!({"dtype": "I32"})), "tensor t: unknown dtype \"I32\""),
        (plain(json!({"shape": [2, -3]})), "line 1, tensor t"),
        (plain(json!({"shape": [1u64 << 40, 1u64 << 40]})), "impossibly many"),
        (
            plain(json!({"shape": [6, 1, 1, 1, 1, 1, 1, 1, 1]})),
            "at most 8 dimensions",
        ),
        (
            plain(json!({"shape": [6], "transposed": true})),
            "only matrices can be transposed",
        ),
        (plain(json!({"sha256": "00"})), "64 hexadecimal digits"),
        (plain(json!({"sha256": "é".repeat(32)})), "64 hexadecimal digits"),
        (
            plain(json!({"sha256": "0".repeat(64)})),
            "tensor t is damaged: its SHA-256",
        ),
        (plain(json!({"sha256": null})), "missing field `sha256`"),
        (plain(json!({"crc": 1})), "unknown field `crc`"),
        (
            plain(json!({"shard": {"axis": 2, "range": [0, 1]}})),
            "it has no axis 2",
        ),
        (
            plain(json!({"shard": {"axis": 0, "range": [0, 3]}})),
            "shard 0 to 3 is outside of axis 0",
        ),
        (
            plain(json!({"shard": {"axis": 0, "range": [1, 1]}})),
            "outside of axis 0",
        ),
        (
            vec![rows(0, 3), rows(4, 6)],
            "tensor t: the shard for 3 to 4 of axis 0 is missing",
        ),
        (vec![rows(0, 3)], "tensor t: the shard for 3 to 6 of axis 0 is missing"),
        (vec![rows(1, 6)], "tensor t: the shard for 0 to 1 of axis 0 is missing"),
        (
            vec![rows(0, 3), rows(2, 6)],
            "tensor t: its shard overlaps another, from 2 to 3",
        ),
        (vec![rows(0, 6), rows(0, 6)], "overlaps another"),
        (
            vec![rows(0, 3), rows(3, 7)],
            "shard 3 to 7 is outside of axis 0, which has 6",
        ),
        (
            [plain(json!({})), plain(json!({}))].concat(),
            "line 2, tensor t: it is described twice",
        ),
        ([vec![rows(0, 6)], plain(json!({}))].concat(), "it is described twice"),
        (
            vec![
                rows(0, 3),
                line(
                    "t",
                    json!([6, 3]),
                    [24, 60],
                    json!({"shard": {"axis": 0, "range": [3, 6]}}),
                ),
            ],
            "is not that of its other pieces",
        ),
        (
            vec![
                line("t", json!([2]), [0, 8], json!({})),
                line("u", json!([2]), [4, 12], json!({})),
            ],
            "the bytes of tensor t (line 1) and tensor u (line 2) overlap",
        ),
        (header(json!({"version": 2})), "version 2"),
        (header(json!({"format": "other"})), "\"other\""),
        (header(json!({"x": 1})), "unknown field `x`"),
        (vec![json!([1])], "line 1"),
        (vec![json!("t")], "line 1"),
    ];
    for (lines, expected) in cases {
        match read_all(folder(&lines).path()) {
            Err(error @ (Error::InvalidFile { .. } | Error::Unsupported(_))) => {
                let message = error.to_string();
                assert!(message.contains(expected), "{message}, not {expected}");
            }
            other => panic!("{other:?}, not {expected}"),
        }
    }
    assert!(read_all(folder(&[rows(3, 6), rows(0, 3)]).path()).is_ok());
    assert!(read_all(folder(&header(json!({"config": {}}))).path()).is_ok());
}

#[test]
fn no_symbolic_link_leads_out_of_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret.bin"), numbers()).unwrap();
    let one = folder(&[line("t", json!([2]), [0, 8], json!({"file": "x/secret.bin"}))]);
    std::os::unix::fs::symlink(outside.path(), one.path().join("x")).unwrap();
    let error = read_all(one.path()).unwrap_err().to_string();
    assert!(error.contains("symbolic link out of the manifest's folder"), "{error}");
    let within = folder(&[line("t", json!([2]), [0, 8], json!({"file": "b.bin"}))]);
    std::os::unix::fs::symlink("a.bin", within.path().join("b.bin")).unwrap();
    assert!(read_all(within.path()).is_ok());
}

#[test]
fn truncated_manifests_never_panic() {
    let whole = std::fs::read(crate::golden("formats/gpt2-manifest/model.jsonl")).unwrap();
    for length in (0..whole.len()).step_by(13) {
        let folder = folder(&[]);
        std::fs::write(folder.path().join("model.jsonl"), &whole[..length]).unwrap();
        match read_all(folder.path()) {
            Ok(()) | Err(Error::InvalidFile { .. } | Error::Unsupported(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
}
