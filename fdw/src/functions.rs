//! Functions and procedures of the schema `candle`.
#![allow(unsafe_code)]

mod baseline;
mod datasets;
mod embed;
mod evaluate;
mod generate;
mod gradients;
mod server;
mod statistics;
mod tokens;
mod train;
mod train_tokenizer;

pub(crate) use baseline::sql_kernel_baseline;
pub(crate) use server::{default_client, register_settings};

/// Raises an error in a read-only transaction.
fn refuse_read_only(command: &std::ffi::CStr) {
    // SAFETY: reads a variable of the backend and the NUL-terminated name.
    unsafe { pgrx::pg_sys::PreventCommandIfReadOnly(command.as_ptr()) };
}
