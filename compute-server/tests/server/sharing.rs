//! `share` changed by an update of the configuration: in transactions, through crashes, and where it cannot be.

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::adapters::lora;
use crate::durability::restarted;
use crate::support::{Client, TestServer, assert_status, endless, sub, within};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];

fn deep(name: &str) -> LoadModelRequest {
    let config = r#"{"architecture":"gpt2","layers":4,"width":32,"heads":4,"context_length":32000,"vocabulary":280}"#;
    LoadModelRequest {
        name: name.into(),
        config_json: config.into(),
        seed: Some(1),
        ..Default::default()
    }
}

fn restored(name: &str, source: &str, config: &str) -> LoadModelRequest {
    LoadModelRequest {
        name: name.into(),
        source: source.into(),
        config_json: config.into(),
        ..Default::default()
    }
}

async fn share(client: &Client, transaction: Option<TransactionContext>, config: &str) -> Result<Model, Status> {
    let request = UpdateModelRequest {
        transaction,
        name: "m".into(),
        config_json: config.into(),
    };
    let updated = client.models.clone().update_model(request).await?;
    Ok(updated.into_inner().model.unwrap())
}

async fn digest(client: &Client, model: &str, transaction: Option<TransactionContext>) -> (String, u64) {
    let request = DigestModelRequest {
        transaction,
        model: model.into(),
        ..Default::default()
    };
    let digest = client.models.clone().digest_model(request).await.unwrap().into_inner();
    (digest.sha256, digest.step)
}

async fn train(client: &Client, model: &str, transaction: Option<TransactionContext>) {
    client.batch(model, transaction.clone(), &[A, B]).await.unwrap();
    client.step(model, transaction).await.unwrap();
}

async fn server() -> (TestServer, Client) {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(deep("m")).await.unwrap();
    (server, client)
}

