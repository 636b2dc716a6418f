//! `tokens`: a text as a model's tokenizer cuts it.

use candle_compute_proto::v1::TokenizeRequest;

use crate::client::read;
use crate::relation::{Call, Column, Estimate, Relation, Rows, Work, input, output};
use crate::values::{Kind, Value};

/// One row per token of the input.
pub(crate) struct Tokens;

const COLUMNS: &[Column] = &[
    input("model", Kind::Text),
    input("input", Kind::Text),
    output("position", Kind::Int),
    output("token_id", Kind::Int),
    output("token", Kind::Text),
];

impl Relation for Tokens {
    fn name(&self) -> &'static str {
        "tokens"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn required(&self) -> &'static [&'static [&'static str]] {
        &[&["model"], &["input"]]
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 100.0,
            cost: 100.0,
        }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = TokenizeRequest {
                transaction: call.transaction.clone(),
                model: call.inputs.required("model")?,
                input: call.inputs.required("input")?,
            };
            let tokens = read!(call.client, inference.tokenize(request)).await?.tokens;
            for (position, token) in (0_i64..).zip(tokens) {
                let row = vec![
                    Value::Echo,
                    Value::Echo,
                    position.into(),
                    token.token_id.into(),
                    token.text.into(),
                ];
                if !rows.row(row).await {
                    break;
                }
            }
            Ok(())
        })
    }
}
