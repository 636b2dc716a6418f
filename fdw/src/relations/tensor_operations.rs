//! `tensor_operations`: operations on tensors, which the server works on beside the statements. INSERT submits, DELETE
//! stops.

use candle_compute_proto::v1::{
    CancelOperationsRequest, ListOperationsRequest, Operation, OperationSpec, OperationStatus, SubmitOperationsRequest,
};

use crate::client::{read, write};
use crate::error::{Error, Result};
use crate::relation::{
    Call, Column, Inputs, Participant, Relation, Row, Rows, Work, Writer, Writes, key, missing, output, stored,
};
use crate::values::{Kind, Value};

/// One row per operation of the session.
pub(crate) struct TensorOperations;

const COLUMNS: &[Column] = &[
    Column {
        insertable: false,
        ..key("id", Kind::BigInt)
    },
    stored("operation", Kind::Text),
    stored("inputs", Kind::TextArray),
    stored("outputs", Kind::TextArray),
    stored("attributes", Kind::Jsonb),
    stored("device", Kind::Text),
    stored("persistent", Kind::Boolean),
    output("status", Kind::Text),
    output("error", Kind::Text),
    output("done", Kind::BigInt),
    output("total", Kind::BigInt),
    output("submitted_at", Kind::Timestamp),
    output("started_at", Kind::Timestamp),
    output("finished_at", Kind::Timestamp),
    output("request", Kind::Text),
];

impl Relation for TensorOperations {
    fn name(&self) -> &'static str {
        "tensor_operations"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn participant(&self) -> Participant {
        Participant::Tensors
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let id = call.inputs.integer("id");
            let request = ListOperationsRequest {
                session_id: call.client.tensor_session().await?,
                transaction: call.transaction,
                // No operation has the number 0, and so the recheck leaves no row.
                ids: id.map(|id| u64::try_from(id).unwrap_or(0)).into_iter().collect(),
            };
            let listed = read!(call.client, tensors.list_operations(request)).await;
            for operation in call.client.in_tensor_session(listed).await?.operations {
                if !rows.row(row(operation)?).await {
                    break;
                }
            }
            Ok(())
        })
    }

    fn writes(&self) -> Writes {
        Writes {
            insert: true,
            batched: 256,
            delete: true,
            deleted_together: true,
            deleted_at_once: true,
            ..Writes::default()
        }
    }

    fn identity(&self) -> &'static [&'static str] {
        &["id"]
    }

    fn insert(&self, writer: Writer, inputs: Vec<Inputs>) -> Work<Vec<Row>> {
        Box::pin(async move {
            let request = SubmitOperationsRequest {
                session_id: writer.client.tensor_session().await?,
                transaction: writer.transaction,
                operations: inputs.iter().map(spec).collect::<Result<_>>()?,
            };
            let submitted = write!(writer.client, tensors.submit_operations(request)).await;
            let operations = writer.client.in_tensor_session(submitted).await?.operations;
            operations.into_iter().map(row).collect()
        })
    }

    /// Stops at once: work that has been given up cannot be taken up again by a rollback.
    fn delete_together(&self, writer: Writer, rows: Vec<Inputs>) -> Work<()> {
        Box::pin(async move {
            let ids = rows.iter().map(|row| row.integer("id").ok_or_else(|| missing("id")));
            let ids = ids.map(|id| id.map(|id| u64::try_from(id).unwrap_or(0)));
            let request = CancelOperationsRequest {
                session_id: writer.client.tensor_session().await?,
                ids: ids.collect::<Result<_>>()?,
            };
            let cancelled = write!(writer.client, tensors.cancel_operations(request)).await;
            writer.client.in_tensor_session(cancelled).await?;
            Ok(())
        })
    }
}

fn spec(row: &Inputs) -> Result<OperationSpec> {
    let outputs = row.texts("outputs");
    if outputs.is_empty() {
        return Err(missing("outputs"));
    }
    Ok(OperationSpec {
        operation: row.required("operation")?,
        inputs: row.texts("inputs"),
        outputs,
        attributes_json: row.text("attributes").unwrap_or_default(),
        device: row.text("device").unwrap_or_default(),
        persistent: row.boolean("persistent").unwrap_or(false),
    })
}

fn row(operation: Operation) -> Result<Row> {
    let status = match operation.status() {
        OperationStatus::Unspecified => Value::Null,
        OperationStatus::Queued => "queued".into(),
        OperationStatus::Running => "running".into(),
        OperationStatus::Done => "done".into(),
        OperationStatus::Failed => "failed".into(),
        OperationStatus::Cancelled => "cancelled".into(),
    };
    let spec = operation.spec.ok_or_else(|| Error::protocol("spec"))?;
    Ok(vec![
        Value::count(operation.id),
        spec.operation.into(),
        Value::Texts(spec.inputs),
        Value::Texts(spec.outputs),
        match spec.attributes_json {
            none if none.is_empty() => "{}".into(),
            some => some.into(),
        },
        spec.device.into(),
        spec.persistent.into(),
        status,
        Value::text_or_null(operation.error),
        Value::count(operation.done),
        match operation.total {
            0 => Value::Null,
            total => Value::count(total),
        },
        Value::time(operation.submitted_at),
        Value::time(operation.started_at),
        Value::time(operation.finished_at),
        Value::text_or_null(operation.request_id),
    ])
}
