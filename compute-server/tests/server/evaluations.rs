//! Evaluations over gRPC: against values of transformers, within transactions, across restarts and between tenants.

use std::path::Path;

use candle_compute_proto::v1::evaluate_request::Message;
use candle_compute_proto::v1::evaluation_row::Row;
use candle_compute_proto::v1::*;
use serde_json::Value;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::support::{Client, TestServer, assert_status, tiny, within};

/// Tiny models and what they must give, by `tests/golden/evaluation.py`.
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");

fn golden() -> Value {
    let text = std::fs::read_to_string(Path::new(GOLDEN).join("evaluation.golden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn text(text: &str) -> EvaluationRow {
    EvaluationRow {
        row: Some(Row::Text(text.into())),
    }
}

fn tokens(ids: &[i64]) -> EvaluationRow {
    let ids = ids.to_vec();
    EvaluationRow {
        row: Some(Row::Tokens(EvaluationTokens { ids })),
    }
}

fn question(context: &str, choices: &[&str], answer: i64) -> EvaluationRow {
    let question = EvaluationQuestion {
        context: context.into(),
        choices: choices.iter().map(|choice| (*choice).to_owned()).collect(),
        answer,
    };
    EvaluationRow {
        row: Some(Row::Question(question)),
    }
}

fn start(model: &str) -> EvaluationStart {
    EvaluationStart {
        model: model.into(),
        ..Default::default()
    }
}

impl Client {
    /// Evaluates rows, each of the given lists in a message of its own.
    async fn evaluate(
        &self,
        start: EvaluationStart,
        rows: &[&[EvaluationRow]],
    ) -> Result<(Evaluation, Vec<EvaluatedRow>), Status> {
        let rows = rows
            .iter()
            .map(|rows| Message::Rows(EvaluationRows { rows: rows.to_vec() }));
        let messages = [Message::Start(start)].into_iter().chain(rows);
        let messages: Vec<_> = messages.chain([Message::Finish(EvaluationFinish {})]).collect();
        self.messages(messages).await
    }

    async fn messages(&self, messages: Vec<Message>) -> Result<(Evaluation, Vec<EvaluatedRow>), Status> {
        let messages = messages
            .into_iter()
            .map(|message| EvaluateRequest { message: Some(message) });
        let request = tokio_stream::iter(messages.collect::<Vec<_>>());
        let mut answers = self.evaluations.clone().evaluate(request).await?.into_inner();
        let (mut found, mut evaluation) = (Vec::new(), None);
        while let Some(answer) = answers.message().await? {
            found.extend(answer.rows);
            evaluation = answer.evaluation.or(evaluation);
        }
        Ok((evaluation.unwrap(), found))
    }

    async fn list_evaluations(&self, transaction: Option<TransactionContext>) -> Vec<Evaluation> {
        let request = ListEvaluationsRequest {
            transaction,
            models: Vec::new(),
        };
        let listed = self.evaluations.clone().list_evaluations(request).await;
        listed.unwrap().into_inner().evaluations
    }

    async fn delete_evaluation(&self, id: u64, transaction: Option<TransactionContext>) -> Result<(), Status> {
        let request = DeleteEvaluationRequest { transaction, id };
        self.evaluations.clone().delete_evaluation(request).await.map(drop)
    }
}

async fn load_golden() -> (TestServer, Client) {
    let server = TestServer::start(&["--models-dir", GOLDEN]);
    let client = server.connect().await;
    let request = LoadModelRequest {
        name: "m".into(),
        source: "evaluation".into(),
        ..Default::default()
    };
    client.load(request).await.unwrap();
    (server, client)
}

fn assert_near(found: Option<f64>, want: &Value, what: &str) {
    match want.as_f64() {
        None => assert_eq!(found, None, "{what}"),
        Some(want) => {
            let found = found.unwrap_or(f64::NAN);
            assert!(
                (found - want).abs() < 1e-4 * want.abs().max(1.0),
                "{what}: {found}, not {want}"
            );
        }
    }
}

#[tokio::test]
async fn texts_are_evaluated_as_transformers_does() {
    let golden = golden();
    let (_server, client) = load_golden().await;
    let rows = golden["texts"].as_array().unwrap().iter();
    let rows: Vec<_> = rows.map(|row| text(row.as_str().unwrap())).collect();
    for want in golden["of_texts"].as_array().unwrap() {
        let stride = u32::try_from(want["stride"].as_u64().unwrap()).unwrap();
        let start = EvaluationStart {
            stride: Some(stride),
            start_token: want["start_token"].as_bool().unwrap(),
            with_rows: true,
            ..start("m")
        };
        let (found, found_rows) = client.evaluate(start, &[&rows[..2], &rows[2..]]).await.unwrap();
        assert_near(found.loss, &want["loss"], "loss");
        assert_near(found.perplexity, &want["perplexity"], "perplexity");
        assert_near(found.bits_per_byte, &want["bits_per_byte"], "bits per byte");
        assert_near(found.next_token_accuracy, &want["next_token_accuracy"], "accuracy");
        assert_eq!(found.tokens, want["tokens"].as_u64().unwrap());
        assert_eq!(found.bytes, want["bytes"].as_u64().unwrap());
        assert_eq!((found.rows, found.kind.as_str(), found.accuracy), (5, "texts", None));
        for (row, want) in found_rows.iter().zip(want["rows"].as_array().unwrap()) {
            assert_eq!(row.tokens, want["tokens"].as_u64().unwrap());
            assert_near(row.loss, &want["loss"], "loss of a row");
        }
        assert_eq!(found_rows.len(), 5);
    }
}

#[tokio::test]
async fn questions_are_answered_as_lm_evaluation_harness_does() {
    let golden = golden();
    let (_server, client) = load_golden().await;
    let rows = golden["questions"].as_array().unwrap().iter().map(|row| {
        let choices = row["choices"].as_array().unwrap().iter();
        let choices: Vec<&str> = choices.map(|choice| choice.as_str().unwrap()).collect();
        question(
            row["context"].as_str().unwrap(),
            &choices,
            row["answer"].as_i64().unwrap(),
        )
    });
    let rows: Vec<_> = rows.collect();
    let start = EvaluationStart {
        choices: true,
        with_rows: true,
        ..start("m")
    };
    let (found, found_rows) = client.evaluate(start, &[&rows]).await.unwrap();
    let want = &golden["of_questions"];
    assert_near(found.accuracy, &want["accuracy"], "accuracy");
    assert_near(found.accuracy_norm, &want["accuracy_norm"], "normalised accuracy");
    assert_eq!((found.rows, found.kind.as_str(), found.loss), (5, "choices", None));
    for (row, want) in found_rows.iter().zip(want["rows"].as_array().unwrap()) {
        for (found, want) in row
            .log_likelihoods
            .iter()
            .zip(want["log_likelihoods"].as_array().unwrap())
        {
            assert_near(Some(*found), want, "log-likelihood");
        }
        assert_eq!(row.choice.map(u64::from), want["choice"].as_u64());
        assert_eq!(row.choice_norm.map(u64::from), want["choice_norm"].as_u64());
    }
    assert_eq!(found_rows.len(), 5);
}

#[tokio::test]
async fn tokens_are_evaluated_like_their_text_and_generations_are_timed() {
    let (_server, client) = load_golden().await;
    let tokenized = TokenizeRequest {
        transaction: None,
        model: "m".into(),
        input: "The quick brown fox".into(),
    };
    let tokenized = client.inference.clone().tokenize(tokenized).await.unwrap().into_inner();
    let ids: Vec<i64> = tokenized.tokens.iter().map(|token| i64::from(token.token_id)).collect();
    let timed = EvaluationStart {
        generations: 3,
        max_tokens: Some(4),
        ..start("m")
    };
    let (of_text, _) = client
        .evaluate(start("m"), &[&[text("The quick brown fox")]])
        .await
        .unwrap();
    let one = tokens(&ids);
    let (of_tokens, _) = client
        .evaluate(timed, &[std::slice::from_ref(&one), &[one.clone(), one.clone()]])
        .await
        .unwrap();
    assert!((of_text.loss.unwrap() - of_tokens.loss.unwrap()).abs() < 1e-9);
    assert_eq!((of_tokens.bytes, of_tokens.bits_per_byte), (0, None));
    assert_eq!((of_tokens.tokens, of_tokens.rows), (3 * of_text.tokens, 3));
    assert_ne!(of_text.dataset_digest, of_tokens.dataset_digest);
    // Of the text nothing was generated.
    assert_eq!((of_text.generations, of_text.latency_p50_ms), (0, None));
    assert_eq!(of_tokens.generations, 3);
    let [p50, p90, p99] = [
        of_tokens.latency_p50_ms,
        of_tokens.latency_p90_ms,
        of_tokens.latency_p99_ms,
    ]
    .map(Option::unwrap);
    assert!(0.0 < of_tokens.time_to_first_token_ms.unwrap() && of_tokens.time_to_first_token_ms.unwrap() <= p99);
    assert!(p50 <= p90 && p90 <= p99);
    assert!(of_tokens.generation_tokens_per_second.unwrap() > 0.0 && of_tokens.tokens_per_second > 0.0);
    let settings: Value = serde_json::from_str(&of_tokens.settings_json).unwrap();
    assert_eq!(settings["max_tokens"], 4);
}

#[tokio::test]
async fn evaluations_are_part_of_transactions_and_survive_restarts() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let rows: &[EvaluationRow] = &[tokens(&[1, 2, 3])];
    let of = |id: &str| EvaluationStart {
        transaction: within(id),
        ..start("m")
    };
    let (staged, _) = client.evaluate(of("a"), &[rows]).await.unwrap();
    assert_eq!(
        client.list_evaluations(within("a")).await,
        std::slice::from_ref(&staged)
    );
    assert_eq!(client.list_evaluations(None).await, []);
    client.rollback("a", 1).await;
    assert_eq!(client.list_evaluations(None).await, []);
    // What a transaction staged in the model is what is evaluated.
    client.batch("m", within("b"), &[&[1, 2, 3, 4]]).await.unwrap();
    client.step("m", within("b")).await.unwrap();
    let (after, _) = client.evaluate(of("b"), &[rows]).await.unwrap();
    assert_eq!((staged.step, after.step), (0, 1));
    assert_ne!(staged.loss, after.loss);
    client.publish("b").await.unwrap();
    let (kept, _) = client.evaluate(start("m"), &[rows]).await.unwrap();
    assert_eq!((kept.loss, kept.step), (after.loss, 1));
    assert_eq!(client.list_evaluations(None).await, [after.clone(), kept.clone()]);
    // Deleted in a transaction, it is there until that commits.
    client.delete_evaluation(after.id, within("c")).await.unwrap();
    assert_eq!(client.list_evaluations(within("c")).await, std::slice::from_ref(&kept));
    assert_status(
        client.delete_evaluation(after.id, within("c")).await,
        Code::NotFound,
        "42704",
    );
    assert_eq!(client.list_evaluations(None).await.len(), 2);
    client.publish("c").await.unwrap();
    let (_, nothing) = client
        .messages(vec![
            Message::Start(EvaluationStart {
                discard: true,
                ..start("m")
            }),
            Message::Rows(EvaluationRows { rows: rows.to_vec() }),
            Message::Finish(EvaluationFinish {}),
        ])
        .await
        .unwrap();
    assert_eq!(nothing, []);
    let data = server.kill();
    let server = TestServer::start_in(data, &[]);
    let client = server.connect().await;
    assert_eq!(client.list_evaluations(None).await, std::slice::from_ref(&kept));
    client.delete_evaluation(kept.id, None).await.unwrap();
    assert_eq!(client.list_evaluations(None).await, []);
}

#[tokio::test]
async fn bad_input_is_refused_and_leaves_nothing() {
    let (_server, client) = load_golden().await;
    client
        .load(LoadModelRequest {
            config_json: r#"{"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2,
        "context_length": 8, "vocabulary": 20}"#
                .into(),
            ..LoadModelRequest {
                name: "bare".into(),
                ..Default::default()
            }
        })
        .await
        .unwrap();
    let good = text("The quick brown fox");
    let choices = EvaluationStart {
        choices: true,
        ..start("m")
    };
    let cases: [(EvaluationStart, EvaluationRow, Code, &str, &str); 13] = [
        (start("none"), good.clone(), Code::NotFound, "42704", "model \"none\""),
        (
            EvaluationStart {
                adapter: "none".into(),
                ..start("m")
            },
            good.clone(),
            Code::NotFound,
            "42704",
            "none",
        ),
        (
            EvaluationStart {
                stride: Some(21),
                ..start("m")
            },
            good.clone(),
            Code::InvalidArgument,
            "22023",
            "stride is 21; it must be from 1 to 20",
        ),
        (
            EvaluationStart {
                context_length: Some(0),
                ..start("m")
            },
            good.clone(),
            Code::InvalidArgument,
            "22023",
            "context_length is 0",
        ),
        (
            EvaluationStart {
                generations: 1001,
                ..start("m")
            },
            good.clone(),
            Code::InvalidArgument,
            "22023",
            "generations is 1001",
        ),
        (
            start("m"),
            question("a", &["b"], 0),
            Code::InvalidArgument,
            "22023",
            "row 2: it must be a text or tokens",
        ),
        (
            choices.clone(),
            good.clone(),
            Code::InvalidArgument,
            "22023",
            "row 1: it must be a question",
        ),
        (
            choices.clone(),
            question("a", &["b"], 1),
            Code::InvalidArgument,
            "22023",
            "row 1: the answer is 1; it must be the number of a choice, from 0 to 0",
        ),
        (
            choices.clone(),
            question("a", &["b", ""], 1),
            Code::InvalidArgument,
            "22023",
            "row 1: choice 1 is empty",
        ),
        (
            choices.clone(),
            question("a", &[], 0),
            Code::InvalidArgument,
            "22023",
            "row 1: there are no choices",
        ),
        (
            choices,
            question("a", &[&"long ".repeat(30)], 0),
            Code::InvalidArgument,
            "22023",
            "row 1: choice 0 has",
        ),
        (
            start("m"),
            tokens(&[1, 300]),
            Code::InvalidArgument,
            "22023",
            "row 2: token 1 is 300",
        ),
        (
            start("bare"),
            good.clone(),
            Code::FailedPrecondition,
            "55000",
            "no tokenizer",
        ),
    ];
    for (start, row, code, sqlstate, reason) in cases {
        let first = match (&row.row, start.choices, start.model.as_str()) {
            (Some(Row::Question(_)), false, _) | (Some(Row::Tokens(_)), ..) => vec![good.clone()],
            _ => Vec::new(),
        };
        let found = client.evaluate(start, &[&first, &[row]]).await;
        let message = assert_status(found, code, sqlstate);
        assert!(message.contains(reason), "{message}");
    }
    let nothing = client.evaluate(start("m"), &[]).await;
    assert!(assert_status(nothing, Code::FailedPrecondition, "55000").contains("no rows"));
    let single = client.evaluate(start("m"), &[&[text("x"), text("")]]).await;
    assert!(assert_status(single, Code::FailedPrecondition, "55000").contains("2 rows"));
    for wrong in [
        vec![],
        vec![Message::Finish(EvaluationFinish {})],
        vec![Message::Start(start("m")), Message::Start(start("m"))],
    ] {
        assert_status(client.messages(wrong).await, Code::InvalidArgument, "22023");
    }
    // A stream that ends without finish.
    let unfinished = vec![
        Message::Start(start("m")),
        Message::Rows(EvaluationRows { rows: vec![good] }),
    ];
    assert_status(client.messages(unfinished).await, Code::Cancelled, "57014");
    assert_eq!(client.list_evaluations(None).await, []);
    poll_idle(&client).await;
}

