//! `candle.train`: a run of optimizer steps over the documents of a query, which can be left and gone on with.
//!
//! ```text
//! query ─▶ Source ─▶ Reader (order, tokens) ─▶ Packing (batches) ─▶ step on every worker ─▶ Run (position, durable)
//! ```

mod arguments;
mod documents;
mod driver;
mod evaluation;
mod exchange;
mod packing;
mod progress;
mod run;
mod schedule;
mod source;
mod step;
mod workers;

pub(crate) use arguments::Arguments;
pub(crate) use documents::{Tokenizing, tokenize};
pub(crate) use driver::train;
pub(crate) use progress::Progress;
pub(crate) use source::{QueryColumn, columns, from};
