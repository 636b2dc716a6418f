//! Response formats over gRPC.

use candle_compute_proto::v1::*;
use serde_json::{Value, json};
use tonic::Code;

use crate::support::{TestServer, assert_status, random};

fn with_format(seed: i64, format: &Value) -> GenerateRequest {
    GenerateRequest {
        response_format_json: format.to_string(),
        ..random("m", "the", seed, 200)
    }
}

#[tokio::test]
async fn completions_follow_their_format_among_others_that_have_none() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
                        "required": ["n"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"schema": schema}});
    let free = client.generate(random("m", "the", 3, 40)).await.unwrap();
    let both = (0..6).map(|seed| {
        let (client, constrained) = (client.clone(), with_format(seed, &format));
        tokio::spawn(async move { client.generate(constrained).await.unwrap() })
    });
    let both: Vec<_> = both.collect();
    assert_eq!(client.generate(random("m", "the", 3, 40)).await.unwrap().0, free.0);
    for (seed, task) in (0..).zip(both) {
        let (tokens, summary) = task.await.unwrap();
        if summary.finish_reason == "stop" {
            let value: Value = serde_json::from_str(&summary.completion).unwrap();
            assert!((0..=99).contains(&value["n"].as_i64().unwrap()), "{value}");
        }
        let alone = client.generate(with_format(seed, &format)).await.unwrap();
        assert_eq!(tokens, alone.0);
    }
}

#[tokio::test]
async fn a_completion_stops_where_nothing_can_follow() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let request = GenerateRequest {
        n: Some(4),
        sampling: None,
        ..with_format(0, &json!({"type": "regex", "regex": "(yes|no)!"}))
    };
    let (_, summary) = client.generate(request).await.unwrap();
    assert!(
        ["yes!", "no!"].contains(&summary.completion.as_str()),
        "{}",
        summary.completion
    );
    assert_eq!(summary.finish_reason, "stop");
    let cut = GenerateRequest {
        max_tokens: Some(3),
        ..with_format(0, &json!({"type": "regex", "regex": "[a-z]{50}"}))
    };
    let (_, summary) = client.generate(cut).await.unwrap();
    assert_eq!(summary.finish_reason, "length");
    assert!(
        summary.completion.bytes().all(|byte| byte.is_ascii_lowercase()),
        "{}",
        summary.completion
    );
}

#[tokio::test]
async fn bad_formats_are_refused_before_anything_is_generated() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    let cases = [
        json!([]),
        json!({"type": "yaml"}),
        json!({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}),
        json!({"type": "regex", "regex": "("}),
        json!({"type": "grammar", "grammar": "start: missing"}),
        json!({"type": "regex", "regex": "a".repeat(70_000)}),
    ];
    for format in cases {
        let refused = client.inference.clone().generate(with_format(1, &format)).await;
        let message = assert_status(refused.map(|_| ()), Code::InvalidArgument, "22023");
        assert!(message.contains("response_format"), "{message}");
    }
    assert_eq!(client.requests().await, []);
    assert_eq!(client.generate(random("m", "the", 1, 3)).await.unwrap().0.len(), 3);
}
