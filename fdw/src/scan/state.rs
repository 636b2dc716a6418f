//! A running scan: the calls that are under way, their rows in the order of the inputs.

use std::collections::VecDeque;
use std::sync::Arc;

use pgrx::{PgSqlErrorCode, pg_sys};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::inputs::{Binding, Combinations};
use crate::client::{Client, dropped_work, flush, spawn, wait};
use crate::error::{Error, Result};
use crate::relation::{Call, Item, Row, Rows, Usage};
use crate::table::Table;
use crate::transaction;

/// A call under way.
struct Running {
    /// For each binding the datum that its rows echo.
    echo: Vec<pg_sys::Datum>,
    items: mpsc::Receiver<Item>,
    task: JoinHandle<Result<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.task.is_finished() {
            self.task.abort();
            dropped_work();
        }
    }
}

/// What EXPLAIN ANALYZE shows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    pub(super) calls: u64,
    pub(super) usage: Usage,
}

/// The calls of a scan.
pub(super) struct Calls {
    client: Client,
    combinations: Combinations,
    running: VecDeque<Running>,
    needed: Arc<[bool]>,
    /// Calls under way at a time.
    width: usize,
}

impl Calls {
    pub(super) fn new(client: Client, combinations: Combinations, needed: Arc<[bool]>, limit: Option<usize>) -> Self {
        let width = limit.unwrap_or(usize::MAX).clamp(1, client.fetch_size);
        Self {
            client,
            combinations,
            running: VecDeque::new(),
            needed,
            width,
        }
    }

    /// The next row, with the datums that it echoes. None at the end.
    pub(super) fn next(
        &mut self,
        table: &Table,
        bindings: &[Binding],
        totals: &mut Totals,
    ) -> Result<Option<(Row, Vec<pg_sys::Datum>)>> {
        loop {
            while self.running.len() < self.width && self.start(table, bindings)? {
                totals.calls += 1;
            }
            let Some(first) = self.running.front_mut() else {
                return Ok(None);
            };
            let item = match first.items.try_recv() {
                Ok(item) => Some(item),
                Err(_) => wait(async { Ok(first.items.recv().await) })?,
            };
            match item {
                Some(Item::Row(row)) => return Ok(Some((row, first.echo.clone()))),
                Some(Item::Usage(usage)) => totals.add(usage),
                None => {
                    let outcome = wait(async { Ok((&mut first.task).await) })?;
                    self.running.pop_front();
                    outcome.map_err(|_| {
                        let code = PgSqlErrorCode::ERRCODE_INTERNAL_ERROR;
                        Error::new(code, "a call to the compute server ended unexpectedly")
                    })??;
                }
            }
        }
    }

    fn start(&mut self, table: &Table, bindings: &[Binding]) -> Result<bool> {
        let Some((inputs, echo)) = self.combinations.advance(bindings, table) else {
            return Ok(false);
        };
        let call = Call {
            client: self.client.clone(),
            transaction: transaction::reading(self.client.session)?,
            inputs,
            needed: Arc::clone(&self.needed),
        };
        let (sender, items) = mpsc::channel(table.relation.buffered_rows());
        let task = spawn(table.relation.select(call, Rows(sender)))?;
        self.running.push_back(Running { echo, items, task });
        Ok(true)
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.running.clear();
        flush();
    }
}

impl Totals {
    fn add(&mut self, usage: Usage) {
        self.usage.generations += usage.generations;
        self.usage.prompt_tokens += usage.prompt_tokens;
        self.usage.cached_tokens += usage.cached_tokens;
        self.usage.completion_tokens += usage.completion_tokens;
        self.usage.batch_sizes += usage.batch_sizes;
        self.usage.queue_ms += usage.queue_ms;
        self.usage.prefill_ms += usage.prefill_ms;
        self.usage.decode_ms += usage.decode_ms;
    }
}