async fn poll_idle(client: &Client) {
    client.wait_for_requests(|requests| requests.is_empty()).await;
}

#[tokio::test]
async fn evaluations_are_listed_and_cancelled() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let send = |message| sender.send(EvaluateRequest { message: Some(message) });
    send(Message::Start(start("m"))).await.unwrap();
    let mut answers = client
        .evaluations
        .clone()
        .evaluate(ReceiverStream::new(receiver))
        .await
        .unwrap()
        .into_inner();
    send(Message::Rows(EvaluationRows {
        rows: vec![tokens(&[1, 2, 3]); 2],
    }))
    .await
    .unwrap();
    answers.message().await.unwrap().unwrap();
    let listed = client.requests().await;
    assert_eq!(
        (listed[0].kind.as_str(), listed[0].model.as_str(), listed[0].done),
        ("evaluate", "m", 2)
    );
    let request = CancelRequestRequest {
        id: listed[0].id.clone(),
    };
    client.telemetry.clone().cancel_request(request).await.unwrap();
    assert_status(answers.message().await.map(drop), Code::Cancelled, "57014");
    poll_idle(&client).await;
    // A client that goes away leaves nothing behind.
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    sender
        .send(EvaluateRequest {
            message: Some(Message::Start(start("m"))),
        })
        .await
        .unwrap();
    let answers = client
        .evaluations
        .clone()
        .evaluate(ReceiverStream::new(receiver))
        .await
        .unwrap();
    drop((answers, sender));
    poll_idle(&client).await;
    assert_eq!(client.list_evaluations(None).await, []);
}

