//! The wrapper `candle_fdw`: handler, validator and IMPORT FOREIGN SCHEMA. supabase-wrappers gives the entry points; every
//! scan and modify callback is ours.
#![allow(unsafe_code)]

use pgrx::prelude::*;
use pgrx::spi::{quote_identifier, quote_literal};
use pgrx::{AllocatedByRust, pg_sys};
use std::collections::HashMap;
use supabase_wrappers::prelude::*;

use crate::error::Error;
use crate::relation::{self, RELATIONS};
use crate::{modify, options, scan};

/// Name of the one remote schema.
const SCHEMA: &str = "candle";

/// Shows a compute server as foreign tables.
#[wrappers_fdw(
    version = "0.1.0",
    author = "candle_fdw contributors",
    website = "",
    error_type = "Error"
)]
pub(crate) struct CandleFdw {
    /// The server's name.
    server: String,
}

impl ForeignDataWrapper<Error> for CandleFdw {
    fn new(server: ForeignServer) -> Result<Self, Error> {
        Ok(Self {
            server: server.server_name,
        })
    }

    fn fdw_routine_hook(routine: &mut supabase_wrappers::FdwRoutine<AllocatedByRust>) {
        scan::install(routine);
        modify::install(routine);
    }

    fn validator(options: Vec<Option<String>>, catalog: Option<pg_sys::Oid>) -> Result<(), Error> {
        options::validate(options, catalog)
    }

    fn import_foreign_schema(&mut self, statement: ImportForeignSchemaStmt) -> Result<Vec<String>, Error> {
        if statement.remote_schema != SCHEMA {
            let code = PgSqlErrorCode::ERRCODE_FDW_SCHEMA_NOT_FOUND;
            return Err(Error::new(
                code,
                format!("there is no remote schema \"{}\"", statement.remote_schema),
            )
            .hint(format!("The one schema of a compute server is \"{SCHEMA}\".")));
        }
        if let Some(name) = statement.options.keys().min() {
            let code = PgSqlErrorCode::ERRCODE_FDW_INVALID_OPTION_NAME;
            return Err(
                Error::new(code, format!("invalid option \"{name}\" of IMPORT FOREIGN SCHEMA"))
                    .hint("There are no valid options here."),
            );
        }
        let listed = |name: &str| statement.table_list.iter().any(|table| table == name);
        let limited = matches!(statement.list_type, ImportSchemaType::FdwImportSchemaLimitTo);
        if let Some(unknown) = statement
            .table_list
            .iter()
            .find(|table| limited && relation::find(table).is_none())
        {
            let names: Vec<&str> = RELATIONS.iter().map(|relation| relation.name()).collect();
            let code = PgSqlErrorCode::ERRCODE_FDW_TABLE_NOT_FOUND;
            return Err(Error::new(code, format!("there is no remote table \"{unknown}\""))
                .hint(format!("The tables are {}.", names.join(", "))));
        }
        let wanted = RELATIONS.iter().filter(|relation| match statement.list_type {
            ImportSchemaType::FdwImportSchemaAll => true,
            ImportSchemaType::FdwImportSchemaLimitTo => listed(relation.name()),
            ImportSchemaType::FdwImportSchemaExcept => !listed(relation.name()),
        });
        Ok(wanted
            .map(|relation| definition(*relation, &self.server, &statement.local_schema))
            .collect())
    }

    // The scan callbacks that would call these are replaced.
    fn begin_scan(
        &mut self,
        _quals: &[Qual],
        _columns: &[supabase_wrappers::prelude::Column],
        _sorts: &[Sort],
        _limit: &Option<Limit>,
        _options: &HashMap<String, String>,
    ) -> Result<(), Error> {
        Err(replaced())
    }

    fn iter_scan(&mut self, _row: &mut supabase_wrappers::prelude::Row) -> Result<Option<()>, Error> {
        Err(replaced())
    }

    fn end_scan(&mut self) -> Result<(), Error> {
        Err(replaced())
    }
}

fn replaced() -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
        "a scan callback of supabase-wrappers was not replaced",
    )
}

/// The statement that makes a relation's foreign table.
fn definition(relation: &dyn relation::Relation, server: &str, schema: &str) -> String {
    let columns: Vec<String> = relation
        .columns()
        .iter()
        .map(|column| format!("{} {}", quote_identifier(column.name), column.kind.sql()))
        .collect();
    format!(
        "CREATE FOREIGN TABLE {}.{} ({}) SERVER {} OPTIONS (relation {})",
        quote_identifier(schema),
        quote_identifier(relation.name()),
        columns.join(", "),
        quote_identifier(server),
        quote_literal(relation.name())
    )
}

extension_sql!(
    r"CREATE FOREIGN DATA WRAPPER candle_fdw HANDLER candle_fdw_handler VALIDATOR candle_fdw_validator;",
    name = "foreign_data_wrapper",
    finalize
);
