//! LoRA adapters: creating, training in transactions, generating, merging, loading, and what is refused.

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::support::{Client, TestServer, assert_status, random, sub, tiny, within};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];

impl Client {
    pub async fn adapt(&self, request: CreateAdapterRequest) -> Result<Adapter, Status> {
        let made = self.adapters.clone().create_adapter(request).await?.into_inner();
        Ok(made.adapter.unwrap())
    }

    pub async fn adapter(&self, name: &str, transaction: Option<TransactionContext>) -> Option<Adapter> {
        let request = ListAdaptersRequest {
            transaction,
            models: vec![],
            names: vec![name.into()],
        };
        let listed = self.adapters.clone().list_adapters(request).await.unwrap();
        listed.into_inner().adapters.pop()
    }

    async fn drop_adapter(&self, name: &str, transaction: Option<TransactionContext>) -> Result<(), Status> {
        let request = DropAdapterRequest {
            transaction,
            model: "m".into(),
            name: name.into(),
        };
        self.adapters.clone().drop_adapter(request).await.map(drop)
    }

    pub async fn merge_adapter(&self, name: &str, transaction: Option<TransactionContext>) -> Result<Adapter, Status> {
        let request = MergeAdapterRequest {
            transaction,
            model: "m".into(),
            name: name.into(),
        };
        let merged = self.adapters.clone().merge_adapter(request).await?.into_inner();
        Ok(merged.adapter.unwrap())
    }

    pub async fn train_adapter(
        &self,
        adapter: &str,
        transaction: Option<TransactionContext>,
        rows: &[&[i64]],
    ) -> Result<f64, Status> {
        let sequence = |tokens: &&[i64]| Sequence {
            token_ids: tokens.to_vec(),
            ..Default::default()
        };
        let request = AccumulateBatchesRequest {
            transaction,
            model: "m".into(),
            sequences: rows.iter().map(sequence).collect(),
            adapter: adapter.into(),
        };
        let trained = self.training.clone().accumulate_batches(request).await?.into_inner();
        Ok(trained.losses[0].loss)
    }

    pub async fn step_adapter(&self, adapter: &str, transaction: Option<TransactionContext>) -> Result<u64, Status> {
        let request = StepRequest {
            transaction,
            model: "m".into(),
            options: Some(AdamWOptions {
                learning_rate: Some(0.01),
                ..Default::default()
            }),
            adapter: adapter.into(),
        };
        Ok(self
            .training
            .clone()
            .step(request)
            .await?
            .into_inner()
            .step
            .unwrap()
            .step)
    }

    pub async fn rows_of(&self, adapter: &str, transaction: Option<TransactionContext>) -> usize {
        let request = ListBatchesRequest {
            transaction,
            models: vec![],
            adapter: adapter.into(),
        };
        let listed = self.training.clone().list_batches(request).await.unwrap();
        listed.into_inner().sequences.len()
    }

    pub async fn scores_of(&self, adapter: &str, transaction: Option<TransactionContext>) -> Result<Vec<f32>, Status> {
        let request = ScoreRequest {
            transaction,
            model: "m".into(),
            source: Some(score_request::Source::Tokens(TokenIds { ids: A.to_vec() })),
            adapter: adapter.into(),
        };
        let scored = self.inference.clone().score(request).await?.into_inner().tokens;
        Ok(scored.iter().filter_map(|token| token.logprob).collect())
    }
}

/// An adapter of every matrix of the model `m`.
pub fn lora(name: &str) -> CreateAdapterRequest {
    CreateAdapterRequest {
        model: "m".into(),
        name: name.into(),
        rank: Some(4),
        target_modules: vec!["all-linear".into()],
        seed: Some(3),
        ..Default::default()
    }
}

/// The request, of an adapter.
pub fn with(adapter: &str, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest {
        adapter: adapter.into(),
        ..request
    }
}

async fn server() -> (TestServer, Client) {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    (server, client)
}

/// A batch and a step, published.
async fn trained(client: &Client, name: &str) {
    client.adapt(lora(name)).await.unwrap();
    for _ in 0..3 {
        client.train_adapter(name, None, &[A, B]).await.unwrap();
        client.step_adapter(name, None).await.unwrap();
    }
}

