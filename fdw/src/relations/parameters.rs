//! `parameters`: the weights of the models, in chunks of about 1 MB.

use candle_compute_proto::v1::ReadParametersRequest;

use crate::client::read;
use crate::error::Error;
use crate::relation::{Call, Column, Estimate, Relation, Rows, Work, concat, output};
use crate::relations::tensors;
use crate::values::Kind;

/// One row per chunk of a parameter.
pub(crate) struct Parameters;

const COLUMNS: &[Column] = &concat::<_, _, 9>(tensors::COLUMNS, [output("trainable", Kind::Boolean)]);

impl Relation for Parameters {
    fn name(&self) -> &'static str {
        "parameters"
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
                let request = ReadParametersRequest {
                    transaction: call.transaction.clone(),
                    model: model.clone(),
                    selection: Some(selection.clone()),
                };
                let mut stream = read!(call.client, models.read_parameters(request)).await?;
                while let Some(message) = call.client.next(&mut stream).await? {
                    let chunk = message.chunk.ok_or_else(|| Error::protocol("chunk"))?;
                    let trainable = chunk.trainable;
                    let mut row = tensors::row(&model, chunk, selection.without_data);
                    row.push(trainable.into());
                    if !rows.row(row).await {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }
}
