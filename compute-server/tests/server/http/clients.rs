//! Clients that go away, are many, or may not, and what is counted of them.

use std::net::TcpStream;

use candle_compute_proto::v1::*;
use serde_json::{Value, json};
use tonic::Code;

use super::{get, post, read, send, server_with_model, wait_for};
use crate::support::{TestServer, endless, poll, random};

#[tokio::test]
async fn a_client_that_goes_away_ends_its_generation() {
    let (server, client) = server_with_model().await;
    for stream in [true, false] {
        let request = json!({"model": "m", "prompt": "the", "max_tokens": 30_000, "stream": stream});
        let connection = send(&server, "POST", "/v1/completions", "", &request.to_string());
        wait_for("a generation runs", &client, |requests| {
            requests
                .iter()
                .any(|request| request.kind == "generate" && request.done > 0)
                .then_some(())
        })
        .await;
        drop(connection);
        wait_for("nothing runs", &client, |requests| requests.is_empty().then_some(())).await;
    }
    assert_counted(
        &server,
        "candle_http_requests_total{route=\"/v1/completions\",status=\"499\"} 2",
    )
    .await;
    let stream = client.start_generation(endless("m")).await.unwrap();
    wait_for("a generation runs", &client, |requests| requests.first().map(drop)).await;
    drop(stream);
    let cancelled = "candle_grpc_requests_total{code=\"Cancelled\",service=\"candle.compute.v1.InferenceService\"} 1";
    assert_counted(&server, cancelled).await;
}

/// Waits until the metrics have a line: what was dropped is counted a moment later.
async fn assert_counted(server: &TestServer, line: &str) {
    poll(|| get(server, "/metrics").body.lines().any(|found| found == line)).await;
}

#[tokio::test]
async fn a_generation_that_somebody_cancels_says_so() {
    let (server, client) = server_with_model().await;
    for stream in [true, false] {
        let request = json!({"model": "m", "prompt": "the", "max_tokens": 30_000, "stream": stream});
        let connection = send(&server, "POST", "/v1/completions", "", &request.to_string());
        let reader = std::thread::spawn(move || read(connection));
        let id = wait_for("a generation runs", &client, |requests| {
            Some(requests.first()?.id.clone())
        })
        .await;
        client
            .telemetry
            .clone()
            .cancel_request(CancelRequestRequest { id })
            .await
            .unwrap();
        let answer = reader.join().unwrap();
        let error = match stream {
            false => answer.error(),
            true => {
                let last = answer.body.lines().rfind(|line| line.starts_with("data: ")).unwrap();
                let last: Value = serde_json::from_str(&last["data: ".len()..]).unwrap();
                (499, last["error"]["code"].clone(), Value::Null)
            }
        };
        assert_eq!(error, (499, json!("cancelled"), Value::Null));
        // The next turn must not find this one's request.
        client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
    }
    // An answer of events begins with 200 whatever comes.
    assert_counted(
        &server,
        "candle_http_requests_total{route=\"/v1/completions\",status=\"499\"} 2",
    )
    .await;
}

#[tokio::test]
async fn a_stream_counts_as_what_it_ended_with() {
    let (server, client) = server_with_model().await;
    client.generate(random("m", "the quick", 7, 5)).await.unwrap();
    let mut stream = client.start_generation(endless("m")).await.unwrap();
    client.drop_model("m").await.unwrap();
    let status = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "the stream ended without an error"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Aborted);
    for code in ["Ok", "Aborted"] {
        let line =
            format!("candle_grpc_requests_total{{code=\"{code}\",service=\"candle.compute.v1.InferenceService\"}} 1");
        assert_counted(&server, &line).await;
    }
}

#[tokio::test]
async fn sigterm_lets_an_answer_finish() {
    let (mut server, client) = server_with_model().await;
    let request = json!({"model": "m", "prompt": "the", "max_tokens": 2000, "stream": true});
    let connection = send(&server, "POST", "/v1/completions", "", &request.to_string());
    wait_for("a generation runs", &client, |requests| requests.first().map(drop)).await;
    server.terminate();
    let events = read(connection).events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    drop(client);
    assert_eq!(server.wait().code(), Some(0));
}

#[tokio::test]
async fn tokens_are_asked_for_everywhere_but_at_probes() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("tokens");
    std::fs::write(&file, "ann s3cret-token\n").unwrap();
    let server = TestServer::start_in(data, &["--token-file", file.to_str().unwrap()]);
    for path in ["/v1/models", "/v1/models/m", "/metrics"] {
        for header in [
            "",
            "authorization: Bearer s3cret\r\n",
            "authorization: Basic s3cret-token\r\n",
        ] {
            let answer = read(send(&server, "GET", path, header, ""));
            assert_eq!(answer.error(), (401, json!("invalid_api_key"), Value::Null));
            assert!(answer.headers.contains("www-authenticate: bearer") && !answer.body.contains("s3cret"));
        }
        let answer = read(send(&server, "GET", path, "authorization: Bearer s3cret-token\r\n", ""));
        assert_ne!(answer.status, 401, "{path}");
    }
    assert_eq!(post(&server, "/v1/completions", &json!({})).status, 401);
    assert_eq!(
        (get(&server, "/healthz").status, get(&server, "/readyz").status),
        (200, 200)
    );
}