#[tokio::test]
async fn training_changes_the_adapter_alone_and_generations_tell() {
    let (_server, client) = server().await;
    let base = client.parameters("m", None).await.unwrap();
    let made = client.adapt(lora("a")).await.unwrap();
    // Every layer: A and B of [96, 32], [32, 32], [128, 32] and [32, 128].
    assert_eq!(made.parameters, 2 * 4 * (96 + 32 + 32 + 32 + 128 + 32 + 32 + 128));
    assert_eq!((made.rank, made.step, made.status.as_str()), (4, 0, "ready"));
    assert_eq!(client.adapt(lora("b")).await.unwrap().seed, Some(3));
    let plain = client.generate(random("m", "the", 7, 40)).await.unwrap();
    assert_eq!(
        client.generate(with("a", random("m", "the", 7, 40))).await.unwrap().0,
        plain.0
    );

    let first = client.train_adapter("a", None, &[A, B]).await.unwrap();
    assert_eq!(client.step_adapter("a", None).await.unwrap(), 1);
    let second = client.train_adapter("a", None, &[A, B]).await.unwrap();
    assert!(second < first, "{second} {first}");
    assert_eq!(
        (client.rows_of("a", None).await, client.rows_of("b", None).await),
        (2, 0)
    );
    assert_eq!(client.batches("m", None).await, 0);
    assert_eq!(client.adapter("a", None).await.unwrap().step, 1);
    assert_eq!(
        (
            client.adapter("b", None).await.unwrap().step,
            client.describe("m", None).await.unwrap().step
        ),
        (0, 0)
    );
    assert_eq!(client.parameters("m", None).await.unwrap(), base);
    assert_ne!(
        client.generate(with("a", random("m", "the", 7, 40))).await.unwrap().0,
        plain.0
    );
    assert_eq!(client.generate(random("m", "the", 7, 40)).await.unwrap().0, plain.0);
    assert_ne!(
        client.scores_of("a", None).await.unwrap(),
        client.scores_of("", None).await.unwrap()
    );
}

#[tokio::test]
async fn a_generation_is_the_same_alone_and_beside_those_of_other_adapters() {
    let (_server, client) = server().await;
    trained(&client, "a").await;
    trained(&client, "b").await;
    client.train_adapter("b", None, &[B]).await.unwrap();
    client.step_adapter("b", None).await.unwrap();
    let requests: Vec<GenerateRequest> = (0..9)
        .map(|seed| with(["", "a", "b"][seed as usize % 3], random("m", "the quick ", seed, 30)))
        .collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(client.generate(request.clone()).await.unwrap().0);
    }
    let together: Vec<_> = requests
        .into_iter()
        .map(|request| {
            let client = client.clone();
            tokio::spawn(async move { client.generate(request).await.unwrap().0 })
        })
        .collect();
    for (alone, together) in alone.iter().zip(together) {
        assert_eq!(alone, &together.await.unwrap());
    }
}

#[tokio::test]
async fn what_a_transaction_stages_of_an_adapter_is_its_own_until_it_commits() {
    let (_server, client) = server().await;
    client
        .adapt(CreateAdapterRequest {
            transaction: within("t"),
            ..lora("new")
        })
        .await
        .unwrap();
    assert!(client.adapter("new", None).await.is_none());
    assert_eq!(client.adapter("new", within("t")).await.unwrap().status, "staged");
    // One transaction with a batch of the adapter, one of the model, and steps of both.
    client.train_adapter("new", within("t"), &[A, B]).await.unwrap();
    client.batch("m", within("t"), &[A]).await.unwrap();
    assert_eq!(
        (
            client.rows_of("new", within("t")).await,
            client.batches("m", within("t")).await
        ),
        (2, 1)
    );
    client.step_adapter("new", within("t")).await.unwrap();
    client.step("m", within("t")).await.unwrap();
    // The model has changed for this transaction, which the adapter does not see.
    let refused = client.train_adapter("new", within("t"), &[A]).await;
    assert_status(refused, Code::FailedPrecondition, "55000");
    client.publish("t").await.unwrap();
    assert_eq!(client.adapter("new", None).await.unwrap().step, 1);
    assert_eq!(client.describe("m", None).await.unwrap().step, 1);

    let before = client.parameters_of("m", "new", None).await.unwrap();
    client.train_adapter("new", within("u"), &[A]).await.unwrap();
    client.step_adapter("new", within("u")).await.unwrap();
    assert_ne!(client.parameters_of("m", "new", within("u")).await.unwrap(), before);
    assert_eq!(client.adapter("new", within("u")).await.unwrap().step, 2);
    client.drop_adapter("new", sub("u", 2)).await.unwrap();
    assert!(client.adapter("new", within("u")).await.is_none());
    client.rollback("u", 2).await;
    assert!(client.adapter("new", within("u")).await.is_some());
    client.rollback("u", 0).await;
    assert_eq!(client.parameters_of("m", "new", None).await.unwrap(), before);
    assert_eq!(client.rows_of("new", None).await, 0);
}

