//! `candle_fdw`: a PostgreSQL extension that shows a compute server (language models, their generations, gradients,
//! optimizer steps and checkpoints) as foreign tables.
//!
//! Contents:
//! - `wrapper`: handler, validator, IMPORT FOREIGN SCHEMA
//! - `relation`, `relations`: the contract of a foreign table, and the tables, one file each
//! - `scan`, `modify`: SELECT, and INSERT, UPDATE, DELETE, COPY
//! - `table`, `values`, `nodes`: definitions of tables, values and PostgreSQL's lists
//! - `client`, `transaction`, `resources`: the connection, what is staged over it, what an abort must clean up
//! - `options`, `error`: options and errors
//! - `functions`: functions and procedures of the schema `candle`
//! - `training`, `datasets`, `evaluation`: what `candle.train`, `candle.tokenize_dataset`, `candle.retokenize_dataset` and
//!   `candle.evaluate` do
//! - `procedure`: commits inside of procedures, and cursors that outlive them

mod client;
mod datasets;
mod error;
mod evaluation;
mod functions;
mod modify;
mod nodes;
mod options;
mod procedure;
mod relation;
mod relations;
mod resources;
mod scan;
mod table;
mod training;
mod transaction;
mod values;
mod wrapper;

#[cfg(not(panic = "unwind"))]
compile_error!("candle_fdw needs panic = \"unwind\": errors unwind through Rust before PostgreSQL handles them");

pgrx::pg_module_magic!(name, version);

/// Called once when a backend loads the library.
#[allow(unsafe_code)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn _PG_init() {
    functions::register_settings();
    transaction::register();
    scan::register_joins();
}
