//! `embeddings`: one vector per input.

use candle_compute_proto::v1::embed_input::Input;
use candle_compute_proto::v1::{EmbedInput, EmbedRequest};

use crate::client::{Client, read};
use crate::error::{Error, Result};
use crate::relation::{Call, Column, Estimate, Relation, Rows, Work, input, output};
use crate::relations::adapters;
use crate::values::{Kind, Value};

/// One row per set of inputs; the server puts those that come together into one batch.
pub(crate) struct Embeddings;

const COLUMNS: &[Column] = &[
    input("model", Kind::Text),
    input("input", Kind::Text),
    input("pooling", Kind::Text),
    input("normalize", Kind::Boolean),
    output("embedding", Kind::RealArray),
    input("adapter", Kind::Text),
];

impl Relation for Embeddings {
    fn name(&self) -> &'static str {
        "embeddings"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn required(&self) -> &'static [&'static [&'static str]] {
        &[&["model"], &["input"]]
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 1.0,
            cost: 1000.0,
        }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let inputs = &call.inputs;
            let request = EmbedRequest {
                transaction: call.transaction.clone(),
                model: inputs.required("model")?,
                inputs: vec![text(inputs.required("input")?)],
                pooling: inputs.text("pooling").unwrap_or_default(),
                normalize: inputs.boolean("normalize"),
                adapter: adapters::named(inputs)?,
            };
            let mut row = vec![Value::Echo; COLUMNS.len()];
            row[4] = Value::Reals(vector(&call.client, request).await?);
            rows.row(row).await;
            Ok(())
        })
    }
}

/// An input of a request.
pub(crate) fn text(input: String) -> EmbedInput {
    EmbedInput {
        input: Some(Input::Text(input)),
    }
}

/// The vector of a request's only input, as little-endian f32.
pub(crate) async fn vector(client: &Client, request: EmbedRequest) -> Result<tonic::codegen::Bytes> {
    let mut stream = read!(client, inference.embed(request)).await?;
    let mut vector = None;
    while let Some(message) = client.next(&mut stream).await? {
        vector = message.embeddings.into_iter().next().map(|one| one.values).or(vector);
    }
    vector.ok_or_else(|| Error::protocol("vector"))
}