#[tokio::test]
async fn gradients_add_and_stale_steps_are_refused() {
    let (_server, client) = server().await;
    client.adapt(lora("a")).await.unwrap();
    client.train_adapter("a", within("t"), &[A]).await.unwrap();
    client.train_adapter("a", within("u"), &[B]).await.unwrap();
    client.publish("u").await.unwrap();
    client.publish("t").await.unwrap();
    assert_eq!(client.rows_of("a", None).await, 2);
    client.step_adapter("a", within("c")).await.unwrap();
    client.step_adapter("a", within("d")).await.unwrap();
    client.publish("c").await.unwrap();
    assert_status(client.publish("d").await, Code::Aborted, "40001");
    // A gradient of the adapter is stale, too, once its model has been stepped.
    client.train_adapter("a", within("e"), &[A]).await.unwrap();
    client.batch("m", None, &[A]).await.unwrap();
    client.step("m", None).await.unwrap();
    assert_status(client.publish("e").await, Code::Aborted, "40001");
    assert_eq!(
        (
            client.adapter("a", None).await.unwrap().step,
            client.rows_of("a", None).await
        ),
        (1, 0)
    );
    // An adapter sees what its model has become.
    let scores = client.scores_of("a", None).await.unwrap();
    client.batch("m", None, &[A]).await.unwrap();
    client.step("m", None).await.unwrap();
    assert_ne!(client.scores_of("a", None).await.unwrap(), scores);
}

#[tokio::test]
async fn merging_gives_the_model_the_scores_of_the_adapter() {
    let (_server, client) = server().await;
    trained(&client, "a").await;
    let (adapted, plain) = (
        client.scores_of("a", None).await.unwrap(),
        client.scores_of("", None).await.unwrap(),
    );
    let near = |one: &[f32], other: &[f32]| one.iter().zip(other).all(|(one, other)| (one - other).abs() < 1e-4);
    assert!(!near(&adapted, &plain));

    assert!(client.merge_adapter("a", within("t")).await.unwrap().merged);
    assert!(near(&client.scores_of("", within("t")).await.unwrap(), &adapted));
    assert_eq!(client.scores_of("", None).await.unwrap(), plain);
    client.rollback("t", 0).await;
    assert!(!client.adapter("a", None).await.unwrap().merged);
    assert_eq!(client.scores_of("a", None).await.unwrap(), adapted);

    client.merge_adapter("a", None).await.unwrap();
    let merged = client.scores_of("", None).await.unwrap();
    assert!(near(&merged, &adapted));
    // It is not added a second time, and takes no more training.
    assert_eq!(client.scores_of("a", None).await.unwrap(), merged);
    assert_status(client.merge_adapter("a", None).await, Code::FailedPrecondition, "55000");
    assert_status(
        client.train_adapter("a", None, &[A]).await,
        Code::FailedPrecondition,
        "55000",
    );
}

#[tokio::test]
async fn a_quantised_model_is_adapted_as_it_is_and_refuses_a_merge() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.train_tokenizer().await;
    let quantised = LoadModelRequest {
        dtype: "q8_0".into(),
        ..tiny("m")
    };
    let loaded = client.load(quantised).await.unwrap();
    client.adapt(lora("a")).await.unwrap();
    let first = client.train_adapter("a", None, &[A, B]).await.unwrap();
    client.step_adapter("a", None).await.unwrap();
    assert!(client.train_adapter("a", None, &[A, B]).await.unwrap() < first);
    let model = client.describe("m", None).await.unwrap();
    assert_eq!((model.memory_bytes, model.dtype), (loaded.memory_bytes, loaded.dtype));
    assert_status(client.merge_adapter("a", None).await, Code::Unimplemented, "0A000");
    assert!(!client.adapter("a", None).await.unwrap().merged);
    client.train_adapter("a", None, &[A]).await.unwrap();
}

