//! Runs SQL tests in sqllogictest's format.

use std::path::Path;

use postgres::{Client, SimpleQueryMessage};
use sqllogictest::{DB, DBOutput, DefaultColumnType, Runner};

use crate::database_errors;
use crate::fixture::Fixture;

/// A session that sqllogictest drives by simple queries, as psql does.
struct Session(Client);

/// A failure that shows what Postgres reported, for expectations that name a word of it.
#[derive(Debug)]
struct Failure(postgres::Error);

impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&database_errors::report(&self.0))
    }
}

impl std::error::Error for Failure {}

impl DB for Session {
    type Error = Failure;
    type ColumnType = DefaultColumnType;

    fn run(&mut self, sql: &str) -> Result<DBOutput<DefaultColumnType>, Failure> {
        let mut columns = 0;
        let mut rows = Vec::new();
        let mut affected = 0;
        for message in self.0.simple_query(sql).map_err(Failure)? {
            match message {
                SimpleQueryMessage::RowDescription(description) => columns = description.len(),
                SimpleQueryMessage::Row(row) => rows.push((0..row.len()).map(|i| cell(row.get(i))).collect()),
                SimpleQueryMessage::CommandComplete(count) => affected = count,
                _ => {}
            }
        }
        Ok(if columns > 0 {
            DBOutput::Rows {
                types: vec![DefaultColumnType::Any; columns],
                rows,
            }
        } else {
            DBOutput::StatementComplete(affected)
        })
    }

    fn engine_name(&self) -> &str {
        "postgres"
    }

    fn error_sql_state(error: &Failure) -> Option<String> {
        Some(database_errors::sqlstate(&error.0).to_owned())
    }
}

/// How a value is written in a test's expectation.
fn cell(value: Option<&str>) -> String {
    match value {
        None => "NULL".to_owned(),
        Some("") => "(empty)".to_owned(),
        Some(text) => text.to_owned(),
    }
}

/// Runs one file of SQL tests in a database of its own with the models of [`Fixture::create_models`].
///
/// # Panics
/// At the first record that does not give what the file expects.
pub fn run_file(path: &Path) {
    let fixture = Fixture::with_models();
    let mut runner = Runner::new(|| async { Ok(Session(fixture.connect())) });
    if let Err(error) = runner.run_file(path) {
        panic!("{}", error.display(false));
    }
    runner.shutdown();
    fixture.assert_idle();
}
