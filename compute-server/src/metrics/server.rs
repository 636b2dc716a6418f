//! The instruments of the server as a whole.

use std::time::SystemTime;

use prometheus::core::Collector;
use prometheus::{IntCounterVec, Opts};

use super::model::{defect, gauge};
use super::process;
use crate::app::App;
use crate::error::Result;

/// What is measured of the server.
#[derive(Debug)]
pub(crate) struct ServerMetrics {
    started: SystemTime,
    grpc: IntCounterVec,
    http: IntCounterVec,
    tensor_operations: IntCounterVec,
}

impl ServerMetrics {
    /// Instruments that have measured nothing.
    ///
    /// # Errors
    /// `Internal`, for a defect of the names below.
    pub(crate) fn new() -> Result<Self> {
        let grpc = Opts::new(
            "candle_grpc_requests_total",
            "gRPC calls that have ended, by service and code; CANCELLED where the client did not wait for the end",
        );
        let http = Opts::new(
            "candle_http_requests_total",
            "HTTP requests that have ended, by route and status; of a stream of events the status of the error that it ended \
             with, and 499 where the client did not wait for the end",
        );
        let operations = Opts::new(
            "candle_tensor_operations_total",
            "Operations on tensors that have ended, by operation and outcome: done, failed or cancelled",
        );
        Ok(Self {
            started: SystemTime::now(),
            grpc: IntCounterVec::new(grpc, &["service", "code"]).map_err(defect)?,
            http: IntCounterVec::new(http, &["route", "status"]).map_err(defect)?,
            tensor_operations: IntCounterVec::new(operations, &["operation", "outcome"]).map_err(defect)?,
        })
    }

    /// Counts operations on tensors by operation and outcome.
    pub(crate) fn tensor_operations(&self) -> IntCounterVec {
        self.tensor_operations.clone()
    }

    /// A gRPC call to `path` was answered with `code`.
    pub(crate) fn answered_grpc(&self, path: &str, code: tonic::Code) {
        let service = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        // Labels must not grow with what clients think of.
        let listed = crate::services::SERVICES.into_iter().chain(["grpc.health.v1.Health"]);
        let service = listed.into_iter().find(|listed| *listed == service).unwrap_or("other");
        self.grpc.with_label_values(&[service, &format!("{code:?}")]).inc();
    }

    /// An HTTP request to `route`, as the router knows it, was answered with `status`.
    pub(crate) fn answered_http(&self, route: Option<&str>, status: u16) {
        let status = status.to_string();
        self.http.with_label_values(&[route.unwrap_or("other"), &status]).inc();
    }

    /// Calls `show` with every instrument.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn visit(&self, app: &App, mut show: impl FnMut(&dyn Collector)) -> Result<()> {
        show(&self.grpc);
        show(&self.http);
        show(&self.tensor_operations);
        let [sessions, tensors] = app.executor.counts();
        let gauges = [
            (
                "candle_models_loaded",
                "Models and adapters that everybody sees",
                Some(app.registry.list().len() as f64),
            ),
            (
                "candle_transactions_open",
                "Transactions that have staged something",
                Some(app.transactions.count() as f64),
            ),
            (
                "candle_tensor_sessions",
                "Sessions that may have tensors",
                Some(sessions as f64),
            ),
            (
                "candle_tensors",
                "Tensors of sessions, and persistent ones",
                Some(tensors as f64),
            ),
            (
                "candle_memory_used_bytes",
                "Bytes reserved for weights, gradients, optimizer states, caches and tensors",
                Some(app.memory.used() as f64),
            ),
            (
                "candle_memory_limit_bytes",
                "Bytes that may be reserved",
                Some(app.config.limits.memory as f64),
            ),
            (
                "candle_kv_cache_usage_ratio",
                "Part of --cache-bytes that pages of keys and values hold",
                Some(app.memory.cache.used() as f64 / app.memory.cache.limit().max(1) as f64),
            ),
            (
                "process_resident_memory_bytes",
                "Resident memory size in bytes",
                process::resident_bytes().map(|bytes| bytes as f64),
            ),
            (
                "process_open_fds",
                "Number of open file descriptors",
                process::open_files().map(|files| files as f64),
            ),
            (
                "process_start_time_seconds",
                "Start time of the process since unix epoch in seconds",
                Some(process::unix_seconds(self.started)),
            ),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                show(&gauge(name, help, value)?);
            }
        }
        let build =
            Opts::new("candle_build_info", "The version that runs").const_label("version", env!("CARGO_PKG_VERSION"));
        let build = prometheus::IntGauge::with_opts(build).map_err(defect)?;
        build.set(1);
        show(&build);
        Ok(())
    }
}
