//! What a request may ask of its completions: several of them, probabilities, penalties, bias.

use std::collections::HashMap;

use candle_compute_proto::v1::*;

use crate::support::{Client, TestServer, collect, random};

/// Tokens and summary of every completion, by its number.
async fn completions(client: &Client, request: GenerateRequest) -> Vec<(Vec<GeneratedToken>, GenerationSummary)> {
    let stream = client.start_generation(request).await.unwrap();
    let mut tokens: HashMap<u32, Vec<GeneratedToken>> = HashMap::new();
    let mut summaries = Vec::new();
    for message in collect(stream).await.unwrap() {
        if let Some(token) = message.token {
            tokens.entry(token.choice).or_default().push(token);
        }
        summaries.extend(message.summary);
    }
    summaries.sort_by_key(|summary| summary.choice);
    let with_tokens = |summary: GenerationSummary| (tokens.remove(&summary.choice).unwrap_or_default(), summary);
    summaries.into_iter().map(with_tokens).collect()
}

#[tokio::test]
async fn several_completions_are_those_of_consecutive_seeds() {
    let server = TestServer::start(&["--max-generations", "3"]);
    let client = server.connect().await;
    client.create("m").await;
    let request = GenerateRequest {
        n: Some(5),
        ..random("m", "the quick", 40, 20)
    };
    let together = completions(&client, request).await;
    assert_eq!(together.len(), 5);
    for (choice, (tokens, summary)) in together.into_iter().enumerate() {
        let (alone, alone_summary) = client
            .generate(random("m", "the quick", 40 + choice as i64, 20))
            .await
            .unwrap();
        let ids = |tokens: &[GeneratedToken]| {
            tokens
                .iter()
                .map(|token| (token.token_id, token.logprob))
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(&tokens), ids(&alone));
        assert_eq!(summary.choice as usize, choice);
        assert_eq!(summary.completion, alone_summary.completion);
    }
}

#[tokio::test]
async fn cancelling_a_request_ends_all_its_completions() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let request = GenerateRequest {
        n: Some(3),
        stream_tokens: false,
        ..crate::support::endless("m")
    };
    let stream = client.start_generation(request).await.unwrap();
    client
        .wait_for_requests(|requests| requests.len() == 1 && requests[0].phase == "decode")
        .await;
    let id = client.requests().await[0].id.clone();
    let cancel = CancelRequestRequest { id };
    client.telemetry.clone().cancel_request(cancel).await.unwrap();
    let summaries: Vec<_> = collect(stream)
        .await
        .unwrap()
        .into_iter()
        .filter_map(|message| message.summary)
        .collect();
    assert_eq!(summaries.len(), 3);
    assert!(summaries.iter().all(|summary| summary.finish_reason == "cancelled"));
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
}

#[tokio::test]
async fn likely_tokens_are_reported_with_each_token() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let greedy = GenerateRequest {
        sampling: None,
        top_logprobs: Some(4),
        ..random("m", "the", 0, 10)
    };
    let (tokens, summary) = client.generate(greedy).await.unwrap();
    assert_eq!(tokens.len(), 10);
    for token in &tokens {
        assert_eq!(token.top_logprobs.len(), 4);
        let best = &token.top_logprobs[0];
        assert_eq!(
            (best.token_id, best.logprob, &best.bytes),
            (token.token_id, token.logprob, &token.bytes)
        );
        assert!(
            token
                .top_logprobs
                .windows(2)
                .all(|pair| pair[0].logprob >= pair[1].logprob)
        );
    }
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.bytes.to_vec()).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), summary.completion);
    let (tokens, _) = client.generate(random("m", "the", 0, 3)).await.unwrap();
    assert!(tokens.iter().all(|token| token.top_logprobs.is_empty()));
}

#[tokio::test]
async fn bias_and_penalties_change_what_is_generated() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let with = |sampling: SamplingOptions| GenerateRequest {
        sampling: Some(sampling),
        ..random("m", "the", 0, 30)
    };
    let ids = |tokens: Vec<GeneratedToken>| tokens.into_iter().map(|token| token.token_id).collect::<Vec<_>>();
    let biased = with(SamplingOptions {
        logit_bias: [(70, 100.0)].into(),
        ..Default::default()
    });
    assert_eq!(ids(client.generate(biased).await.unwrap().0), [70; 30]);
    let twice = with(SamplingOptions {
        logit_bias: [(70, 100.0), (71, 99.0)].into(),
        frequency_penalty: Some(0.75),
        ..Default::default()
    });
    // 70 leads by about 1 at first, and every token loses 0.75 each time that it comes.
    let found = ids(client.generate(twice).await.unwrap().0);
    let count = |id: u32| found.iter().filter(|&&found| found == id).count();
    assert_eq!(count(70) + count(71), 30);
    assert!(count(71) >= 12, "{found:?}");
}
