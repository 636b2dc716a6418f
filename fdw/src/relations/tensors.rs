//! What `parameters` and `gradients` share: the selection of chunks and the columns of a chunk.

use candle_compute_proto::v1::{DataType, ListModelsRequest, TensorChunk, TensorSelection};

use crate::client::read;
use crate::error::Result;
use crate::relation::{Call, Column, key, output};
use crate::values::{Kind, Value};

/// Number of columns of a chunk.
pub(super) const COLUMN_COUNT: usize = 8;

/// The columns of a chunk, the first columns of both tables.
pub(super) const COLUMNS: [Column; COLUMN_COUNT] = [
    key("model", Kind::Text),
    key("parameter", Kind::Text),
    key("chunk", Kind::Int),
    output("shape", Kind::IntArray),
    output("dtype", Kind::Text),
    output("elements", Kind::BigInt),
    output("data", Kind::Bytea),
    output("norm", Kind::Double),
];

/// The model asked for, else all of them.
pub(super) async fn models(call: &Call) -> Result<Vec<String>> {
    if let Some(model) = call.inputs.text("model") {
        return Ok(vec![model]);
    }
    let request = ListModelsRequest {
        transaction: call.transaction.clone(),
        names: Vec::new(),
    };
    let models = read!(call.client, models.list_models(request)).await?.models;
    Ok(models.into_iter().map(|model| model.name).collect())
}

/// The chunks that the query asks for, with data only when it reads `data` or `norm`.
pub(super) fn selection(call: &Call) -> TensorSelection {
    let chunk = call.inputs.integer("chunk");
    TensorSelection {
        names: call.inputs.wanted("parameter"),
        // No chunk has a number out of this range, and so the recheck leaves no row.
        chunks: chunk
            .map(|chunk| u32::try_from(chunk).unwrap_or(u32::MAX))
            .into_iter()
            .collect(),
        without_data: !call.needs("data") && !call.needs("norm"),
    }
}

/// The columns of a chunk; what was not sent is NULL.
pub(super) fn row(model: &str, chunk: TensorChunk, without_data: bool) -> Vec<Value> {
    let dtype = match chunk.dtype() {
        DataType::Unspecified => Value::Null,
        DataType::F32 => "f32".into(),
        DataType::F16 => "f16".into(),
        DataType::Bf16 => "bf16".into(),
        DataType::I32 => "i32".into(),
    };
    vec![
        model.into(),
        chunk.name.into(),
        chunk.chunk.into(),
        Value::Ints(
            chunk
                .shape
                .iter()
                .map(|size| i64::try_from(*size).unwrap_or(i64::MAX))
                .collect(),
        ),
        dtype,
        Value::count(chunk.elements),
        if without_data {
            Value::Null
        } else {
            Value::Bytes(chunk.data)
        },
        if without_data { Value::Null } else { chunk.norm.into() },
    ]
}
