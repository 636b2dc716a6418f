//! Who runs when: batches that mix adapters, turns between sessions, deadlines, and prompts between tokens.

use std::time::Duration;

use candle_compute_proto::v1::*;
use tonic::{Code, Request, Status};

use crate::adapters::{lora, with};
use crate::support::{Client, TestServer, assert_status, collect, endless, random, within};

const A: &[i64] = &[1, 2, 3, 4, 5, 6];
const B: &[i64] = &[9, 8, 7, 6, 5];

/// A generation that runs until it is cancelled: nobody has to read it.
fn running(model: &str) -> GenerateRequest {
    GenerateRequest {
        stream_tokens: false,
        ..endless(model)
    }
}

impl Client {
    /// A running generation, once it writes.
    async fn occupy(&self, request: GenerateRequest) -> tonic::Streaming<GenerateResponse> {
        let before: Vec<String> = self.requests().await.into_iter().map(|one| one.id).collect();
        let stream = self.start_generation(request).await.unwrap();
        let writes = |one: &ActiveRequest| one.phase == "decode" && !before.contains(&one.id);
        self.wait_for_requests(|requests| requests.iter().any(writes)).await;
        stream
    }

    async fn queued(&self, count: usize) {
        let queued = |requests: &[ActiveRequest]| requests.iter().filter(|one| one.phase == "queued").count();
        self.wait_for_requests(|requests| queued(requests) == count).await;
    }

    async fn adapter_step(&self, adapter: &str, transaction: Option<TransactionContext>, rows: &[&[i64]]) {
        self.train_adapter(adapter, transaction.clone(), rows).await.unwrap();
        self.step_adapter(adapter, transaction).await.unwrap();
    }
}

async fn server(arguments: &[&str]) -> (TestServer, Client) {
    let server = TestServer::start(arguments);
    let client = server.connect().await;
    client.create("m").await;
    (server, client)
}

#[tokio::test]
async fn adapters_of_a_model_share_its_batch_and_their_numbers_do_not_change() {
    let (_server, client) = server(&[]).await;
    for (name, rows) in [("a", [A, B]), ("b", [B, B]), ("c", [A, A])] {
        client.adapt(lora(name)).await.unwrap();
        client.adapter_step(name, None, &rows).await;
    }
    client.merge_adapter("c", within("t")).await.unwrap();
    client.publish("t").await.unwrap();
    let requests = ["", "a", "b", "c"].map(|name| with(name, random("m", "the quick ", 4, 40)));
    let mut alone = Vec::new();
    for request in &requests {
        let (tokens, summary) = client.generate(request.clone()).await.unwrap();
        assert_eq!(summary.batch_size, 1.0);
        alone.push(tokens);
    }
    assert!(alone[1] != alone[0] && alone[2] != alone[0] && alone[1] != alone[2]);
    assert_eq!(alone[3], alone[0], "a merged adapter adds nothing");
    let others = [
        client.occupy(running("m")).await,
        client.occupy(with("a", running("m"))).await,
        client.occupy(with("b", running("m"))).await,
        client.occupy(with("c", running("m"))).await,
    ];
    for (request, alone) in requests.iter().zip(&alone) {
        let (tokens, summary) = client.generate(request.clone()).await.unwrap();
        assert_eq!((&tokens, summary.batch_size), (alone, 5.0), "{}", request.adapter);
    }
    drop(others);
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
}

#[tokio::test]
async fn a_generation_goes_on_with_what_commits_and_a_transaction_sees_what_it_staged() {
    let (_server, client) = server(&[]).await;
    client.adapt(lora("a")).await.unwrap();
    client.adapter_step("a", None, &[A, B]).await;
    let request = |transaction: Option<TransactionContext>| GenerateRequest {
        transaction,
        ..with("a", random("m", "the", 7, 40))
    };
    let before = client.generate(request(None)).await.unwrap().0;
    let scores = client.scores_of("a", None).await.unwrap();
    let beside = client.occupy(with("a", running("m"))).await;
    client.adapter_step("a", within("t"), &[A, A, B]).await;
    let (staged, summary) = client.generate(request(within("t"))).await.unwrap();
    let staged_scores = client.scores_of("a", within("t")).await.unwrap();
    assert_eq!(summary.batch_size, 1.0, "nobody else has its weights");
    assert!(staged != before && staged_scores != scores);
    assert_eq!(client.generate(request(None)).await.unwrap().0, before);
    assert_eq!(client.scores_of("a", None).await.unwrap(), scores);
    // A transaction that has changed something else is in the batch with all others.
    client.batch("m", within("u"), &[A]).await.unwrap();
    let (tokens, summary) = client.generate(request(within("u"))).await.unwrap();
    assert_eq!((tokens, summary.batch_size), (before, 2.0));
    client.publish("t").await.unwrap();
    let (tokens, summary) = client.generate(request(None)).await.unwrap();
    assert_eq!((tokens, summary.batch_size), (staged, 2.0));
    assert_eq!(client.scores_of("a", None).await.unwrap(), staged_scores);
    drop(beside);
}

