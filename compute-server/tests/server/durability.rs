//! The commit log: what is committed survives a kill, bit for bit, and damage is told.

use std::path::{Path, PathBuf};

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::adapters::lora;
use crate::support::{Client, TestServer, assert_status, sub, within};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];
const BIAS: &str = "transformer.h.0.mlp.c_fc.bias";

/// A model whose files are small.
pub fn small(name: &str) -> LoadModelRequest {
    let config = r#"{"architecture":"gpt2","layers":2,"width":32,"heads":4,"context_length":64,"vocabulary":280}"#;
    LoadModelRequest {
        name: name.into(),
        config_json: config.into(),
        seed: Some(1),
        ..Default::default()
    }
}

/// Everything that is committed of a model, but for when and how fast.
#[derive(Debug, PartialEq)]
pub struct Committed {
    pub row: Model,
    parameters: Vec<u8>,
    gradient: Vec<u32>,
    batches: Vec<AccumulatedSequence>,
    pub steps: Vec<OptimizerStep>,
}

impl Client {
    /// What everybody sees of a model.
    pub async fn committed(&self, model: &str) -> Committed {
        let gradient = self.gradients(model).await;
        let request = ListBatchesRequest {
            transaction: None,
            models: vec![model.into()],
            ..Default::default()
        };
        let batches = self.training.clone().list_batches(request).await.unwrap().into_inner();
        let mut row = self.describe(model, None).await.unwrap();
        // Copies that a transaction made are not there after a restart.
        row.memory_bytes = 0;
        Committed {
            row,
            parameters: self.parameters(model, None).await.unwrap(),
            gradient: gradient.into_iter().map(f32::to_bits).collect(),
            batches: batches.sequences,
            steps: self.steps(model).await,
        }
    }

    pub async fn configure(&self, transaction: Option<TransactionContext>, model: &str, config: &str) {
        let request = UpdateModelRequest {
            transaction,
            name: model.into(),
            config_json: config.into(),
        };
        self.models.clone().update_model(request).await.unwrap();
    }

    /// Runs the model on a few tokens.
    pub async fn score(&self, model: &str) {
        let request = ScoreRequest {
            model: model.into(),
            source: Some(score_request::Source::Tokens(TokenIds { ids: A.to_vec() })),
            ..Default::default()
        };
        self.inference.clone().score(request).await.unwrap();
    }

    async fn zero(&self, model: &str) {
        let request = ZeroGradientsRequest {
            transaction: None,
            model: model.into(),
            ..Default::default()
        };
        self.training.clone().zero_gradients(request).await.unwrap();
    }

    /// Adds the gradient of `from` to that of `to`.
    async fn merge_from(&self, from: &str, to: &str) {
        let request = ReadGradientsRequest {
            model: from.into(),
            ..Default::default()
        };
        let stream = self
            .training
            .clone()
            .read_gradients(request)
            .await
            .unwrap()
            .into_inner();
        let messages = crate::support::collect(stream).await.unwrap().into_iter();
        let messages: Vec<MergeGradientsRequest> = messages
            .map(|message| MergeGradientsRequest {
                transaction: None,
                model: to.into(),
                set_id: 0,
                chunk: message.chunk,
                tokens: message.tokens,
                micro_batches: message.micro_batches,
                loss: message.loss,
                ..Default::default()
            })
            .collect();
        let mut training = self.training.clone();
        training.merge_gradients(tokio_stream::iter(messages)).await.unwrap();
    }
}

/// Where the log is.
pub fn log(data: &Path) -> PathBuf {
    data.join("commits/log")
}

/// The server after a kill.
pub async fn restarted(server: TestServer, arguments: &[&str]) -> (TestServer, Client) {
    let server = TestServer::start_in(server.kill(), arguments);
    let client = server.connect().await;
    (server, client)
}