#[tokio::test]
async fn dropping_a_model_drops_its_adapters() {
    let (_server, client) = server().await;
    client.adapt(lora("a")).await.unwrap();
    // Made by another transaction while the model is being dropped.
    client
        .adapt(CreateAdapterRequest {
            transaction: within("late"),
            ..lora("late")
        })
        .await
        .unwrap();
    client.drop_model("m").await.unwrap();
    assert!(client.adapter("a", None).await.is_none());
    assert_status(client.publish("late").await, Code::Aborted, "40001");
    assert_status(client.adapt(lora("a")).await, Code::NotFound, "42704");
    client.load(tiny("m")).await.unwrap();
    assert_status(client.scores_of("a", None).await, Code::NotFound, "42704");
    client.adapt(lora("a")).await.unwrap();
    client.scores_of("a", None).await.unwrap();
}

#[tokio::test]
async fn bad_adapters_are_refused_with_their_fault() {
    let (_server, client) = server().await;
    client.adapt(lora("a")).await.unwrap();
    assert_status(client.adapt(lora("a")).await, Code::AlreadyExists, "42710");
    let text = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    for (request, what) in [
        (
            CreateAdapterRequest {
                rank: Some(0),
                ..lora("b")
            },
            "rank is 0",
        ),
        (
            CreateAdapterRequest {
                rank: Some(-3),
                ..lora("b")
            },
            "rank is -3",
        ),
        (
            CreateAdapterRequest {
                rank: Some(33),
                ..lora("b")
            },
            "at most 32",
        ),
        (
            CreateAdapterRequest {
                alpha: Some(f64::NAN),
                ..lora("b")
            },
            "alpha is NaN",
        ),
        (
            CreateAdapterRequest {
                dropout: Some(1.5),
                ..lora("b")
            },
            "dropout is 1.5",
        ),
        (
            CreateAdapterRequest {
                target_modules: text(&["q_proj"]),
                ..lora("b")
            },
            "q_proj",
        ),
        (
            CreateAdapterRequest {
                target_modules: text(&["all-linear", "c_fc"]),
                ..lora("b")
            },
            "alone",
        ),
        (
            CreateAdapterRequest {
                source: "../x".into(),
                ..lora("b")
            },
            "\"..\"",
        ),
        (
            CreateAdapterRequest {
                source: "nowhere".into(),
                ..lora("b")
            },
            "nowhere",
        ),
        (lora(""), "must not be empty"),
        (lora("a\nb"), "U+000A"),
    ] {
        let message = assert_status(client.adapt(request).await, Code::InvalidArgument, "22023");
        assert!(message.contains(what), "{message}");
    }
    let message = assert_status(client.scores_of("x", None).await, Code::NotFound, "42704");
    assert!(message.contains("adapter \"x\" of model \"m\""), "{message}");
    assert_status(client.drop_adapter("x", None).await, Code::NotFound, "42704");
    assert_status(client.step_adapter("a", None).await, Code::FailedPrecondition, "55000");
    // The parameters of the model are not the adapter's to write.
    let write = |name: &str| WriteParametersRequest {
        model: "m".into(),
        adapter: "a".into(),
        chunk: Some(TensorChunk {
            name: name.into(),
            ..Default::default()
        }),
        trainable: Some(false),
        ..Default::default()
    };
    let frozen = write("base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight");
    client
        .training
        .clone()
        .write_parameters(tokio_stream::iter([frozen]))
        .await
        .unwrap();
    let bases = write("transformer.h.0.mlp.c_fc.weight");
    let refused = client
        .training
        .clone()
        .write_parameters(tokio_stream::iter([bases]))
        .await;
    assert_status(refused, Code::InvalidArgument, "22023");
}

