//! `candle.tokenize` and `candle.detokenize`.
#![allow(unsafe_code)]

use candle_compute_proto::v1::{DetokenizeRequest, TokenizeRequest};
use pgrx::prelude::*;

use super::server::client;
use crate::client::{read, wait};
use crate::error::{Error, OrReport, Result};
use crate::transaction;

/// Text to token ids.
#[pg_extern(volatile, parallel_unsafe)]
fn tokenize(model: &str, input: &str) -> Vec<i32> {
    let tokenize = || -> Result<Vec<i32>> {
        let client = client()?;
        let request = TokenizeRequest {
            transaction: transaction::reading(client.session)?,
            model: model.to_string(),
            input: input.to_string(),
        };
        let tokens = wait(read!(client, inference.tokenize(request)))?.tokens;
        Ok(tokens.into_iter().map(|token| token.token_id as i32).collect())
    };
    tokenize().or_report()
}

/// Token ids to text; bytes that are not UTF-8 become U+FFFD.
#[pg_extern(volatile, parallel_unsafe)]
fn detokenize(model: &str, tokens: Vec<Option<i32>>) -> String {
    let detokenize = || -> Result<String> {
        let client = client()?;
        let token_ids: Option<Vec<i64>> = tokens.iter().map(|token| token.map(i64::from)).collect();
        let token_ids = token_ids.ok_or_else(|| Error::bad_value("tokens must not contain NULL"))?;
        let request = DetokenizeRequest {
            transaction: transaction::reading(client.session)?,
            model: model.to_string(),
            token_ids,
        };
        Ok(wait(read!(client, inference.detokenize(request)))?.text)
    };
    detokenize().or_report().replace('\0', "\u{FFFD}")
}
