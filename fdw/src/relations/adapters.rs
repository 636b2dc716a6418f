//! `adapters`: LoRA adapters. INSERT creates or loads, UPDATE of `merged` merges into the model, DELETE drops.

use candle_compute_proto::v1::{
    Adapter, CreateAdapterRequest, DropAdapterRequest, ListAdaptersRequest, MergeAdapterRequest,
};
use pgrx::PgSqlErrorCode;

use crate::client::{read, write};
use crate::error::{Error, Result};
use crate::relation::{
    Assignments, Call, Column, Estimate, Inputs, Relation, Row, Rows, Work, Writer, Writes, key, output, stored,
};
use crate::values::{Kind, Value};

/// One row per adapter of a model.
pub(crate) struct Adapters;

const COLUMNS: &[Column] = &[
    key("model", Kind::Text),
    key("name", Kind::Text),
    stored("rank", Kind::Int),
    stored("alpha", Kind::Real),
    stored("target_modules", Kind::TextArray),
    stored("dropout", Kind::Real),
    stored("use_rslora", Kind::Boolean),
    stored("source", Kind::Text),
    stored("seed", Kind::BigInt),
    output("merged", Kind::Boolean),
    output("status", Kind::Text),
    output("parameters", Kind::BigInt),
    output("memory_bytes", Kind::BigInt),
    output("step", Kind::BigInt),
    output("created_at", Kind::Timestamp),
];

impl Relation for Adapters {
    fn name(&self) -> &'static str {
        "adapters"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn estimate(&self) -> Estimate {
        Estimate { rows: 10.0, cost: 10.0 }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = ListAdaptersRequest {
                transaction: call.transaction,
                models: call.inputs.wanted("model"),
                names: call.inputs.wanted("name"),
            };
            for adapter in read!(call.client, adapters.list_adapters(request)).await?.adapters {
                if !rows.row(row(adapter)).await {
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
            update: &["merged"],
            ..Writes::default()
        }
    }

    fn identity(&self) -> &'static [&'static str] {
        &["model", "name"]
    }

    fn insert(&self, writer: Writer, inputs: Vec<Inputs>) -> Work<Vec<Row>> {
        Box::pin(async move {
            let mut rows = Vec::with_capacity(inputs.len());
            for inputs in inputs {
                let request = CreateAdapterRequest {
                    transaction: writer.transaction.clone(),
                    model: inputs.required("model")?,
                    name: inputs.required("name")?,
                    source: source(&inputs)?,
                    rank: inputs.integer("rank"),
                    alpha: number(&inputs, "alpha"),
                    target_modules: target_modules(&inputs)?,
                    dropout: number(&inputs, "dropout"),
                    use_rslora: inputs.boolean("use_rslora"),
                    seed: inputs.integer("seed"),
                };
                let made = write!(writer.client, adapters.create_adapter(request)).await?;
                rows.push(row(made.adapter.ok_or_else(|| Error::protocol("adapter"))?));
            }
            Ok(rows)
        })
    }

    fn delete(&self, writer: Writer, row: Inputs) -> Work<()> {
        Box::pin(async move {
            let request = DropAdapterRequest {
                transaction: writer.transaction,
                model: row.required("model")?,
                name: row.required("name")?,
            };
            write!(writer.client, adapters.drop_adapter(request)).await?;
            Ok(())
        })
    }

    fn update(&self, writer: Writer, row: Inputs, new: Assignments) -> Work<()> {
        Box::pin(async move {
            if new.values.boolean("merged") != Some(true) {
                let code = PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED;
                return Err(
                    Error::new(code, "an adapter cannot be taken out of the weights of its model again")
                        .hint("Merge a copy of the model, or restore it from a checkpoint."),
                );
            }
            let request = MergeAdapterRequest {
                transaction: writer.transaction,
                model: row.required("model")?,
                name: row.required("name")?,
            };
            write!(writer.client, adapters.merge_adapter(request)).await?;
            Ok(())
        })
    }
}

/// The adapter that the inputs of another relation name, empty without one.
pub(super) fn named(inputs: &Inputs) -> Result<String> {
    checked(inputs.text("adapter").as_deref())
}

/// The name of an adapter, empty where none is given: to the server an empty name means the model itself.
pub(crate) fn checked(adapter: Option<&str>) -> Result<String> {
    match adapter {
        Some("") => Err(Error::bad_value(
            "adapter must not be empty; NULL stands for the model itself",
        )),
        adapter => Ok(adapter.unwrap_or_default().to_string()),
    }
}

fn source(inputs: &Inputs) -> Result<String> {
    match inputs.text("source") {
        Some(source) if source.is_empty() => Err(Error::bad_value(
            "source must not be empty; NULL stands for an adapter made from nothing",
        )),
        source => Ok(source.unwrap_or_default()),
    }
}

/// A real column as the decimal number that was written: 0.1 is to be 0.1, not the f32 next to it.
fn number(inputs: &Inputs, name: &str) -> Option<f64> {
    let value = inputs.real(name)?;
    value.to_string().parse().ok()
}

fn target_modules(inputs: &Inputs) -> Result<Vec<String>> {
    match inputs.get("target_modules") {
        Some(Value::Texts(names)) if names.is_empty() => Err(Error::bad_value(
            "target_modules must not be empty; NULL stands for the architecture's default",
        )),
        _ => Ok(inputs.texts("target_modules")),
    }
}

fn row(adapter: Adapter) -> Row {
    vec![
        adapter.model.into(),
        adapter.name.into(),
        adapter.rank.into(),
        Value::Real(adapter.alpha as f32),
        Value::Texts(adapter.target_modules),
        Value::Real(adapter.dropout as f32),
        adapter.use_rslora.into(),
        Value::text_or_null(adapter.source),
        adapter.seed.into(),
        adapter.merged.into(),
        adapter.status.into(),
        Value::count(adapter.parameters),
        Value::count(adapter.memory_bytes),
        Value::count(adapter.step),
        Value::time(adapter.created_at),
    ]
}
