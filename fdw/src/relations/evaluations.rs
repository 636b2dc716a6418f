//! `evaluations`: what candle.evaluate found; DELETE prunes.

use candle_compute_proto::v1::{DeleteEvaluationRequest, Evaluation, ListEvaluationsRequest};

use crate::client::{read, write};
use crate::relation::{Call, Column, Inputs, Relation, Row, Rows, Work, Writer, Writes, key, output};
use crate::values::{Kind, Value};

/// One row per evaluation.
pub(crate) struct Evaluations;

const COLUMNS: &[Column] = &[
    output("id", Kind::BigInt),
    key("model", Kind::Text),
    output("adapter", Kind::Text),
    output("step", Kind::BigInt),
    output("kind", Kind::Text),
    output("tag", Kind::Text),
    output("dataset_digest", Kind::Text),
    output("rows", Kind::BigInt),
    output("tokens", Kind::BigInt),
    output("bytes", Kind::BigInt),
    output("loss", Kind::Double),
    output("perplexity", Kind::Double),
    output("bits_per_byte", Kind::Double),
    output("next_token_accuracy", Kind::Double),
    output("accuracy", Kind::Double),
    output("accuracy_norm", Kind::Double),
    output("tokens_per_second", Kind::Double),
    output("generations", Kind::BigInt),
    output("time_to_first_token_ms", Kind::Double),
    output("latency_p50_ms", Kind::Double),
    output("latency_p90_ms", Kind::Double),
    output("latency_p99_ms", Kind::Double),
    output("generation_tokens_per_second", Kind::Double),
    output("duration_ms", Kind::Double),
    output("settings", Kind::Jsonb),
    output("created_at", Kind::Timestamp),
];

impl Relation for Evaluations {
    fn name(&self) -> &'static str {
        "evaluations"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = ListEvaluationsRequest {
                transaction: call.transaction,
                models: call.inputs.wanted("model"),
            };
            let found = read!(call.client, evaluations.list_evaluations(request)).await?;
            for evaluation in found.evaluations {
                if !rows.row(row(evaluation)).await {
                    break;
                }
            }
            Ok(())
        })
    }

    fn writes(&self) -> Writes {
        Writes {
            delete: true,
            ..Writes::default()
        }
    }

    fn identity(&self) -> &'static [&'static str] {
        &["id"]
    }

    fn delete(&self, writer: Writer, row: Inputs) -> Work<()> {
        Box::pin(async move {
            let id = row.integer("id").and_then(|id| u64::try_from(id).ok());
            let request = DeleteEvaluationRequest {
                transaction: writer.transaction,
                id: id.unwrap_or_default(),
            };
            write!(writer.client, evaluations.delete_evaluation(request)).await?;
            Ok(())
        })
    }
}

fn row(found: Evaluation) -> Row {
    vec![
        Value::count(found.id),
        found.model.into(),
        Value::text_or_null(found.adapter),
        Value::count(found.step),
        found.kind.into(),
        Value::text_or_null(found.tag),
        found.dataset_digest.into(),
        Value::count(found.rows),
        Value::count(found.tokens),
        Value::count(found.bytes),
        found.loss.into(),
        found.perplexity.into(),
        found.bits_per_byte.into(),
        found.next_token_accuracy.into(),
        found.accuracy.into(),
        found.accuracy_norm.into(),
        found.tokens_per_second.into(),
        Value::count(found.generations),
        found.time_to_first_token_ms.into(),
        found.latency_p50_ms.into(),
        found.latency_p90_ms.into(),
        found.latency_p99_ms.into(),
        found.generation_tokens_per_second.into(),
        found.duration_ms.into(),
        found.settings_json.into(),
        Value::time(found.created_at),
    ]
}
