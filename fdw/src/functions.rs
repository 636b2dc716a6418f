//! Functions and procedures of the schema `candle`.

mod generate;
mod gradients;
mod server;
mod tokens;
mod train;

pub(crate) use server::register_settings;
