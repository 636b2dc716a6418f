//! Models whose experts live on several servers: they score, generate and train as on one, and survive as on one.

use std::collections::BTreeMap;

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::experts::{TOKENS, mixture};
use crate::support::{Client, TestServer, assert_status, random, within};

/// A model `name` of which the experts of each server live there, under the name given.
fn split(name: &str, servers: &[(&TestServer, &str, &[usize])]) -> LoadModelRequest {
    let servers = servers.iter().map(|(server, model, experts)| {
        format!(
            r#"{{"endpoint":"{}","model":"{model}","experts":{experts:?}}}"#,
            server.endpoint
        )
    });
    let servers: Vec<String> = servers.collect();
    with(mixture(name), &format!(r#""expert_servers":[{}]"#, servers.join(",")))
}

/// The request with another field of its configuration.
pub fn with(mut request: LoadModelRequest, field: &str) -> LoadModelRequest {
    request.config_json.truncate(request.config_json.rfind('}').unwrap());
    request.config_json += &format!(",{field}}}");
    request
}

/// With a tokenizer, which generations need, and its vocabulary.
fn with_tokenizer(mut request: LoadModelRequest) -> LoadModelRequest {
    request.config_json = request.config_json.replace(r#""vocabulary":40"#, r#""vocabulary":280"#);
    with(request, r#""tokenizer":"tiny""#)
}

impl Client {
    pub async fn scores_in(
        &self,
        model: &str,
        transaction: Option<TransactionContext>,
    ) -> Result<Vec<Option<f32>>, Status> {
        let request = ScoreRequest {
            transaction,
            model: model.into(),
            source: Some(score_request::Source::Tokens(TokenIds { ids: TOKENS.to_vec() })),
            ..Default::default()
        };
        let tokens = self.inference.clone().score(request).await?.into_inner().tokens;
        Ok(tokens.iter().map(|token| token.logprob).collect())
    }
}

pub fn close(a: &[Option<f32>], b: &[Option<f32>]) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|pair| match pair {
            (Some(a), Some(b)) => (a - b).abs() < 1e-4,
            (a, b) => a == b,
        })
}

/// Rows of an expert without weights of their own.
fn rows(expert: u32, bytes: usize) -> Vec<ExpertRows> {
    vec![ExpertRows {
        expert,
        rows: vec![0; bytes].into(),
        ..Default::default()
    }]
}

#[tokio::test]
async fn experts_may_live_on_other_servers() {
    let (here, there, far) = (TestServer::start(&[]), TestServer::start(&[]), TestServer::start(&[]));
    let client = here.connect().await;
    client.load(mixture("whole")).await.unwrap();
    let other = there.connect().await;
    other.load(mixture("m")).await.unwrap();
    let third = far.connect().await;
    third.load(mixture("copy")).await.unwrap();
    client
        .load(split("m", &[(&there, "m", &[0, 3, 1]), (&far, "copy", &[4])]))
        .await
        .unwrap();
    let whole = client.scores_in("whole", None).await.unwrap();
    assert_eq!(whole.len(), TOKENS.len());
    assert_eq!(client.scores_in("m", None).await.unwrap(), whole);
    // They do not send on what was sent to them.
    let request = ForwardExpertsRequest {
        model: "m".into(),
        groups: rows(1, 40),
        ..Default::default()
    };
    let sent = client.experts.clone().forward_experts(request.clone()).await.map(drop);
    assert_status(sent, Code::FailedPrecondition, "55000");
    for (layer, expert, bytes) in [(2, 1, 40), (0, 5, 40), (0, 1, 44), (0, 1, 0)] {
        let bad = ForwardExpertsRequest {
            layer,
            groups: rows(expert, bytes),
            ..request.clone()
        };
        let sent = other.experts.clone().forward_experts(bad).await.map(drop);
        assert_status(sent, Code::InvalidArgument, "22023");
    }
    // A server that dies is named.
    let endpoint = there.endpoint.clone();
    drop(there.kill());
    let message = assert_status(client.scores_in("m", None).await, Code::FailedPrecondition, "55000");
    assert!(message.contains(&endpoint), "{message}");
    let trained = client.batch("m", None, &[TOKENS]).await;
    let message = assert_status(trained, Code::FailedPrecondition, "55000");
    assert!(message.contains(&endpoint), "{message}");
    assert_eq!(client.batches("m", None).await, 0);
    assert_eq!(client.scores_in("whole", None).await.unwrap(), whole);
}

#[tokio::test]
async fn what_is_trained_over_servers_is_as_on_one_and_stays_here() {
    let (here, there, far) = (TestServer::start(&[]), TestServer::start(&[]), TestServer::start(&[]));
    let client = here.connect().await;
    client.load(mixture("whole")).await.unwrap();
    let others = [there.connect().await, far.connect().await];
    others[0].load(mixture("m")).await.unwrap();
    // Of another seed: all weights have to be lent to it.
    let foreign = LoadModelRequest {
        seed: Some(2),
        ..mixture("copy")
    };
    others[1].load(foreign).await.unwrap();
    client
        .load(split("m", &[(&there, "m", &[0, 3, 1]), (&far, "copy", &[4])]))
        .await
        .unwrap();
    let before = (
        others[0].parameters("m", None).await.unwrap(),
        others[1].parameters("copy", None).await.unwrap(),
    );
    for step in 0..4 {
        let batch: [&[i64]; 3] = [TOKENS, &TOKENS[..1], &TOKENS[step..7]];
        let mut losses = BTreeMap::new();
        for model in ["whole", "m"] {
            let rows = client.batch(model, None, &batch).await.unwrap();
            losses.insert(model, (rows[0].loss, client.step(model, None).await.unwrap()));
        }
        let (whole, split) = (&losses["whole"], &losses["m"]);
        assert!((whole.0 - split.0).abs() < 1e-5, "{whole:?} {split:?}");
        assert!(
            (whole.1.grad_norm / split.1.grad_norm - 1.0).abs() < 1e-4,
            "{whole:?} {split:?}"
        );
        // What is rolled back leaves nothing, here or there.
        let committed = client.scores_in("m", None).await.unwrap();
        let id = format!("t{step}");
        client.batch("m", within(&id), &batch).await.unwrap();
        client.step("m", within(&id)).await.unwrap();
        let staged = client.scores_in("m", within(&id)).await.unwrap();
        assert!(!close(&staged, &committed));
        assert_eq!(client.scores_in("m", None).await.unwrap(), committed);
        client.rollback(&id, 0).await;
        assert_eq!(client.scores_in("m", None).await.unwrap(), committed);
        let whole = client.scores_in("whole", None).await.unwrap();
        assert!(close(&whole, &committed), "{whole:?} {committed:?}");
    }
    client.batch("m", None, &[TOKENS]).await.unwrap();
    let after = (
        others[0].parameters("m", None).await.unwrap(),
        others[1].parameters("copy", None).await.unwrap(),
    );
    assert!(before == after, "training changed a model of another server");
    // The log is replayed without them, to the same bits.
    let committed = client.committed("m").await;
    let scores = client.scores_in("m", None).await.unwrap();
    drop((there.kill(), others));
    let here = TestServer::start_in(here.kill(), &[]);
    let client = here.connect().await;
    assert_eq!(client.committed("m").await, committed);
    drop(far.kill());
    // Experts that are at home go on where the model is loaded without servers.
    client.checkpoint("m", None).await.unwrap();
    let restored = LoadModelRequest {
        name: "home".into(),
        source: "checkpoint://m/4".into(),
        ..Default::default()
    };
    client.load(restored).await.unwrap();
    assert_eq!(client.scores_in("home", None).await.unwrap(), scores);
}

#[tokio::test]
async fn one_expert_of_one_layer_elsewhere() {
    let (here, there) = (TestServer::start(&[]), TestServer::start(&[]));
    let config = r#"{"architecture":"mixtral","layers":1,"width":6,"heads":3,"context_length":16,"vocabulary":20,
        "num_experts":1,"num_experts_per_tok":1,"feed_forward_width":5,"precision":"bf16"}"#;
    let model = |name: &str| LoadModelRequest {
        name: name.into(),
        config_json: config.into(),
        seed: Some(3),
        ..Default::default()
    };
    let (client, other) = (here.connect().await, there.connect().await);
    client.load(model("whole")).await.unwrap();
    other.load(model("m")).await.unwrap();
    let mut split = model("m");
    split.config_json.truncate(split.config_json.rfind('}').unwrap());
    split.config_json += &format!(
        r#","expert_servers":[{{"endpoint":"{}","experts":[0]}}]}}"#,
        there.endpoint
    );
    client.load(split).await.unwrap();
    for _ in 0..3 {
        let mut steps = Vec::new();
        for model in ["whole", "m"] {
            client.batch(model, None, &[&[1, 2], &[7, 8, 9, 1]]).await.unwrap();
            steps.push(client.step(model, None).await.unwrap());
        }
        let ratio = steps[0].grad_norm / steps[1].grad_norm;
        assert!((ratio - 1.0).abs() < 1e-2, "{steps:?}");
    }
}

#[tokio::test]
async fn quantised_experts_are_lent_in_their_blocks() {
    let (here, there, far) = (TestServer::start(&[]), TestServer::start(&[]), TestServer::start(&[]));
    let config = r#"{"architecture":"mixtral","layers":2,"width":32,"heads":2,"context_length":32,"vocabulary":280,
        "num_experts":5,"num_experts_per_tok":2,"feed_forward_width":64,"tokenizer":"tiny"}"#;
    let model = |name: &str, dtype: &str, seed: i64| LoadModelRequest {
        name: name.into(),
        config_json: config.into(),
        dtype: dtype.into(),
        seed: Some(seed),
        ..Default::default()
    };
    let (client, same, other) = (here.connect().await, there.connect().await, far.connect().await);
    for client in [&client, &same, &other] {
        client.train_tokenizer().await;
    }
    for dtype in ["q8_0", "q4_0"] {
        client.load(model("whole", dtype, 1)).await.unwrap();
        // One has the same blocks. The other one has other weights, in f32: all have to be lent to it.
        same.load(model("m", dtype, 1)).await.unwrap();
        other.load(model("m", "", 2)).await.unwrap();
        let servers = format!(
            r#""expert_servers":[{{"endpoint":"{}","experts":[0,3]}},{{"endpoint":"{}","experts":[1,4]}}]"#,
            there.endpoint, far.endpoint
        );
        client.load(with(model("m", dtype, 1), &servers)).await.unwrap();
        let whole = client.scores_in("whole", None).await.unwrap();
        assert_eq!(client.scores_in("m", None).await.unwrap(), whole, "{dtype}");
        let mut texts = Vec::new();
        for model in ["whole", "m"] {
            texts.push(
                client
                    .generate(random(model, "the quick", 3, 12))
                    .await
                    .unwrap()
                    .1
                    .completion,
            );
        }
        assert_eq!(texts[0], texts[1], "{dtype}");
        // Training expands the weights to f32, which are lent then.
        let mut steps = Vec::new();
        for model in ["whole", "m"] {
            client.batch(model, None, &[TOKENS]).await.unwrap();
            steps.push(client.step(model, None).await.unwrap());
        }
        let ratio = steps[0].grad_norm / steps[1].grad_norm;
        assert!((ratio - 1.0).abs() < 1e-4, "{dtype}: {steps:?}");
        let whole = client.scores_in("whole", None).await.unwrap();
        assert!(close(&client.scores_in("m", None).await.unwrap(), &whole), "{dtype}");
        for client in [&client, &same, &other] {
            client.drop_model("m").await.unwrap();
        }
        client.drop_model("whole").await.unwrap();
    }
}

