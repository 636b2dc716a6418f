//! The pages of key/value caches: equal answers whatever is shared, eviction, waiting for room, other weights.

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::support::{Client, PATIENCE, TestServer, assert_status, endless, random, tiny, within};

/// Bytes of a page of 16 positions of the tiny model in f32.
const PAGE: u64 = 16 * 2 * 2 * 32 * 4;

/// About 100 tokens.
fn long_prompt() -> String {
    "the quick brown fox jumps over the lazy dog, it was the best of times, it was the worst of times, ".repeat(3)
}

async fn server(arguments: &[&str]) -> (TestServer, Client) {
    let server = TestServer::start(arguments);
    let client = server.connect().await;
    client.create("m").await;
    (server, client)
}

/// What must be the same however a generation is computed.
fn answer((tokens, summary): (Vec<GeneratedToken>, GenerationSummary)) -> (Vec<GeneratedToken>, String, String) {
    (tokens, summary.completion, summary.finish_reason)
}

#[tokio::test]
async fn answers_are_the_same_alone_among_others_after_a_hit_and_on_another_server() {
    for dtype in ["f32", "f16", "q8"] {
        let (_server, client) = server(&["--cache-dtype", dtype]).await;
        let prompt = long_prompt();
        let request = random("m", &prompt, 5, 40);
        let first = client.generate(request.clone()).await.unwrap();
        assert_eq!(first.1.cached_tokens, 0);
        let prompt_tokens = first.1.prompt_tokens;
        let alone = answer(first);
        let second = client.generate(request.clone()).await.unwrap();
        assert_eq!(second.1.cached_tokens, (prompt_tokens - 1) / 16 * 16);
        assert_eq!(answer(second), alone, "{dtype}");

        let (_other, other) = server(&["--cache-dtype", dtype]).await;
        let others = (0..32).map(|seed| {
            let (client, begin) = (
                other.clone(),
                prompt.chars().take(seed as usize * 9).collect::<String>(),
            );
            tokio::spawn(async move {
                client
                    .generate(random("m", &format!("{begin}it"), seed, 60))
                    .await
                    .unwrap()
            })
        });
        let others: Vec<_> = others.collect();
        assert_eq!(answer(other.generate(request).await.unwrap()), alone, "{dtype}");
        for (seed, other) in (0..).zip(others) {
            let begin: String = prompt.chars().take(seed as usize * 9).collect();
            let alone = client
                .generate(random("m", &format!("{begin}it"), seed, 60))
                .await
                .unwrap();
            assert_eq!(answer(other.await.unwrap()), answer(alone), "{dtype}");
        }
    }
}

#[tokio::test]
async fn a_common_beginning_is_computed_once_for_requests_that_come_together() {
    let (_server, client) = server(&[]).await;
    let prompt = long_prompt();
    let together = (0..8).map(|seed| {
        let (client, prompt) = (client.clone(), format!("{prompt}{seed}"));
        tokio::spawn(async move { client.generate(random("m", &prompt, seed, 5)).await.unwrap().1 })
    });
    let together: Vec<_> = together.collect();
    let mut cached = Vec::new();
    for generation in together {
        let summary = generation.await.unwrap();
        cached.push(summary.cached_tokens * 2 > summary.prompt_tokens);
    }
    assert!(cached.iter().filter(|cached| **cached).count() >= 4, "{cached:?}");
}

#[tokio::test]
async fn a_small_cache_gives_up_what_was_used_longest_ago() {
    let limit = (20 * PAGE).to_string();
    let (_server, client) = server(&["--cache-bytes", &limit]).await;
    let weights = client.describe("m", None).await.unwrap().memory_bytes;
    let begin = |word: &str| [word; 30].join(" ");
    let mut answers = Vec::new();
    for word in ["fox", "dog", "lazy", "quick", "times"] {
        answers.push(answer(client.generate(random("m", &begin(word), 1, 30)).await.unwrap()));
        let held = client.describe("m", None).await.unwrap().memory_bytes - weights;
        assert!(held > 0 && held <= 20 * PAGE, "{held}");
    }
    let newest = client.generate(random("m", &begin("times"), 1, 30)).await.unwrap();
    assert!(newest.1.cached_tokens > 0);
    let oldest = client.generate(random("m", &begin("fox"), 1, 30)).await.unwrap();
    assert_eq!(oldest.1.cached_tokens, 0);
    assert_eq!(
        (answer(oldest), answer(newest)),
        (answers[0].clone(), answers[4].clone())
    );
}

#[tokio::test]
async fn generations_wait_for_room_and_go_on_as_if_they_never_had() {
    // Each needs ten pages at its end, and all together start with few.
    let limit = (16 * PAGE).to_string();
    let (_server, client) = server(&["--cache-bytes", &limit]).await;
    let (_roomy, roomy) = server(&[]).await;
    let request = |seed| random("m", ["fox", "dog", "lazy", "quick"][seed as usize % 4], seed, 150);
    let together = (0..12).map(|seed| {
        let client = client.clone();
        tokio::spawn(async move { client.generate(request(seed)).await.unwrap() })
    });
    let together: Vec<_> = together.collect();
    for (seed, generation) in (0..).zip(together) {
        let alone = roomy.generate(request(seed)).await.unwrap();
        assert_eq!(answer(generation.await.unwrap()), answer(alone));
    }
}

#[tokio::test]
async fn a_generation_that_could_never_have_its_pages_is_refused_at_once() {
    let limit = (4 * PAGE).to_string();
    let (_server, client) = server(&["--cache-bytes", &limit]).await;
    let refused = client.generate(random("m", "the", 1, 64)).await;
    let message = assert_status(refused, Code::ResourceExhausted, "53400");
    assert!(message.contains("--cache-bytes"), "{message}");
    client.generate(random("m", "the", 1, 50)).await.unwrap();
}

