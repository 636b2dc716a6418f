//! `tensors`: named tensors on the server's devices, in chunks of about 1 MB. SELECT of `data` waits for the operation
//! that computes it.

use std::collections::{BTreeMap, BTreeSet};

use candle_compute_proto::v1::{
    DeleteTensorsRequest, ListTensorsRequest, PutTensorsRequest, ReadTensorsRequest, Tensor, TensorChunk,
    TensorSelection, TensorStatus,
};
use pgrx::PgSqlErrorCode;

use crate::client::{read, write};
use crate::error::{Error, Result};
use crate::relation::{
    Call, Column, Estimate, Inputs, Participant, Relation, Row, Rows, Work, Writer, Writes, key, missing, output,
    stored,
};
use crate::relations::chunks;
use crate::values::{Kind, Value};

/// One row per chunk of a tensor.
pub(crate) struct Tensors;

const COLUMNS: &[Column] = &[
    key("name", Kind::Text),
    stored("device", Kind::Text),
    stored("dtype", Kind::Text),
    stored("shape", Kind::IntArray),
    key("chunk", Kind::Int),
    stored("data", Kind::Bytea),
    stored("persistent", Kind::Boolean),
    stored("elements", Kind::BigInt),
    output("chunks", Kind::Int),
    output("status", Kind::Text),
    output("error", Kind::Text),
    output("operation_id", Kind::BigInt),
    output("created_at", Kind::Timestamp),
];

/// Position of the column `data`.
const DATA: usize = 5;

/// Elements of every chunk but the last.
const CHUNK_ELEMENTS: u64 = 1 << 18;

impl Relation for Tensors {
    fn name(&self) -> &'static str {
        "tensors"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn participant(&self) -> Participant {
        Participant::Tensors
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 10.0,
            cost: 100.0,
        }
    }

    fn buffered_rows(&self) -> usize {
        // A row holds a chunk of 1 MB.
        4
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let client = call.client.clone();
            client.in_tensor_session(select(call, rows).await).await
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
        &["name", "chunk"]
    }

    fn insert(&self, writer: Writer, inputs: Vec<Inputs>) -> Work<Vec<Row>> {
        Box::pin(async move {
            let session_id = writer.client.tensor_session().await?;
            let messages = inputs.iter().map(|row| put(&session_id, &writer, row));
            let messages = messages.collect::<Result<Vec<PutTensorsRequest>>>()?;
            let numbers: Vec<u32> = messages.iter().map(number).collect();
            let sent = write!(writer.client, tensors.put_tensors(tokio_stream::iter(messages))).await;
            let made = writer.client.in_tensor_session(sent).await?.tensors;
            if made.len() != numbers.len() {
                return Err(Error::protocol("tensor for every chunk"));
            }
            let inserted = made.iter().zip(numbers).map(|(tensor, chunk)| {
                let before = u64::from(chunk) * CHUNK_ELEMENTS;
                let chunk = TensorChunk {
                    name: tensor.name.clone(),
                    chunk,
                    elements: tensor.elements.saturating_sub(before).min(CHUNK_ELEMENTS),
                    ..TensorChunk::default()
                };
                let mut row = row(tensor, chunk, true);
                row[DATA] = Value::Echo;
                row
            });
            Ok(inserted.collect())
        })
    }

    fn delete_together(&self, writer: Writer, rows: Vec<Inputs>) -> Work<()> {
        Box::pin(async move {
            let mut found: BTreeMap<String, BTreeSet<i64>> = BTreeMap::new();
            for row in &rows {
                let chunks = found.entry(row.required("name")?).or_default();
                chunks.insert(row.integer("chunk").unwrap_or_default());
            }
            let session_id = writer.client.tensor_session().await?;
            let names: Vec<String> = found.keys().cloned().collect();
            let request = ListTensorsRequest {
                session_id: session_id.clone(),
                transaction: writer.transaction.clone(),
                names: names.clone(),
            };
            let listed = read!(writer.client, tensors.list_tensors(request)).await;
            for tensor in writer.client.in_tensor_session(listed).await?.tensors {
                let present = match tensor.status() {
                    TensorStatus::Incomplete => tensor.received.len(),
                    _ => tensor.chunks as usize,
                };
                let chunks = found.get(&tensor.name).map_or(0, BTreeSet::len);
                if chunks < present {
                    let code = PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED;
                    let message = format!("only a part of tensor \"{}\" would be deleted", tensor.name);
                    return Err(Error::new(code, message)
                        .detail(format!("The statement found {chunks} of its {present} chunks."))
                        .hint("A tensor is deleted as a whole: DELETE FROM tensors WHERE name = '…'."));
                }
            }
            let request = DeleteTensorsRequest {
                session_id,
                transaction: writer.transaction,
                names,
            };
            let deleted = write!(writer.client, tensors.delete_tensors(request)).await;
            writer.client.in_tensor_session(deleted).await?;
            Ok(())
        })
    }
}