#[tokio::test]
async fn what_is_lent_has_to_be_what_it_says() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.load(mixture("m")).await.unwrap();
    let good = LendExpertRequest {
        model: "m".into(),
        layer: 1,
        expert: 4,
        weights: vec![1; 32].into(),
        dtype: DataType::F32.into(),
        data: vec![0; 4 * 3 * 3 * 10].into(),
        ..Default::default()
    };
    let wrong = [
        good.clone(),
        LendExpertRequest {
            layer: 2,
            ..good.clone()
        },
        LendExpertRequest {
            expert: 5,
            ..good.clone()
        },
        LendExpertRequest {
            weights: vec![1; 31].into(),
            ..good.clone()
        },
        LendExpertRequest {
            weights: vec![].into(),
            ..good.clone()
        },
        LendExpertRequest {
            data: vec![0; 7].into(),
            ..good.clone()
        },
        LendExpertRequest {
            data: vec![0; 1000].into(),
            ..good.clone()
        },
        LendExpertRequest {
            dtype: DataType::I32.into(),
            ..good.clone()
        },
        // Rows of 10 and of 3 elements are no whole blocks.
        LendExpertRequest {
            up_type: "q8_0".into(),
            ..good.clone()
        },
        LendExpertRequest {
            down_type: "q4_k".into(),
            ..good.clone()
        },
        LendExpertRequest {
            up_type: "q9_9".into(),
            ..good.clone()
        },
    ];
    for request in wrong {
        let sent = client
            .experts
            .clone()
            .lend_expert(tokio_stream::once(request.clone()))
            .await;
        assert_status(sent.map(drop), Code::InvalidArgument, "22023");
    }
    let nothing = client.experts.clone().lend_expert(tokio_stream::empty()).await;
    assert_status(nothing.map(drop), Code::InvalidArgument, "22023");
    // Weights that nobody lent are asked for.
    let mut asked = ForwardExpertsRequest {
        model: "m".into(),
        groups: rows(2, 40),
        ..Default::default()
    };
    asked.groups[0].weights = vec![7; 32].into();
    let answer = client
        .experts
        .clone()
        .forward_experts(asked)
        .await
        .unwrap()
        .into_inner();
    assert_eq!((answer.missing, answer.groups.len()), (vec![2], 0));
    for (expert, data) in [(0, 7), (5, 4 * (2 * 10 + 1)), (0, 4 * 22)] {
        let request = BackwardExpertRequest {
            model: "m".into(),
            expert,
            rows: 1,
            data: vec![0; data].into(),
            ..Default::default()
        };
        let sent = client
            .experts
            .clone()
            .backward_expert(tokio_stream::once(request))
            .await;
        assert_status(sent.map(drop), Code::InvalidArgument, "22023");
    }
}

