//! `tape`: what the last forward pass of training recorded for its backward pass.

use candle_compute_proto::v1::{ActivationStorage, ListTapeRequest, TapeEntry};

use crate::client::read;
use crate::relation::{Call, Column, Relation, Row, Rows, Work, input, key, output};
use crate::relations::{adapters, chunks};
use crate::values::{Kind, Value};

/// One row per operation of the last forward pass of each model, or of each model's adapter of that name.
pub(crate) struct Tape;

const COLUMNS: &[Column] = &[
    key("model", Kind::Text),
    output("position", Kind::Int),
    output("segment", Kind::Text),
    output("operation", Kind::Text),
    output("inputs", Kind::IntArray),
    output("shape", Kind::IntArray),
    output("dtype", Kind::Text),
    output("bytes", Kind::BigInt),
    output("storage", Kind::Text),
    input("adapter", Kind::Text),
];

impl Relation for Tape {
    fn name(&self) -> &'static str {
        "tape"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = ListTapeRequest {
                transaction: call.transaction,
                models: call.inputs.wanted("model"),
                adapter: adapters::named(&call.inputs)?,
            };
            for entry in read!(call.client, training.list_tape(request)).await?.entries {
                if !rows.row(row(entry)).await {
                    break;
                }
            }
            Ok(())
        })
    }
}

fn row(entry: TapeEntry) -> Row {
    let (dtype, storage) = (entry.dtype(), entry.storage());
    vec![
        entry.model.into(),
        entry.position.into(),
        entry.segment.into(),
        entry.operation.into(),
        Value::Ints(entry.inputs.into_iter().map(i64::from).collect()),
        chunks::shape(&entry.shape),
        chunks::dtype(dtype),
        Value::count(entry.bytes),
        match storage {
            ActivationStorage::Unspecified => Value::Null,
            ActivationStorage::Kept => "kept".into(),
            ActivationStorage::Recomputed => "recomputed".into(),
            ActivationStorage::Compressed => "compressed".into(),
        },
        Value::Echo,
    ]
}
