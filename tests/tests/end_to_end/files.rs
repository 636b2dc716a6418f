//! Weights from files: the golden directories load and agree with PyTorch, damaged ones are refused.

use std::fs;
use std::path::{Path, PathBuf};

use end_to_end_tests::database_errors::{report, sqlstate};
use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::repository;
use postgres::Client;

/// The directories below `tests/golden` that hold a model: single and sharded, f32, f16 and bf16.
fn golden_models() -> Vec<PathBuf> {
    let folder = repository().join("tests/golden");
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").exists())
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no golden models");
    found
}

/// Those whose weights are f32 in one file, for tests that damage it.
fn single_file_models() -> Vec<PathBuf> {
    let names = ["gpt2", "llama", "qwen2"];
    golden_models()
        .into_iter()
        .filter(|path| names.iter().any(|name| path.ends_with(name)))
        .collect()
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

fn load(client: &mut Client, source: &str) -> Result<(), postgres::Error> {
    client
        .execute(
            "INSERT INTO llm.models (name, source) VALUES ('loaded', $1)",
            &[&source],
        )
        .map(drop)
}

#[test]
fn golden_models_load_and_score() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    for model in golden_models() {
        let name = model.file_name().unwrap().to_str().unwrap();
        copy_folder(&model, &fixture.server.models_folder().join(name));
        load(&mut client, name).unwrap_or_else(|error| panic!("{name}: {}", report(&error)));
        let tokens = vec![1, 2, 3, 4, 5];
        let row = client
            .query_one(
                "SELECT count(*), count(logprob), max(logprob)::float8 FROM llm.token_scores WHERE model = 'loaded' AND tokens = $1",
                &[&tokens],
            )
            .unwrap();
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (5, 4), "{name}");
        assert!(row.get::<_, f64>(2) < 0.0, "{name}");
        client.execute("DELETE FROM llm.models", &[]).unwrap();
    }
}

/// One way to damage a model directory.
type Damage = fn(&Path);

const DAMAGES: &[(&str, Damage)] = &[
    ("no weights", |model| {
        fs::remove_file(model.join("model.safetensors")).unwrap()
    }),
    ("no configuration", |model| {
        fs::remove_file(model.join("config.json")).unwrap()
    }),
    ("truncated weights", |model| {
        edit(model, |bytes| bytes.truncate(bytes.len() / 2))
    }),
    ("empty weights", |model| edit(model, Vec::clear)),
    ("a header of 2^60 bytes", |model| {
        edit(model, |bytes| bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes()))
    }),
    ("a header longer than the file", |model| {
        edit(model, |bytes| {
            let length = bytes.len() as u64;
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        });
    }),
    ("a flipped bit in the header", |model| {
        edit(model, |bytes| bytes[9] ^= 0x10)
    }),
    ("a foreign file", |model| {
        edit(model, |bytes| *bytes = b"#!/bin/sh\necho hello\n".repeat(50))
    }),
    ("weights that are NaN", |model| {
        edit(model, |bytes| {
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
            for value in bytes[header..].as_chunks_mut::<4>().0 {
                *value = f32::NAN.to_le_bytes();
            }
        });
    }),
    ("a foreign architecture", |model| {
        configure(model, "\"model_type\"", "\"model_type\": \"t5\", \"was\"")
    }),
    ("configuration that is no JSON", |model| {
        fs::write(model.join("config.json"), "{\"n_layer\": ").unwrap()
    }),
];

fn edit(model: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let file = model.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    change(&mut bytes);
    fs::write(file, bytes).unwrap();
}

fn configure(model: &Path, from: &str, to: &str) {
    let file = model.join("config.json");
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(file, text.replacen(from, to, 1)).unwrap();
}

#[test]
fn damaged_models_are_refused_and_change_nothing() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    for model in single_file_models() {
        for (what, damage) in DAMAGES {
            let copy = fixture.server.models_folder().join("damaged");
            let _ = fs::remove_dir_all(&copy);
            copy_folder(&model, &copy);
            damage(&copy);
            let error = load(&mut client, "damaged").expect_err(what);
            let state = sqlstate(&error);
            assert!(
                matches!(state, "22023" | "42704" | "0A000"),
                "{what}: {state} {}",
                report(&error)
            );
        }
    }
    assert_eq!(client.query("SELECT * FROM llm.models", &[]).unwrap().len(), 0);
    fixture.assert_idle();
}

#[test]
fn a_configuration_that_contradicts_the_weights_is_refused() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    for model in single_file_models() {
        let copy = fixture.server.models_folder().join("contradicted");
        let _ = fs::remove_dir_all(&copy);
        copy_folder(&model, &copy);
        let file = copy.join("config.json");
        let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        let vocabulary = config["vocab_size"].as_u64().unwrap();
        config["vocab_size"] = (vocabulary + 1).into();
        fs::write(&file, config.to_string()).unwrap();
        let error = load(&mut client, "contradicted").unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{}", report(&error));
    }
}

#[cfg(unix)]
#[test]
fn links_out_of_the_models_folder_are_refused() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    let outside = tempfile::tempdir().unwrap();
    copy_folder(&golden_models()[0], outside.path());
    std::os::unix::fs::symlink(outside.path(), fixture.server.models_folder().join("link")).unwrap();
    let error = load(&mut client, "link").unwrap_err();
    assert_eq!(sqlstate(&error), "22023", "{}", report(&error));
}