#[tokio::test]
async fn dropping_an_adapter_ends_its_generations_and_no_others() {
    let (_server, client) = server(&[]).await;
    for name in ["a", "b"] {
        client.adapt(lora(name)).await.unwrap();
        client.adapter_step(name, None, &[A, B]).await;
    }
    let mut of_dropped = client.occupy(with("a", running("m"))).await;
    let others = [
        client.occupy(with("b", running("m"))).await,
        client.occupy(running("m")).await,
    ];
    let request = DropAdapterRequest {
        transaction: None,
        model: "m".into(),
        name: "a".into(),
    };
    client.adapters.clone().drop_adapter(request).await.unwrap();
    let message = assert_status(of_dropped.message().await, Code::Aborted, "42704");
    assert!(message.contains("was unloaded"), "{message}");
    assert_status(
        client.generate(with("a", random("m", "the", 7, 4))).await,
        Code::NotFound,
        "42704",
    );
    let (_, summary) = client.generate(with("b", random("m", "the", 7, 4))).await.unwrap();
    assert_eq!(summary.batch_size, 3.0);
    drop(others);
}

#[tokio::test]
async fn a_late_session_does_not_wait_for_the_flood_of_another() {
    let (server, flooding) = server(&["--max-generations", "1"]).await;
    let other = server.connect().await;
    let first = flooding.occupy(running("m")).await;
    let (ended, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let run = |client: &Client, name: usize, tokens: i64| {
        let (client, ended) = (client.clone(), ended.clone());
        tokio::spawn(async move {
            client.generate(random("m", "the", 1, tokens)).await.unwrap();
            ended.send(name).unwrap();
        })
    };
    let flood: Vec<_> = (0..30).map(|name| run(&flooding, name, 100)).collect();
    flooding.queued(30).await;
    let single = run(&other, 99, 5);
    flooding.queued(31).await;
    drop(first);
    single.await.unwrap();
    for task in flood {
        task.await.unwrap();
    }
    drop(ended);
    let mut order = Vec::new();
    while let Some(name) = ends.recv().await {
        order.push(name);
    }
    let position = order.iter().position(|name| *name == 99).unwrap();
    // It was first; the client may hear of one or two others before.
    assert!(position <= 2, "{order:?}");
    assert_eq!(order.len(), 31);
}

#[tokio::test]
async fn a_session_cannot_fill_the_queue_and_a_late_one_has_its_turn() {
    let (server, flooding) = server(&["--max-generations", "1", "--max-queue", "20"]).await;
    let other = server.connect().await;
    let first = flooding.occupy(running("m")).await;
    let mut flood = Vec::new();
    let refused = loop {
        match flooding.start_generation(random("m", "the", 1, 5)).await {
            Ok(stream) => flood.push(stream),
            Err(status) => break status,
        }
    };
    let message = assert_status::<()>(Err(refused), Code::ResourceExhausted, "53400");
    assert!(
        message.contains("of a session that has 18") && message.contains("--max-queue"),
        "{message}"
    );
    // Completions of one request are all queued, or none.
    let two = GenerateRequest {
        n: Some(2),
        ..random("m", "the", 1, 5)
    };
    assert_status(other.generate(two).await, Code::ResourceExhausted, "53400");
    let (client, request) = (other.clone(), random("m", "the", 1, 5));
    let late = tokio::spawn(async move { client.generate(request).await.unwrap() });
    flooding.queued(19).await;
    drop(first);
    late.await.unwrap();
    // The places are free again when their work has ended.
    for stream in flood {
        collect(stream).await.unwrap();
    }
    flooding.wait_for_requests(<[ActiveRequest]>::is_empty).await;
    flooding.generate(random("m", "the", 1, 5)).await.unwrap();
}

#[tokio::test]
async fn waiting_too_long_is_an_error_that_names_the_flag() {
    let (_server, client) = server(&["--max-generations", "1", "--queue-timeout", "1"]).await;
    let first = client.occupy(running("m")).await;
    let refused = client.generate(random("m", "the", 1, 5)).await;
    let message = assert_status(refused, Code::ResourceExhausted, "53400");
    assert!(
        message.contains("the limit of 1 set by --queue-timeout") && message.contains("\"m\""),
        "{message}"
    );
    drop(first);
    client.generate(random("m", "the", 1, 5)).await.unwrap();
}

#[tokio::test]
async fn the_deadline_of_a_call_ends_it_queued_or_running() {
    let (_server, client) = server(&["--max-generations", "1"]).await;
    let limited = |milliseconds: u64| {
        let client = client.clone();
        async move {
            let mut request = Request::new(running("m"));
            request.set_timeout(Duration::from_millis(milliseconds));
            let mut stream = client.inference.clone().generate(request).await?.into_inner();
            stream.message().await
        }
    };
    let of_server = |result: Result<Option<GenerateResponse>, Status>| {
        let message = assert_status(result, Code::DeadlineExceeded, "57014");
        assert!(message.contains("deadline of the call"), "{message}");
    };
    of_server(limited(1000).await);
    let first = client.occupy(running("m")).await;
    of_server(limited(1000).await);
    client.wait_for_requests(|requests| requests.len() == 1).await;
    drop(first);
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
}

#[tokio::test]
async fn a_long_prompt_is_read_between_the_tokens_of_others() {
    let (_server, client) = server(&["--max-batch-tokens", "65"]).await;
    let writing = client.occupy(running("m")).await;
    let written = async || client.requests().await[0].done; // the oldest is first
    let prompt: Vec<String> = (0..700).map(|word| format!("the {word} quick foxes ")).collect();
    let before = written().await;
    let (_, summary) = client.generate(random("m", &prompt.concat(), 1, 1)).await.unwrap();
    let after = written().await;
    assert!(summary.prompt_tokens > 4000, "{}", summary.prompt_tokens);
    // Every pass over 64 tokens of the prompt was a token for the other.
    assert_eq!(summary.batch_size, 2.0);
    assert!(
        after - before >= u64::from(summary.prompt_tokens) / 64,
        "{before} {after}"
    );
    drop(writing);
}

#[tokio::test]
async fn prompts_are_read_together_as_far_as_a_pass_has_room() {
    let (_server, client) = server(&["--max-generations", "8"]).await;
    let prompt = "the quick brown fox ".repeat(20);
    let alone = client.generate(random("m", &prompt, 3, 20)).await.unwrap().0;
    let first = client.occupy(running("m")).await;
    let together: Vec<_> = (0..7)
        .map(|_| {
            let (client, request) = (client.clone(), random("m", &prompt, 3, 20));
            tokio::spawn(async move { client.generate(request).await.unwrap().0 })
        })
        .collect();
    for tokens in together {
        assert_eq!(tokens.await.unwrap(), alone);
    }
    drop(first);
}

#[tokio::test]
async fn a_generation_goes_on_while_a_long_text_is_scored() {
    let (_server, client) = server(&[]).await;
    let generation = client.occupy(running("m")).await;
    let score = ScoreRequest {
        model: "m".into(),
        source: Some(score_request::Source::Tokens(TokenIds { ids: vec![5; 8_000] })),
        ..Default::default()
    };
    let inference = client.inference.clone();
    let scored = tokio::spawn(async move { inference.clone().score(score).await.unwrap().into_inner().tokens });
    // Tokens that were written while the score was running, each time it was looked at.
    let mut seen = std::collections::BTreeSet::new();
    while !scored.is_finished() {
        let requests = client.requests().await;
        let phase = |kind: &str| requests.iter().find(|one| one.kind == kind);
        if let (Some(score), Some(generation)) = (phase("score"), phase("generate"))
            && score.phase == "running"
        {
            seen.insert(generation.done);
        }
    }
    assert!(seen.len() > 1, "{seen:?}");
    let tokens = scored.await.unwrap();
    assert_eq!((tokens.len(), tokens[0].logprob), (8_000, None));
    assert!(
        tokens[1..]
            .iter()
            .all(|token| token.logprob.is_some_and(f32::is_finite))
    );
    drop(generation);
}
