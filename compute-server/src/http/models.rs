//! `GET /v1/models` and `GET /v1/models/{id}`: the models, and their adapters as `model:adapter`.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::error::ApiError;
use super::model_names;
use crate::app::App;
use crate::owner::{ModelHandle, View};
use crate::transactions::Reader;

/// Lists what can be asked for.
pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let reader = Reader::open(&app, None)?;
    let mut models: Vec<ModelHandle> = reader.models().into_iter().map(|(model, _)| model).collect();
    models.extend(reader.adapters().into_iter().map(|(adapter, _)| adapter));
    models.sort_by_key(ModelHandle::key);
    let data: Vec<Value> = models.iter().map(describe).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// Shows one of them.
pub(super) async fn retrieve(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let key = model_names::resolve(&app, &id);
    let reader = Reader::open(&app, None)?;
    let model = reader.find(&key.model, key.adapter.as_deref().unwrap_or_default())?;
    Ok(Json(describe(&model)))
}

fn describe(model: &ModelHandle) -> Value {
    let (key, row) = (model.key(), model.describe(&View::Committed));
    let created = row.created_at.and_then(|time| SystemTime::try_from(time).ok());
    let created = created.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    json!({
        "id": model_names::id(&key),
        "object": "model",
        "created": created.map_or(0, |time| time.as_secs()),
        "owned_by": "candle",
        // As other servers of open models show it.
        "max_model_len": row.context_length,
        "root": key.model,
        "parent": key.adapter.is_some().then_some(&key.model),
    })
}
