//! `candle.embed`.
#![allow(unsafe_code)]

use candle_compute_proto::v1::EmbedRequest;
use pgrx::prelude::*;

use super::server::client;
use crate::client::wait;
use crate::error::{OrReport, Result};
use crate::relations::{adapters, embeddings};
use crate::transaction;

/// The vector of a text. NULL for an option means its default; NULL for the model or the text gives NULL.
#[pg_extern(volatile, parallel_unsafe)]
fn embed(
    model: Option<&str>,
    input: Option<&str>,
    pooling: default!(Option<&str>, "NULL"),
    normalize: default!(Option<bool>, "NULL"),
    adapter: default!(Option<&str>, "NULL"),
) -> Option<Vec<f32>> {
    let (model, input) = (model?, input?);
    let embed = || -> Result<Vec<f32>> {
        let client = client()?;
        let request = EmbedRequest {
            transaction: transaction::reading(client.session)?,
            model: model.to_string(),
            inputs: vec![embeddings::text(input.to_string())],
            pooling: pooling.unwrap_or_default().to_string(),
            normalize,
            adapter: adapters::checked(adapter)?,
        };
        let values = wait(embeddings::vector(&client, request))?;
        let (values, _) = values.as_chunks::<4>();
        Ok(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    };
    Some(embed().or_report())
}
