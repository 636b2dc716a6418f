//! Generations: determinism, batches, streams, cancels.

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::support::{TestServer, assert_status, endless, random};

#[tokio::test]
async fn the_same_seed_gives_the_same_text_alone_and_among_others() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let prompts: Vec<String> = (0..12).map(|n| "the quick brown fox ".repeat(n * 3 + 1)).collect();
    let mut alone = Vec::new();
    for (seed, prompt) in (0..).zip(&prompts) {
        alone.push(client.generate(random("m", prompt, seed, 30)).await.unwrap());
    }
    let together = (0..).zip(&prompts).map(|(seed, prompt)| {
        let (client, request) = (client.clone(), random("m", prompt, seed, 30));
        tokio::spawn(async move { client.generate(request).await.unwrap() })
    });
    let together: Vec<_> = together.collect();
    for ((tokens, summary), batched) in alone.iter().zip(together) {
        let (batched_tokens, batched_summary) = batched.await.unwrap();
        assert_eq!(tokens, &batched_tokens);
        assert_eq!(summary.completion, batched_summary.completion);
    }
    assert_ne!(
        alone[0].1.completion,
        client
            .generate(random("m", &prompts[0], 99, 30))
            .await
            .unwrap()
            .1
            .completion
    );
}

#[tokio::test]
async fn streamed_tokens_make_up_the_completion() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    for seed in 0..10 {
        // Random bytes: characters are cut by tokens all the time.
        let mut request = random("m", "it was", seed, 50);
        request.stop = vec!["e ".into(), "zz".into()];
        let (tokens, summary) = client.generate(request.clone()).await.unwrap();
        let text: String = tokens.iter().map(|token| token.text.as_str()).collect();
        assert_eq!(text, summary.completion);
        assert!(!summary.completion.contains("e "));
        assert!(
            tokens
                .iter()
                .enumerate()
                .all(|(index, token)| token.position as usize == index && token.logprob <= 0.0)
        );
        assert_eq!(summary.completion_tokens as usize, tokens.len());
        request.stream_tokens = false;
        let (tokens, silent) = client.generate(request).await.unwrap();
        assert!(tokens.is_empty());
        assert_eq!(silent.completion, summary.completion);
    }
}

#[tokio::test]
async fn a_dropped_stream_stops_the_work() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let mut stream = client.start_generation(endless("m")).await.unwrap();
    stream.message().await.unwrap().unwrap();
    client
        .wait_for_requests(|requests| requests.len() == 1 && requests[0].phase == "decode")
        .await;
    drop(stream);
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
}

#[tokio::test]
async fn a_slow_reader_stops_nobody_else() {
    let server = TestServer::start(&["--max-generations", "1"]);
    let client = server.connect().await;
    client.create("m").await;
    let slow = client.start_generation(endless("m")).await.unwrap();
    let (tokens, _) = client.generate(random("m", "it", 2, 200)).await.unwrap();
    assert!(!tokens.is_empty());
    client.wait_for_requests(|requests| requests.len() == 1).await;
    drop(slow);
}

#[tokio::test]
async fn a_request_can_be_cancelled_by_its_id() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let mut stream = client.start_generation(endless("m")).await.unwrap();
    stream.message().await.unwrap().unwrap();
    let id = client.requests().await[0].id.clone();
    client
        .telemetry
        .clone()
        .cancel_request(CancelRequestRequest { id: id.clone() })
        .await
        .unwrap();
    let mut summary = None;
    while let Some(message) = stream.message().await.unwrap() {
        summary = message.summary;
    }
    assert_eq!(summary.unwrap().finish_reason, "cancelled");
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
    let again = client
        .telemetry
        .clone()
        .cancel_request(CancelRequestRequest { id })
        .await;
    assert_status(again, Code::NotFound, "42704");
}

#[tokio::test]
async fn a_model_dropped_while_it_generates_ends_its_streams_with_an_error() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let mut stream = client.start_generation(endless("m")).await.unwrap();
    stream.message().await.unwrap().unwrap();
    client.drop_model("m").await.unwrap();
    let error = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without an error"),
            Err(status) => break status,
        }
    };
    assert_eq!(error.code(), Code::Aborted);
    assert!(error.message().contains("\"m\" was unloaded"), "{}", error.message());
    assert_status(client.generate(random("m", "the", 1, 5)).await, Code::NotFound, "42704");
}

#[tokio::test]
async fn a_full_queue_names_its_limit() {
    let server = TestServer::start(&["--max-generations", "1", "--max-queue", "2"]);
    let client = server.connect().await;
    client.create("m").await;
    let mut streams = Vec::new();
    let refused = loop {
        match client.inference.clone().generate(endless("m")).await {
            Ok(stream) => streams.push(stream),
            Err(status) => break status,
        }
        // Paused ones make room for others, so only a bound on the queue itself ends this.
        assert!(streams.len() < 3000);
    };
    assert!(refused.message().contains("--max-queue"), "{}", refused.message());
    assert_status::<()>(Err(refused), Code::ResourceExhausted, "53400");
}
