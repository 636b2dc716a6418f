//! `parameters`: the weights of the models, in chunks of about 1 MB. UPDATE of `data` replaces elements, of `trainable`
//! freezes a parameter.

use candle_compute_proto::v1::{ReadParametersRequest, WriteParametersRequest};

use crate::client::{read, write};
use crate::error::Error;
use crate::relation::{
    Assignments, Call, Column, Estimate, Inputs, Relation, Rows, Work, Writer, Writes, choice, concat, missing, output,
};
use crate::relations::{adapters, chunks};
use crate::values::{Kind, Value};

/// One row per chunk of a parameter.
pub(crate) struct Parameters;

const COLUMNS: &[Column] = &concat::<_, _, 10>(
    chunks::COLUMNS,
    [output("trainable", Kind::Boolean), choice("adapter", Kind::Text)],
);

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
            let selection = chunks::selection(&call);
            let adapter = adapters::named(&call.inputs)?;
            for model in chunks::models(&call).await? {
                let request = ReadParametersRequest {
                    transaction: call.transaction.clone(),
                    model: model.clone(),
                    selection: Some(selection.clone()),
                    adapter: adapter.clone(),
                };
                let mut stream = read!(call.client, models.read_parameters(request)).await?;
                while let Some(message) = call.client.next(&mut stream).await? {
                    let chunk = message.chunk.ok_or_else(|| Error::protocol("chunk"))?;
                    let trainable = chunk.trainable;
                    let mut row = chunks::row(&model, chunk, selection.without_data);
                    row.extend([trainable.into(), Value::Echo]);
                    if !rows.row(row).await {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    fn writes(&self) -> Writes {
        Writes {
            update: &["data", "trainable"],
            ..Writes::default()
        }
    }

    fn identity(&self) -> &'static [&'static str] {
        chunks::IDENTITY
    }

    fn update(&self, writer: Writer, row: Inputs, new: Assignments) -> Work<()> {
        Box::pin(async move {
            let mut chunk = chunks::named_chunk(&row)?;
            if new.sets("data") {
                chunk.data = new.values.bytes("data").ok_or_else(|| missing("data"))?;
                if chunk.data.is_empty() {
                    return Err(Error::bad_value("data must not be empty"));
                }
            }
            let trainable = new.values.boolean("trainable");
            if new.sets("trainable") && trainable.is_none() {
                return Err(missing("trainable"));
            }
            let request = WriteParametersRequest {
                transaction: writer.transaction.clone(),
                model: row.required("model")?,
                chunk: Some(chunk),
                trainable,
                adapter: adapters::named(&row)?,
            };
            write!(writer.client, training.write_parameters(tokio_stream::once(request))).await?;
            Ok(())
        })
    }
}