#[tokio::test]
async fn tenants_have_evaluations_of_their_own() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("tokens");
    std::fs::write(
        &file,
        "root r00t\nann t-ann roles=read,generate\nbob t-bob roles=read,generate\ncat t-cat roles=read\n",
    )
    .unwrap();
    let server = TestServer::start_in(data, &["--token-file", file.to_str().unwrap()]);
    let client = server.connect().await;
    let [root, ann, bob, cat] = ["r00t", "t-ann", "t-bob", "t-cat"].map(|token| client.with_token(token));
    root.train_tokenizer().await;
    root.load(tiny("m")).await.unwrap();
    let rows: &[EvaluationRow] = &[tokens(&[1, 2, 3])];
    let (found, _) = ann.evaluate(start("m"), &[rows]).await.unwrap();
    assert_eq!(found.tenant, "ann");
    assert_status(cat.evaluate(start("m"), &[rows]).await, Code::PermissionDenied, "42501");
    assert_eq!(
        (bob.list_evaluations(None).await, ann.list_evaluations(None).await.len()),
        (vec![], 1)
    );
    assert_eq!(root.list_evaluations(None).await.len(), 1);
    assert_status(bob.delete_evaluation(found.id, None).await, Code::NotFound, "42704");
    root.delete_evaluation(found.id, None).await.unwrap();
    assert_eq!(ann.list_evaluations(None).await, []);
}
