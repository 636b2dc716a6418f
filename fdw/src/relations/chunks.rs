//! What `parameters`, `gradients` and `tensors` share: the selection of chunks and the columns of a chunk.

use candle_compute_proto::v1::{DataType, ListAdaptersRequest, ListModelsRequest, TensorChunk, TensorSelection};

use crate::client::read;
use crate::error::{Error, Result};
use crate::relation::{Call, Column, Inputs, Row, key, missing, stored};
use crate::values::{Kind, Value};

/// Number of columns of a chunk.
pub(super) const COLUMN_COUNT: usize = 8;

/// The columns of a chunk, the first columns of both tables. `norm` may be inserted so that whole rows can be copied; it is
/// not read.
pub(super) const COLUMNS: [Column; COLUMN_COUNT] = [
    key("model", Kind::Text),
    key("parameter", Kind::Text),
    key("chunk", Kind::Int),
    stored("shape", Kind::IntArray),
    stored("dtype", Kind::Text),
    stored("elements", Kind::BigInt),
    stored("data", Kind::Bytea),
    stored("norm", Kind::Double),
];

/// Columns that name a chunk.
pub(super) const IDENTITY: &[&str] = &["model", "parameter", "chunk", "adapter"];

/// The model asked for, else all of them; or all that have the adapter asked for.
pub(super) async fn models(call: &Call) -> Result<Vec<String>> {
    if let Some(model) = call.inputs.text("model") {
        return Ok(vec![model]);
    }
    if call.inputs.get("adapter").is_some() {
        let request = ListAdaptersRequest {
            transaction: call.transaction.clone(),
            models: Vec::new(),
            names: call.inputs.wanted("adapter"),
        };
        let adapters = read!(call.client, adapters.list_adapters(request)).await?.adapters;
        return Ok(adapters.into_iter().map(|adapter| adapter.model).collect());
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

/// The parameter and the number of a chunk, without data.
pub(super) fn named_chunk(row: &Inputs) -> Result<TensorChunk> {
    let chunk = row.integer("chunk").ok_or_else(|| missing("chunk"))?;
    Ok(TensorChunk {
        name: row.required("parameter")?,
        chunk: u32::try_from(chunk).map_err(|_| Error::bad_value(format!("chunk must not be {chunk}")))?,
        ..TensorChunk::default()
    })
}

/// The chunk that a row gives, with its data.
pub(super) fn chunk(row: &Inputs) -> Result<TensorChunk> {
    let shape = row.integers("shape");
    if shape.as_ref().is_some_and(|shape| shape.is_empty()) {
        return Err(Error::bad_value(
            "shape must not be empty; NULL leaves it out".to_owned(),
        ));
    }
    let shape = shape.unwrap_or_default().into_iter();
    let shape =
        shape.map(|size| u64::try_from(size).map_err(|_| Error::bad_value(format!("shape must not have {size}"))));
    let elements = row.integer("elements").map(|elements| {
        let count = u64::try_from(elements).ok().filter(|count| *count > 0);
        count.ok_or_else(|| Error::bad_value(format!("elements must be at least 1, not {elements}")))
    });
    let dtype = row.text("dtype").map(|name| data_type(&name, false)).transpose()?;
    Ok(TensorChunk {
        dtype: dtype.unwrap_or_default().into(),
        shape: shape.collect::<Result<_>>()?,
        elements: elements.transpose()?.unwrap_or_default(),
        data: row.bytes("data").ok_or_else(|| missing("data"))?,
        ..named_chunk(row)?
    })
}

/// The element type of that name; `integers` are possible in some places only.
pub(super) fn data_type(name: &str, integers: bool) -> Result<DataType> {
    match name {
        "f32" => Ok(DataType::F32),
        "f16" => Ok(DataType::F16),
        "bf16" => Ok(DataType::Bf16),
        "i32" if integers => Ok(DataType::I32),
        other => {
            let known = if integers {
                "f32, f16, bf16 or i32"
            } else {
                "f32, f16 or bf16"
            };
            let other: String = other.chars().take(40).collect();
            Err(Error::bad_value(format!("dtype must be {known}, not {other}")))
        }
    }
}

/// The row of `inputs` as it was given.
pub(super) fn echo(columns: &[Column]) -> Row {
    vec![Value::Echo; columns.len()]
}

/// A shape as an array.
pub(super) fn shape(sizes: &[u64]) -> Value {
    let size = |size: &u64| i64::try_from(*size).unwrap_or(i64::MAX);
    Value::Ints(sizes.iter().map(size).collect())
}

/// The name of an element type.
pub(super) fn dtype(dtype: DataType) -> Value {
    match dtype {
        DataType::Unspecified => Value::Null,
        DataType::F32 => "f32".into(),
        DataType::F16 => "f16".into(),
        DataType::Bf16 => "bf16".into(),
        DataType::I32 => "i32".into(),
        DataType::Q8 => "q8".into(),
    }
}

/// The columns of a chunk; what was not sent is NULL.
pub(super) fn row(model: &str, chunk: TensorChunk, without_data: bool) -> Vec<Value> {
    let dtype = dtype(chunk.dtype());
    vec![
        model.into(),
        chunk.name.into(),
        chunk.chunk.into(),
        shape(&chunk.shape),
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
