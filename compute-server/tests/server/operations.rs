//! Running the server: tokens, limits, health, shutdown, refusals at the start.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use candle_compute_proto::v1::*;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::{Client, TestServer, assert_status, command, endless, random, within};

fn http_get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.lines().next().unwrap().to_owned()
}

async fn health(client: &Client, service: &str) -> ServingStatus {
    let request = HealthCheckRequest {
        service: service.into(),
    };
    HealthClient::new(client.channel.clone())
        .check(request)
        .await
        .unwrap()
        .into_inner()
        .status()
}

#[tokio::test]
async fn only_known_tokens_are_served() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("tokens");
    std::fs::write(&file, "ann s3cret-token\n").unwrap();
    let server = TestServer::start_in(data, &["--token-file", file.to_str().unwrap()]);
    let client = server.connect().await;
    let ask = |token: Option<&str>| {
        let mut request = Request::new(ListModelsRequest::default());
        if let Some(token) = token {
            request
                .metadata_mut()
                .insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let mut models = client.models.clone();
        async move { models.list_models(request).await }
    };
    assert!(ask(Some("s3cret-token")).await.is_ok());
    for refused in [None, Some("s3cret"), Some("wrong-token")] {
        let message = assert_status(ask(refused).await, Code::Unauthenticated, "28000");
        assert!(!message.contains("s3cret") && !message.contains("wrong"), "{message}");
    }
    // Probes need no token.
    assert_eq!(health(&client, "").await, ServingStatus::Serving);
    assert_eq!(http_get(&server.http, "/readyz"), "HTTP/1.1 200 OK");
}

#[tokio::test]
async fn a_message_past_the_limit_is_refused_by_name() {
    let server = TestServer::start(&["--max-message-bytes", "64K"]);
    let client = server.connect().await;
    let info = client
        .telemetry
        .clone()
        .get_server_info(GetServerInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (info.protocol.as_str(), info.max_message_bytes),
        ("candle.compute.v1", 65_536)
    );
    let request = random("m", &"x".repeat(100_000), 1, 1);
    let message = assert_status(client.generate(request).await, Code::ResourceExhausted, "53400");
    assert!(message.contains("--max-message-bytes"), "{message}");
}

#[tokio::test]
async fn sigterm_lets_running_work_finish_and_takes_no_more() {
    let mut server = TestServer::start(&[]);
    let client = server.connect().await;
    client.create("m").await;
    client.batch("m", within("t"), &[&[1, 2, 3]]).await.unwrap();
    let mut stream = client
        .start_generation(GenerateRequest {
            max_tokens: Some(3000),
            ..endless("m")
        })
        .await
        .unwrap();
    server.terminate();
    while health(&client, "").await == ServingStatus::Serving {}
    assert_eq!(
        health(&client, "candle.compute.v1.InferenceService").await,
        ServingStatus::NotServing
    );
    assert_eq!(http_get(&server.http, "/readyz"), "HTTP/1.1 503 Service Unavailable");
    assert_eq!(http_get(&server.http, "/healthz"), "HTTP/1.1 200 OK");
    assert_status(
        client.generate(random("m", "the", 1, 5)).await,
        Code::Unavailable,
        "HV00N",
    );
    let mut summary = None;
    while let Some(message) = stream.message().await.unwrap() {
        summary = message.summary;
    }
    assert_eq!(summary.unwrap().finish_reason, "length");
    // An open transaction can still be ended.
    assert_eq!(client.publish("t").await.unwrap(), 1);
    assert_eq!(server.wait().code(), Some(0));
}

#[tokio::test]
async fn work_that_outlives_the_drain_timeout_is_cancelled() {
    let mut server = TestServer::start(&["--drain-timeout", "0"]);
    let client = server.connect().await;
    client.create("m").await;
    let stream = client.start_generation(endless("m")).await.unwrap();
    server.terminate();
    assert_eq!(server.wait().code(), Some(0));
    drop(stream);
}

#[test]
fn starts_that_cannot_work_say_why() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start_in(tempfile::tempdir().unwrap(), &[]);
    let cases: [(&[&str], &str); 6] = [
        (&["--listen", "0.0.0.0:0"], "--token-file"),
        (&["--token-file", "/nonexistent"], "token file"),
        (&["--device", "cuda:0"], "--device"),
        (&["--config", "/nonexistent.toml"], "/nonexistent.toml"),
        (&["--tls-cert", "/nonexistent"], "--tls-key"),
        (&["--data-dir", server.data.path().to_str().unwrap()], "another server"),
    ];
    for (arguments, expected) in cases {
        // The last --data-dir and --listen count.
        let mut command = command(data.path());
        let all: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let overridden = arguments[0];
        let mut kept = Vec::new();
        let mut words = all.into_iter().peekable();
        while let Some(word) = words.next() {
            if word == overridden {
                words.next();
            } else {
                kept.push(word);
            }
        }
        command = std::process::Command::new(env!("CARGO_BIN_EXE_compute-server"));
        let output = command.args(kept).args(arguments).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && message.contains(expected), "{message}");
    }
}

#[test]
fn help_tells_every_option() {
    let help = std::process::Command::new(env!("CARGO_BIN_EXE_compute-server"))
        .args(["serve", "--help"])
        .output();
    let help = String::from_utf8(help.unwrap().stdout).unwrap();
    for flag in [
        "--listen",
        "--http",
        "--data-dir",
        "--models-dir",
        "--device",
        "--threads",
        "--memory-limit",
    ] {
        assert!(help.contains(flag) && help.contains("COMPUTE_SERVER_LISTEN"), "{flag}");
    }
}