#[tokio::test]
async fn blocks_take_weights_and_moments_of_the_first_and_keep_them_apart_again() {
    let (_server, client) = server().await;
    train(&client, "m", None).await;
    let before = client.describe("m", None).await.unwrap();
    let saved = client.checkpoint("m", None).await.unwrap();
    let source = format!("checkpoint://m/{}", saved.step);
    let row = share(&client, None, r#"{"share": 2, "learning_rate": 0.5}"#)
        .await
        .unwrap();
    assert!(row.parameters < before.parameters, "{row:?}");
    assert!(
        row.config_json.contains(r#""share":2"#) && row.config_json.contains("0.5"),
        "{row:?}"
    );
    assert_eq!(
        (row.step, row.seed, row.created_at, row.status.as_str()),
        (1, Some(1), before.created_at, "ready")
    );
    assert_eq!(client.steps("m").await.len(), 1);
    // A checkpoint that is restored with another "share" begins likewise.
    client.load(restored("n", &source, r#"{"share": 2}"#)).await.unwrap();
    assert_eq!(digest(&client, "m", None).await, digest(&client, "n", None).await);
    for model in ["m", "n"] {
        train(&client, model, None).await;
    }
    let shared = digest(&client, "m", None).await;
    assert_eq!((shared.clone(), shared.1), (digest(&client, "n", None).await, 2));

    // Without, every block goes on with a copy of its own; what the configuration does not name stays.
    share(&client, None, r#"{"learning_rate": 0.1}"#).await.unwrap();
    assert_eq!(digest(&client, "m", None).await, shared);
    let row = share(&client, None, r#"{"share": "none"}"#).await.unwrap();
    assert_eq!(row.parameters, before.parameters);
    assert!(!row.config_json.contains("share"), "{row:?}");
    let saved = client.checkpoint("n", None).await.unwrap();
    let source = format!("checkpoint://n/{}", saved.step);
    client.load(restored("o", &source, r#"{"share": 4}"#)).await.unwrap();
    for model in ["m", "o"] {
        train(&client, model, None).await;
    }
    assert_eq!(digest(&client, "m", None).await, digest(&client, "o", None).await);
    // The blocks have grown apart, so that taking the first one's again changes something.
    let apart = client.parameters("m", None).await.unwrap();
    share(&client, None, r#"{"share": "all"}"#).await.unwrap();
    share(&client, None, r#"{"share": "none"}"#).await.unwrap();
    assert_ne!(client.parameters("m", None).await.unwrap(), apart);
}

#[tokio::test]
async fn it_is_staged_rolled_back_and_trained_on_within_a_transaction() {
    let (_server, client) = server().await;
    train(&client, "m", None).await;
    let (before, row) = (
        digest(&client, "m", None).await,
        client.describe("m", None).await.unwrap(),
    );
    let staged = share(&client, within("t"), r#"{"share": "all"}"#).await.unwrap();
    assert_eq!(
        (staged.status.as_str(), staged.parameters < row.parameters),
        ("staged", true)
    );
    assert_eq!(client.describe("m", None).await.unwrap(), row);
    train(&client, "m", within("t")).await;
    assert_eq!(digest(&client, "m", within("t")).await.1, 2);
    assert_eq!(digest(&client, "m", None).await, before);
    client.rollback("t", 1).await;
    assert_eq!(digest(&client, "m", None).await, before);

    // To a savepoint, then on; twice in one transaction.
    share(&client, within("u"), r#"{"share": 2}"#).await.unwrap();
    let two = digest(&client, "m", within("u")).await;
    share(&client, sub("u", 2), r#"{"share": "all"}"#).await.unwrap();
    train(&client, "m", sub("u", 2)).await;
    client.rollback("u", 2).await;
    assert_eq!(digest(&client, "m", within("u")).await, two);
    share(&client, sub("u", 3), r#"{"share": 1}"#).await.unwrap();
    client.checkpoint("m", sub("u", 3)).await.unwrap();
    train(&client, "m", sub("u", 3)).await;
    let expected = digest(&client, "m", within("u")).await;
    client.publish("u").await.unwrap();
    assert_eq!(digest(&client, "m", None).await, expected);
    assert_eq!(client.list_checkpoints(None).await.len(), 1);
    assert_eq!(client.models().await.len(), 1);
    // Made and changed in one transaction, or changed and dropped.
    let made = LoadModelRequest {
        transaction: within("v"),
        ..deep("n")
    };
    client.load(made).await.unwrap();
    let request = UpdateModelRequest {
        transaction: within("v"),
        name: "n".into(),
        config_json: r#"{"share": 3}"#.into(),
    };
    client.models.clone().update_model(request).await.unwrap();
    share(&client, within("v"), r#"{"share": 2}"#).await.unwrap();
    let dropped = UnloadModelRequest {
        transaction: within("v"),
        name: "m".into(),
    };
    client.models.clone().unload_model(dropped).await.unwrap();
    client.publish("v").await.unwrap();
    let models = client.models().await;
    assert_eq!((models.len(), models[0].name.as_str()), (1, "n"));
    assert!(models[0].config_json.contains(r#""share":3"#));
}

#[tokio::test]
async fn a_crash_brings_it_back_with_all_that_followed() {
    let state = async |client: &Client| {
        let mut committed = client.committed("m").await;
        committed.row.created_at = None;
        for step in &mut committed.steps {
            (step.created_at, step.duration_ms) = (None, 0.0);
        }
        committed
    };
    let (straight, crashing) = (server().await, server().await);
    for client in [&straight.1, &crashing.1] {
        train(client, "m", None).await;
        share(client, within("t"), r#"{"share": 2, "dropout": 0.1}"#)
            .await
            .unwrap();
        train(client, "m", within("t")).await;
        client.publish("t").await.unwrap();
        client.batch("m", None, &[B]).await.unwrap();
    }
    let (server, client) = restarted(crashing.0, &[]).await;
    assert_eq!(state(&client).await, state(&straight.1).await);
    for client in [&straight.1, &client] {
        client.step("m", None).await.unwrap();
        share(client, None, r#"{"share": "none"}"#).await.unwrap();
        train(client, "m", None).await;
    }
    assert_eq!(state(&client).await, state(&straight.1).await);
    let (server, client) = restarted(server, &[]).await;
    assert_eq!(state(&client).await, state(&straight.1).await);
    // Without a log, what a checkpoint holds.
    share(&client, None, r#"{"share": "all"}"#).await.unwrap();
    client.checkpoint("m", None).await.unwrap();
    let expected = digest(&client, "m", None).await;
    let (_server, client) = restarted(server, &["--durability", "checkpoint"]).await;
    client.load(restored("m", "checkpoint://m/4", "")).await.unwrap();
    assert_eq!(digest(&client, "m", None).await, expected);
    share(&client, None, r#"{"share": "none"}"#).await.unwrap();
    train(&client, "m", None).await;
}

#[tokio::test]
async fn what_would_be_lost_refuses_it() {
    let (_server, client) = server().await;
    let all = r#"{"share": "all"}"#;
    for (config, named) in [
        (r#"{"share": 5}"#, "1 to the 4 layers"),
        (r#"{"share": 0}"#, "`0`"),
        (r#"{"share": "some"}"#, "some"),
        (r#"{"share": "all", "width": 33}"#, "only share"),
        (r#"{"share": "all", "beta1": 2}"#, "beta1"),
    ] {
        let message = assert_status(share(&client, None, config).await, Code::InvalidArgument, "22023");
        assert!(message.contains(named), "{message}");
    }
    // A gradient, committed or staged, and the weights that a transaction has changed itself.
    client.batch("m", within("t"), &[A]).await.unwrap();
    assert_status(
        share(&client, within("t"), all).await,
        Code::FailedPrecondition,
        "55000",
    );
    assert_status(share(&client, None, all).await, Code::FailedPrecondition, "55006");
    client.publish("t").await.unwrap();
    let message = assert_status(share(&client, None, all).await, Code::FailedPrecondition, "55000");
    assert!(message.contains("gradient"), "{message}");
    client.step("m", within("t2")).await.unwrap();
    assert_status(
        share(&client, within("t2"), all).await,
        Code::FailedPrecondition,
        "55000",
    );
    client.publish("t2").await.unwrap();

    // Whoever commits first wins.
    share(&client, within("u"), all).await.unwrap();
    client.batch("m", None, &[A]).await.unwrap();
    assert_status(client.publish("u").await, Code::Aborted, "40001");
    client.step("m", None).await.unwrap();
    share(&client, within("v"), all).await.unwrap();
    client.batch("m", within("w"), &[A]).await.unwrap();
    client.publish("v").await.unwrap();
    assert_status(client.publish("w").await, Code::Aborted, "40001");

    // An adapter, before and after.
    share(&client, None, r#"{"share": "none"}"#).await.unwrap();
    share(&client, within("x"), all).await.unwrap();
    client.adapt(lora("a")).await.unwrap();
    assert_status(client.publish("x").await, Code::Aborted, "40001");
    let message = assert_status(share(&client, None, all).await, Code::FailedPrecondition, "55000");
    assert!(message.contains("adapters"), "{message}");

    let half = LoadModelRequest {
        dtype: "bf16".into(),
        ..deep("half")
    };
    client.load(half).await.unwrap();
    let request = UpdateModelRequest {
        name: "half".into(),
        config_json: all.into(),
        ..Default::default()
    };
    let refused = client.models.clone().update_model(request).await;
    let message = assert_status(refused, Code::Unimplemented, "0A000");
    assert!(message.contains("bf16"), "{message}");
}

#[tokio::test]
async fn what_runs_on_the_model_ends_on_it() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let limited = GenerateRequest {
        max_tokens: Some(3_000),
        ..endless("m")
    };
    let mut running = client.start_generation(limited).await.unwrap();
    running.message().await.unwrap();
    share(&client, None, r#"{"share": "all"}"#).await.unwrap();
    train(&client, "m", None).await;
    let mut tokens = 1;
    let summary = loop {
        let message = running.message().await.unwrap().unwrap();
        tokens += usize::from(message.token.is_some());
        if let Some(summary) = message.summary {
            break summary;
        }
    };
    assert_eq!((summary.completion_tokens, tokens), (3_000, 3_000));
}
