//! `token_scores`: how probable a model finds each token of a text.

use candle_compute_proto::v1::ScoreRequest;
use candle_compute_proto::v1::score_request::Source;

use crate::client::read;
use crate::relation::{Call, Column, Estimate, Relation, Rows, Work, input, output};
use crate::relations::adapters;
use crate::values::{Kind, Value};

/// One row per token of the input.
pub(crate) struct TokenScores;

const COLUMNS: &[Column] = &[
    input("model", Kind::Text),
    input("input", Kind::Text),
    input("tokens", Kind::IntArray),
    output("position", Kind::Int),
    output("token_id", Kind::Int),
    output("token", Kind::Text),
    output("logprob", Kind::Real),
    input("adapter", Kind::Text),
];

impl Relation for TokenScores {
    fn name(&self) -> &'static str {
        "token_scores"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn required(&self) -> &'static [&'static [&'static str]] {
        &[&["model"], &["input", "tokens"]]
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 100.0,
            cost: 1000.0,
        }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let source = call.inputs.text_or_tokens(Source::Input, Source::Tokens)?;
            let request = ScoreRequest {
                transaction: call.transaction.clone(),
                model: call.inputs.required("model")?,
                source: Some(source),
                adapter: adapters::named(&call.inputs)?,
            };
            let tokens = read!(call.client, inference.score(request)).await?.tokens;
            for (position, token) in (0_i64..).zip(tokens) {
                let mut row = vec![Value::Echo; 3];
                row.extend([
                    position.into(),
                    token.token_id.into(),
                    Value::text_or_null(token.text),
                    token.logprob.into(),
                    Value::Echo,
                ]);
                if !rows.row(row).await {
                    break;
                }
            }
            Ok(())
        })
    }
}
