//! The HTTP endpoint, as OpenAI's own Python package uses it, and beside SQL.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::server::ComputeServer;

/// A folder of models with `chat`: random weights, a tokenizer of letters, and a chat template.
fn models() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let chat = folder.path().join("chat");
    std::fs::create_dir(&chat).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    for file in [
        "llama/config.json",
        "llama/model.safetensors",
        "chat/tokenizer.json",
        "chat/tokenizer_config.json",
    ] {
        let file: PathBuf = golden.join(file);
        std::fs::copy(&file, chat.join(file.file_name().unwrap())).unwrap();
    }
    folder
}

#[test]
fn the_openai_package() {
    let Some(python) = std::env::var_os("CANDLE_TEST_PYTHON") else {
        println!("skipped: CANDLE_TEST_PYTHON names no Python with the package openai");
        return;
    };
    let models = models();
    let tokens = models.path().join("tokens");
    std::fs::write(&tokens, "tester right-token-0123456789\n").unwrap();
    let server = ComputeServer::start_with_models_and(models.path(), &["--token-file", tokens.to_str().unwrap()]);
    let address = server.http().expect("HTTP is on");
    let fixture = Fixture::over(server);
    let mut client = fixture.connect();
    client
        .batch_execute(
            "CREATE USER MAPPING FOR CURRENT_USER SERVER compute OPTIONS (token 'right-token-0123456789');
             INSERT INTO llm.models (name, source) VALUES ('chat', 'chat');
             INSERT INTO llm.adapters (model, name) VALUES ('chat', 'style')",
        )
        .unwrap();
    let script = end_to_end_tests::repository().join("tests/python/openai_client.py");
    let output = std::process::Command::new(python)
        .arg(script)
        .arg(format!("http://{address}/v1"))
        .arg("right-token-0123456789")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fixture.assert_idle();
}

#[test]
fn requests_over_http_are_seen_and_cancelled_in_sql() {
    let fixture = Fixture::with_models();
    let address = fixture.server.http().expect("HTTP is on");
    let body = r#"{"model": "endless", "prompt": "a", "max_tokens": 150000}"#;
    let mut stream = TcpStream::connect(address).unwrap();
    let length = body.len();
    write!(
        stream,
        "POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    fixture.wait_for_work("generate");
    let mut client = fixture.connect();
    let cancelled = client
        .execute(
            "DELETE FROM llm.requests WHERE kind = 'generate' AND model = 'endless'",
            &[],
        )
        .unwrap();
    assert_eq!(cancelled, 1);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.0 499") && answer.contains("\"cancelled\""),
        "{answer}"
    );
    fixture.assert_idle();
}

/// What monitoring sees without an imported schema, and with which rights.
#[test]
fn statistics_are_for_monitors() {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client
        .batch_execute(
            "SELECT * FROM llm.generations WHERE model = 'tiny' AND prompt = 'a' AND max_tokens = 5;
             DROP ROLE IF EXISTS statistics_monitor; CREATE ROLE statistics_monitor LOGIN;
             DROP ROLE IF EXISTS statistics_stranger; CREATE ROLE statistics_stranger LOGIN;
             GRANT USAGE ON FOREIGN SERVER compute TO statistics_monitor, statistics_stranger;
             GRANT pg_monitor TO statistics_monitor;",
        )
        .unwrap();
    let counts = "SELECT (SELECT count(*) FROM candle.stat_requests), (SELECT count(*) FROM candle.stat_models),
                         (SELECT value FROM candle.stat_metrics
                          WHERE name = 'candle_generation_tokens_total' AND labels ->> 'model_name' = 'tiny')";
    let mut monitor = fixture.connect_as("statistics_monitor").unwrap();
    let row = monitor.query_one(counts, &[]).unwrap();
    let counted: (i64, i64, f64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(counted, (0, 2, 5.0));
    let mut stranger = fixture.connect_as("statistics_stranger").unwrap();
    for view in ["stat_requests", "stat_models", "stat_metrics"] {
        let error = stranger
            .query(&format!("SELECT * FROM candle.{view}"), &[])
            .unwrap_err();
        assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{error}");
    }
    client
        .batch_execute(
            "DROP OWNED BY statistics_monitor, statistics_stranger; DROP ROLE statistics_monitor, statistics_stranger",
        )
        .unwrap();
}
