//! The server on its own, as any gRPC client sees it.

use candle_compute_proto::v1::inference_service_client::InferenceServiceClient;
use candle_compute_proto::v1::models_service_client::ModelsServiceClient;
use candle_compute_proto::v1::telemetry_service_client::TelemetryServiceClient;
use candle_compute_proto::v1::{ForwardRequest, GetServerInfoRequest, LoadModelRequest};
use end_to_end_tests::server::ComputeServer;
use tokio_stream::StreamExt;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const CONFIG: &str =
    r#"{"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "context_length": 8, "vocabulary": 10}"#;

#[tokio::test]
async fn health_and_version() {
    let server = ComputeServer::start();
    let channel = tonic::transport::Endpoint::from_shared(server.endpoint())
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut health = HealthClient::new(channel);
    let answer = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    let mut telemetry = TelemetryServiceClient::connect(server.endpoint()).await.unwrap();
    let info = telemetry
        .get_server_info(GetServerInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.protocol, "candle.compute.v1");
    assert_eq!(info.version, env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn the_forward_pass_alone() {
    let server = ComputeServer::start();
    let mut models = ModelsServiceClient::connect(server.endpoint()).await.unwrap();
    let request = LoadModelRequest {
        name: "m".into(),
        config_json: CONFIG.into(),
        ..Default::default()
    };
    models.load_model(request).await.unwrap();
    let mut inference = InferenceServiceClient::connect(server.endpoint()).await.unwrap();
    let request = ForwardRequest {
        model: "m".into(),
        token_ids: vec![1, 2, 3],
        ..Default::default()
    };
    let mut stream = inference.forward(request).await.unwrap().into_inner();
    let mut logits = Vec::new();
    while let Some(message) = stream.next().await {
        let chunk = message.unwrap().chunk.unwrap();
        assert_eq!(chunk.shape, [3, 10]);
        logits.extend_from_slice(&chunk.data);
    }
    assert_eq!(logits.len(), 3 * 10 * 4);
}

/// What any language can do with the server's address alone.
#[test]
fn a_python_client_by_reflection() {
    let Some(python) = std::env::var_os("CANDLE_TEST_PYTHON") else {
        println!("skipped: CANDLE_TEST_PYTHON names no Python with grpcio, grpcio-reflection, grpcio-health-checking");
        return;
    };
    let server = ComputeServer::start();
    let script = end_to_end_tests::repository().join("tests/python/client.py");
    let address = server.endpoint().replace("http://", "");
    let output = std::process::Command::new(python)
        .arg(script)
        .arg(address)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn help_names_every_option() {
    let program = end_to_end_tests::programs().join("compute-server");
    let output = std::process::Command::new(program)
        .args(["serve", "--help"])
        .output()
        .unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    for option in [
        "--listen",
        "--http",
        "--data-dir",
        "--models-dir",
        "--device",
        "--threads",
        "--memory-limit",
        "--token-file",
        "--tls-cert",
        "--tls-key",
        "--config",
        "--drain-timeout",
    ] {
        assert!(help.contains(option), "{option} is missing from:\n{help}");
    }
}

#[test]
fn refuses_to_listen_to_the_world_without_a_token() {
    let data = tempfile::tempdir().unwrap();
    let output = std::process::Command::new(end_to_end_tests::programs().join("compute-server"))
        .args(["serve", "--listen", "0.0.0.0:0", "--data-dir"])
        .arg(data.path())
        .arg("--models-dir")
        .arg(data.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("token"), "{message}");
}
