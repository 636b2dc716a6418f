//! INSERTs whose server works on rows while the statement goes on to the next ones.

use tokio::task::JoinHandle;

use super::state::Change;
use crate::client::{dropped_work, spawn, wait};
use crate::error::{Error, Result};
use crate::relation::{Row, Work, Writer};
use crate::transaction;

/// An INSERT's call that nobody waits for yet.
pub(super) struct UnderWay(JoinHandle<Result<Vec<Row>>>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        if !self.0.is_finished() {
            self.0.abort();
            dropped_work();
        }
    }
}

impl Change {
    /// As [`run`](Self::run), without waiting for more than the call before.
    pub(super) fn run_ahead(&self, work: impl FnOnce(Writer) -> Work<Vec<Row>>) -> Result<()> {
        let writer = Writer {
            client: self.client.clone(),
            statement: self.statement,
            transaction: Some(transaction::writing_of(
                self.table.relation.participant(),
                &self.client,
            )?),
        };
        self.settle()?;
        let task = spawn(work(writer))?;
        self.under_way.replace(Some(UnderWay(task)));
        Ok(())
    }

    /// Waits for what the server takes while the statement goes on.
    pub(super) fn settle(&self) -> Result<()> {
        let Some(mut under_way) = self.under_way.take() else {
            return Ok(());
        };
        let outcome = wait(async { Ok((&mut under_way.0).await) })?;
        outcome.map_err(|_| Error::protocol("answer"))??;
        transaction::wrote_of(self.table.relation.participant(), self.client.session);
        Ok(())
    }
}
