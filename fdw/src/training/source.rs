//! The query that gives documents: which of its columns are read, and in which order its rows.

use pgrx::{PgOid, pg_sys};

use crate::error::{Error, Result};
use crate::procedure::{Cursor, Procedure, run, subquery};
use crate::values::element_type;

/// A query of documents: texts, or arrays of token ids, with or without a loss mask.
pub(super) struct Source {
    /// `SELECT body, mask FROM …`.
    rows: String,
    pub(super) body: Body,
}

/// What a document comes as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    Text,
    Tokens,
}

/// A column of a query.
pub(crate) struct QueryColumn {
    pub(crate) name: String,
    pub(crate) oid: pg_sys::Oid,
}

/// A query in FROM, its columns named `c1`, `c2`, …: names of its own need not be unique.
pub(crate) fn from(query: &str, columns: &[QueryColumn]) -> String {
    let names: Vec<String> = (1..=columns.len()).map(|number| format!("c{number}")).collect();
    format!("{} AS source ({})", subquery(query), names.join(", "))
}

/// The columns of a query, which is planned and not run.
pub(crate) fn columns(query: &str) -> Result<Vec<QueryColumn>> {
    let statement = format!("SELECT * FROM {} AS source LIMIT 0", subquery(query));
    run(&statement, &[], |rows| {
        let column = |index| -> std::result::Result<QueryColumn, pgrx::spi::Error> {
            let oid = match rows.column_type_oid(index)? {
                PgOid::BuiltIn(oid) => oid.value(),
                PgOid::Custom(oid) => oid,
                PgOid::Invalid => pg_sys::Oid::INVALID,
            };
            Ok(QueryColumn {
                name: rows.column_name(index)?,
                oid,
            })
        };
        (1..=rows.columns()?).map(column).collect()
    })
}

fn is_integer_array(oid: pg_sys::Oid) -> bool {
    [pg_sys::INT2ARRAYOID, pg_sys::INT4ARRAYOID, pg_sys::INT8ARRAYOID].contains(&oid)
}

impl Source {
    /// Looks at the columns of the argument `name`: documents are the column `tokens` with the mask `loss_mask`, as in
    /// candle.dataset, else the first column.
    ///
    /// # Errors
    /// 22023 for a query without a column that holds documents.
    pub(super) fn new(name: &str, query: &str) -> Result<Self> {
        let columns = columns(query)?;
        if columns.is_empty() {
            return Err(Error::bad_value(format!("{name} has no columns")));
        }
        let tokens = |column: &QueryColumn| column.name == "tokens" && is_integer_array(column.oid);
        let document = columns.iter().position(tokens).unwrap_or(0);
        let body = if is_integer_array(columns[document].oid) {
            Body::Tokens
        } else if element_type(columns[document].oid) != pg_sys::Oid::INVALID {
            let column = &columns[document].name;
            return Err(Error::bad_value(format!(
                "column \"{column}\" of {name} must be text or integer[]"
            )));
        } else {
            Body::Text
        };
        let mask = columns.iter().position(|column| {
            body == Body::Tokens && column.name == "loss_mask" && column.oid == pg_sys::BOOLARRAYOID
        });
        let mask = mask.map_or_else(|| "NULL::boolean[]".to_string(), |index| format!("c{}", index + 1));
        let cast = match body {
            Body::Text => "text COLLATE \"C\"",
            Body::Tokens => "integer[]",
        };
        let rows = format!(
            "SELECT c{}::{cast} AS body, {mask} AS mask FROM {}",
            document + 1,
            from(query, &columns)
        );
        Ok(Self { rows, body })
    }

    /// The name of the function that hashes a document with a seed.
    fn hash(&self) -> &'static str {
        match self.body {
            Body::Text => "pg_catalog.hashtextextended",
            Body::Tokens => "pg_catalog.hash_array_extended",
        }
    }

    /// Opens the rows as the query gives them.
    pub(super) fn open(&self, procedure: &Procedure) -> Result<Cursor> {
        let query = format!("SELECT body, mask FROM ({}) AS rows WHERE body IS NOT NULL", self.rows);
        Cursor::open(procedure, &query)
    }

    /// Opens the rows in an order that depends on nothing but their contents and `seed`. Equal rows are told apart by
    /// counting them, so that they do not follow each other.
    pub(super) fn open_shuffled(&self, procedure: &Procedure, seed: i64) -> Result<Cursor> {
        let hash = self.hash();
        let query = format!(
            "SELECT body, mask FROM (
                 SELECT body, mask, row_number() OVER (PARTITION BY {hash}(body, 0) ORDER BY mask) AS copy
                 FROM ({}) AS rows WHERE body IS NOT NULL) AS counted
             ORDER BY {hash}(body, pg_catalog.hashint8extended(copy, {seed})), mask",
            self.rows
        );
        Cursor::open(procedure, &query)
    }

    /// A digest of the rows, whatever their order: their number and the sum of their hashes.
    pub(super) fn digest(&self) -> Result<String> {
        let statement = format!(
            "SELECT count(*)::text || ':' || coalesce(sum({}(body, 0)), 0)::text FROM ({}) AS rows WHERE body IS NOT NULL",
            self.hash(),
            self.rows
        );
        let digest = run(&statement, &[], |rows| rows.first().get_one::<String>())?;
        digest.ok_or_else(|| Error::protocol("digest"))
    }
}