#[tokio::test]
async fn pages_make_way_for_models_and_end_with_their_own() {
    let (server, client) = server(&["--memory-limit", "9M", "--cache-bytes", "9M"]).await;
    let held = || async { client.describe("m", None).await.unwrap().memory_bytes };
    // Its weights take 4 MB: pages are what comes on top.
    let weights = held().await;
    let mut stream = client
        .start_generation(GenerateRequest {
            max_tokens: Some(8_000),
            ..endless("m")
        })
        .await
        .unwrap();
    while held().await < weights + (2 << 20) {
        stream.message().await.unwrap().unwrap();
    }
    // A model that takes more than 4 MB, for which there is no room until the generation is given up.
    let large = LoadModelRequest {
        name: "large".into(),
        config_json:
            r#"{"architecture":"gpt2","layers":2,"width":208,"heads":4,"context_length":64,"tokenizer":"tiny"}"#.into(),
        ..tiny("large")
    };
    assert_status(client.load(large.clone()).await, Code::ResourceExhausted, "HV001");
    drop(stream);
    // The model's thread gives the pages back at its next turn.
    let given_back = async { while held().await > weights + (1 << 19) {} };
    tokio::time::timeout(PATIENCE, given_back)
        .await
        .expect("pages are given back");
    client.load(large).await.unwrap();
    assert!(held().await <= weights + (1 << 19));
    client.drop_model("large").await.unwrap();
    client.generate(random("m", &long_prompt(), 1, 2000)).await.unwrap();
    client.drop_model("m").await.unwrap();
    assert_eq!(client.models().await, []);
    drop(server);
}

/// A step of the model that changes what it says.
async fn train(client: &Client, model: &str, transaction: Option<TransactionContext>) {
    client
        .batch(model, transaction.clone(), &[&[1, 2, 3, 4, 5, 6]])
        .await
        .unwrap();
    client.step(model, transaction).await.unwrap();
}

#[tokio::test]
async fn weights_that_change_use_no_pages_of_those_before() {
    let (_server, client) = server(&[]).await;
    let request = random("m", &long_prompt(), 3, 20);
    let before = client.generate(request.clone()).await.unwrap();
    train(&client, "m", within("t")).await;
    let staged = GenerateRequest {
        transaction: within("t"),
        ..request.clone()
    };
    let seen = client.generate(staged.clone()).await.unwrap();
    assert_eq!(seen.1.cached_tokens, 0);
    let committed = client.generate(request.clone()).await.unwrap();
    assert!(committed.1.cached_tokens > 0);
    assert_eq!(answer(committed), answer(before.clone()));
    assert_ne!(answer(seen.clone()), answer(before));
    client.publish("t").await.unwrap();
    let after = client.generate(request.clone()).await.unwrap();
    assert_eq!(after.1.cached_tokens, 0);
    assert_eq!(answer(after), answer(seen));
    assert!(client.generate(request).await.unwrap().1.cached_tokens > 0);
}

#[tokio::test]
async fn a_generation_that_runs_across_a_step_says_what_one_of_the_two_states_says_about_all_before() {
    let (_server, client) = server(&[]).await;
    client.load(tiny("untrained")).await.unwrap();
    let mut stream = client
        .start_generation(GenerateRequest {
            max_tokens: Some(3_000),
            ..endless("m")
        })
        .await
        .unwrap();
    let mut generated = Vec::new();
    while generated.len() < 100 {
        generated.extend(stream.message().await.unwrap().unwrap().token);
    }
    train(&client, "m", None).await;
    while let Some(message) = stream.message().await.unwrap() {
        generated.extend(message.token);
    }
    let prompt = client
        .inference
        .clone()
        .tokenize(TokenizeRequest {
            model: "m".into(),
            input: "the".into(),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    let mut ids: Vec<i64> = prompt.tokens.iter().map(|token| i64::from(token.token_id)).collect();
    let start = ids.len();
    ids.extend(generated.iter().map(|token| i64::from(token.token_id)));
    let mut scores = Vec::new();
    for model in ["untrained", "m"] {
        let request = ScoreRequest {
            model: model.into(),
            source: Some(score_request::Source::Tokens(TokenIds { ids: ids.clone() })),
            ..Default::default()
        };
        scores.push(
            client
                .inference
                .clone()
                .score(request)
                .await
                .unwrap()
                .into_inner()
                .tokens,
        );
    }
    let agrees = |model: usize, index: usize| {
        let score = scores[model][start + index].logprob.unwrap();
        (score - generated[index].logprob).abs() < 1e-4
    };
    let before = (0..generated.len()).take_while(|&index| agrees(0, index)).count();
    assert!(
        (100..generated.len()).contains(&before),
        "{before} of {}",
        generated.len()
    );
    let wrong: Vec<_> = (before..generated.len()).filter(|&index| !agrees(1, index)).collect();
    assert_eq!(wrong, [0; 0], "of {}, {before} before the step", generated.len());
}

#[tokio::test]
async fn a_cancelled_generation_makes_room_for_those_that_wait() {
    let limit = (40 * PAGE).to_string();
    let (_server, client) = server(&["--cache-bytes", &limit]).await;
    let half = |seed| random("m", "the", seed, 400);
    let mut first = client.start_generation(half(1)).await.unwrap();
    let mut second = client.start_generation(half(2)).await.unwrap();
    first.message().await.unwrap().unwrap();
    second.message().await.unwrap().unwrap();
    let third = tokio::spawn({
        let (client, request) = (client.clone(), half(3));
        async move { client.generate(request).await.unwrap() }
    });
    drop((first, second));
    let (_, summary) = third.await.unwrap();
    assert!(summary.completion_tokens > 0);
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
}
