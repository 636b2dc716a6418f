//! The views `candle.stat_requests`, `candle.stat_metrics` and `candle.stat_models` over the server of
//! `candle_fdw.server`, and the functions beneath them. They run as whoever asks: with that user's mapping, and only
//! where the foreign server is granted to the user.
#![allow(unsafe_code)]

use candle_compute_proto::v1::{
    ActiveRequest, ListMetricsRequest, ListModelsRequest, ListRequestsRequest, MetricSample, Model,
};
use pgrx::prelude::*;

use super::server::client;
use crate::client::{read, wait};
use crate::error::{OrReport, Result};
use crate::relations::metrics;
use crate::transaction;

extension_sql_file!(
    "../../sql/statistics.sql",
    name = "statistics",
    requires = [stat_get_requests, stat_get_metrics, stat_get_models]
);

/// Running and queued work. `started_at` is in seconds since 1970.
// The columns are read off the type.
#[allow(clippy::type_complexity)]
#[pg_extern(volatile, parallel_unsafe)]
fn stat_get_requests() -> TableIterator<
    'static,
    (
        name!(id, String),
        name!(kind, String),
        name!(model, Option<String>),
        name!(phase, String),
        name!(done, i64),
        name!(total, Option<i64>),
        name!(started_at, Option<f64>),
    ),
> {
    let list = || -> Result<Vec<ActiveRequest>> {
        let client = client()?;
        Ok(wait(read!(client, telemetry.list_requests(ListRequestsRequest {})))?.requests)
    };
    TableIterator::new(list().or_report().into_iter().map(|request| {
        (
            request.id,
            request.kind,
            some_text(request.model),
            request.phase,
            count(request.done),
            (request.total > 0).then(|| count(request.total)),
            request
                .started_at
                .map(|time| time.seconds as f64 + f64::from(time.nanos) / 1e9),
        )
    }))
}

/// What is measured, with the labels as text of a JSON object.
#[pg_extern(volatile, parallel_unsafe)]
fn stat_get_metrics() -> TableIterator<'static, (name!(name, String), name!(labels, String), name!(value, f64))> {
    let list = || -> Result<Vec<MetricSample>> {
        let client = client()?;
        Ok(wait(read!(client, telemetry.list_metrics(ListMetricsRequest {})))?.samples)
    };
    TableIterator::new(list().or_report().into_iter().map(|sample| {
        let labels = metrics::labels(&sample);
        (sample.name, labels, sample.value)
    }))
}

/// The models that the present transaction sees.
// The columns are read off the type.
#[allow(clippy::type_complexity)]
#[pg_extern(volatile, parallel_unsafe)]
fn stat_get_models() -> TableIterator<
    'static,
    (
        name!(name, String),
        name!(architecture, Option<String>),
        name!(dtype, Option<String>),
        name!(device, Option<String>),
        name!(status, String),
        name!(parameters, i64),
        name!(memory_bytes, i64),
        name!(context_length, i64),
        name!(step, i64),
    ),
> {
    let list = || -> Result<Vec<Model>> {
        let client = client()?;
        let request = ListModelsRequest {
            transaction: transaction::reading(client.session)?,
            names: Vec::new(),
        };
        Ok(wait(read!(client, models.list_models(request)))?.models)
    };
    TableIterator::new(list().or_report().into_iter().map(|model| {
        (
            model.name,
            some_text(model.architecture),
            some_text(model.dtype),
            some_text(model.device),
            model.status,
            count(model.parameters),
            count(model.memory_bytes),
            i64::from(model.context_length),
            count(model.step),
        )
    }))
}

fn some_text(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn count(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
