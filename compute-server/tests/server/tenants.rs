//! Tenants: roles, quotas, and what one tenant can do about another's work.

use std::path::Path;

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::support::{Client, TestServer, assert_status, endless, random, tiny, within};

fn start(tokens: &str) -> (TestServer, std::path::PathBuf) {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("tokens");
    std::fs::write(&file, tokens).unwrap();
    let server = TestServer::start_in(data, &["--token-file", file.to_str().unwrap()]);
    (server, file)
}

/// Replaces a file as editors and configuration management do.
fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(&new, file).unwrap();
}

async fn list(client: &Client) -> Result<(), Status> {
    let request = ListModelsRequest::default();
    client.models.clone().list_models(request).await.map(drop)
}

#[tokio::test]
async fn each_call_needs_its_role() {
    let tokens = "root r00t\nreader t-read roles=read\nwriter t-generate roles=generate\ntrainer t-train roles=train\n";
    let (server, _) = start(tokens);
    let client = server.connect().await;
    client.with_token("r00t").create("m").await;
    let as_role = |role: &str| client.with_token(&format!("t-{role}"));
    for role in ["read", "generate", "train"] {
        let caller = as_role(role);
        let outcomes = [
            ("read", list(&caller).await),
            ("generate", caller.generate(random("m", "the", 1, 2)).await.map(drop)),
            ("train", caller.batch("m", None, &[&[1, 2, 3]]).await.map(drop)),
            ("admin", caller.drop_model("m").await),
        ];
        for (needed, outcome) in outcomes {
            if needed == role {
                outcome.unwrap();
                continue;
            }
            let message = assert_status(outcome, Code::PermissionDenied, "42501");
            assert!(message.contains(&format!("role \"{needed}\"")), "{message}");
            assert!(!message.contains("t-"), "{message}");
        }
    }
    client.with_token("r00t").drop_model("m").await.unwrap();
}

#[tokio::test]
async fn a_tenant_sees_and_cancels_its_own_work_only() {
    let (server, _) = start("root r00t\nann t-ann roles=read,generate,train\nbob t-bob roles=read,generate,train\n");
    let client = server.connect().await;
    let (root, ann, bob) = (
        client.with_token("r00t"),
        client.with_token("t-ann"),
        client.with_token("t-bob"),
    );
    root.create("m").await;
    let mut running = ann.start_generation(endless("m")).await.unwrap();
    running.message().await.unwrap();
    assert!(bob.requests().await.is_empty());
    let listed = ann.requests().await;
    assert_eq!((listed.len(), root.requests().await.len()), (1, 1));
    let cancel = |client: &Client| {
        let (mut telemetry, id) = (client.telemetry.clone(), listed[0].id.clone());
        async move { telemetry.cancel_request(CancelRequestRequest { id }).await }
    };
    assert_status(cancel(&bob).await, Code::NotFound, "42704");
    cancel(&ann).await.unwrap();
    let mut last = None;
    while let Some(message) = running.message().await.unwrap() {
        last = message.summary;
    }
    assert_eq!(last.unwrap().finish_reason, "cancelled");
}

#[tokio::test]
async fn a_tenant_cannot_touch_the_transaction_of_another() {
    let (server, _) = start("ann t-ann\nbob t-bob\n");
    let client = server.connect().await;
    let (ann, bob) = (client.with_token("t-ann"), client.with_token("t-bob"));
    ann.create("m").await;
    ann.batch("m", within("t"), &[&[1, 2, 3]]).await.unwrap();
    let stolen = bob.batch("m", within("t"), &[&[1, 2, 3]]).await;
    assert_status(stolen, Code::NotFound, "42704");
    assert_status(bob.publish("t").await, Code::NotFound, "42704");
    let rollback = RollbackRequest {
        transaction_id: "t".into(),
        subtransaction_id: 0,
    };
    assert_status(
        bob.transactions.clone().rollback(rollback).await,
        Code::NotFound,
        "42704",
    );
    assert_eq!(ann.publish("t").await.unwrap(), 1);
}

