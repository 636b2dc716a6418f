//! What a foreign table is: the trait that every table implements, the types it speaks, and the list of all tables.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use candle_compute_proto::v1::{GenerationSummary, TokenIds, TransactionContext};
use pgrx::PgSqlErrorCode;
use tokio::sync::mpsc;
use tonic::codegen::Bytes;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::relations;
use crate::values::{Kind, Value};

/// Every foreign table that IMPORT FOREIGN SCHEMA makes.
pub(crate) const RELATIONS: &[&dyn Relation] = &[
    &relations::Models,
    &relations::Adapters,
    &relations::Generations,
    &relations::GenerationTokens,
    &relations::Tokens,
    &relations::TokenScores,
    &relations::Embeddings,
    &relations::Batches,
    &relations::Gradients,
    &relations::Parameters,
    &relations::OptimizerSteps,
    &relations::Tape,
    &relations::AttentionLayouts,
    &relations::Checkpoints,
    &relations::Experts,
    &relations::Routes,
    &relations::Routers,
    &relations::Devices,
    &relations::Requests,
    &relations::Metrics,
    &relations::Evaluations,
    &relations::KernelBenchmarks,
    &relations::Tensors,
    &relations::TensorOperations,
];

/// The relation of that name.
pub(crate) fn find(name: &str) -> Option<&'static dyn Relation> {
    RELATIONS.iter().copied().find(|relation| relation.name() == name)
}

/// What a column is to a SELECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The server reports it, and an equality on it narrows what the server sends.
    Key,
    /// Only WHERE can give it; rows echo it.
    Input,
    /// The server computes it.
    Output,
}

/// A column of a relation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) role: Role,
    /// Whether INSERT may give it a value.
    pub(crate) insertable: bool,
}

/// A column that narrows a SELECT and may be inserted where the table takes rows.
pub(crate) const fn key(name: &'static str, kind: Kind) -> Column {
    Column {
        name,
        kind,
        role: Role::Key,
        insertable: true,
    }
}

/// A column that only WHERE gives.
pub(crate) const fn input(name: &'static str, kind: Kind) -> Column {
    Column {
        name,
        kind,
        role: Role::Input,
        insertable: false,
    }
}

/// A column that only WHERE gives, and INSERT.
pub(crate) const fn choice(name: &'static str, kind: Kind) -> Column {
    Column {
        name,
        kind,
        role: Role::Input,
        insertable: true,
    }
}

/// A column that INSERT gives and the server reports.
pub(crate) const fn stored(name: &'static str, kind: Kind) -> Column {
    Column {
        name,
        kind,
        role: Role::Output,
        insertable: true,
    }
}

/// A column that the server computes.
pub(crate) const fn output(name: &'static str, kind: Kind) -> Column {
    Column {
        name,
        kind,
        role: Role::Output,
        insertable: false,
    }
}

/// The columns of `first` and then those of `second`, for tables that share their first columns.
pub(crate) const fn concat<const A: usize, const B: usize, const N: usize>(
    first: [Column; A],
    second: [Column; B],
) -> [Column; N] {
    assert!(A + B == N, "N is the sum of the two");
    let mut all = [output("", Kind::Text); N];
    let mut index = 0;
    while index < N {
        all[index] = if index < A { first[index] } else { second[index - A] };
        index += 1;
    }
    all
}

/// Planner's estimate for one set of inputs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Estimate {
    pub(crate) rows: f64,
    /// Cost of the call, in units of a sequential page read.
    pub(crate) cost: f64,
}

/// Which of the server's services stages what a statement writes, and publishes it: they do so independently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Participant {
    /// Models and everything that belongs to them, by `TransactionsService`.
    #[default]
    Models,
    /// Tensors of the session, by `TensorsService` itself.
    Tensors,
}

/// Statements that change a relation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Writes {
    pub(crate) insert: bool,
    /// Most rows of one INSERT that may travel together; less than 2: each by itself.
    pub(crate) batched: i32,
    /// While the server takes rows of an INSERT, the statement may go on to the next ones. What the server answers is known
    /// at the latest when the statement ends.
    pub(crate) ahead: bool,
    pub(crate) delete: bool,
    /// The rows of one DELETE are handed over together, at its end.
    pub(crate) deleted_together: bool,
    /// Columns that UPDATE may change.
    pub(crate) update: &'static [&'static str],
    /// Changes take effect at once rather than with the transaction.
    pub(crate) immediate: bool,
    /// Likewise, deletions alone, of rows that are handed over together.
    pub(crate) deleted_at_once: bool,
}

