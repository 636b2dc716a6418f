//! `checkpoints`: INSERT saves a model, DELETE prunes.

use candle_compute_proto::v1::{Checkpoint, CreateCheckpointRequest, DeleteCheckpointRequest, ListCheckpointsRequest};

use crate::client::{read, write};
use crate::error::Error;
use crate::relation::{Call, Column, Inputs, Relation, Row, Rows, Work, Writer, Writes, choice, key, output, stored};
use crate::relations::adapters;
use crate::values::{Kind, Value};

/// One row per checkpoint.
pub(crate) struct Checkpoints;

const COLUMNS: &[Column] = &[
    key("model", Kind::Text),
    stored("tag", Kind::Text),
    output("step", Kind::BigInt),
    output("bytes", Kind::BigInt),
    output("shared_bytes", Kind::BigInt),
    output("sha256", Kind::Text),
    output("path", Kind::Text),
    output("created_at", Kind::Timestamp),
    choice("adapter", Kind::Text),
];

impl Relation for Checkpoints {
    fn name(&self) -> &'static str {
        "checkpoints"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = ListCheckpointsRequest {
                transaction: call.transaction,
                models: call.inputs.wanted("model"),
                adapter: adapters::named(&call.inputs)?,
            };
            for checkpoint in read!(call.client, checkpoints.list_checkpoints(request))
                .await?
                .checkpoints
            {
                if !rows.row(row(checkpoint)).await {
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
            ..Writes::default()
        }
    }

    fn identity(&self) -> &'static [&'static str] {
        &["model", "step", "adapter"]
    }

    fn insert(&self, writer: Writer, inputs: Vec<Inputs>) -> Work<Vec<Row>> {
        Box::pin(async move {
            let mut rows = Vec::with_capacity(inputs.len());
            for inputs in inputs {
                let request = CreateCheckpointRequest {
                    transaction: writer.transaction.clone(),
                    model: inputs.required("model")?,
                    tag: inputs.text("tag").unwrap_or_default(),
                    adapter: adapters::named(&inputs)?,
                };
                let made = write!(writer.client, checkpoints.create_checkpoint(request)).await?;
                rows.push(row(made.checkpoint.ok_or_else(|| Error::protocol("checkpoint"))?));
            }
            Ok(rows)
        })
    }

    fn delete(&self, writer: Writer, row: Inputs) -> Work<()> {
        Box::pin(async move {
            let request = DeleteCheckpointRequest {
                transaction: writer.transaction,
                model: row.required("model")?,
                step: row
                    .integer("step")
                    .and_then(|step| u64::try_from(step).ok())
                    .unwrap_or_default(),
                adapter: adapters::named(&row)?,
            };
            write!(writer.client, checkpoints.delete_checkpoint(request)).await?;
            Ok(())
        })
    }
}

fn row(checkpoint: Checkpoint) -> Row {
    vec![
        checkpoint.model.into(),
        Value::text_or_null(checkpoint.tag),
        Value::count(checkpoint.step),
        Value::count(checkpoint.bytes),
        Value::count(checkpoint.shared_bytes),
        checkpoint.sha256.into(),
        checkpoint.path.into(),
        Value::time(checkpoint.created_at),
        Value::Echo,
    ]
}