#[tokio::test]
async fn a_tenant_over_its_quota_is_told_and_others_go_on() {
    let tokens =
        "root r00t\nann t-ann tokens_per_minute=40\nbob t-bob concurrent=1\ncid t-cid requests_per_second=0.01\n";
    let (server, _) = start(tokens);
    let client = server.connect().await;
    let root = client.with_token("r00t");
    root.create("m").await;
    let request = || random("m", "the", 3, 20);
    let alone = root.generate(request()).await.unwrap().1.completion;

    // Tokens: the first generation goes into a debt of minutes, which the second finds.
    let ann = client.with_token("t-ann");
    let long = GenerateRequest {
        max_tokens: Some(600),
        ..endless("m")
    };
    assert_eq!(ann.generate(long).await.unwrap().1.completion_tokens, 600);
    let status = ann.generate(request()).await.unwrap_err();
    let seconds = status.metadata().get("retry-after").unwrap().to_str().unwrap();
    assert!((60..1000).contains(&seconds.parse().unwrap()), "{seconds}");
    let message = assert_status(Err::<(), _>(status), Code::ResourceExhausted, "53400");
    assert!(
        message.contains("ann") && message.contains("40 tokens per minute"),
        "{message}"
    );
    let score = ScoreRequest {
        model: "m".into(),
        source: Some(score_request::Source::Tokens(TokenIds { ids: vec![1; 41] })),
        ..Default::default()
    };
    let message = assert_status(
        ann.inference.clone().score(score).await,
        Code::ResourceExhausted,
        "53400",
    );
    assert!(message.contains("less than the 41"), "{message}");

    // Work at once.
    let bob = client.with_token("t-bob");
    let mut running = bob.start_generation(endless("m")).await.unwrap();
    running.message().await.unwrap();
    let message = assert_status(bob.generate(request()).await, Code::ResourceExhausted, "53400");
    assert!(message.contains("1 requests at once"), "{message}");
    assert_eq!(root.generate(request()).await.unwrap().1.completion, alone);
    drop(running);
    root.wait_for_requests(<[_]>::is_empty).await;
    assert_eq!(bob.generate(request()).await.unwrap().1.completion, alone);

    // Calls.
    let cid = client.with_token("t-cid");
    assert_eq!(cid.generate(request()).await.unwrap().1.completion, alone);
    let message = assert_status(list(&cid).await, Code::ResourceExhausted, "53400");
    assert!(message.contains("0.01 requests per second"), "{message}");
    // What ends something is always allowed.
    assert_eq!(cid.rollback("t", 0).await, 0);
    assert_eq!(root.generate(request()).await.unwrap().1.completion, alone);
}

#[tokio::test]
async fn a_changed_token_file_counts_from_the_next_call() {
    let (server, file) = start("ann first\n");
    let client = server.connect().await;
    list(&client.with_token("first")).await.unwrap();
    replace(&file, "ann second roles=generate\n");
    assert_status(list(&client.with_token("first")).await, Code::Unauthenticated, "28000");
    assert_status(
        list(&client.with_token("second")).await,
        Code::PermissionDenied,
        "42501",
    );
    // A file with a mistake changes nothing.
    replace(&file, "ann third\nbob\n");
    assert_status(list(&client.with_token("third")).await, Code::Unauthenticated, "28000");
    assert_status(
        list(&client.with_token("second")).await,
        Code::PermissionDenied,
        "42501",
    );
    replace(&file, "ann second\n");
    list(&client.with_token("second")).await.unwrap();
}

#[tokio::test]
async fn models_count_for_the_tenant_that_loaded_them_and_still_do_after_a_crash() {
    let tokens = tempfile::NamedTempFile::new().unwrap();
    // A model of `tiny` has weights of 4.2 MB.
    std::fs::write(tokens.path(), "root r00t\ndan t-dan memory=6M\n").unwrap();
    let arguments = ["--token-file", tokens.path().to_str().unwrap()];
    let mut data = tempfile::tempdir().unwrap();
    for round in 0..2 {
        let server = TestServer::start_in(data, &arguments);
        let client = server.connect().await;
        let (root, dan) = (client.with_token("r00t"), client.with_token("t-dan"));
        if round == 0 {
            root.train_tokenizer().await;
            dan.load(tiny("first")).await.unwrap();
        }
        assert_eq!(dan.describe("first", None).await.unwrap().status, "ready");
        let message = assert_status(dan.load(tiny("second")).await, Code::ResourceExhausted, "HV001");
        assert!(message.contains("tenant \"dan\""), "{message}");
        root.load(tiny("other")).await.unwrap();
        root.drop_model("other").await.unwrap();
        data = server.kill();
    }
}
