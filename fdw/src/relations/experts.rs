//! `experts`: what each expert of each layer had to do in the batches since the last step.

use candle_compute_proto::v1::ListExpertsRequest;

use crate::client::read;
use crate::relation::{Call, Column, Relation, Rows, Work, key, output};
use crate::values::{Kind, Value};

/// One row per model, layer and expert.
pub(crate) struct Experts;

const COLUMNS: &[Column] = &[
    key("model", Kind::Text),
    output("layer", Kind::Int),
    output("expert", Kind::Int),
    output("tokens", Kind::BigInt),
    output("share", Kind::Real),
    output("mean_gate", Kind::Real),
    output("dropped", Kind::BigInt),
];

impl Relation for Experts {
    fn name(&self) -> &'static str {
        "experts"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = ListExpertsRequest {
                transaction: call.transaction,
                models: call.inputs.wanted("model"),
            };
            for load in read!(call.client, experts.list_experts(request)).await?.experts {
                let row = vec![
                    load.model.into(),
                    load.layer.into(),
                    load.expert.into(),
                    Value::count(load.tokens),
                    load.share.map(|share| share as f32).into(),
                    load.mean_gate.map(|gate| gate as f32).into(),
                    Value::count(load.dropped),
                ];
                if !rows.row(row).await {
                    break;
                }
            }
            Ok(())
        })
    }
}