async fn select(call: Call, rows: Rows) -> Result<()> {
    let chunk = call.inputs.integer("chunk");
    let selection = TensorSelection {
        names: call.inputs.wanted("name"),
        // No chunk has a number out of this range, and so the recheck leaves no row.
        chunks: chunk
            .map(|chunk| u32::try_from(chunk).unwrap_or(u32::MAX))
            .into_iter()
            .collect(),
        without_data: !call.needs("data"),
    };
    let without_data = selection.without_data;
    let request = ReadTensorsRequest {
        session_id: call.client.tensor_session().await?,
        transaction: call.transaction.clone(),
        selection: Some(selection),
    };
    let mut stream = read!(call.client, tensors.read_tensors(request)).await?;
    let mut tensor = Tensor::default();
    while let Some(message) = call.client.next(&mut stream).await? {
        if let Some(next) = message.tensor {
            tensor = next;
        }
        let chunk = message.chunk.ok_or_else(|| Error::protocol("chunk"))?;
        if !rows.row(row(&tensor, chunk, without_data)).await {
            break;
        }
    }
    Ok(())
}

/// A row of INSERT as a message.
fn put(session_id: &str, writer: &Writer, row: &Inputs) -> Result<PutTensorsRequest> {
    let shape = row.integers("shape");
    let has_shape = shape.is_some();
    let shape = shape.unwrap_or_default().into_iter().map(|size| {
        u64::try_from(size).map_err(|_| Error::bad_value(format!("shape must not have {size}, which is negative")))
    });
    let chunk = row.integer("chunk").unwrap_or_default();
    let elements = row.integer("elements").unwrap_or_default();
    let dtype = row
        .text("dtype")
        .map(|name| chunks::data_type(&name, true))
        .transpose()?;
    Ok(PutTensorsRequest {
        session_id: session_id.to_string(),
        transaction: writer.transaction.clone(),
        chunk: Some(TensorChunk {
            name: row.required("name")?,
            dtype: dtype.unwrap_or_default().into(),
            shape: shape.collect::<Result<_>>()?,
            chunk: u32::try_from(chunk).map_err(|_| Error::bad_value(format!("chunk must not be {chunk}")))?,
            elements: u64::try_from(elements)
                .map_err(|_| Error::bad_value(format!("elements must not be {elements}, which is negative")))?,
            data: row.bytes("data").ok_or_else(|| missing("data"))?,
            ..TensorChunk::default()
        }),
        has_shape,
        device: row.text("device").unwrap_or_default(),
        persistent: row.boolean("persistent"),
    })
}

fn number(message: &PutTensorsRequest) -> u32 {
    message.chunk.as_ref().map_or(0, |chunk| chunk.chunk)
}

fn row(tensor: &Tensor, chunk: TensorChunk, without_data: bool) -> Row {
    let status = match tensor.status() {
        TensorStatus::Unspecified => Value::Null,
        TensorStatus::Incomplete => "incomplete".into(),
        TensorStatus::Pending => "pending".into(),
        TensorStatus::Ready => "ready".into(),
        TensorStatus::Failed => "failed".into(),
    };
    vec![
        chunk.name.into(),
        tensor.device.clone().into(),
        chunks::dtype(tensor.dtype()),
        chunks::shape(&tensor.shape),
        chunk.chunk.into(),
        match without_data {
            true => Value::Null,
            false => Value::Bytes(chunk.data),
        },
        tensor.persistent.into(),
        Value::count(chunk.elements),
        tensor.chunks.into(),
        status,
        Value::text_or_null(tensor.error.clone()),
        match tensor.operation_id {
            0 => Value::Null,
            id => Value::count(id),
        },
        Value::time(tensor.created_at),
    ]
}
