//! `candle.evaluate` and `candle.evaluate_rows`: the rows of a query, sent to the server as it asks for them.

mod call;
mod rows;

pub(crate) use call::{Settings, evaluate};