#[tokio::test]
async fn an_adapter_that_peft_saved_is_loaded() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");
    let server = TestServer::start(&["--models-dir", golden]);
    let client = server.connect().await;
    let load = |source: &str| LoadModelRequest {
        name: "m".into(),
        source: source.into(),
        ..Default::default()
    };
    client.load(load("gpt2")).await.unwrap();
    let stored = |source: &str| CreateAdapterRequest {
        model: "m".into(),
        name: "a".into(),
        source: source.into(),
        ..Default::default()
    };
    let made = client.adapt(stored("gpt2-lora")).await.unwrap();
    assert_eq!((made.rank, made.alpha, made.seed), (3, 6.0, None));
    assert_eq!(made.target_modules, ["c_attn", "c_proj"]);
    assert_ne!(
        client.scores_of("a", None).await.unwrap(),
        client.scores_of("", None).await.unwrap()
    );
    let contradicting = CreateAdapterRequest {
        name: "b".into(),
        rank: Some(4),
        ..stored("gpt2-lora")
    };
    let message = assert_status(client.adapt(contradicting).await, Code::InvalidArgument, "22023");
    assert!(message.contains("rank is 4"), "{message}");
    for source in ["llama-lora", "gpt2"] {
        let other = CreateAdapterRequest {
            name: "b".into(),
            ..stored(source)
        };
        assert_status(client.adapt(other).await, Code::InvalidArgument, "22023");
    }
}

#[tokio::test]
async fn a_checkpoint_of_an_adapter_goes_on_where_it_was_made() {
    let (server, client) = server().await;
    trained(&client, "a").await;
    let request = |adapter: &str| CreateCheckpointRequest {
        model: "m".into(),
        tag: "half-way".into(),
        adapter: adapter.into(),
        ..Default::default()
    };
    let mut checkpoints = client.checkpoints.clone();
    let saved = checkpoints.create_checkpoint(request("a")).await.unwrap().into_inner();
    let saved = saved.checkpoint.unwrap();
    assert_eq!(
        (saved.model.as_str(), saved.adapter.as_str(), saved.step),
        ("m", "a", 3)
    );
    assert_status(
        checkpoints.create_checkpoint(request("a")).await,
        Code::AlreadyExists,
        "42710",
    );
    // The model has one of its own, and each is listed with its own.
    checkpoints.create_checkpoint(request("")).await.unwrap();
    let mut listed = async |adapter: &str| {
        let request = ListCheckpointsRequest {
            adapter: adapter.into(),
            ..Default::default()
        };
        let listed = checkpoints.list_checkpoints(request).await.unwrap().into_inner();
        listed.checkpoints.into_iter().map(|row| row.step).collect::<Vec<_>>()
    };
    assert_eq!(
        (listed("a").await, listed("").await, listed("x").await),
        (vec![3], vec![0], vec![])
    );

    // After a restart, over the same model: the next step is the same bit for bit.
    let go_on = async |client: &Client, name: &str| {
        client.train_adapter(name, None, &[B, A]).await.unwrap();
        assert_eq!(client.step_adapter(name, None).await.unwrap(), 4);
        client.parameters_of("m", name, None).await.unwrap()
    };
    let straight = go_on(&client, "a").await;
    let data = server.kill();
    let server = TestServer::start_in(data, &[]);
    let client = server.connect().await;
    let restored = |name: &str, source: &str| CreateAdapterRequest {
        model: "m".into(),
        name: name.into(),
        source: source.into(),
        ..Default::default()
    };
    let row = client.adapt(restored("b", "checkpoint://m/a/3")).await.unwrap();
    assert_eq!(
        (row.step, row.rank, row.target_modules),
        (3, 4, vec!["all-linear".to_owned()])
    );
    assert_eq!(go_on(&client, "b").await, straight);
    let missing = client.adapt(restored("c", "checkpoint://m/a/4")).await;
    assert_status(missing, Code::NotFound, "42704");
    let models = client.adapt(restored("c", "checkpoint://m/0")).await;
    assert_status(models, Code::NotFound, "42704");
    let delete = |step| DeleteCheckpointRequest {
        model: "m".into(),
        step,
        adapter: "a".into(),
        ..Default::default()
    };
    let mut checkpoints = client.checkpoints.clone();
    checkpoints.delete_checkpoint(delete(3)).await.unwrap();
    assert_status(checkpoints.delete_checkpoint(delete(3)).await, Code::NotFound, "42704");
    // What was restored survives a crash, though the checkpoint is gone.
    let server = TestServer::start_in(server.kill(), &[]);
    let client = server.connect().await;
    assert_eq!(client.parameters_of("m", "b", None).await.unwrap(), straight);
    client.merge_adapter("b", None).await.unwrap();
    assert_status(
        client.checkpoints.clone().create_checkpoint(request("b")).await,
        Code::FailedPrecondition,
        "55000",
    );
}
