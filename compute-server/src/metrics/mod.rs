//! What is measured, under the names that servers of language models have for it: `/metrics` shows it to Prometheus, the
//! relation `metrics` to SQL.
//!
//! Each model carries its own instruments, so that they go when it goes, and what is shown is gathered when somebody
//! asks.

mod gather;
mod model;
mod process;
mod samples;
mod server;

pub(crate) use gather::gather;
pub(crate) use model::ModelMetrics;
pub(crate) use process::most_resident_bytes;
pub(crate) use samples::samples;
pub(crate) use server::ServerMetrics;