/// The values that a statement gives, by column; absent and NULL are the same.
#[derive(Clone, Debug)]
pub(crate) struct Inputs {
    columns: &'static [Column],
    values: Vec<Option<Value>>,
}

impl Inputs {
    pub(crate) fn new(columns: &'static [Column]) -> Self {
        Self {
            columns,
            values: vec![None; columns.len()],
        }
    }

    pub(crate) fn set(&mut self, column: usize, value: Value) {
        self.values[column] = Some(value);
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        let column = self.columns.iter().position(|column| column.name == name)?;
        self.values[column].as_ref()
    }

    /// The text given for a column, or for a JSON column its text.
    pub(crate) fn text(&self, name: &str) -> Option<String> {
        match self.get(name)? {
            Value::Text(text) => Some(text.clone()),
            _ => None,
        }
    }

    /// The text of a column that has to be given.
    pub(crate) fn required(&self, name: &str) -> Result<String> {
        self.text(name).ok_or_else(|| missing(name))
    }

    pub(crate) fn integer(&self, name: &str) -> Option<i64> {
        match self.get(name)? {
            Value::Int(value) => Some(*value),
            _ => None,
        }
    }

    pub(crate) fn number(&self, name: &str) -> Option<f64> {
        match self.get(name)? {
            Value::Double(value) => Some(*value),
            Value::Real(value) => Some(f64::from(*value)),
            Value::Int(value) => Some(*value as f64),
            _ => None,
        }
    }

    pub(crate) fn real(&self, name: &str) -> Option<f32> {
        match self.get(name)? {
            Value::Real(value) => Some(*value),
            _ => self.number(name).map(|value| value as f32),
        }
    }

    pub(crate) fn integers(&self, name: &str) -> Option<Vec<i64>> {
        match self.get(name)? {
            Value::Ints(values) => Some(values.clone()),
            _ => None,
        }
    }

    /// The source of a request that takes a text, in the column `input`, or token ids, in `tokens`.
    pub(crate) fn text_or_tokens<S>(&self, text: fn(String) -> S, tokens: fn(TokenIds) -> S) -> Result<S> {
        match (self.text("input"), self.integers("tokens")) {
            (Some(input), None) => Ok(text(input)),
            (None, Some(ids)) => Ok(tokens(TokenIds { ids })),
            _ => Err(Error::bad_value("give either input or tokens, not both")),
        }
    }

    /// Little-endian f32.
    pub(crate) fn reals(&self, name: &str) -> Option<Bytes> {
        match self.get(name)? {
            Value::Reals(values) => Some(values.clone()),
            _ => None,
        }
    }

    pub(crate) fn boolean(&self, name: &str) -> Option<bool> {
        match self.get(name)? {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    pub(crate) fn bytes(&self, name: &str) -> Option<Bytes> {
        match self.get(name)? {
            Value::Bytes(bytes) => Some(bytes.clone()),
            _ => None,
        }
    }

    pub(crate) fn texts(&self, name: &str) -> Vec<String> {
        match self.get(name) {
            Some(Value::Texts(values)) => values.clone(),
            _ => Vec::new(),
        }
    }

    /// The text as a list of one, for requests where an empty list means all.
    pub(crate) fn wanted(&self, name: &str) -> Vec<String> {
        self.text(name).into_iter().collect()
    }
}

/// The columns that an UPDATE sets, with their values.
#[derive(Clone, Debug)]
pub(crate) struct Assignments {
    pub(crate) columns: Vec<&'static str>,
    pub(crate) values: Inputs,
}

impl Assignments {
    /// Whether the statement sets the column.
    pub(crate) fn sets(&self, name: &str) -> bool {
        self.columns.contains(&name)
    }
}

/// A column that has to be given was not.
pub(crate) fn missing(name: &str) -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_NOT_NULL_VIOLATION,
        format!("column \"{name}\" needs a value"),
    )
}

/// What a SELECT asks of a relation for one set of inputs.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) client: Client,
    /// Set when this transaction staged something, so that it sees it.
    pub(crate) transaction: Option<TransactionContext>,
    pub(crate) inputs: Arc<Inputs>,
    /// Whether the query reads the column of each position.
    pub(crate) needed: Arc<[bool]>,
}

impl Call {
    /// Whether the query reads the column.
    pub(crate) fn needs(&self, name: &str) -> bool {
        let column = self.inputs.columns.iter().position(|column| column.name == name);
        column
            .and_then(|column| self.needed.get(column))
            .copied()
            .unwrap_or(true)
    }
}