/// Writes of every kind, in transactions of every shape.
async fn work(client: &Client) {
    client.load(small("m")).await.unwrap();
    client
        .load(LoadModelRequest {
            name: "n".into(),
            seed: Some(7),
            ..small("n")
        })
        .await
        .unwrap();
    for rate in [0.02, 0.012345678901234568] {
        client
            .configure(
                None,
                "m",
                &format!(r#"{{"learning_rate": {rate}, "recompute": "blocks"}}"#),
            )
            .await;
        client.batch("m", None, &[A, B]).await.unwrap();
        client.batch("m", None, &[B]).await.unwrap();
        client.step("m", None).await.unwrap();
    }
    // Subtransactions: a gradient summed apart, one rolled back, and both models at once.
    client.batch("m", sub("t", 1), &[A]).await.unwrap();
    client.batch("m", sub("t", 2), &[B]).await.unwrap();
    client.batch("m", sub("t", 2), &[A, A]).await.unwrap();
    client.batch("m", sub("t", 3), &[B]).await.unwrap();
    client.rollback("t", 3).await;
    let release = ReleaseRequest {
        transaction_id: "t".into(),
        subtransaction_id: 2,
        parent_subtransaction_id: 1,
    };
    client.transactions.clone().release(release).await.unwrap();
    client.batch("n", within("t"), &[A, B]).await.unwrap();
    client.publish("t").await.unwrap();
    // Frozen and written in a transaction that then trains.
    client.freeze(within("u"), BIAS).await.unwrap();
    client.publish("u").await.unwrap();
    client.zero("m").await;
    client.batch("m", within("v"), &[A]).await.unwrap();
    client.step("m", within("v")).await.unwrap();
    // Read before its commit, the step is taken on a copy.
    client.parameters("m", within("v")).await.unwrap();
    client.publish("v").await.unwrap();
    // A gradient from elsewhere, on top of one from here.
    client.batch("m", None, &[B, A]).await.unwrap();
    client.merge_from("n", "n").await;
    client.batch("n", None, &[B]).await.unwrap();
    client.step("n", None).await.unwrap();
    client.batch("n", None, &[A]).await.unwrap();
    // Staged, and lost.
    client.step("n", within("w")).await.unwrap();
    client.load(small("gone")).await.unwrap();
    client.drop_model("gone").await.unwrap();
}

#[tokio::test]
async fn everything_committed_survives_kill_9_bit_for_bit_and_training_goes_on_alike() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    work(&client).await;
    let before = (client.committed("m").await, client.committed("n").await);
    let (server, client) = restarted(server, &[]).await;
    let names: Vec<String> = client.models().await.into_iter().map(|model| model.name).collect();
    assert_eq!(names, ["m", "n"]);
    assert_eq!((client.committed("m").await, client.committed("n").await), before);
    assert_status(client.publish("w").await, Code::Aborted, "40001");

    // The same work on a server that is never killed comes to the same end.
    let straight = TestServer::start(&[]);
    let other = straight.connect().await;
    work(&other).await;
    for client in [&client, &other] {
        for model in ["m", "n"] {
            client.batch(model, None, &[B, B, A]).await.unwrap();
            client.step(model, None).await.unwrap();
        }
    }
    for model in ["m", "n"] {
        assert_eq!(
            client.parameters(model, None).await.unwrap(),
            other.parameters(model, None).await.unwrap()
        );
        // The moments, by the digests of a checkpoint's files.
        let digests = |server: &TestServer, saved: Checkpoint| tensors(&server.data.path().join(saved.path));
        let saved = client.checkpoint(model, None).await.unwrap();
        let expected = other.checkpoint(model, None).await.unwrap();
        assert_eq!(digests(&server, saved), digests(&straight, expected));
    }
    let after = client.committed("m").await;
    let (_server, client) = restarted(server, &[]).await;
    assert_eq!(client.committed("m").await, after);
}

/// Names and digests of the tensors in a checkpoint.
fn tensors(folder: &Path) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
    let files = manifest["files"].as_array().unwrap().iter();
    let tensors = files.filter_map(|file| file["tensors"].as_array()).flatten();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let mut found: Vec<_> = tensors
        .map(|tensor| (text(&tensor["name"]), text(&tensor["sha256"])))
        .collect();
    found.sort();
    assert!(found.len() > 50, "{found:?}");
    found
}

#[tokio::test]
async fn adapters_come_back_though_their_model_was_trained_in_between() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    client.adapt(lora("x")).await.unwrap();
    for _ in 0..2 {
        client.train_adapter("x", None, &[A, B]).await.unwrap();
        client.step_adapter("x", None).await.unwrap();
        client.batch("m", None, &[A]).await.unwrap();
        client.step("m", None).await.unwrap();
    }
    // In one transaction: the adapter's gradient is that on the weights before the model's step.
    client.batch("m", within("t"), &[B]).await.unwrap();
    client.train_adapter("x", within("t"), &[A]).await.unwrap();
    client.step("m", within("t")).await.unwrap();
    client.publish("t").await.unwrap();
    client.train_adapter("x", None, &[B, A]).await.unwrap();
    let state = async |client: &Client| {
        let adapter = client.adapter("x", None).await.unwrap();
        let scores = client.scores_of("x", None).await.unwrap();
        let rows = client.rows_of("x", None).await;
        let parameters = client.parameters_of("m", "x", None).await.unwrap();
        (
            client.committed("m").await,
            adapter.step,
            adapter.merged,
            scores,
            rows,
            parameters,
        )
    };
    let before = state(&client).await;
    let (server, client) = restarted(server, &[]).await;
    assert_eq!(state(&client).await, before);
    client.step_adapter("x", None).await.unwrap();
    client.merge_adapter("x", None).await.unwrap();
    let before = state(&client).await;
    assert!(before.2);
    let (server, client) = restarted(server, &[]).await;
    assert_eq!(state(&client).await, before);
    client.drop_model("m").await.unwrap();
    let (_server, client) = restarted(server, &[]).await;
    assert!(client.adapter("x", None).await.is_none() && client.models().await.is_empty());
}