#[tokio::test]
async fn an_unknown_path_is_not_found_for_whoever_has_a_token() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("tokens");
    std::fs::write(
        &file,
        "ann t-ann roles=read requests_per_second=0.001\nbob t-bob roles=generate\n",
    )
    .unwrap();
    let server = TestServer::start_in(data, &["--token-file", file.to_str().unwrap()]);
    let ask = |method, path, token: &str| {
        let header = format!("authorization: Bearer {token}\r\n");
        read(send(&server, method, path, &header, "")).error()
    };
    for path in [
        "/",
        "/v1/nothing",
        "/v1/models/",
        "/healthz/x",
        "/candle.compute.v1.ModelsService/LoadModel",
    ] {
        for method in ["GET", "POST"] {
            assert_eq!(
                ask(method, path, "wrong"),
                (401, json!("invalid_api_key"), Value::Null),
                "{path}"
            );
            assert_eq!(
                ask(method, path, "t-bob"),
                (404, json!("unknown_url"), Value::Null),
                "{path}"
            );
        }
    }
    // A path that is there needs its role as before, and quotas hold for those that are not.
    assert_eq!(ask("GET", "/v1/models", "t-bob").0, 403);
    assert_eq!(ask("GET", "/v1/nothing", "t-ann").0, 404);
    assert_eq!(ask("GET", "/v1/nothing", "t-ann").0, 429);
}

#[tokio::test]
async fn metrics_may_be_public_and_count_what_was_done() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("tokens");
    std::fs::write(&file, "ann s3cret-token\n").unwrap();
    let server = TestServer::start_in(data, &["--token-file", file.to_str().unwrap(), "--metrics-public"]);
    assert_eq!(get(&server, "/v1/models").status, 401);
    assert!(
        get(&server, "/metrics")
            .body
            .contains("candle_http_requests_total{route=\"/v1/models\",status=\"401\"} 1")
    );
    drop(server);

    let (server, client) = server_with_model().await;
    let (tokens, summary) = client.generate(random("m", "the quick", 7, 20)).await.unwrap();
    let _ = client.generate(endless("nobody")).await.unwrap_err();
    let text = get(&server, "/metrics");
    assert!(text.headers.contains("text/plain; version=0.0.4"), "{}", text.headers);
    let count = tokens.len();
    let prompt = summary.prompt_tokens;
    for line in [
        format!("candle_generation_tokens_total{{model_name=\"m\"}} {count}"),
        format!("candle_prompt_tokens_total{{model_name=\"m\"}} {prompt}"),
        "candle_request_duration_seconds_count{model_name=\"m\"} 1".to_owned(),
        "candle_time_to_first_token_seconds_count{model_name=\"m\"} 1".to_owned(),
        "candle_time_per_output_token_seconds_count{model_name=\"m\"} 1".to_owned(),
        "candle_requests_waiting{kind=\"generate\",model_name=\"m\"} 0".to_owned(),
        format!("candle_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(
            text.body.lines().any(|found| found == line),
            "{line} is missing from\n{}",
            text.body
        );
    }
    let batches = text
        .body
        .lines()
        .find_map(|line| line.strip_prefix("candle_batch_size_sum{model_name=\"m\"} "));
    assert!(batches.is_some_and(|sum| sum != "0"), "{}", text.body);
    let loss = async || {
        let listed = client.telemetry.clone().list_metrics(ListMetricsRequest {}).await;
        let mut samples = listed.unwrap().into_inner().samples.into_iter();
        let loss = samples.find(|sample| sample.name == "candle_training_loss");
        loss.map(|sample| sample.value)
    };
    assert_eq!(loss().await, None);
    client.batch("m", None, &[&[1, 2, 3]]).await.unwrap();
    let step = client.step("m", None).await.unwrap();
    assert_eq!(loss().await, Some(step.loss));
    // What a model measured goes with it.
    client.drop_model("m").await.unwrap();
    assert!(!get(&server, "/metrics").body.contains("model_name=\"m\""));
}

#[tokio::test]
async fn many_clients_at_once_get_what_each_gets_alone() {
    let (server, client) = server_with_model().await;
    let request = |seed: u64| {
        let prompt = ["the quick", "it was the best", "fox", "of times, it was"][seed as usize % 4];
        json!({"model": "m", "prompt": prompt, "max_tokens": 24, "temperature": 1, "seed": seed}).to_string()
    };
    let text = |connection: TcpStream| read(connection).json()["choices"][0]["text"].take();
    let alone: Vec<Value> = (0..64)
        .map(|seed| text(send(&server, "POST", "/v1/completions", "", &request(seed))))
        .collect();
    assert!(alone.iter().any(|answer| *answer != alone[0]));
    // All are sent before any is read.
    let together: Vec<TcpStream> = (0..64)
        .map(|seed| send(&server, "POST", "/v1/completions", "", &request(seed)))
        .collect();
    for (connection, alone) in together.into_iter().zip(&alone) {
        assert_eq!(&text(connection), alone);
    }
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
}

#[tokio::test]
async fn roles_and_quotas_hold_over_http_as_well() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("tokens");
    let tokens = "root r00t\nann t-ann roles=read\nbob t-bob roles=generate tokens_per_minute=1\n";
    std::fs::write(&file, tokens).unwrap();
    let server = TestServer::start_in(data, &["--token-file", file.to_str().unwrap()]);
    server.connect().await.with_token("r00t").create("m").await;
    let body = json!({"model": "m", "prompt": "the quick brown fox", "max_tokens": 2}).to_string();
    let complete = |token: &str| {
        let headers = format!("authorization: Bearer {token}\r\n");
        read(send(&server, "POST", "/v1/completions", &headers, &body))
    };
    let refused = complete("t-ann");
    assert_eq!(refused.error().0, 403);
    assert!(refused.body.contains("generate"), "{}", refused.body);
    let over = complete("t-bob");
    assert_eq!(over.error().0, 429);
    assert!(over.body.contains("1 tokens per minute"), "{}", over.body);
    assert!(over.headers.to_lowercase().contains("retry-after:"), "{}", over.headers);
    assert_eq!(complete("r00t").status, 200);
}
