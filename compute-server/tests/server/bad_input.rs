//! Bad input gives a clear error with its code and SQLSTATE, and changes nothing.

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::support::{TestServer, assert_status, random, tiny};

#[tokio::test]
async fn models_that_cannot_be_loaded() {
    let data = tempfile::tempdir().unwrap();
    let models = data.path().join("models");
    std::fs::create_dir(&models).unwrap();
    std::fs::write(models.join("noise.gguf"), b"GGUF and then nothing of use").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", models.join("link")).unwrap();
    let server = TestServer::start_in(data, &[]);
    let client = server.connect().await;
    client.create("m").await;
    let invalid = (Code::InvalidArgument, "22023");
    let source = |source: &str| LoadModelRequest {
        name: "x".into(),
        source: source.into(),
        ..Default::default()
    };
    let config = |config: &str| LoadModelRequest {
        config_json: config.into(),
        ..tiny("x")
    };
    let named = |name: &str| LoadModelRequest {
        name: name.into(),
        ..tiny("x")
    };
    let cases = [
        (source("/etc/passwd"), invalid),
        (source("../secrets"), invalid),
        (source("link"), invalid),
        (source("missing"), invalid),
        (source("noise.gguf"), invalid),
        (source("hf://owner/name"), (Code::Unimplemented, "0A000")),
        (source("checkpoint://m/9"), (Code::NotFound, "42704")),
        (source("checkpoint://m"), invalid),
        (config("{"), invalid),
        (config("[]"), invalid),
        (config(r#"{"architecture":"gpt2","layerz":2}"#), invalid),
        (
            config(r#"{"architecture":"gpt2","layers":2,"width":33,"heads":4,"context_length":8,"vocabulary":9}"#),
            invalid,
        ),
        (
            config(r#"{"architecture":"rnn","layers":2,"width":32,"heads":4,"context_length":8,"vocabulary":9}"#),
            (Code::Unimplemented, "0A000"),
        ),
        (
            config(
                r#"{"architecture":"gpt2","layers":2,"width":32,"heads":4,"context_length":8,"vocabulary":9,"beta1":2}"#,
            ),
            invalid,
        ),
        (
            config(r#"{"architecture":"gpt2","layers":2,"width":32,"heads":4,"context_length":8,"tokenizer":"none"}"#),
            (Code::NotFound, "42704"),
        ),
        (named(""), invalid),
        (named("a\nb"), invalid),
        (named(&"x".repeat(10_000)), invalid),
        (named("m"), (Code::AlreadyExists, "42710")),
        (
            LoadModelRequest {
                device: "tpu".into(),
                ..tiny("x")
            },
            invalid,
        ),
        (
            LoadModelRequest {
                device: "cuda:0".into(),
                ..tiny("x")
            },
            (Code::Unimplemented, "0A000"),
        ),
    ];
    for (request, (code, sqlstate)) in cases {
        let message = assert_status(client.load(request.clone()).await, code, sqlstate);
        assert!(message.len() < 1600 && !message.contains("root:"), "{message}");
    }
    let models = client
        .models
        .clone()
        .list_models(ListModelsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .models;
    assert_eq!(models.len(), 1);
    assert_eq!(client.requests().await, []);
}

#[tokio::test]
async fn too_large_a_model_is_refused_before_it_is_made() {
    let server = TestServer::start(&["--memory-limit", "100M", "--max-models", "2"]);
    let client = server.connect().await;
    let huge = r#"{"architecture":"gpt2","layers":12,"width":768,"heads":12,"context_length":1024,"vocabulary":50257}"#;
    let request = LoadModelRequest {
        config_json: huge.into(),
        ..tiny("huge")
    };
    assert_status(client.load(request).await, Code::ResourceExhausted, "HV001");
    client.create("a").await;
    client.load(tiny("b")).await.unwrap();
    assert_status(client.load(tiny("c")).await, Code::ResourceExhausted, "53400");
    // What an unloaded model held is free when the answer comes.
    for (old, new) in [("a", "c"), ("c", "d"), ("d", "e")] {
        client.drop_model(old).await.unwrap();
        client.load(tiny(new)).await.unwrap();
    }
}

#[tokio::test]
async fn generations_that_cannot_be_run() {
    let server = TestServer::start(&["--max-request-tokens", "1000"]);
    let client = server.connect().await;
    client.create("m").await;
    let bare = r#"{"architecture":"llama","layers":1,"width":32,"heads":4,"context_length":8,"vocabulary":9}"#;
    client
        .load(LoadModelRequest {
            config_json: bare.into(),
            ..tiny("bare")
        })
        .await
        .unwrap();
    let with = |change: &dyn Fn(&mut GenerateRequest)| {
        let mut request = random("m", "the", 1, 5);
        change(&mut request);
        request
    };
    let sampling = |sampling: SamplingOptions| with(&|request| request.sampling = Some(sampling.clone()));
    let invalid = (Code::InvalidArgument, "22023");
    let messages = |role: &str| {
        let message = ChatMessage {
            role: role.into(),
            content: "hi".into(),
        };
        Some(generate_request::Input::Messages(ChatMessages {
            messages: vec![message],
        }))
    };
    let cases = [
        (
            with(&|request| request.model = "none".into()),
            (Code::NotFound, "42704"),
        ),
        (
            with(&|request| request.model = "bare".into()),
            (Code::FailedPrecondition, "55000"),
        ),
        (with(&|request| request.input = None), invalid),
        (
            with(&|request| request.input = Some(generate_request::Input::Prompt(String::new()))),
            invalid,
        ),
        (
            with(&|request| request.input = Some(generate_request::Input::Prompt("word ".repeat(9000)))),
            invalid,
        ),
        (
            with(&|request| request.input = messages("user")),
            (Code::FailedPrecondition, "55000"),
        ),
        (with(&|request| request.max_tokens = Some(0)), invalid),
        (with(&|request| request.max_tokens = Some(-1)), invalid),
        (with(&|request| request.max_tokens = Some(1_000_000_000)), invalid),
        (
            with(&|request| request.max_tokens = Some(2000)),
            (Code::ResourceExhausted, "53400"),
        ),
        (with(&|request| request.stop = vec![String::new()]), invalid),
        (with(&|request| request.stop = vec!["x".into(); 17]), invalid),
        (
            sampling(SamplingOptions {
                temperature: Some(-1.0),
                ..Default::default()
            }),
            invalid,
        ),
        (
            sampling(SamplingOptions {
                temperature: Some(f32::NAN),
                ..Default::default()
            }),
            invalid,
        ),
        (
            sampling(SamplingOptions {
                top_p: Some(0.0),
                ..Default::default()
            }),
            invalid,
        ),
        (
            sampling(SamplingOptions {
                top_k: Some(-1),
                ..Default::default()
            }),
            invalid,
        ),
        (
            sampling(SamplingOptions {
                min_p: Some(2.0),
                ..Default::default()
            }),
            invalid,
        ),
        (
            sampling(SamplingOptions {
                repetition_penalty: Some(0.0),
                ..Default::default()
            }),
            invalid,
        ),
        (
            sampling(SamplingOptions {
                frequency_penalty: Some(3.0),
                ..Default::default()
            }),
            invalid,
        ),
        (
            sampling(SamplingOptions {
                presence_penalty: Some(-2.1),
                ..Default::default()
            }),
            invalid,
        ),
        (
            sampling(SamplingOptions {
                logit_bias: [(-1, 1.0)].into(),
                ..Default::default()
            }),
            invalid,
        ),
        (
            sampling(SamplingOptions {
                logit_bias: [(1_000_000, 1.0)].into(),
                ..Default::default()
            }),
            invalid,
        ),
        (with(&|request| request.n = Some(0)), invalid),
        (with(&|request| request.n = Some(129)), invalid),
        (with(&|request| request.top_logprobs = Some(21)), invalid),
        (
            with(&|request| (request.n, request.max_tokens) = (Some(128), Some(100))),
            (Code::ResourceExhausted, "53400"),
        ),
    ];
    for (request, (code, sqlstate)) in cases {
        assert_status(client.generate(request).await, code, sqlstate);
    }
    assert_eq!(client.requests().await, []);
}

#[tokio::test]
async fn training_input_that_is_wrong_changes_nothing() {
    let server = TestServer::start(&["--max-accumulated-tokens", "20"]);
    let client = server.connect().await;
    client.create("m").await;
    let sequence = |tokens: &[i64]| Sequence {
        token_ids: tokens.to_vec(),
        ..Default::default()
    };
    let targets = |targets: &[i64]| Sequence {
        targets: targets.to_vec(),
        has_targets: true,
        ..sequence(&[1, 2, 3])
    };
    let weight = |weight: f32| Sequence {
        loss_weight: Some(weight),
        ..sequence(&[1, 2])
    };
    let invalid = (Code::InvalidArgument, "22023");
    let cases = [
        (vec![], invalid),
        (vec![sequence(&[1, 2]), sequence(&[])], invalid),
        (vec![sequence(&[1, 2]), sequence(&[-1, 2])], invalid),
        (vec![sequence(&[1, 1 << 40])], invalid),
        (vec![sequence(&[1; 32_001])], invalid),
        (vec![targets(&[])], invalid),
        (vec![targets(&[1, 2])], invalid),
        (vec![targets(&[1, 2, -7])], invalid),
        (vec![weight(f32::NAN)], invalid),
        (vec![weight(-1.0)], invalid),
        (vec![sequence(&[1; 21])], (Code::ResourceExhausted, "53400")),
    ];
    for (sequences, (code, sqlstate)) in cases {
        let request = AccumulateBatchesRequest {
            transaction: None,
            model: "m".into(),
            sequences,
            adapter: String::new(),
        };
        assert_status(
            client.training.clone().accumulate_batches(request).await,
            code,
            sqlstate,
        );
    }
    assert_eq!(client.batches("m", None).await, 0);
    // Ignored targets are no gradient to step with.
    let ignored = AccumulateBatchesRequest {
        transaction: None,
        model: "m".into(),
        sequences: vec![targets(&[-100, -100, -100])],
        adapter: String::new(),
    };
    let losses = client
        .training
        .clone()
        .accumulate_batches(ignored)
        .await
        .unwrap()
        .into_inner()
        .losses;
    assert!(losses[0].loss.is_nan() && losses[0].token_count == 0);
    assert_status(client.step("m", None).await, Code::FailedPrecondition, "55000");
    let bad = StepRequest {
        transaction: None,
        model: "m".into(),
        options: Some(AdamWOptions {
            learning_rate: Some(f64::NAN),
            ..Default::default()
        }),
        adapter: String::new(),
    };
    client.batch("m", None, &[&[1, 2, 3]]).await.unwrap();
    assert_status(client.training.clone().step(bad).await, Code::InvalidArgument, "22023");
    let update = UpdateModelRequest {
        transaction: None,
        name: "m".into(),
        config_json: r#"{"layers": 3}"#.into(),
    };
    assert_status(
        client.models.clone().update_model(update).await,
        Code::InvalidArgument,
        "22023",
    );
    client.step("m", None).await.unwrap();
}
