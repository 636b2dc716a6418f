//! The query of an evaluation: what its columns hold, and its rows as messages.

use std::cell::Cell;

use candle_compute_proto::v1::evaluation_row::Row;
use candle_compute_proto::v1::{EvaluationQuestion, EvaluationRow, EvaluationTokens};
use pgrx::PgSqlErrorCode;
use pgrx::pg_sys;

use crate::error::{Error, Result};
use crate::procedure::{Cursor, CursorRow, Procedure};
use crate::training::{QueryColumn, columns, from};
use crate::values::{element_type, is_text, type_name};

/// Rows fetched at a time.
const ROWS_PER_FETCH: i64 = 64;

/// Bytes of one message, unless a single row has more.
const BYTES_PER_MESSAGE: usize = 1 << 20;

/// What a row of the query is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// A text: the first column.
    Text,
    /// A text as tokens: the column `tokens`, as in candle.dataset, or the first column.
    Tokens,
    /// A question: the columns `context`, `choices` and `answer`.
    Question,
}

/// An open query.
pub(super) struct Rows {
    pub(super) shape: Shape,
    cursor: Cursor,
    /// Rows read.
    read: Cell<i64>,
}

impl Rows {
    /// Looks at the columns of the query and opens it.
    ///
    /// # Errors
    /// 22023 for columns that hold neither texts nor questions.
    pub(super) fn open(procedure: &Procedure, query: &str) -> Result<Self> {
        let columns = columns(query)?;
        let (shape, selected) = select(&columns)?;
        let statement = format!("SELECT {selected} FROM {}", from(query, &columns));
        Ok(Self {
            shape,
            cursor: Cursor::open(procedure, &statement)?,
            read: Cell::new(0),
        })
    }

    /// The next rows as messages of about one size; none at the end.
    ///
    /// # Errors
    /// 22004 for a NULL, naming the row.
    pub(super) fn next(&mut self) -> Result<Vec<Vec<EvaluationRow>>> {
        let (shape, read) = (self.shape, &self.read);
        let rows = self.cursor.fetch(ROWS_PER_FETCH, |row| {
            read.set(read.get() + 1);
            let row = message(shape, row).map_err(|what| null(read.get(), what))?;
            Ok(EvaluationRow { row: Some(row) })
        })?;
        let mut messages: Vec<Vec<EvaluationRow>> = Vec::new();
        let mut bytes = BYTES_PER_MESSAGE;
        for row in rows {
            let size = size(&row);
            match messages.last_mut() {
                Some(last) if bytes + size <= BYTES_PER_MESSAGE => last.push(row),
                _ => {
                    messages.push(vec![row]);
                    bytes = 0;
                }
            }
            bytes += size;
        }
        Ok(messages)
    }
}

fn null(row: i64, what: &str) -> Error {
    let code = PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED;
    Error::new(code, format!("row {row} of the query: {what} must not be NULL"))
        .hint("Leave such rows out: WHERE … IS NOT NULL.")
}

/// What the rows are, and the select list that gives them.
fn select(columns: &[QueryColumn]) -> Result<(Shape, String)> {
    let named = |name: &str| columns.iter().position(|column| column.name == name);
    if let Some(choices) = named("choices") {
        let missing = |name: &str| {
            Error::bad_value(format!("the query has a column \"choices\", but none named \"{name}\""))
                .hint("Questions are the columns context (text), choices (text[]) and answer (integer, from 0).")
        };
        let context = named("context").ok_or_else(|| missing("context"))?;
        let answer = named("answer").ok_or_else(|| missing("answer"))?;
        check(&columns[context], is_text(columns[context].oid), "text")?;
        check(&columns[choices], is_text(element_type(columns[choices].oid)), "text[]")?;
        check(&columns[answer], is_integer(columns[answer].oid), "integer")?;
        let selected = format!(
            "c{}::text, c{}::text[], c{}::bigint",
            context + 1,
            choices + 1,
            answer + 1
        );
        return Ok((Shape::Question, selected));
    }
    let tokens = columns
        .iter()
        .position(|column| column.name == "tokens" && is_integer(element_type(column.oid)));
    let index = tokens.unwrap_or(0);
    let column = columns
        .get(index)
        .ok_or_else(|| Error::bad_value("the query has no columns"))?;
    if is_integer(element_type(column.oid)) {
        return Ok((Shape::Tokens, format!("c{}::integer[]", index + 1)));
    }
    check(column, is_text(column.oid), "text, or integer[] for tokens")?;
    Ok((Shape::Text, format!("c{}::text", index + 1)))
}

fn check(column: &QueryColumn, fits: bool, wanted: &str) -> Result<()> {
    if fits {
        return Ok(());
    }
    let found = type_name(column.oid);
    Err(Error::bad_value(format!(
        "column \"{}\" of the query is {found}, but must be {wanted}",
        column.name
    )))
}

fn is_integer(oid: pg_sys::Oid) -> bool {
    [pg_sys::INT2OID, pg_sys::INT4OID, pg_sys::INT8OID].contains(&oid)
}

/// A row of the select list; what of it is NULL where something is.
fn message(shape: Shape, row: &CursorRow) -> std::result::Result<Row, &'static str> {
    Ok(match shape {
        Shape::Text => Row::Text(row.get::<String>(1).ok_or("the text")?),
        Shape::Tokens => {
            let tokens = row.get::<Vec<Option<i32>>>(1).ok_or("the array of tokens")?;
            let ids: Option<Vec<i64>> = tokens.into_iter().map(|token| token.map(i64::from)).collect();
            let ids = ids.ok_or("a token")?;
            Row::Tokens(EvaluationTokens { ids })
        }
        Shape::Question => {
            let choices = row.get::<Vec<Option<String>>>(2).ok_or("the array of choices")?;
            let choices: Option<Vec<String>> = choices.into_iter().collect();
            Row::Question(EvaluationQuestion {
                context: row.get::<String>(1).ok_or("the context")?,
                choices: choices.ok_or("a choice")?,
                answer: row.get::<i64>(3).ok_or("the answer")?,
            })
        }
    })
}

fn size(row: &EvaluationRow) -> usize {
    match &row.row {
        Some(Row::Text(text)) => text.len(),
        Some(Row::Tokens(tokens)) => 8 * tokens.ids.len(),
        Some(Row::Question(question)) => {
            question.context.len() + question.choices.iter().map(String::len).sum::<usize>()
        }
        None => 0,
    }
}