#[tokio::test]
async fn a_repeated_publish_is_answered_after_a_crash_as_before() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    client.batch("m", within("t"), &[A]).await.unwrap();
    client.step("m", within("t")).await.unwrap();
    assert_eq!(client.publish("t").await.unwrap(), 2);
    let (_server, client) = restarted(server, &[]).await;
    assert_eq!(client.publish("t").await.unwrap(), 2);
    assert_eq!(client.describe("m", None).await.unwrap().step, 1);
    assert_status(client.batch("m", within("t"), &[A]).await, Code::Aborted, "40001");
}

#[tokio::test]
async fn with_durability_checkpoint_only_checkpoints_survive_and_no_old_state_comes_back() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    let (server, client) = restarted(server, &["--durability", "checkpoint"]).await;
    assert!(client.models().await.is_empty());
    client.load(small("m")).await.unwrap();
    client.batch("m", None, &[A]).await.unwrap();
    client.step("m", None).await.unwrap();
    client.checkpoint("m", None).await.unwrap();
    assert!(!log(server.data.path()).exists());
    let (_server, client) = restarted(server, &[]).await;
    assert!(client.models().await.is_empty());
    assert_eq!(client.list_checkpoints(None).await.len(), 1);
}

#[tokio::test]
async fn states_are_saved_before_a_replay_becomes_long() {
    let arguments = ["--max-replay-tokens", "40"];
    let server = TestServer::start(&arguments);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    client
        .configure(None, "m", r#"{"schedule": "linear", "schedule_steps": 40}"#)
        .await;
    for _ in 0..12 {
        client.batch("m", None, &[A, B]).await.unwrap();
        client.step("m", None).await.unwrap();
    }
    let bases = || {
        std::fs::read_dir(server.data.path().join("commits/bases"))
            .unwrap()
            .count()
    };
    crate::support::poll(|| bases() == 1).await;
    client.batch("m", None, &[A]).await.unwrap();
    let before = client.committed("m").await;
    let (server, client) = restarted(server, &arguments).await;
    assert_eq!(client.committed("m").await, before);
    client.step("m", None).await.unwrap();
    let before = client.committed("m").await;
    let (server, client) = restarted(server, &arguments).await;
    assert_eq!(client.committed("m").await, before);
    client.drop_model("m").await.unwrap();
    assert_eq!(
        std::fs::read_dir(server.data.path().join("commits/bases"))
            .unwrap()
            .count(),
        0
    );
}

#[tokio::test]
async fn the_log_does_not_grow_with_what_nobody_needs() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("kept")).await.unwrap();
    client.batch("kept", within("t"), &[A]).await.unwrap();
    client.publish("t").await.unwrap();
    let before = client.committed("kept").await;
    client.load(small("m")).await.unwrap();
    let embedding = TensorChunk {
        name: "transformer.wte.weight".into(),
        data: vec![0; 4 * 280 * 32].into(),
        ..Default::default()
    };
    for _ in 0..40 {
        client.write(None, embedding.clone(), None).await.unwrap();
    }
    assert!(std::fs::metadata(log(server.data.path())).unwrap().len() > 1 << 20);
    client.drop_model("m").await.unwrap();
    let length = std::fs::metadata(log(server.data.path())).unwrap().len();
    assert!(length < 10_000, "{length}");
    let (_server, client) = restarted(server, &[]).await;
    assert_eq!(client.committed("kept").await, before);
    assert_eq!(client.publish("t").await.unwrap(), 1);
}

#[tokio::test]
async fn a_model_restored_from_a_checkpoint_survives_the_deletion_of_that_checkpoint() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(small("m")).await.unwrap();
    client.batch("m", None, &[A, B]).await.unwrap();
    client.step("m", None).await.unwrap();
    client.checkpoint("m", None).await.unwrap();
    let restore = LoadModelRequest {
        name: "r".into(),
        source: "checkpoint://m/1".into(),
        config_json: r#"{"learning_rate": 0.25}"#.into(),
        ..Default::default()
    };
    client.load(restore).await.unwrap();
    client.batch("r", None, &[B]).await.unwrap();
    client.step("r", None).await.unwrap();
    let delete = DeleteCheckpointRequest {
        transaction: None,
        model: "m".into(),
        step: 1,
        adapter: String::new(),
    };
    client.checkpoints.clone().delete_checkpoint(delete).await.unwrap();
    let before = client.committed("r").await;
    assert_eq!((before.row.step, before.row.source.as_str()), (2, "checkpoint://m/1"));
    assert!(before.row.config_json.contains("0.25"));
    let (_server, client) = restarted(server, &[]).await;
    assert_eq!(client.committed("r").await, before);
}
