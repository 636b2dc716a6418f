//! `models`: INSERT loads or creates, UPDATE of `config` changes training settings, DELETE unloads.

use candle_compute_proto::v1::{ListModelsRequest, LoadModelRequest, Model, UnloadModelRequest, UpdateModelRequest};

use crate::client::{read, write};
use crate::error::{Error, Result};
use crate::relation::{
    Assignments, Call, Column, Estimate, Inputs, Relation, Row, Rows, Work, Writer, Writes, key, output, stored,
};
use crate::values::{Kind, Value};

/// One row per model that the server holds.
pub(crate) struct Models;

const COLUMNS: &[Column] = &[
    key("name", Kind::Text),
    output("architecture", Kind::Text),
    stored("source", Kind::Text),
    stored("config", Kind::Jsonb),
    stored("dtype", Kind::Text),
    stored("device", Kind::Text),
    stored("seed", Kind::BigInt),
    output("status", Kind::Text),
    output("parameters", Kind::BigInt),
    output("memory_bytes", Kind::BigInt),
    output("context_length", Kind::Int),
    output("vocabulary", Kind::Int),
    output("step", Kind::BigInt),
    output("created_at", Kind::Timestamp),
];

impl Relation for Models {
    fn name(&self) -> &'static str {
        "models"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn estimate(&self) -> Estimate {
        Estimate { rows: 10.0, cost: 10.0 }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = ListModelsRequest {
                transaction: call.transaction,
                names: call.inputs.wanted("name"),
            };
            for model in read!(call.client, models.list_models(request)).await?.models {
                if !rows.row(row(model)).await {
                    break;
                }
            }
            Ok(())
        })
    }

    fn writes(&self) -> Writes {
        Writes {
            insert: true,
            delete: true,
            update: &["config"],
            ..Writes::default()
        }
    }

    fn identity(&self) -> &'static [&'static str] {
        &["name"]
    }

    fn insert(&self, writer: Writer, inputs: Vec<Inputs>) -> Work<Vec<Row>> {
        Box::pin(async move {
            let mut rows = Vec::with_capacity(inputs.len());
            for inputs in inputs {
                rows.push(row(load(&writer, &inputs).await?));
            }
            Ok(rows)
        })
    }

    fn delete(&self, writer: Writer, row: Inputs) -> Work<()> {
        Box::pin(async move {
            let request = UnloadModelRequest {
                transaction: writer.transaction,
                name: row.required("name")?,
            };
            write!(writer.client, models.unload_model(request)).await?;
            Ok(())
        })
    }

    fn update(&self, writer: Writer, row: Inputs, new: Assignments) -> Work<()> {
        Box::pin(async move {
            let request = UpdateModelRequest {
                transaction: writer.transaction,
                name: row.required("name")?,
                config_json: new.values.required("config")?,
            };
            write!(writer.client, models.update_model(request)).await?;
            Ok(())
        })
    }
}

async fn load(writer: &Writer, inputs: &Inputs) -> Result<Model> {
    let request = LoadModelRequest {
        transaction: writer.transaction.clone(),
        name: inputs.required("name")?,
        source: not_empty(inputs, "source")?,
        config_json: inputs.text("config").unwrap_or_else(|| "{}".into()),
        dtype: not_empty(inputs, "dtype")?,
        device: not_empty(inputs, "device")?,
        seed: inputs.integer("seed"),
    };
    write!(writer.client, models.load_model(request))
        .await?
        .model
        .ok_or_else(|| Error::protocol("model"))
}

/// The text of a column, empty only where it was not given: to the server an empty text means the default.
fn not_empty(inputs: &Inputs, column: &str) -> Result<String> {
    match inputs.text(column) {
        Some(text) if text.is_empty() => Err(Error::bad_value(format!(
            "\"{column}\" must not be empty; NULL stands for the default"
        ))),
        text => Ok(text.unwrap_or_default()),
    }
}

fn row(model: Model) -> Row {
    vec![
        model.name.into(),
        model.architecture.into(),
        Value::text_or_null(model.source),
        Value::text_or_null(model.config_json),
        model.dtype.into(),
        model.device.into(),
        model.seed.into(),
        model.status.into(),
        Value::count(model.parameters),
        Value::count(model.memory_bytes),
        model.context_length.into(),
        model.vocabulary.into(),
        Value::count(model.step),
        Value::time(model.created_at),
    ]
}
