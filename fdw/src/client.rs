//! The connection to a compute server: one per backend, server and user, opened on first use and reused; and the one
//! function that waits on it, which PostgreSQL can interrupt.

mod channel;
mod runtime;
mod tensor_session;

pub(crate) use channel::{connect, option_map};
pub(crate) use runtime::{dropped_work, flush, pump, spawn, wait, wait_settled};

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_compute_proto::MAX_MESSAGE_BYTES;
use candle_compute_proto::v1::adapters_service_client::AdaptersServiceClient;
use candle_compute_proto::v1::checkpoints_service_client::CheckpointsServiceClient;
use candle_compute_proto::v1::evaluations_service_client::EvaluationsServiceClient;
use candle_compute_proto::v1::experts_service_client::ExpertsServiceClient;
use candle_compute_proto::v1::inference_service_client::InferenceServiceClient;
use candle_compute_proto::v1::models_service_client::ModelsServiceClient;
use candle_compute_proto::v1::telemetry_service_client::TelemetryServiceClient;
use candle_compute_proto::v1::tensors_service_client::TensorsServiceClient;
use candle_compute_proto::v1::training_service_client::TrainingServiceClient;
use candle_compute_proto::v1::transactions_service_client::TransactionsServiceClient;
use pgrx::{PgSqlErrorCode, pg_sys};
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::error::{Error, Result, describe, is_transport};
use tensor_session::TensorSession;

/// Whose connection to which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Session {
    pub(crate) server: pg_sys::Oid,
    pub(crate) user: pg_sys::Oid,
}

/// A connection, cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) session: Session,
    channel: Channel,
    token: Option<AsciiMetadataValue>,
    timeout: Option<Duration>,
    /// Sets of inputs of one scan that the server works on at a time.
    pub(crate) fetch_size: usize,
    /// Rows of one INSERT that travel together.
    pub(crate) batch_size: i32,
    tensor_session: Arc<TensorSession>,
}

/// Time between two attempts to reach a server that has gone.
const PAUSE: Duration = Duration::from_millis(100);

macro_rules! services {
    ($($method:ident: $client:ident),*) => {
        impl Client {$(
            pub(crate) fn $method(&self) -> $client<Channel> {
                $client::new(self.channel.clone())
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .max_encoding_message_size(MAX_MESSAGE_BYTES)
            }
        )*}
    };
}
services!(
    models: ModelsServiceClient,
    adapters: AdaptersServiceClient,
    inference: InferenceServiceClient,
    training: TrainingServiceClient,
    checkpoints: CheckpointsServiceClient,
    experts: ExpertsServiceClient,
    evaluations: EvaluationsServiceClient,
    transactions: TransactionsServiceClient,
    telemetry: TelemetryServiceClient,
    tensors: TensorsServiceClient
);

/// Calls a method that may be repeated: `read!(client, service.method(message))` answers `Result<response>`.
macro_rules! read {
    ($client:expr, $service:ident.$method:ident($message:expr)) => {{
        let client = &$client;
        client.repeatable($message, |request| {
            let mut service = client.$service();
            async move { service.$method(request).await }
        })
    }};
}
/// Calls a method that must not be repeated.
macro_rules! write {
    ($client:expr, $service:ident.$method:ident($message:expr)) => {{
        let client = &$client;
        client.once($message, |request| {
            let mut service = client.$service();
            async move { service.$method(request).await }
        })
    }};
}
/// Calls a method whose outcome must be known: `resolve!(client, patience, service.method(message))`.
macro_rules! resolve {
    ($client:expr, $patience:expr, $service:ident.$method:ident($message:expr)) => {{
        let client = &$client;
        client.resolved($patience, $message, |request| {
            let mut service = client.$service();
            async move { service.$method(request).await }
        })
    }};
}
pub(crate) use {read, resolve, write};

impl Client {
    /// A request that carries the user's token.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.clone());
        }
        request
    }

    /// Calls once.
    pub(crate) async fn once<Q, A, F>(&self, message: Q, call: impl Fn(Request<Q>) -> F) -> Result<A>
    where
        F: Future<Output = std::result::Result<Response<A>, Status>>,
    {
        self.limited(call(self.request(message)))
            .await?
            .map(Response::into_inner)
            .map_err(Error::from)
    }

    /// Calls, and once more over a new connection when the old one turns out to be dead.
    pub(crate) async fn repeatable<Q: Clone, A, F>(&self, message: Q, call: impl Fn(Request<Q>) -> F) -> Result<A>
    where
        F: Future<Output = std::result::Result<Response<A>, Status>>,
    {
        match self.limited(call(self.request(message.clone()))).await? {
            Err(status) if is_transport(&status) => self.once(message, call).await,
            answer => answer.map(Response::into_inner).map_err(Error::from),
        }
    }

    /// Calls until the server answers or refuses, for at most `patience` after the first answer that got lost: for a call
    /// whose outcome must be known, and which is answered as at first when it is repeated, also by a server that was started
    /// again meanwhile.
    ///
    /// Fails with SQLSTATE 08007 where nobody knows the outcome.
    pub(crate) async fn resolved<Q: Clone, A, F>(
        &self,
        patience: Duration,
        message: Q,
        call: impl Fn(Request<Q>) -> F,
    ) -> Result<A>
    where
        F: Future<Output = std::result::Result<Response<A>, Status>>,
    {
        let mut lost = None;
        loop {
            let status = match self.limited(call(self.request(message.clone()))).await? {
                Err(status) if is_transport(&status) || status.code() == Code::Unavailable => status,
                answer => return answer.map(Response::into_inner).map_err(Error::from),
            };
            if lost.get_or_insert_with(Instant::now).elapsed() >= patience {
                let code = PgSqlErrorCode::ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN;
                return Err(Error::new(code, "the compute server's answer to the commit was lost")
                    .detail(describe(&status))
                    .hint("The server may have committed its part. Compare the model's step before you repeat the transaction."));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The next message of a stream; None at its end.
    pub(crate) async fn next<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>> {
        self.limited(stream.message()).await?.map_err(Error::from)
    }

    async fn limited<F: Future>(&self, future: F) -> Result<F::Output> {
        let Some(limit) = self.timeout else {
            return Ok(future.await);
        };
        tokio::time::timeout(limit, future).await.map_err(|_| {
            let code = PgSqlErrorCode::ERRCODE_FDW_UNABLE_TO_CREATE_EXECUTION;
            Error::new(
                code,
                format!("the compute server did not answer within {} ms", limit.as_millis()),
            )
            .hint("Raise the server option \"request_timeout_ms\", or set it to 0 to wait without end.")
        })
    }
}
