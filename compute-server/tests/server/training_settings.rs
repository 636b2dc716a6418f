//! Training settings in a model's configuration, and the tape that shows what they do.

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::support::{Client, TestServer, assert_status, tiny, within};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];

async fn configure(client: &Client, transaction: Option<TransactionContext>, config: &str) -> Result<(), Status> {
    let request = UpdateModelRequest {
        transaction,
        name: "m".into(),
        config_json: config.into(),
    };
    client.models.clone().update_model(request).await.map(drop)
}

/// A step with the configured learning rate, or with one of its own; the one that was used.
async fn step(client: &Client, learning_rate: Option<f64>) -> f64 {
    client.batch("m", None, &[A]).await.unwrap();
    let request = StepRequest {
        transaction: None,
        model: "m".into(),
        options: Some(AdamWOptions {
            learning_rate,
            ..Default::default()
        }),
        adapter: String::new(),
    };
    let response = client.training.clone().step(request).await.unwrap().into_inner();
    response.step.unwrap().options.unwrap().learning_rate.unwrap()
}

fn held(tape: &[TapeEntry]) -> u64 {
    tape.iter().map(|entry| entry.bytes).sum()
}

#[tokio::test]
async fn the_learning_rate_follows_the_schedule_and_changes_by_update() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let linear = r#"{"learning_rate": 0.5, "schedule": "linear", "warmup_steps": 2, "schedule_steps": 4}"#;
    configure(&client, None, linear).await.unwrap();
    assert_eq!(step(&client, None).await, 0.25);
    assert_eq!(step(&client, None).await, 0.5);
    assert_eq!(step(&client, Some(0.125)).await, 0.125);
    assert_eq!(step(&client, None).await, 0.25);
    assert_eq!(step(&client, None).await, 0.0);
    configure(&client, None, r#"{"learning_rate": 0.75}"#).await.unwrap();
    assert_eq!(step(&client, None).await, 0.75);
    let config = client.describe("m", None).await.unwrap().config_json;
    assert!(!config.contains("schedule"), "{config}");
}

#[tokio::test]
async fn bad_settings_are_refused_by_name() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    for (config, named) in [
        (r#"{"schedule": "exponential"}"#, "\"constant\", \"linear\", \"cosine\""),
        (
            r#"{"schedule": "cosine", "schedule_steps": 3, "warmup_steps": 3}"#,
            "`schedule_steps`",
        ),
        (r#"{"warmup_steps": -1}"#, "`warmup_steps`"),
        (r#"{"recompute": "everything"}"#, "\"none\", \"blocks\""),
        (r#"{"recompute": 0}"#, "`recompute`"),
        (r#"{"compress_activations": "zip"}"#, "\"none\", \"bf16\""),
        (r#"{"decay_norms_and_biases": "no"}"#, "`decay_norms_and_biases`"),
    ] {
        let update = configure(&client, None, config).await;
        let message = update.as_ref().unwrap_err().message().to_owned();
        assert!(message.contains(named), "{config}: {message}");
        assert_status(update, Code::InvalidArgument, "22023");
        let mut load = tiny("n");
        load.config_json.truncate(load.config_json.len() - 1);
        load.config_json = format!("{},{}", load.config_json, &config[1..]);
        assert_status(client.load(load).await, Code::InvalidArgument, "22023");
    }
}

#[tokio::test]
async fn recomputing_changes_the_tape_and_not_the_model() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    assert!(client.tape("m").await.is_empty());
    client.load(tiny("plain")).await.unwrap();
    client.batch("m", None, &[A, B]).await.unwrap();
    let all = client.tape("m").await;
    let shape = (all[0].operation.as_str(), all[0].shape.as_slice(), all[0].dtype());
    assert_eq!(shape, ("embedding", [11, 32].as_slice(), DataType::F32));
    assert!(
        all.iter()
            .enumerate()
            .all(|(place, entry)| entry.position as usize == place && entry.model == "m")
    );
    client.step("m", None).await.unwrap();
    // Within the transaction that sets it, and after.
    configure(&client, within("t"), r#"{"recompute": "blocks"}"#)
        .await
        .unwrap();
    client.batch("m", within("t"), &[A, B]).await.unwrap();
    let blocks = client.tape("m").await;
    assert!(held(&blocks) * 2 < held(&all), "{} {}", held(&blocks), held(&all));
    let recomputed = |entry: &TapeEntry| entry.storage() == ActivationStorage::Recomputed && entry.operation == "query";
    assert_eq!(blocks.iter().filter(|entry| recomputed(entry)).count(), 2);
    client.publish("t").await.unwrap();
    client.step("m", None).await.unwrap();
    for _ in 0..2 {
        client.batch("plain", None, &[A, B]).await.unwrap();
        client.step("plain", None).await.unwrap();
    }
    assert_eq!(
        client.parameters("m", None).await.unwrap(),
        client.parameters("plain", None).await.unwrap()
    );
    configure(&client, None, r#"{"compress_activations": "bf16"}"#)
        .await
        .unwrap();
    client.batch("m", None, &[A, B]).await.unwrap();
    let compressed = client.tape("m").await;
    assert!(held(&compressed) < held(&all));
    assert!(
        compressed
            .iter()
            .any(|entry| entry.storage() == ActivationStorage::Compressed)
    );
}

#[tokio::test]
async fn settings_survive_a_checkpoint() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let config = r#"{"schedule": "cosine", "schedule_steps": 9, "recompute": 2, "decay_norms_and_biases": false}"#;
    configure(&client, None, config).await.unwrap();
    client.checkpoint("m", None).await.unwrap();
    let restored = LoadModelRequest {
        name: "restored".into(),
        source: "checkpoint://m/0".into(),
        ..Default::default()
    };
    client.load(restored).await.unwrap();
    let config = client.describe("restored", None).await.unwrap().config_json;
    for part in [
        "\"schedule\":\"cosine\"",
        "\"recompute\":2",
        "\"decay_norms_and_biases\":false",
    ] {
        assert!(config.contains(part), "{config}");
    }
}
