//! Models in every format of weights: the same tokens from each, by SQL and after `compute-server convert`; damaged ones are
//! refused by name.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use end_to_end_tests::database_errors::{report, sqlstate};
use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::{programs, repository};
use postgres::Client;

fn convert(source: &Path, target: &Path, options: &[&str]) -> Output {
    let mut command = Command::new(programs().join("compute-server"));
    command
        .arg("convert")
        .arg(source)
        .arg(target)
        .args(options)
        .output()
        .unwrap()
}

fn load(client: &mut Client, name: &str, source: &str) -> Result<(), postgres::Error> {
    let insert = "INSERT INTO llm.models (name, source) VALUES ($1, $2)";
    client.execute(insert, &[&name, &source]).map(drop)
}

fn completions(client: &mut Client, model: &str) -> Vec<String> {
    let query = "SELECT completion FROM llm.generations WHERE model = $1 AND max_tokens = 16
                 AND prompt = ANY (ARRAY['the number of', 'returns', 'a']) ORDER BY prompt";
    client
        .query(query, &[&model])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect()
}

/// The folder of a fresh checkpoint of a model.
fn exported(fixture: &Fixture, client: &mut Client, model: &str) -> std::path::PathBuf {
    client
        .execute("INSERT INTO llm.checkpoints (model) VALUES ($1)", &[&model])
        .unwrap();
    let query = "SELECT path FROM llm.checkpoints WHERE model = $1";
    let path: String = client.query_one(query, &[&model]).unwrap().get(0);
    fixture.server.data_folder().join(path)
}

#[test]
fn every_converted_format_gives_the_same_text() {
    let mut fixture = Fixture::with_models();
    let mut client = fixture.connect();
    for model in ["tiny", "endless"] {
        let expected = completions(&mut client, model);
        let mut source = exported(&fixture, &mut client, model);
        for (name, options) in [
            ("hf", &["--shard-size", "40K"][..]),
            ("jsonl", &["--format", "jsonl", "--shard-size", "40K"]),
            ("m.npz", &[]),
            ("m.gguf", &["--dtype", "f32"]),
            ("back", &["--format", "safetensors"]),
        ] {
            let name = format!("{model}-{name}");
            let target = fixture.server.models_folder().join(&name);
            let done = convert(&source, &target, options);
            assert!(
                done.status.success(),
                "{name}: {}",
                String::from_utf8_lossy(&done.stderr)
            );
            assert!(String::from_utf8_lossy(&done.stdout).starts_with("wrote "), "{done:?}");
            assert!(String::from_utf8_lossy(&done.stderr).contains("100 %"), "{done:?}");
            load(&mut client, &name, &name).unwrap_or_else(|error| panic!("{name}: {}", report(&error)));
            assert_eq!(completions(&mut client, &name), expected, "{name}");
            source = target;
        }
    }
    // What was loaded comes back from its files after a crash.
    let before = completions(&mut client, "tiny-jsonl");
    fixture.server.kill();
    fixture.server.restart();
    assert_eq!(completions(&mut fixture.connect(), "tiny-jsonl"), before);
}

#[test]
fn files_of_numpy_and_pytorch_score_as_the_folder_does() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    let models = fixture.server.models_folder();
    let golden = repository().join("tests/golden");
    let score = |client: &mut Client, name: &str| -> Vec<Option<f32>> {
        let query = "SELECT logprob FROM llm.token_scores WHERE model = $1 AND tokens = $2 ORDER BY position";
        let rows = client.query(query, &[&name, &vec![1, 2, 3, 5, 8, 13]]).unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    fs::create_dir(models.join("gpt2")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden.join("gpt2").join(name), models.join("gpt2").join(name)).unwrap();
    }
    load(&mut client, "expected", "gpt2").unwrap();
    let expected = score(&mut client, "expected");
    for file in ["gpt2.npz", "gpt2.bin", "pg_gpt2-converted.npz", "pg_gpt2-exported.npz"] {
        let source = format!("gpt2/{file}");
        fs::copy(golden.join("formats").join(file), models.join(&source)).unwrap();
        load(&mut client, file, &source).unwrap_or_else(|error| panic!("{file}: {}", report(&error)));
        assert_eq!(score(&mut client, file), expected, "{file}");
    }
    fs::create_dir_all(models.join("manifest/shards")).unwrap();
    for name in ["model.jsonl", "a.bin", "shards/b.bin"] {
        fs::copy(
            golden.join("formats/gpt2-manifest").join(name),
            models.join("manifest").join(name),
        )
        .unwrap();
    }
    for (name, source) in [("folder", "manifest"), ("manifest", "manifest/model.jsonl")] {
        load(&mut client, name, source).unwrap();
        assert_eq!(score(&mut client, name), expected, "{name}");
    }

    let manifest = models.join("manifest/model.jsonl");
    let whole = fs::read_to_string(&manifest).unwrap();
    for (from, to, expected) in [
        ("shards/b.bin", "/etc/passwd", "must be a relative path"),
        ("shards/b.bin", "../gpt2/model.safetensors", "must be a relative path"),
        ("shards/b.bin", "b.bin", "is missing"),
        ("\"range\": [7, 20]", "\"range\": [8, 21]", "c_attn.weight"),
        ("\"sha256\": \"", "\"sha256\": \"x", "64 hexadecimal digits"),
    ] {
        fs::write(&manifest, whole.replace(from, to)).unwrap();
        let error = load(&mut client, "bad", "manifest").unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{}", report(&error));
        assert!(report(&error).contains(expected), "{}", report(&error));
        let loaded = client.query("SELECT FROM llm.models WHERE name = 'bad'", &[]).unwrap();
        assert!(loaded.is_empty());
    }
    fs::write(&manifest, whole).unwrap();
    fs::remove_file(models.join("manifest/a.bin")).unwrap();
    std::os::unix::fs::symlink(
        golden.join("formats/gpt2-manifest/a.bin"),
        models.join("manifest/a.bin"),
    )
    .unwrap();
    let error = load(&mut client, "bad", "manifest").unwrap_err();
    assert!(report(&error).contains("symbolic link"), "{}", report(&error));
    fixture.assert_idle();
}

#[test]
fn convert_plans_refuses_and_leaves_nothing() {
    let folder = end_to_end_tests::state_folder().join(format!("convert-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let golden = repository().join("tests/golden");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let planned = convert(
        &golden.join("gpt2"),
        &folder.join("m.gguf"),
        &["--dry-run", "--dtype", "q8_0"],
    );
    let listed = text(&planned.stdout);
    assert!(
        planned.status.success() && listed.contains("blk.1.ffn_down.weight\tf16"),
        "{listed}"
    );
    assert!(listed.contains("nothing was written"), "{listed}");
    fs::write(folder.join("there"), "mine").unwrap();
    for (source, target, options, expected) in [
        ("gpt2", "there", &[][..], "exists already"),
        (
            "gpt2",
            "x",
            &["--format", "zip"],
            "known are safetensors, jsonl, npz, gguf",
        ),
        ("gpt2", "x", &["--dtype", "q8_0"], "for quantised weights write gguf"),
        ("nothing", "x", &[], "nothing"),
        ("text", "x", &[], "config.json is missing"),
    ] {
        let refused = convert(&golden.join(source), &folder.join(target), options);
        assert!(!refused.status.success());
        assert!(text(&refused.stderr).contains(expected), "{}", text(&refused.stderr));
    }
    let left: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["there"]);
    fs::remove_dir_all(&folder).unwrap();
}
