//! A dataset from texts.

use pgrx::prelude::*;
use pgrx::{PgSqlErrorCode, pg_sys};

use super::ROWS_PER_BATCH;
use super::conversion::{Conversion, Counts, Row};
use crate::error::{Error, Result};
use crate::functions::default_client;
use crate::procedure::{Cursor, Procedure, run};
use crate::training::{self, Progress, Tokenizing};
use crate::values::element_type;

/// The query's texts with their ids.
struct Texts {
    /// Expression and type of the ids; None where rows are counted.
    id: Option<String>,
    text: String,
    /// What FROM names.
    source: String,
}

/// Tokenizes the texts of `query` into the dataset `name` for `model`, going on where an earlier call stopped.
///
/// # Errors
/// 22004 for NULL among texts or ids, 22023 for a query without texts, 42704 for an unknown model, 42710 for a name that is
/// taken.
pub(crate) fn tokenize(procedure: &Procedure, name: &str, model: &str, query: &str) -> Result<()> {
    let (client, _) = default_client()?;
    let texts = Texts::of(query)?;
    let progress = Progress::begin(&client, "tokenize", model, 0, 0)?;
    let tokenizing = Tokenizing {
        client: &client,
        model,
        progress: &progress,
    };
    // An unknown model is an error before anything is stored.
    training::tokenize(tokenizing, vec![String::new()], false)?;
    let total = texts.check()?;
    let mut conversion = Conversion::open(name, model, query)?;
    if conversion.rows > 0 {
        notice!("going on after {} of {total} texts", conversion.rows);
    }
    let mut cursor = Cursor::open(procedure, &texts.rest(&conversion))?;
    if texts.id.is_none() {
        cursor.skip(conversion.rows);
    }
    let mut batch = || -> Result<bool> {
        let rows = cursor.fetch(ROWS_PER_BATCH, |row| {
            Ok((row.get::<i64>(1), row.get::<String>(2).unwrap_or_default()))
        })?;
        if rows.is_empty() {
            return Ok(false);
        }
        let before = conversion.rows;
        let (ids, bodies): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        let documents = training::tokenize(tokenizing, bodies, true)?;
        let mut counts = Counts::default();
        let rows = ids
            .into_iter()
            .zip(documents)
            .enumerate()
            .map(|(index, (id, document))| {
                counts.tokens_after += document.token_ids.len() as i64;
                counts.inexact += i64::from(!document.exact);
                Row {
                    id: id.unwrap_or(before + index as i64 + 1),
                    tokens: document.token_ids.into_iter().map(|token| token as i32).collect(),
                    mask: None,
                }
            });
        let rows = rows.collect();
        conversion.store(rows, counts)?;
        procedure.commit();
        progress.tell("running", conversion.rows as u64);
        tell(before, conversion.rows, total);
        Ok(true)
    };
    while procedure.round(&mut batch)? {}
    conversion.finish()?;
    notice!(
        "dataset \"{name}\" for model \"{model}\": {} rows, {} tokens; {} texts that their tokens do not give back exactly",
        conversion.rows,
        conversion.counts.tokens_after,
        conversion.counts.inexact
    );
    Ok(())
}

/// Tells every tenth part that is done.
pub(super) fn tell(before: i64, after: i64, total: i64) {
    let part = |rows: i64| rows * 10 / total.max(1);
    if part(after) > part(before) && after < total {
        notice!("{after} of {total} rows");
    }
}

impl Texts {
    /// Looks at a query's columns: `id` and `text` by name; else an integer first column is the id, and the next the text.
    fn of(query: &str) -> Result<Self> {
        let columns = training::columns(query)?;
        let integer = |oid| [pg_sys::INT2OID, pg_sys::INT4OID, pg_sys::INT8OID].contains(&oid);
        let id = columns.iter().position(|column| column.name == "id").or({
            let first = columns
                .first()
                .filter(|column| columns.len() > 1 && integer(column.oid));
            first.map(|_| 0)
        });
        let text = columns
            .iter()
            .position(|column| column.name == "text")
            .or((0..columns.len()).find(|index| Some(*index) != id));
        let Some(text) = text else {
            return Err(Error::bad_value("the query gives no column of texts")
                .hint("Give SELECT text FROM …, or SELECT id, text FROM …."));
        };
        if let Some(id) = id.filter(|id| !integer(columns[*id].oid)) {
            return Err(Error::bad_value(format!(
                "column \"{}\" of the query must be an integer",
                columns[id].name
            )));
        }
        if element_type(columns[text].oid) != pg_sys::Oid::INVALID {
            return Err(Error::bad_value(format!(
                "column \"{}\" of the query must be text",
                columns[text].name
            )));
        }
        let name = |index: usize| format!("c{}", index + 1);
        Ok(Self {
            id: id.map(name),
            text: name(text),
            source: training::from(query, &columns),
        })
    }

    /// Refuses NULLs; the number of rows.
    fn check(&self) -> Result<i64> {
        let id = self.id.as_deref().unwrap_or("0");
        let statement = format!(
            "SELECT count(*), count(*) FILTER (WHERE {} IS NULL), count(*) FILTER (WHERE {id} IS NULL) FROM {}",
            self.text, self.source
        );
        let (rows, texts, ids) = run(&statement, &[], |rows| rows.first().get_three::<i64, i64, i64>())?;
        for (what, count) in [("texts", texts), ("ids", ids)] {
            if let Some(count) = count.filter(|count| *count > 0) {
                let code = PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED;
                return Err(Error::new(code, format!("{count} {what} of the query are NULL"))
                    .hint("Leave them out: … WHERE … IS NOT NULL."));
            }
        }
        Ok(rows.unwrap_or_default())
    }

    /// The query for what a conversion has not stored; without ids all, in the query's order.
    fn rest(&self, conversion: &Conversion) -> String {
        let (text, source) = (&self.text, &self.source);
        match (&self.id, conversion.last_id) {
            (None, _) => format!("SELECT NULL::bigint, {text}::text FROM {source}"),
            (Some(id), None) => format!("SELECT {id}::bigint, {text}::text FROM {source} ORDER BY 1"),
            (Some(id), Some(last)) => {
                format!("SELECT {id}::bigint, {text}::text FROM {source} WHERE {id} > {last} ORDER BY 1")
            }
        }
    }
}
