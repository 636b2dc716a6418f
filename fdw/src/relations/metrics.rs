//! `metrics`: what is measured of the server and its models, as Prometheus reads it.

use candle_compute_proto::v1::{ListMetricsRequest, MetricSample};

use crate::client::read;
use crate::relation::{Call, Column, Relation, Rows, Work, output};
use crate::values::Kind;

/// One row per sample.
pub(crate) struct Metrics;

const COLUMNS: &[Column] = &[
    output("name", Kind::Text),
    output("labels", Kind::Jsonb),
    output("value", Kind::Double),
];

impl Relation for Metrics {
    fn name(&self) -> &'static str {
        "metrics"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            for sample in read!(call.client, telemetry.list_metrics(ListMetricsRequest {}))
                .await?
                .samples
            {
                let labels = labels(&sample);
                if !rows
                    .row(vec![sample.name.into(), labels.into(), sample.value.into()])
                    .await
                {
                    break;
                }
            }
            Ok(())
        })
    }
}

/// The labels of a sample as a JSON object.
pub(crate) fn labels(sample: &MetricSample) -> String {
    serde_json::json!(sample.labels).to_string()
}
