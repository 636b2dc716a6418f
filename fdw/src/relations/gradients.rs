//! `gradients`: the accumulated gradient of the models, in chunks of about 1 MB. INSERT adds by weight, DELETE zeroes.

use std::collections::{BTreeMap, BTreeSet};

use candle_compute_proto::v1::{
    MergeGradientsRequest, ReadGradientsRequest, TensorSelection, TransactionContext, ZeroGradientsRequest,
};
use pgrx::PgSqlErrorCode;

use crate::client::{Client, read, write};
use crate::error::{Error, Result};
use crate::relation::{
    Call, Column, Estimate, Inputs, Relation, Row, Rows, Work, Writer, Writes, choice, concat, missing, stored,
};
use crate::relations::{adapters, chunks};
use crate::values::{Kind, Value};

/// One row per chunk of a parameter's gradient.
pub(crate) struct Gradients;

const COLUMNS: &[Column] = &concat::<_, _, 12>(
    chunks::COLUMNS,
    [
        stored("tokens", Kind::BigInt),
        stored("micro_batches", Kind::BigInt),
        stored("loss", Kind::Double),
        choice("adapter", Kind::Text),
    ],
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
            let selection = chunks::selection(&call);
            let adapter = adapters::named(&call.inputs)?;
            for model in chunks::models(&call).await? {
                let request = ReadGradientsRequest {
                    transaction: call.transaction.clone(),
                    model: model.clone(),
                    selection: Some(selection.clone()),
                    adapter: adapter.clone(),
                };
                let mut stream = read!(call.client, training.read_gradients(request)).await?;
                while let Some(message) = call.client.next(&mut stream).await? {
                    let chunk = message.chunk.ok_or_else(|| Error::protocol("chunk"))?;
                    let mut row = chunks::row(&model, chunk, selection.without_data);
                    row.extend([
                        Value::count(message.tokens),
                        Value::count(message.micro_batches),
                        message.loss.into(),
                        Value::Echo,
                    ]);
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
            insert: true,
            // A row holds a chunk of 1 MB.
            batched: 16,
            ahead: true,
            delete: true,
            deleted_together: true,
            ..Writes::default()
        }
    }

    fn identity(&self) -> &'static [&'static str] {
        chunks::IDENTITY
    }

    fn insert(&self, writer: Writer, inputs: Vec<Inputs>) -> Work<Vec<Row>> {
        Box::pin(async move {
            let count = inputs.len();
            let mut pending = inputs.iter().peekable();
            // Runs of rows of one model or adapter travel together, in the order of the statement.
            while let Some(first) = pending.next() {
                let target = [first.required("model")?, adapters::named(first)?];
                let same =
                    |next: &&Inputs| ["model", "adapter"].map(|column| next.text(column).unwrap_or_default()) == target;
                let mut messages = vec![merge(&writer, &target, first)?];
                while let Some(next) = pending.next_if(same) {
                    messages.push(merge(&writer, &target, next)?);
                }
                write!(writer.client, training.merge_gradients(tokio_stream::iter(messages))).await?;
            }
            Ok(vec![chunks::echo(COLUMNS); count])
        })
    }

    fn delete_together(&self, writer: Writer, rows: Vec<Inputs>) -> Work<()> {
        Box::pin(async move {
            let mut models: BTreeMap<[String; 2], BTreeSet<(String, u32)>> = BTreeMap::new();
            for row in &rows {
                let chunk = chunks::named_chunk(row)?;
                let chunks = models
                    .entry([row.required("model")?, adapters::named(row)?])
                    .or_default();
                chunks.insert((chunk.name, chunk.chunk));
            }
            for ([model, adapter], chunks) in models {
                let present = count_chunks(&writer.client, writer.transaction.clone(), &model, &adapter).await?;
                if chunks.len() < present {
                    let code = PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED;
                    let message = format!("only a part of the gradient of model \"{model}\" would be deleted");
                    return Err(Error::new(code, message)
                        .detail(format!("The statement found {} of its {present} chunks.", chunks.len()))
                        .hint("A gradient is zeroed as a whole: DELETE FROM gradients WHERE model = '…'."));
                }
                let request = ZeroGradientsRequest {
                    transaction: writer.transaction.clone(),
                    model,
                    adapter,
                };
                write!(writer.client, training.zero_gradients(request)).await?;
            }
            Ok(())
        })
    }
}

fn merge(writer: &Writer, [model, adapter]: &[String; 2], row: &Inputs) -> Result<MergeGradientsRequest> {
    let count = |name: &str, value: i64| {
        u64::try_from(value).map_err(|_| Error::bad_value(format!("{name} must not be negative, but is {value}")))
    };
    Ok(MergeGradientsRequest {
        transaction: writer.transaction.clone(),
        model: model.clone(),
        set_id: writer.statement,
        chunk: Some(chunks::chunk(row)?),
        tokens: count("tokens", row.integer("tokens").ok_or_else(|| missing("tokens"))?)?,
        micro_batches: count("micro_batches", row.integer("micro_batches").unwrap_or(1))?,
        loss: row.number("loss"),
        adapter: adapter.clone(),
        ..MergeGradientsRequest::default()
    })
}

/// How many chunks a model's gradient has.
async fn count_chunks(
    client: &Client,
    transaction: Option<TransactionContext>,
    model: &str,
    adapter: &str,
) -> Result<usize> {
    let request = ReadGradientsRequest {
        transaction,
        model: model.to_string(),
        selection: Some(TensorSelection {
            without_data: true,
            ..TensorSelection::default()
        }),
        adapter: adapter.to_string(),
    };
    let mut stream = read!(client, training.read_gradients(request)).await?;
    let mut count = 0;
    while client.next(&mut stream).await?.is_some() {
        count += 1;
    }
    Ok(count)
}
