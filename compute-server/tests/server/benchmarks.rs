//! Measuring kernels on request.

use candle_compute_proto::v1::*;
use tonic::{Code, Status, Streaming};

use crate::support::{Client, TestServer, assert_status, collect};

impl Client {
    async fn measure(&self, kernels: &[&str]) -> Result<Streaming<RunKernelBenchmarksResponse>, Status> {
        let kernels = kernels.iter().map(|name| (*name).to_owned()).collect();
        let request = RunKernelBenchmarksRequest { kernels };
        let stream = self.telemetry.clone().run_kernel_benchmarks(request).await?;
        Ok(stream.into_inner())
    }

    async fn cancel(&self, id: &str) {
        let request = CancelRequestRequest { id: id.to_owned() };
        self.telemetry.clone().cancel_request(request).await.unwrap();
    }
}

#[tokio::test]
async fn the_kernels_that_were_asked_for_are_measured() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    let stream = client.measure(&["rms_norm", "sum_of_squares"]).await.unwrap();
    let figures = collect(stream).await.unwrap();
    let figures: Vec<_> = figures
        .into_iter()
        .map(|message| message.measurement.unwrap())
        .collect();
    for kernel in ["rms_norm", "sum_of_squares"] {
        let portable = figures
            .iter()
            .find(|figure| figure.kernel == kernel && figure.variant == "portable")
            .unwrap();
        assert_eq!(portable.ratio_to_portable, 1.0);
    }
    assert!(figures.iter().all(|figure| figure.value > 0.0 && figure.unit == "GB/s"));
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
}

#[tokio::test]
async fn an_unknown_kernel_is_refused_with_the_known_ones() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    let message = assert_status(client.measure(&["warp"]).await, Code::InvalidArgument, "22023");
    assert!(message.contains("\"warp\"") && message.contains("adamw"), "{message}");
}

#[tokio::test]
async fn runs_take_turns_are_listed_and_end_when_cancelled_or_dropped() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    let mut first = client.measure(&[]).await.unwrap();
    first.message().await.unwrap().unwrap();
    let waiting = client.measure(&[]).await.unwrap();
    let requests = client.requests().await;
    let phases: Vec<_> = requests.iter().map(|request| request.phase.as_str()).collect();
    assert_eq!(phases, ["running", "queued"]);
    assert!(requests.iter().all(|request| request.kind == "benchmark"));
    assert!(requests[0].total > requests[0].done);
    client.cancel(&requests[1].id).await;
    assert_status(collect(waiting).await, Code::Cancelled, "57014");
    let dropped = client.measure(&[]).await.unwrap();
    drop(dropped);
    client.cancel(&requests[0].id).await;
    assert_status(collect(first).await, Code::Cancelled, "57014");
    client.wait_for_requests(<[ActiveRequest]>::is_empty).await;
}
