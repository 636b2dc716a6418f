//! Mixed precision with its loss scale, and dropout, over sockets.

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::support::{Client, TestServer, assert_status, tiny, within};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];
const C: &[i64] = &[3, 1, 4, 1, 5, 9, 2];

/// The model `name` with more settings.
async fn create(client: &Client, name: &str, settings: &str) {
    let mut load = tiny(name);
    load.config_json = format!("{},{}", load.config_json.trim_end_matches('}'), &settings[1..]);
    client.load(load).await.unwrap();
}

async fn restore(client: &Client, name: &str, source: &str) {
    let request = LoadModelRequest {
        name: name.into(),
        source: source.into(),
        ..Default::default()
    };
    client.load(request).await.unwrap();
}

async fn configure(client: &Client, model: &str, transaction: Option<TransactionContext>, config: &str) {
    let request = UpdateModelRequest {
        transaction,
        name: model.into(),
        config_json: config.into(),
    };
    client.models.clone().update_model(request).await.unwrap();
}

/// A sequence whose gradient is so large that f16 overflows unless the scale is small.
async fn large_batch(client: &Client, model: &str, transaction: Option<TransactionContext>) {
    let sequence = Sequence {
        token_ids: A.to_vec(),
        loss_weight: Some(1e5),
        ..Default::default()
    };
    let request = AccumulateBatchesRequest {
        transaction,
        model: model.into(),
        sequences: vec![sequence],
        ..Default::default()
    };
    client.training.clone().accumulate_batches(request).await.unwrap();
}

async fn memory(client: &Client, model: &str) -> u64 {
    client.describe(model, None).await.unwrap().memory_bytes
}

