//! `requests`: running and queued work; DELETE cancels it.

use candle_compute_proto::v1::{CancelRequestRequest, ListRequestsRequest};

use crate::client::{read, write};
use crate::relation::{Call, Column, Inputs, Relation, Rows, Work, Writer, Writes, output};
use crate::values::{Kind, Value};

/// One row per request that the server works on.
pub(crate) struct Requests;

const COLUMNS: &[Column] = &[
    output("id", Kind::Text),
    output("kind", Kind::Text),
    output("model", Kind::Text),
    output("phase", Kind::Text),
    output("done", Kind::BigInt),
    output("total", Kind::BigInt),
    output("started_at", Kind::Timestamp),
    output("tenant", Kind::Text),
];

impl Relation for Requests {
    fn name(&self) -> &'static str {
        "requests"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            for request in read!(call.client, telemetry.list_requests(ListRequestsRequest {}))
                .await?
                .requests
            {
                let row = vec![
                    request.id.into(),
                    request.kind.into(),
                    Value::text_or_null(request.model),
                    request.phase.into(),
                    Value::count(request.done),
                    if request.total == 0 {
                        Value::Null
                    } else {
                        Value::count(request.total)
                    },
                    Value::time(request.started_at),
                    Value::text_or_null(request.tenant),
                ];
                if !rows.row(row).await {
                    break;
                }
            }
            Ok(())
        })
    }

    fn writes(&self) -> Writes {
        Writes {
            delete: true,
            immediate: true,
            ..Writes::default()
        }
    }

    fn identity(&self) -> &'static [&'static str] {
        &["id"]
    }

    /// Cancels at once: work that goes on outside of this transaction cannot be cancelled and then not.
    fn delete(&self, writer: Writer, row: Inputs) -> Work<()> {
        Box::pin(async move {
            let id = row.required("id")?;
            write!(writer.client, telemetry.cancel_request(CancelRequestRequest { id })).await?;
            Ok(())
        })
    }
}
