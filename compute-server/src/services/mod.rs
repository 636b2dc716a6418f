//! The gRPC services, one a file. Each translates messages to calls and back; the work is done elsewhere.

mod adapters;
mod attention;
mod benchmarks;
mod checkpoints;
mod constraints;
pub(crate) mod embed;
mod evaluating;
mod evaluations;
mod experts;
pub(crate) mod generate;
mod inference;
mod inputs;
mod load;
mod losses;
mod models;
mod placement;
mod sharing;
mod telemetry;
mod tensor_streams;
mod tensors;
mod texts;
mod tokenizing;
mod tracking;
mod training;
mod transactions;

use std::pin::Pin;
use std::sync::Arc;

use candle_compute_proto::v1::adapters_service_server::AdaptersServiceServer;
use candle_compute_proto::v1::checkpoints_service_server::CheckpointsServiceServer;
use candle_compute_proto::v1::evaluations_service_server::EvaluationsServiceServer;
use candle_compute_proto::v1::experts_service_server::ExpertsServiceServer;
use candle_compute_proto::v1::inference_service_server::InferenceServiceServer;
use candle_compute_proto::v1::models_service_server::ModelsServiceServer;
use candle_compute_proto::v1::telemetry_service_server::TelemetryServiceServer;
use candle_compute_proto::v1::tensors_service_server::TensorsServiceServer;
use candle_compute_proto::v1::training_service_server::TrainingServiceServer;
use candle_compute_proto::v1::transactions_service_server::TransactionsServiceServer;
use tokio_stream::Stream;
use tonic::Status;
use tonic::service::Routes;

use crate::app::App;

pub(crate) use adapters::make as make_adapter;
pub(crate) use load::{Loading, Located, load, parse_config};

/// A stream of responses.
type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// State that every service holds.
#[derive(Clone)]
pub(crate) struct Service {
    app: Arc<App>,
}

/// Names of the services, for health reporting.
pub(crate) const SERVICES: [&str; 10] = [
    "candle.compute.v1.ModelsService",
    "candle.compute.v1.InferenceService",
    "candle.compute.v1.TrainingService",
    "candle.compute.v1.AdaptersService",
    "candle.compute.v1.CheckpointsService",
    "candle.compute.v1.ExpertsService",
    "candle.compute.v1.EvaluationsService",
    "candle.compute.v1.TransactionsService",
    "candle.compute.v1.TelemetryService",
    "candle.compute.v1.TensorsService",
];

/// All services of the protocol.
pub(crate) fn routes(app: &Arc<App>) -> Routes {
    let service = Service { app: Arc::clone(app) };
    let limit = app.config.limits.message_bytes;
    Routes::new(ModelsServiceServer::new(service.clone()).max_decoding_message_size(limit))
        .add_service(InferenceServiceServer::new(service.clone()).max_decoding_message_size(limit))
        .add_service(TrainingServiceServer::new(service.clone()).max_decoding_message_size(limit))
        .add_service(AdaptersServiceServer::new(service.clone()).max_decoding_message_size(limit))
        .add_service(CheckpointsServiceServer::new(service.clone()).max_decoding_message_size(limit))
        .add_service(ExpertsServiceServer::new(service.clone()).max_decoding_message_size(limit))
        .add_service(EvaluationsServiceServer::new(service.clone()).max_decoding_message_size(limit))
        .add_service(TransactionsServiceServer::new(service.clone()).max_decoding_message_size(limit))
        .add_service(TelemetryServiceServer::new(service.clone()).max_decoding_message_size(limit))
        .add_service(TensorsServiceServer::new(service).max_decoding_message_size(limit))
}