#[tokio::test]
async fn the_precision_changes_between_steps_with_its_transaction() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let query = |tape: &[TapeEntry]| {
        let entry = tape.iter().find(|entry| entry.operation == "query").unwrap();
        (entry.dtype(), entry.bytes, entry.storage())
    };
    client.batch("m", None, &[A]).await.unwrap();
    let exact = query(&client.tape("m").await);
    assert_eq!(exact.0, DataType::F32);
    client.step("m", None).await.unwrap();
    let idle = memory(&client, "m").await;
    // Rolled back, it has never been.
    configure(&client, "m", within("t"), r#"{"precision": "f16"}"#).await;
    client.batch("m", within("t"), &[A]).await.unwrap();
    let half = (DataType::F16, exact.1 / 2, ActivationStorage::Kept);
    assert_eq!(query(&client.tape("m").await), half);
    client.rollback("t", 1).await;
    assert_eq!(memory(&client, "m").await, idle);
    client.batch("m", None, &[A]).await.unwrap();
    assert_eq!(query(&client.tape("m").await), exact);
    let with_gradient = memory(&client, "m").await;
    client.step("m", None).await.unwrap();
    // Published, it holds from then on, with copies of the weights until they change.
    configure(&client, "m", None, r#"{"precision": "bf16"}"#).await;
    client.batch("m", None, &[A, B]).await.unwrap();
    assert_eq!(query(&client.tape("m").await).0, DataType::Bf16);
    let with_copies = memory(&client, "m").await;
    assert!(with_copies > with_gradient, "{with_copies} {with_gradient}");
    let step = client.step("m", None).await.unwrap();
    assert_eq!((step.loss_scale, step.skipped, step.overflows), (1.0, false, 0));
    assert_eq!(memory(&client, "m").await, idle);
    let described = client.describe("m", None).await.unwrap();
    assert_eq!(described.dtype, "f32");
    assert!(described.config_json.contains("\"precision\":\"bf16\""));
    configure(&client, "m", None, "{}").await;
    client.batch("m", None, &[A]).await.unwrap();
    assert_eq!(query(&client.tape("m").await), exact);
}

#[tokio::test]
async fn copies_count_against_the_memory_limit() {
    // Weights and gradient of 121344 parameters take 970752 bytes, half-precision copies of the matrices 235008.
    let server = TestServer::start(&["--memory-limit", "1100000"]);
    let client = server.connect().await;
    client.train_tokenizer().await;
    let config = r#"{"architecture":"gpt2","layers":2,"width":64,"heads":4,"context_length":32,"vocabulary":300}"#;
    let load = LoadModelRequest {
        name: "m".into(),
        config_json: config.into(),
        ..Default::default()
    };
    client.load(load).await.unwrap();
    client.batch("m", within("t"), &[A]).await.unwrap();
    client.rollback("t", 1).await;
    configure(&client, "m", None, r#"{"precision": "bf16"}"#).await;
    let batch = client.batch("m", None, &[A]).await;
    let message = batch.as_ref().unwrap_err().message().to_owned();
    assert!(message.contains("half-precision copies of the weights"), "{message}");
    assert_status(batch, Code::ResourceExhausted, "HV001");
    configure(&client, "m", None, "{}").await;
    client.batch("m", None, &[A]).await.unwrap();
}

#[tokio::test]
async fn an_overflow_is_a_skipped_step_that_halves_the_scale() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.train_tokenizer().await;
    create(&client, "m", r#"{"precision": "f16", "loss_scale_growth_interval": 2}"#).await;
    let weights = client.parameters("m", None).await.unwrap();
    // Rolled back, the scale is as it was.
    large_batch(&client, "m", within("t")).await;
    let step = client.step("m", within("t")).await.unwrap();
    assert_eq!((step.step, step.skipped, step.loss_scale), (1, true, 65536.0));
    assert!(
        step.overflows > 0 && step.loss.is_finite() && !step.grad_norm.is_finite(),
        "{step:?}"
    );
    client.rollback("t", 1).await;
    assert!(client.steps("m").await.is_empty());
    let mut scale = 65536.0;
    for _ in 0..2 {
        large_batch(&client, "m", None).await;
        let step = client.step("m", None).await.unwrap();
        assert_eq!((step.step, step.skipped, step.loss_scale), (1, true, scale));
        scale /= 2.0;
    }
    assert_eq!(client.parameters("m", None).await.unwrap(), weights);
    assert_eq!(client.batches("m", None).await, 0);
    // The scale is part of the state that a checkpoint holds.
    let saved = client.checkpoint("m", None).await.unwrap();
    restore(&client, "restored", &format!("checkpoint://m/{}", saved.step)).await;
    for model in ["m", "restored"] {
        let mut expected = scale;
        let taken = loop {
            large_batch(&client, model, None).await;
            let step = client.step(model, None).await.unwrap();
            assert_eq!((step.step, step.loss_scale), (1, expected), "{model}");
            expected /= 2.0;
            if !step.skipped {
                break step;
            }
        };
        assert!(taken.overflows == 0 && taken.loss_scale < 16384.0, "{taken:?}");
        let log = client.steps(model).await;
        assert!(log.len() > 4 && log[..log.len() - 1].iter().all(|row| row.skipped && row.step == 1));
        // Two good steps in a row double it.
        for (number, growth) in [(2, 1.0), (3, 2.0)] {
            client.batch(model, None, &[A]).await.unwrap();
            let step = client.step(model, None).await.unwrap();
            let row = (step.step, step.skipped, step.loss_scale);
            assert_eq!(row, (number, false, taken.loss_scale * growth));
        }
    }
    assert_eq!(
        client.parameters("m", None).await.unwrap(),
        client.parameters("restored", None).await.unwrap()
    );
}

#[tokio::test]
async fn a_static_scale_stays_and_changes_no_bit_of_bf16() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.train_tokenizer().await;
    create(&client, "plain", r#"{"precision": "bf16"}"#).await;
    create(&client, "scaled", r#"{"precision": "bf16", "loss_scale": 4096}"#).await;
    for _ in 0..2 {
        for (model, scale) in [("plain", 1.0), ("scaled", 4096.0)] {
            client.batch(model, None, &[A, B]).await.unwrap();
            assert_eq!(client.step(model, None).await.unwrap().loss_scale, scale);
        }
    }
    assert_eq!(
        client.parameters("plain", None).await.unwrap(),
        client.parameters("scaled", None).await.unwrap()
    );
    create(&client, "half", r#"{"precision": "f16", "loss_scale": 65536}"#).await;
    for _ in 0..2 {
        large_batch(&client, "half", None).await;
        let step = client.step("half", None).await.unwrap();
        assert_eq!((step.step, step.skipped, step.loss_scale), (1, true, 65536.0));
    }
    // What is too small for f16 is counted.
    configure(&client, "half", None, r#"{"precision": "f16", "loss_scale": 0.001}"#).await;
    client.batch("half", None, &[A, B]).await.unwrap();
    let step = client.step("half", None).await.unwrap();
    assert!(step.underflows > 0 && step.overflows == 0 && !step.skipped, "{step:?}");
}

#[tokio::test]
async fn masks_follow_from_seed_step_and_place_alone() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.train_tokenizer().await;
    let settings = r#"{"dropout": 0.2, "attn_pdrop": 0.1, "precision": "bf16"}"#;
    for model in ["one", "two"] {
        create(&client, model, settings).await;
    }
    let losses = |given: Vec<SequenceLoss>| given.into_iter().map(|loss| loss.loss).collect::<Vec<_>>();
    let mut together = losses(client.batch("one", None, &[A, B, C]).await.unwrap());
    // In two statements, with something rolled back between them, and two subtransactions' worth of parts.
    let mut apart = losses(client.batch("two", None, &[A]).await.unwrap());
    client.batch("two", within("t"), &[C, C]).await.unwrap();
    client.rollback("t", 1).await;
    apart.extend(losses(client.batch("two", within("u"), &[B]).await.unwrap()));
    apart.extend(losses(client.batch("two", within("u"), &[C]).await.unwrap()));
    client.publish("u").await.unwrap();
    for (together, apart) in together.iter().zip(&apart) {
        assert!((together - apart).abs() < 1e-5, "{together} {apart}");
    }
    // The same text has other masks the second time, and in the next step.
    together.extend(losses(client.batch("one", None, &[A]).await.unwrap()));
    client.step("one", None).await.unwrap();
    assert!((together[0] - together[3]).abs() > 1e-4, "{together:?}");
    // Resumed equals straight, seed and all.
    let saved = client.checkpoint("one", None).await.unwrap();
    restore(&client, "resumed", &format!("checkpoint://one/{}", saved.step)).await;
    for model in ["one", "resumed"] {
        for batch in [[A, B], [C, A]] {
            client.batch(model, None, &batch).await.unwrap();
            client.step(model, None).await.unwrap();
        }
    }
    assert_eq!(
        client.parameters("one", None).await.unwrap(),
        client.parameters("resumed", None).await.unwrap()
    );
    // Nothing is dropped in scoring.
    let score = |model: &str| {
        let request = ScoreRequest {
            model: model.into(),
            source: Some(score_request::Source::Tokens(TokenIds { ids: A.to_vec() })),
            ..Default::default()
        };
        let mut inference = client.inference.clone();
        async move { inference.score(request).await.unwrap().into_inner() }
    };
    let before = score("resumed").await;
    configure(&client, "resumed", None, "{}").await;
    assert_eq!(score("resumed").await, before);
}

/// Commits of two transactions that ran beside each other, a skipped step, and a gradient without its step.
async fn train_up_to_the_crash(client: &Client) {
    create(client, "m", r#"{"precision": "f16", "dropout": 0.2}"#).await;
    client.batch("m", within("a"), &[A]).await.unwrap();
    client.batch("m", within("b"), &[B]).await.unwrap();
    client.publish("b").await.unwrap();
    client.publish("a").await.unwrap();
    client.step("m", None).await.unwrap();
    large_batch(client, "m", None).await;
    assert!(client.step("m", None).await.unwrap().skipped);
    client.batch("m", None, &[C, A]).await.unwrap();
}

async fn train_on(client: &Client) -> (Vec<u8>, f64) {
    client.batch("m", None, &[B]).await.unwrap();
    let scale = client.step("m", None).await.unwrap().loss_scale;
    client.batch("m", None, &[A, C]).await.unwrap();
    client.step("m", None).await.unwrap();
    (client.parameters("m", None).await.unwrap(), scale)
}

#[tokio::test]
async fn a_crash_changes_neither_masks_nor_scale() {
    let straight = TestServer::start(&[]);
    let client = straight.connect().await;
    client.train_tokenizer().await;
    train_up_to_the_crash(&client).await;
    let expected = train_on(&client).await;
    assert_eq!(expected.1, 32768.0);
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.train_tokenizer().await;
    train_up_to_the_crash(&client).await;
    let server = TestServer::start_in(server.kill(), &[]);
    assert!(train_on(&server.connect().await).await == expected);
}

/// What a client merges whose own gradient has overflowed.
#[tokio::test]
async fn a_merged_overflow_is_refused_unless_it_is_to_skip_the_step() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.train_tokenizer().await;
    create(&client, "m", r#"{"precision": "f16"}"#).await;
    let mut data = vec![0; 4 * 32];
    data[4..8].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let refused = MergeGradientsRequest {
        model: "m".into(),
        chunk: Some(TensorChunk {
            name: "transformer.ln_f.bias".into(),
            data: data.into(),
            ..Default::default()
        }),
        tokens: 5,
        micro_batches: 1,
        overflows: 3,
        ..Default::default()
    };
    let message = assert_status(
        client.merge(None, std::slice::from_ref(&refused)).await,
        Code::InvalidArgument,
        "22023",
    );
    assert!(message.contains("element 1 is inf"), "{message}");
    let accepted = MergeGradientsRequest {
        accept_non_finite: true,
        ..refused
    };
    let before = client.parameters("m", None).await.unwrap();
    client.batch("m", None, &[A]).await.unwrap();
    client.merge(None, &[accepted]).await.unwrap();
    let step = client.step("m", None).await.unwrap();
    assert_eq!((step.step, step.skipped, step.overflows), (1, true, 3));
    assert_eq!(client.parameters("m", None).await.unwrap(), before);
    let server = TestServer::start_in(server.kill(), &[]);
    let client = server.connect().await;
    client.batch("m", None, &[A]).await.unwrap();
    let next = client.step("m", None).await.unwrap();
    assert_eq!(
        (next.step, next.skipped, next.loss_scale),
        (1, false, step.loss_scale / 2.0)
    );
}

#[tokio::test]
async fn bad_settings_are_refused_by_name() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    for (config, named) in [
        (r#"{"precision": "fp8"}"#, "\"f32\", \"bf16\", \"f16\""),
        (r#"{"precision": "f16", "loss_scale": 0}"#, "`loss_scale`"),
        (r#"{"precision": "f16", "loss_scale": -1}"#, "`loss_scale`"),
        (r#"{"precision": "f16", "loss_scale": "NaN"}"#, "`loss_scale`"),
        (r#"{"loss_scale": "dynamic"}"#, "needs precision"),
        (
            r#"{"precision": "f16", "loss_scale_growth_interval": 0}"#,
            "`loss_scale_growth_interval`",
        ),
        (r#"{"dropout": 1.0}"#, "`dropout`"),
        (r#"{"attn_pdrop": -0.5}"#, "`attn_pdrop`"),
        (r#"{"attention_dropout": 0.1}"#, "attn_pdrop"),
    ] {
        let request = UpdateModelRequest {
            transaction: None,
            name: "m".into(),
            config_json: config.into(),
        };
        let update = client.models.clone().update_model(request).await;
        let message = update.as_ref().unwrap_err().message().to_owned();
        assert!(message.contains(named), "{config}: {message}");
        assert_status(update, Code::InvalidArgument, "22023");
    }
}
