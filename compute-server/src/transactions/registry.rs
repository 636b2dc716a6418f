//! All open transactions, and the ids of those that were published lately.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::committing::AUTOMATIC;
use super::transaction::{Connection, Transaction};
use crate::access::Caller;
use crate::error::{Error, Result};
use crate::names;
use crate::owner::TransactionId;

/// Published transactions that are remembered, so that a repeated publish is answered as the first one was.
const REMEMBERED: usize = 65_536;

/// The transactions of the server.
pub(crate) struct Transactions {
    open: Mutex<HashMap<TransactionId, Arc<Transaction>>>,
    published: Mutex<Published>,
    /// Held while one transaction is published: what was validated stays valid.
    pub(super) publishing: tokio::sync::Mutex<()>,
    limit: usize,
    timeout: Duration,
}

#[derive(Default)]
struct Published {
    writes: HashMap<TransactionId, u64>,
    order: VecDeque<TransactionId>,
}

impl Transactions {
    /// No transactions; at most `limit` at once, each discarded when nobody uses it for `timeout`.
    pub(crate) fn new(limit: usize, timeout: Duration) -> Self {
        Self {
            open: Mutex::default(),
            published: Mutex::default(),
            publishing: tokio::sync::Mutex::new(()),
            limit,
            timeout,
        }
    }

    /// The open transaction called `id`.
    pub(crate) fn find(&self, id: &str) -> Option<Arc<Transaction>> {
        self.lock().get(id).cloned()
    }

    /// The open transaction called `id`, begun if need be.
    ///
    /// # Errors
    /// `Limit` when too many are open, `Stale` when `id` was published already, `NotFound` when it is another tenant's.
    pub(super) fn find_or_begin(&self, id: &str, caller: &Caller) -> Result<Arc<Transaction>> {
        names::validate("transaction", id)?;
        let mut open = self.lock();
        if let Some(transaction) = open.get(id) {
            transaction.check_tenant(caller)?;
            return Ok(Arc::clone(transaction));
        }
        if self.published(id).is_some() {
            return Err(Error::Stale(format!("transaction {id} was published already")));
        }
        if open.len() >= self.limit {
            return Err(Error::Limit {
                what: format!("a further open transaction beside {}", open.len()),
                limit: self.limit as u64,
                flag: "max-transactions",
            });
        }
        let id: TransactionId = id.into();
        // One that the server begins for a single call ends with the call.
        let connection = caller.connection.filter(|_| !id.starts_with(AUTOMATIC));
        let transaction = Arc::new(Transaction::new(Arc::clone(&id), caller, connection));
        open.insert(id, Arc::clone(&transaction));
        Ok(transaction)
    }

    /// Refuses callers who may not end the transaction called `id`.
    ///
    /// # Errors
    /// `NotFound` when it is another tenant's.
    pub(crate) fn check_tenant(&self, id: &str, caller: &Caller) -> Result<()> {
        self.find(id)
            .map_or(Ok(()), |transaction| transaction.check_tenant(caller))
    }

    /// Number of open transactions.
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    /// Forgets a transaction that has ended.
    pub(super) fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    /// Remembers that `id` was published with so many writes.
    pub(crate) fn remember(&self, id: &TransactionId, writes: u64) {
        let mut published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        if published.writes.insert(Arc::clone(id), writes).is_none() {
            published.order.push_back(Arc::clone(id));
        }
        if published.order.len() > REMEMBERED
            && let Some(oldest) = published.order.pop_front()
        {
            published.writes.remove(&oldest);
        }
    }

    /// The number of writes that `id` published, if it is remembered.
    pub(super) fn published(&self, id: &str) -> Option<u64> {
        self.published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .writes
            .get(id)
            .copied()
    }

    /// Transactions that nobody has used for the timeout.
    pub(super) fn expired(&self) -> Vec<Arc<Transaction>> {
        self.lock()
            .values()
            .filter(|transaction| transaction.is_expired(self.timeout))
            .cloned()
            .collect()
    }

    /// Transactions begun on a connection.
    pub(super) fn of_connection(&self, connection: Connection) -> Vec<Arc<Transaction>> {
        self.lock()
            .values()
            .filter(|transaction| transaction.connection == Some(connection))
            .cloned()
            .collect()
    }

    /// How often to look for expired transactions.
    pub(crate) fn sweep_interval(&self) -> Duration {
        (self.timeout / 4).clamp(Duration::from_millis(250), Duration::from_secs(30))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TransactionId, Arc<Transaction>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
