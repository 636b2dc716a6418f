//! A dataset for another model's vocabulary.

use candle_compute_proto::v1::{DetokenizeTextsRequest, DetokenizedText, TokenIds};
use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;
use pgrx::spi::quote_literal;

use super::conversion::{Conversion, Counts, Row};
use super::tokenize::tell;
use super::{ROWS_PER_BATCH, mask};
use crate::client::read;
use crate::error::{Error, Result};
use crate::functions::default_client;
use crate::procedure::{Cursor, CursorRow, Procedure, run};
use crate::training::{self, Progress, Tokenizing};
use crate::transaction;

/// A document as it is stored.
struct Stored {
    id: i64,
    tokens: Vec<i64>,
    mask: Option<Vec<bool>>,
}

/// Tokenizes the rows of the dataset `name` for model `from` for model `to`, going on where an earlier call stopped.
///
/// # Errors
/// 42704 for an unknown dataset or model, 42710 where the dataset exists for `to`, 22023 for tokens that `from` does not
/// have.
pub(crate) fn retokenize(procedure: &Procedure, name: &str, from: &str, to: &str) -> Result<()> {
    if from == to {
        return Err(Error::bad_value(format!("from_model and to_model are both \"{from}\"")));
    }
    let (client, _) = default_client()?;
    let total = count(name, from)?;
    let progress = Progress::begin(&client, "tokenize", to, 0, total as u64)?;
    let tokenizing = Tokenizing {
        client: &client,
        model: to,
        progress: &progress,
    };
    // Unknown models are errors before anything is stored.
    training::tokenize(tokenizing, vec![String::new()], false)?;
    detokenize(tokenizing, from, &[])?;
    let mut conversion = Conversion::open(name, to, &format!("model {from}"))?;
    if conversion.rows > 0 {
        notice!("going on after {} of {total} rows", conversion.rows);
    }
    let rest = conversion
        .last_id
        .map_or_else(String::new, |last| format!("AND id > {last}"));
    let query = format!(
        "SELECT id, tokens, loss_mask FROM candle.dataset WHERE name = {} AND model = {} {rest} ORDER BY id",
        quote_literal(name),
        quote_literal(from)
    );
    let mut cursor = Cursor::open(procedure, &query)?;
    let mut batch = || -> Result<bool> {
        let stored = cursor.fetch(ROWS_PER_BATCH, stored)?;
        if stored.is_empty() {
            return Ok(false);
        }
        let before = conversion.rows;
        let (rows, counts) = convert(tokenizing, from, stored)?;
        conversion.store(rows, counts)?;
        procedure.commit();
        progress.tell("running", conversion.rows as u64);
        tell(before, conversion.rows, total);
        Ok(true)
    };
    while procedure.round(&mut batch)? {}
    conversion.finish()?;
    let counts = conversion.counts;
    notice!(
        "dataset \"{name}\" for model \"{to}\": {} rows, {} tokens from {} of model \"{from}\"; {} texts not given back \
         exactly, {} masks widened",
        conversion.rows,
        counts.tokens_after,
        counts.tokens_before.unwrap_or_default(),
        counts.inexact,
        counts.masks_widened
    );
    Ok(())
}

fn count(name: &str, model: &str) -> Result<i64> {
    let statement = "SELECT count(*) FROM candle.dataset WHERE name = $1 AND model = $2";
    let rows = run(statement, &[name.into(), model.into()], |rows| {
        rows.first().get_one::<i64>()
    })?;
    rows.filter(|rows| *rows > 0).ok_or_else(|| {
        let code = PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT;
        Error::new(code, format!("there is no dataset \"{name}\" for model \"{model}\""))
            .hint("SELECT DISTINCT name, model FROM candle.dataset shows those that there are.")
    })
}

fn stored(row: &CursorRow) -> Result<Stored> {
    // The table's checks leave no NULLs.
    let tokens = row.get::<Vec<Option<i32>>>(2).unwrap_or_default();
    let mask = row.get::<Vec<Option<bool>>>(3);
    Ok(Stored {
        id: row.get::<i64>(1).unwrap_or_default(),
        tokens: tokens.into_iter().flatten().map(i64::from).collect(),
        mask: mask.map(|mask| mask.into_iter().flatten().collect()),
    })
}

fn convert(tokenizing: Tokenizing<'_>, from: &str, stored: Vec<Stored>) -> Result<(Vec<Row>, Counts)> {
    let texts = detokenize(tokenizing, from, &stored)?;
    let bodies = texts.iter().map(|text| text.text.clone()).collect();
    let documents = training::tokenize(tokenizing, bodies, true)?;
    let mut counts = Counts {
        tokens_before: Some(0),
        ..Counts::default()
    };
    let mut rows = Vec::with_capacity(stored.len());
    for ((stored, text), document) in stored.into_iter().zip(texts).zip(documents) {
        let mapped = stored
            .mask
            .map(|mask| mask::map(&mask, &text.ends, &document.ends, text.text.len() as u32));
        counts.add(Counts {
            tokens_before: Some(stored.tokens.len() as i64),
            tokens_after: document.token_ids.len() as i64,
            inexact: i64::from(!(text.exact && document.exact)),
            masks_widened: i64::from(mapped.as_ref().is_some_and(|mapped| mapped.widened)),
        });
        rows.push(Row {
            id: stored.id,
            tokens: document.token_ids.into_iter().map(|token| token as i32).collect(),
            mask: mapped.map(|mapped| mapped.mask),
        });
    }
    Ok((rows, counts))
}

fn detokenize(tokenizing: Tokenizing<'_>, model: &str, stored: &[Stored]) -> Result<Vec<DetokenizedText>> {
    let client = tokenizing.client;
    let ids = |stored: &Stored| TokenIds {
        ids: stored.tokens.clone(),
    };
    let request = DetokenizeTextsRequest {
        transaction: transaction::reading(client.session)?,
        model: model.to_string(),
        documents: stored.iter().map(ids).collect(),
    };
    let answer = tokenizing
        .progress
        .wait(read!(client, inference.detokenize_texts(request)));
    let texts = answer
        .map_err(|error| match stored.first() {
            Some(first) => error.context(&format!("rows from id {} on", first.id)),
            None => error,
        })?
        .texts;
    if texts.len() != stored.len() {
        return Err(Error::protocol("text for every document"));
    }
    Ok(texts)
}
