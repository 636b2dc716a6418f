//! `routes`: which experts each token of a text goes to, and with which gates.

use candle_compute_proto::v1::ListRoutesRequest;
use candle_compute_proto::v1::list_routes_request::Source;

use crate::client::read;
use crate::relation::{Call, Column, Estimate, Relation, Rows, Work, input, output};
use crate::values::{Kind, Value};

/// One row per token, layer and rank.
pub(crate) struct Routes;

const COLUMNS: &[Column] = &[
    input("model", Kind::Text),
    input("input", Kind::Text),
    input("tokens", Kind::IntArray),
    output("position", Kind::Int),
    output("layer", Kind::Int),
    output("rank", Kind::Int),
    output("expert", Kind::Int),
    output("gate", Kind::Real),
];

impl Relation for Routes {
    fn name(&self) -> &'static str {
        "routes"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn required(&self) -> &'static [&'static [&'static str]] {
        &[&["model"], &["input", "tokens"]]
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 1000.0,
            cost: 1000.0,
        }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let source = call.inputs.text_or_tokens(Source::Input, Source::Tokens)?;
            let request = ListRoutesRequest {
                transaction: call.transaction.clone(),
                model: call.inputs.required("model")?,
                source: Some(source),
            };
            let mut stream = read!(call.client, experts.list_routes(request)).await?;
            while let Some(message) = call.client.next(&mut stream).await? {
                for route in message.routes {
                    let mut row = vec![Value::Echo; 3];
                    row.extend([
                        route.position.into(),
                        route.layer.into(),
                        route.rank.into(),
                        route.expert.into(),
                        route.gate.into(),
                    ]);
                    if !rows.row(row).await {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }
}
