//! `TelemetryService`.

use candle_compute_proto::v1::telemetry_service_server::TelemetryService;
use candle_compute_proto::{PROTOCOL, v1};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::tracking::Tracked;
use super::{ResponseStream, Service, benchmarks};
use crate::access::Caller;
use crate::devices;
use crate::error::Error;
use crate::metrics;

#[tonic::async_trait]
impl TelemetryService for Service {
    type RunKernelBenchmarksStream = ResponseStream<v1::RunKernelBenchmarksResponse>;

    async fn get_server_info(
        &self,
        _request: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        Ok(Response::new(v1::GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL.to_owned(),
            max_message_bytes: self.app.config.limits.message_bytes as u64,
        }))
    }

    async fn list_devices(
        &self,
        _request: Request<v1::ListDevicesRequest>,
    ) -> Result<Response<v1::ListDevicesResponse>, Status> {
        let devices = devices::list(self.app.config.threads, self.app.memory.used());
        Ok(Response::new(v1::ListDevicesResponse { devices }))
    }

    async fn list_requests(
        &self,
        request: Request<v1::ListRequestsRequest>,
    ) -> Result<Response<v1::ListRequestsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let mut requests = self.app.requests.list();
        requests.retain(|request| caller.may_manage(request.tenant.name()));
        let rows = requests.iter().map(|request| {
            let (done, total) = request.progress();
            v1::ActiveRequest {
                id: request.id(),
                kind: request.kind.to_owned(),
                model: request.model.clone(),
                phase: request.phase().as_str().to_owned(),
                done,
                total,
                started_at: Some(request.started_at.into()),
                tenant: request.tenant.name().to_string(),
            }
        });
        Ok(Response::new(v1::ListRequestsResponse {
            requests: rows.collect(),
        }))
    }

    async fn list_metrics(
        &self,
        _request: Request<v1::ListMetricsRequest>,
    ) -> Result<Response<v1::ListMetricsResponse>, Status> {
        let samples = metrics::samples(&metrics::gather(&self.app)?);
        Ok(Response::new(v1::ListMetricsResponse { samples }))
    }

    type TrackRequestStream = ReceiverStream<Result<v1::TrackRequestResponse, Status>>;

    async fn track_request(
        &self,
        request: Request<Streaming<v1::TrackRequestRequest>>,
    ) -> Result<Response<Self::TrackRequestStream>, Status> {
        let caller = Caller::of(&request)?;
        let mut messages = request.into_inner();
        let first = messages.message().await?;
        let first = first.ok_or_else(|| Error::invalid("the stream is empty"))?;
        let tracked = Tracked::begin(&self.app.requests, &caller, &first)?;
        Ok(Response::new(tracked.follow(messages)))
    }

    async fn cancel_request(
        &self,
        request: Request<v1::CancelRequestRequest>,
    ) -> Result<Response<v1::CancelRequestResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = request.into_inner().id;
        match self.app.requests.cancel(&caller, &id) {
            true => Ok(Response::new(v1::CancelRequestResponse {})),
            false => Err(Error::NotFound {
                kind: "running request",
                name: id.chars().take(40).collect(),
            }
            .into()),
        }
    }

    async fn run_kernel_benchmarks(
        &self,
        request: Request<v1::RunKernelBenchmarksRequest>,
    ) -> Result<Response<Self::RunKernelBenchmarksStream>, Status> {
        let caller = Caller::of(&request)?;
        let figures = benchmarks::start(&self.app, &caller, request.into_inner().kernels)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(figures))))
    }
}
