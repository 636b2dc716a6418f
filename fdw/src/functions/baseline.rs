//! `candle.sql_kernel_baseline`: what kernels compute, in plain SQL.

use pgrx::prelude::*;

use crate::error::{Error, Result};

extension_sql_file!("../../sql/sql_kernel_baseline.sql", name = "sql_kernel_baseline");

/// The rate of the kernel's arithmetic in plain SQL, in the unit of its benchmark; `None` for kernels without baseline.
/// Runs queries of some milliseconds.
pub(crate) fn sql_kernel_baseline(kernel: &str) -> Result<Option<f64>> {
    let query = "SELECT candle.sql_kernel_baseline($1)";
    Spi::get_one_with_args(query, &[kernel.into()]).map_err(|error| {
        let code = PgSqlErrorCode::ERRCODE_INTERNAL_ERROR;
        Error::new(code, "cannot measure the baseline in SQL").detail(error.to_string())
    })
}