/// A server that answers whoever asks whether it is there, and nothing else. Its address, and a message for every call.
async fn silent() -> (String, tokio::sync::mpsc::Receiver<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (asked, calls) = tokio::sync::mpsc::channel(64);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let asked = asked.clone();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(socket).await.unwrap();
                let mut held = Vec::new();
                while let Some(Ok(call)) = connection.accept().await {
                    held.push(call);
                    let _ = asked.send(()).await;
                }
            });
        }
    });
    (format!("http://{address}"), calls)
}

#[tokio::test]
async fn who_gives_up_does_not_leave_the_model_waiting() {
    let here = TestServer::start(&[]);
    let client = here.connect().await;
    let (endpoint, mut calls) = silent().await;
    client.train_tokenizer().await;
    let servers = format!(r#""expert_servers":[{{"endpoint":"{endpoint}","experts":[0,1,2,3,4]}}]"#);
    client.load(with_tokenizer(with(mixture("m"), &servers))).await.unwrap();
    let asking = client.clone();
    let score = tokio::spawn(async move { asking.scores_in("m", None).await });
    calls.recv().await.unwrap();
    score.abort();
    // The model's own thread answers.
    let patience = std::time::Duration::from_secs(30);
    let routers = || tokio::time::timeout(patience, client.routers(None, "m"));
    assert_eq!(routers().await.expect("the thread still waits").len(), 10);
    let asking = client.clone();
    let batch = tokio::spawn(async move { asking.batch("m", None, &[TOKENS]).await });
    calls.recv().await.unwrap();
    batch.abort();
    assert_eq!(routers().await.expect("the thread still waits").len(), 10);
    assert_eq!(client.batches("m", None).await, 0);
    let generate = GenerateRequest {
        model: "m".into(),
        input: Some(generate_request::Input::Tokens(TokenIds { ids: TOKENS.to_vec() })),
        max_tokens: Some(3),
        ..Default::default()
    };
    let stream = client.start_generation(generate).await.unwrap();
    calls.recv().await.unwrap();
    drop(stream);
    assert_eq!(routers().await.expect("the thread still waits").len(), 10);
    // Unloading does not wait either.
    let asking = client.clone();
    let score = tokio::spawn(async move { asking.scores_in("m", None).await });
    calls.recv().await.unwrap();
    tokio::time::timeout(patience, client.drop_model("m"))
        .await
        .expect("the thread still waits")
        .unwrap();
    score.abort();
    for endpoint in ["nonsense", "127.0.0.1:9", "ftp://127.0.0.1:9", "http://127.0.0.1"] {
        let servers = format!(r#""expert_servers":[{{"endpoint":"{endpoint}","experts":[0]}}]"#);
        let refused = client.load(with(mixture("x"), &servers)).await;
        let message = assert_status(refused.map(drop), Code::InvalidArgument, "22023");
        assert!(message.contains("http://HOST:PORT"), "{message}");
    }
}

#[tokio::test]
async fn a_server_that_hangs_is_named() {
    let (here, there) = (TestServer::start(&[]), TestServer::start(&[]));
    let (client, other) = (here.connect().await, there.connect().await);
    for client in [&client, &other] {
        client.train_tokenizer().await;
    }
    other.load(with_tokenizer(mixture("m"))).await.unwrap();
    let divided = split("m", &[(&there, "m", &[0, 1, 2, 3])]);
    client.load(with_tokenizer(divided)).await.unwrap();
    let before = client.scores_in("m", None).await.unwrap();
    let signal = |name: &str| {
        let sent = std::process::Command::new("kill")
            .args([name, &there.process_id().to_string()])
            .status();
        assert!(sent.unwrap().success());
    };
    signal("-STOP");
    for answer in [
        client.scores_in("m", None).await.map(drop),
        client.batch("m", None, &[TOKENS]).await.map(drop),
    ] {
        let message = assert_status(answer, Code::FailedPrecondition, "55000");
        assert!(message.contains(&there.endpoint), "{message}");
    }
    let generate = GenerateRequest {
        model: "m".into(),
        input: Some(generate_request::Input::Tokens(TokenIds { ids: TOKENS.to_vec() })),
        max_tokens: Some(3),
        ..Default::default()
    };
    let message = assert_status(
        client.generate(generate).await.map(drop),
        Code::FailedPrecondition,
        "55000",
    );
    assert!(message.contains(&there.endpoint), "{message}");
    signal("-CONT");
    assert_eq!(client.scores_in("m", None).await.unwrap(), before);
    assert_eq!(client.batches("m", None).await, 0);
}
