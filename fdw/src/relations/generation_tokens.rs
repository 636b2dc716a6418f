//! `generation_tokens`: one row per token, as it is produced.

use crate::client::read;
use crate::relation::{Call, Column, Estimate, Relation, Rows, Usage, Work, concat, output};
use crate::relations::sampling;
use crate::values::{Kind, Value};

/// One row per token; who stops reading stops the generation.
pub(crate) struct GenerationTokens;

const COLUMNS: &[Column] = &concat::<_, _, 16>(
    sampling::COLUMNS,
    [
        output("position", Kind::Int),
        output("token_id", Kind::Int),
        output("token", Kind::Text),
        output("logprob", Kind::Real),
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
                        token.position.into(),
                        token.token_id.into(),
                        token.text.into(),
                        token.logprob.into(),
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