/// Where and in which transaction a statement writes.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    pub(crate) client: Client,
    /// Number of the statement, unique in the backend and never 0.
    pub(crate) statement: u64,
    /// Absent where changes are not staged.
    pub(crate) transaction: Option<TransactionContext>,
}

/// A row: one value per column of the relation.
pub(crate) type Row = Vec<Value>;

/// What the server reports of its work, for EXPLAIN ANALYZE.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) generations: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) completion_tokens: u64,
    /// Sequences that the server ran together, in the mean over a generation; of several generations the sum.
    pub(crate) batch_sizes: f64,
    pub(crate) queue_ms: f64,
    pub(crate) prefill_ms: f64,
    pub(crate) decode_ms: f64,
}

impl From<&GenerationSummary> for Usage {
    fn from(summary: &GenerationSummary) -> Self {
        Self {
            generations: 1,
            prompt_tokens: summary.prompt_tokens.into(),
            cached_tokens: summary.cached_tokens.into(),
            completion_tokens: summary.completion_tokens.into(),
            batch_sizes: summary.batch_size,
            queue_ms: summary.queue_ms,
            prefill_ms: (summary.time_to_first_token_ms - summary.queue_ms).max(0.0),
            decode_ms: (summary.duration_ms - summary.time_to_first_token_ms).max(0.0),
        }
    }
}

/// What a running call sends to the scan.
#[derive(Debug)]
pub(crate) enum Item {
    Row(Row),
    Usage(Usage),
}

/// Sends items to a scan; waits while the scan has enough.
#[derive(Clone, Debug)]
pub(crate) struct Rows(pub(crate) mpsc::Sender<Item>);

impl Rows {
    /// Sends a row. False when nobody wants more.
    pub(crate) async fn row(&self, row: Row) -> bool {
        self.0.send(Item::Row(row)).await.is_ok()
    }

    pub(crate) async fn usage(&self, usage: Usage) -> bool {
        self.0.send(Item::Usage(usage)).await.is_ok()
    }
}

/// Work on the connection; dropping it cancels it on the server.
pub(crate) type Work<T> = Pin<Box<dyn Future<Output = Result<T>> + Send>>;

/// A foreign table: its columns, and what SELECT, INSERT, UPDATE and DELETE mean for it.
pub(crate) trait Relation: Sync {
    /// Its name in the remote schema `candle`.
    fn name(&self) -> &'static str;

    /// Its columns, in the order of the table.
    fn columns(&self) -> &'static [Column];

    /// Inputs that SELECT needs: of each group one.
    fn required(&self) -> &'static [&'static [&'static str]] {
        &[]
    }

    /// Planner's estimate for one set of inputs.
    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 100.0,
            cost: 10.0,
        }
    }

    /// Rows that wait in memory per call until the scan takes them.
    fn buffered_rows(&self) -> usize {
        64
    }

    /// Sends the rows of one set of inputs.
    fn select(&self, call: Call, rows: Rows) -> Work<()>;

    /// Whose transactions its changes belong to.
    fn participant(&self) -> Participant {
        Participant::default()
    }

    /// Statements that may change it.
    fn writes(&self) -> Writes {
        Writes::default()
    }

    /// Columns that name a row to UPDATE and DELETE.
    fn identity(&self) -> &'static [&'static str] {
        &[]
    }

    /// Stages rows, all or none, and answers them as they now are, in the same order.
    fn insert(&self, _writer: Writer, _rows: Vec<Inputs>) -> Work<Vec<Row>> {
        Box::pin(async { Err(read_only()) })
    }

    /// Stages the deletion of the row that `row` identifies.
    fn delete(&self, _writer: Writer, _row: Inputs) -> Work<()> {
        Box::pin(async { Err(read_only()) })
    }

    /// Stages the deletion of the rows that a statement found, where they are handed over together.
    fn delete_together(&self, _writer: Writer, _rows: Vec<Inputs>) -> Work<()> {
        Box::pin(async { Err(read_only()) })
    }

    /// Stages the new values of the row that `row` identifies: those of the columns that the statement sets, absent where
    /// it sets NULL.
    fn update(&self, _writer: Writer, _row: Inputs, _new: Assignments) -> Work<()> {
        Box::pin(async { Err(read_only()) })
    }
}

fn read_only() -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
        "this table does not take such a change",
    )
}
