//! The server without a network, for the fuzzers: calls go through everything but the sockets.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use candle_compute_proto::v1;
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::{Code, Status};
use tower::ServiceExt as _;

use crate::access;
use crate::app::App;
use crate::config::{Bytes, Config, Options};
use crate::connections::{ConnectionInfo, Connections};
use crate::error::{Error, Result};
use crate::guard::Guard;
use crate::server;

/// Longest answer that is read, in bytes.
const MOST_ANSWER: usize = 16 << 20;

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The model that there always is.
const MODEL: &str = "m";

/// Calls that take their time whatever they are sent, and one that lasts until its client ends it.
const LEFT_OUT: [&str; 2] = [
    "/candle.compute.v1.TelemetryService/RunKernelBenchmarks",
    "/candle.compute.v1.TensorsService/HoldSession",
];

/// A server with one tiny model, of GPT-2's kind and with a tokenizer.
pub struct InProcess {
    app: Arc<App>,
    router: axum::Router,
    methods: Vec<&'static str>,
    connections: Arc<Connections>,
    runtime: tokio::runtime::Runtime,
}

/// How a call was answered.
#[derive(Debug)]
pub struct Answer {
    code: Code,
    message: String,
}

impl Answer {
    /// The message of an error; empty for none.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Whether it tells of a mistake in the server rather than in the call.
    pub fn is_defect(&self) -> bool {
        matches!(self.code, Code::Internal | Code::Unknown) && !self.is_undecodable()
    }

    /// gRPC's table of status codes has INTERNAL for a message that cannot be parsed, and tonic gives it before any code
    /// of ours is called.
    fn is_undecodable(&self) -> bool {
        self.code == Code::Internal && self.message.starts_with("failed to decode Protobuf message")
    }
}

impl InProcess {
    /// Starts a server with the data folder `folder`.
    ///
    /// # Errors
    /// As starting the program.
    pub fn start(folder: &Path) -> Result<Self> {
        let options = Options {
            data_dir: Some(folder.to_owned()),
            memory_limit: Some(Bytes(256 << 20)),
            max_request_tokens: Some(4096),
            max_tokenizer_bytes: Some(Bytes(1 << 16)),
            max_models: Some(8),
            threads: Some(1),
            durability: Some("checkpoint".to_owned()),
            ..Options::default()
        };
        let config = Config::resolve(options).map_err(|error| Error::invalid(error.to_string()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|error| Error::io("starting threads", error))?;
        let (app, _) = App::open(config)?;
        app.recovered();
        let guard = Arc::new(Guard { app: Arc::clone(&app) });
        let routes = runtime.block_on(server::routes(&guard))?.1;
        let (closed, _) = mpsc::unbounded_channel();
        let started = Self {
            router: routes.into_axum_router(),
            runtime,
            connections: Connections::new(1, PATIENCE, closed),
            methods: access::methods()
                .filter(|path| path.starts_with("/candle.compute.v1.") && !LEFT_OUT.contains(path))
                .collect(),
            app,
        };
        started.ensure_model();
        Ok(started)
    }

    /// The paths that can be called.
    pub fn methods(&self) -> &[&'static str] {
        &self.methods
    }

    /// Calls a method with one message. What the call left behind is cleared away.
    ///
    /// # Panics
    /// When the answer takes too long.
    pub fn call(&self, path: &str, message: &[u8]) -> Answer {
        let answer = self.send(path, message);
        self.clear();
        answer
    }

    fn send(&self, path: &str, message: &[u8]) -> Answer {
        let mut body = vec![0];
        body.extend_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
        body.extend_from_slice(message);
        let mut request = Request::new(Body::from(body));
        *request.method_mut() = axum::http::Method::POST;
        *request.uri_mut() = path.parse().unwrap_or_default();
        let grpc = axum::http::HeaderValue::from_static("application/grpc");
        request.headers_mut().insert(axum::http::header::CONTENT_TYPE, grpc);
        self.runtime.block_on(async {
            let admitted = self.connections.admit();
            let link = admitted.as_ref().map(|(link, _)| Arc::clone(link));
            if let Some(link) = &link {
                let link = Arc::clone(link);
                request.extensions_mut().insert(ConnectionInfo { link });
            }
            let answered = async {
                let response = match self.router.clone().oneshot(request).await {
                    Ok(response) => response,
                    Err(never) => match never {},
                };
                let status = Status::from_header_map(response.headers());
                // A body that ends with an error is one that the client sees end.
                let _ = axum::body::to_bytes(response.into_body(), MOST_ANSWER).await;
                Answer {
                    code: status.as_ref().map_or(Code::Ok, Status::code),
                    message: status.map(|status| status.message().to_owned()).unwrap_or_default(),
                }
            };
            let answer = tokio::time::timeout(PATIENCE, answered).await;
            if let Some(link) = link {
                self.app.connection_closed(link.id).await;
            }
            answer.unwrap_or_else(|_| panic!("{path} does not answer {} bytes", message.len()))
        })
    }

    /// Drops models and work that a call left.
    fn clear(&self) {
        self.app.requests.cancel_all();
        let models = self.app.registry.list();
        let names: Vec<String> = models.iter().map(|model| model.name().to_owned()).collect();
        drop(models);
        for name in names.iter().filter(|name| *name != MODEL) {
            let request = v1::UnloadModelRequest {
                name: name.clone(),
                transaction: None,
            };
            self.send("/candle.compute.v1.ModelsService/UnloadModel", &request.encode_to_vec());
        }
        if !names.iter().any(|name| name == MODEL) {
            self.ensure_model();
        }
    }

    fn ensure_model(&self) {
        let tokenizer = v1::TrainTokenizerRequest {
            transaction: None,
            name: "tiny".to_owned(),
            vocabulary_size: 270,
            texts: vec!["the quick brown fox jumps over the lazy dog".to_owned()],
        };
        self.send(
            "/candle.compute.v1.ModelsService/TrainTokenizer",
            &tokenizer.encode_to_vec(),
        );
        let config = r#"{"architecture":"gpt2","layers":1,"width":8,"heads":2,"context_length":64,"tokenizer":"tiny"}"#;
        let model = v1::LoadModelRequest {
            name: MODEL.to_owned(),
            config_json: config.to_owned(),
            seed: Some(1),
            ..Default::default()
        };
        let loaded = self.send("/candle.compute.v1.ModelsService/LoadModel", &model.encode_to_vec());
        assert_eq!(loaded.code, Code::Ok, "{loaded:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_answered_and_leave_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let server = InProcess::start(folder.path()).unwrap();
        let step = v1::StepRequest {
            model: MODEL.to_owned(),
            ..Default::default()
        };
        let answer = server.call("/candle.compute.v1.TrainingService/Step", &step.encode_to_vec());
        assert_eq!(answer.code, Code::FailedPrecondition, "{answer:?}");
        let unload = v1::UnloadModelRequest {
            name: MODEL.to_owned(),
            ..Default::default()
        };
        let unload = unload.encode_to_vec();
        for _ in 0..2 {
            let answer = server.call("/candle.compute.v1.ModelsService/UnloadModel", &unload);
            assert_eq!(answer.code, Code::Ok, "{answer:?}");
        }
        assert_eq!(
            (server.app.registry.list().len(), server.app.transactions.count()),
            (1, 0)
        );
    }
}
