//! `gradients`: the accumulated gradient of the models, in chunks of about 1 MB.

use candle_compute_proto::v1::ReadGradientsRequest;

use crate::client::read;
use crate::error::Error;
use crate::relation::{Call, Column, Estimate, Relation, Rows, Work, concat, output};
use crate::relations::tensors;
use crate::values::{Kind, Value};

/// One row per chunk of a parameter's gradient.
pub(crate) struct Gradients;

const COLUMNS: &[Column] = &concat::<_, _, 10>(
    tensors::COLUMNS,
    [output("tokens", Kind::BigInt), output("micro_batches", Kind::BigInt)],
);

impl Relation for Gradients {
    fn name(&self) -> &'static str {
        "gradients"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 1000.0,
            cost: 1000.0,
        }
    }

    fn buffered_rows(&self) -> usize {
        // A row holds a chunk of 1 MB.
        4
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let selection = tensors::selection(&call);
            for model in tensors::models(&call).await? {
                let request = ReadGradientsRequest {
                    transaction: call.transaction.clone(),
                    model: model.clone(),
                    selection: Some(selection.clone()),
                };
                let mut stream = read!(call.client, training.read_gradients(request)).await?;
                while let Some(message) = call.client.next(&mut stream).await? {
                    let chunk = message.chunk.ok_or_else(|| Error::protocol("chunk"))?;
                    let mut row = tensors::row(&model, chunk, selection.without_data);
                    row.extend([Value::count(message.tokens), Value::count(message.micro_batches)]);
                    if !rows.row(row).await {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }
}
