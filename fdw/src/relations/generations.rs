//! `generations`: one row per completion, as a whole.

use crate::client::read;
use crate::error::Error;
use crate::relation::{Call, Column, Estimate, Relation, Rows, Usage, Work, concat, output};
use crate::relations::sampling;
use crate::values::{Kind, Value};

/// One row per set of inputs, or as many as its `n` asks for.
pub(crate) struct Generations;

const COLUMNS: &[Column] = &concat::<_, _, 25>(
    sampling::COLUMNS,
    [
        output("choice", Kind::Int),
        output("completion", Kind::Text),
        output("finish_reason", Kind::Text),
        output("prompt_tokens", Kind::Int),
        output("cached_tokens", Kind::Int),
        output("completion_tokens", Kind::Int),
        output("time_to_first_token_ms", Kind::Double),
        output("duration_ms", Kind::Double),
    ],
);

impl Relation for Generations {
    fn name(&self) -> &'static str {
        "generations"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn required(&self) -> &'static [&'static [&'static str]] {
        sampling::REQUIRED
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 1.0,
            cost: 10_000.0,
        }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = sampling::request(&call, false)?;
            let mut stream = read!(call.client, inference.generate(request)).await?;
            let mut ended = false;
            while let Some(message) = call.client.next(&mut stream).await? {
                let Some(summary) = message.summary else { continue };
                ended = true;
                rows.usage(Usage::from(&summary)).await;
                let mut row = vec![Value::Echo; sampling::INPUTS];
                row.extend([
                    summary.choice.into(),
                    summary.completion.into(),
                    summary.finish_reason.into(),
                    summary.prompt_tokens.into(),
                    summary.cached_tokens.into(),
                    summary.completion_tokens.into(),
                    summary.time_to_first_token_ms.into(),
                    summary.duration_ms.into(),
                ]);
                if !rows.row(row).await {
                    return Ok(());
                }
            }
            if !ended {
                return Err(Error::protocol("summary of the generation"));
            }
            Ok(())
        })
    }
}
