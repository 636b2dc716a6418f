//! `generation_tokens`: one row per token, as it is produced.

use candle_compute_proto::v1::TopLogprob;
use serde_json::{Value as Json, json};

use crate::client::read;
use crate::relation::{Call, Column, Estimate, Relation, Rows, Usage, Work, concat, input, output};
use crate::relations::sampling;
use crate::values::{Kind, Value};

/// One row per token; who stops reading stops the generation.
pub(crate) struct GenerationTokens;

const COLUMNS: &[Column] = &concat::<_, _, 24>(
    sampling::COLUMNS,
    [
        input("logprobs", Kind::Int),
        output("choice", Kind::Int),
        output("position", Kind::Int),
        output("token_id", Kind::Int),
        output("token", Kind::Text),
        output("logprob", Kind::Real),
        output("top_logprobs", Kind::Jsonb),
    ],
);

impl Relation for GenerationTokens {
    fn name(&self) -> &'static str {
        "generation_tokens"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn required(&self) -> &'static [&'static [&'static str]] {
        sampling::REQUIRED
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 100.0,
            cost: 10_000.0,
        }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = sampling::request(&call, true)?;
            let mut stream = read!(call.client, inference.generate(request)).await?;
            while let Some(message) = call.client.next(&mut stream).await? {
                if let Some(token) = message.token {
                    let mut row = vec![Value::Echo; sampling::INPUTS];
                    row.extend([
                        Value::Echo,
                        token.choice.into(),
                        token.position.into(),
                        token.token_id.into(),
                        token.text.into(),
                        token.logprob.into(),
                        top_logprobs(token.top_logprobs),
                    ]);
                    if !rows.row(row).await {
                        break;
                    }
                }
                if let Some(summary) = message.summary {
                    rows.usage(Usage::from(&summary)).await;
                }
            }
            Ok(())
        })
    }
}

/// The likely tokens as a JSON array; NULL where none were asked for.
fn top_logprobs(tokens: Vec<TopLogprob>) -> Value {
    if tokens.is_empty() {
        return Value::Null;
    }
    let entry = |token: TopLogprob| {
        // The shortest text that is the same f32, and jsonb has no U+0000.
        let logprob: Option<f64> = token.logprob.to_string().parse().ok();
        json!({"token_id": token.token_id, "token": token.text.replace('\0', "\u{FFFD}"), "logprob": logprob})
    };
    Value::Text(tokens.into_iter().map(entry).collect::<Json>().to_string())
}
