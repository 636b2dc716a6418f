//! Ties PostgreSQL's transactions to the server's: what is written is staged there under an id, published at pre-commit
//! and discarded on abort, by subtransaction where savepoints are used.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use candle_compute_proto::v1::{
    GetServerInfoRequest, PublishRequest, ReleaseRequest, RollbackRequest, TransactionContext,
};
use pgrx::prelude::*;
use tokio::task::JoinHandle;

use crate::client::{Client, Session, flush, pump, read, spawn, wait, wait_settled, write};
use crate::error::{Error, OrReport, Result};
use crate::resources;

/// How long an abort waits for the answer to a rollback: a cancel must not take longer. What has been sent by then goes on
/// by itself, and the server discards what a lost connection left behind.
const ROLLBACK_LIMIT: Duration = Duration::from_millis(50);

/// How long a cancel waits for a publish that is under way: were it cut off, nobody would know whether it happened.
const PUBLISH_LIMIT: Duration = Duration::from_secs(2);

/// A transaction on one server.
struct Remote {
    id: String,
    client: Client,
    /// Subtransactions that wrote, or tried to.
    levels: BTreeSet<pg_sys::SubTransactionId>,
    /// Those of them in which a write succeeded: the server holds something that must not get lost.
    staged: BTreeSet<pg_sys::SubTransactionId>,
    /// Rollbacks of subtransactions that the server has not answered yet.
    pending: Vec<JoinHandle<bool>>,
    /// Set when the server may not have heard of a rollback: then nothing may be published.
    broken: bool,
}

/// What became of a rollback.
enum Delivery {
    Done,
    Pending(JoinHandle<bool>),
    Failed,
}

thread_local! {
    static REMOTES: RefCell<HashMap<Session, Remote>> = RefCell::new(HashMap::new());
}

/// Registers the callbacks, once per backend.
pub(crate) fn register() {
    // SAFETY: both functions live as long as the library, which is never unloaded.
    unsafe {
        pg_sys::RegisterXactCallback(Some(on_transaction), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(on_subtransaction), std::ptr::null_mut());
    }
}

/// The context for a read: set when this transaction has staged something on the server.
pub(crate) fn reading(session: Session) -> Result<Option<TransactionContext>> {
    settle(session)?;
    Ok(REMOTES
        .with_borrow(|remotes| remotes.get(&session).map(|remote| remote.id.clone()))
        .map(context))
}

/// Waits until the server has answered the rollbacks of subtransactions, so that what follows does not overtake them.
fn settle(session: Session) -> Result<()> {
    while let Some((mut task, broken)) = REMOTES.with_borrow_mut(|remotes| {
        let remote = remotes.get_mut(&session)?;
        // Broken until the answer is here: a cancel may end the wait.
        Some((remote.pending.pop()?, std::mem::replace(&mut remote.broken, true)))
    }) {
        let done = wait(async { Ok((&mut task).await) })?;
        REMOTES.with_borrow_mut(|remotes| {
            if let Some(remote) = remotes.get_mut(&session) {
                remote.broken = broken || !matches!(done, Ok(true));
            }
        });
    }
    Ok(())
}

/// The context for a write; the first one begins the transaction.
pub(crate) fn writing(client: &Client) -> Result<TransactionContext> {
    let known = REMOTES.with_borrow(|remotes| remotes.contains_key(&client.session));
    if !known {
        // A write is never repeated, so a connection that died unnoticed is replaced before it.
        wait(read!(client, telemetry.get_server_info(GetServerInfoRequest {})))?;
    }
    settle(client.session)?;
    // SAFETY: reads a variable of the backend.
    let level = unsafe { pg_sys::GetCurrentSubTransactionId() };
    let id = REMOTES.with_borrow_mut(|remotes| {
        let remote = remotes.entry(client.session).or_insert_with(|| Remote {
            id: random_id(),
            client: client.clone(),
            levels: BTreeSet::new(),
            staged: BTreeSet::new(),
            pending: Vec::new(),
            broken: false,
        });
        remote.levels.insert(level);
        remote.id.clone()
    });
    Ok(context(id))
}

/// Notes that a write of the current subtransaction succeeded.
pub(crate) fn wrote(session: Session) {
    // SAFETY: reads a variable of the backend.
    let level = unsafe { pg_sys::GetCurrentSubTransactionId() };
    REMOTES.with_borrow_mut(|remotes| {
        if let Some(remote) = remotes.get_mut(&session) {
            remote.staged.insert(level);
        }
    });
}

fn context(transaction_id: String) -> TransactionContext {
    // SAFETY: reads a variable of the backend.
    let subtransaction_id = unsafe { pg_sys::GetCurrentSubTransactionId() };
    TransactionContext {
        transaction_id,
        subtransaction_id,
    }
}

/// A random UUID (version 4).
fn random_id() -> String {
    let mut bytes = [0_u8; 16];
    // SAFETY: fills the 16 bytes.
    if !unsafe { pg_sys::pg_strong_random(bytes.as_mut_ptr().cast(), bytes.len()) } {
        Error::new(
            PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
            "could not generate random numbers",
        )
        .report();
    }
    bytes[6] = bytes[6] & 0x0F | 0x40;
    bytes[8] = bytes[8] & 0x3F | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

#[pg_guard]
unsafe extern "C-unwind" fn on_transaction(event: pg_sys::XactEvent::Type, _argument: *mut std::ffi::c_void) {
    match event {
        pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT => publish().or_report(),
        pg_sys::XactEvent::XACT_EVENT_PRE_PREPARE if REMOTES.with_borrow(|remotes| !remotes.is_empty()) => {
            let code = PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED;
            Error::new(
                code,
                "cannot PREPARE a transaction that has written to a compute server",
            )
            .report();
        }
        pg_sys::XactEvent::XACT_EVENT_ABORT | pg_sys::XactEvent::XACT_EVENT_COMMIT => {
            // Nothing may be raised here: a panic would end the backend.
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| {
                resources::abort(None);
                let remotes: Vec<Remote> =
                    REMOTES.with_borrow_mut(|remotes| remotes.drain().map(|(_, one)| one).collect());
                if event == pg_sys::XactEvent::XACT_EVENT_ABORT {
                    remotes.iter().for_each(|remote| {
                        roll_back(remote, 0);
                    });
                }
                flush();
            }));
        }
        _ => {}
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_subtransaction(
    event: pg_sys::SubXactEvent::Type,
    level: pg_sys::SubTransactionId,
    parent: pg_sys::SubTransactionId,
    _argument: *mut std::ffi::c_void,
) {
    match event {
        pg_sys::SubXactEvent::SUBXACT_EVENT_PRE_COMMIT_SUB => release(level, parent).or_report(),
        pg_sys::SubXactEvent::SUBXACT_EVENT_COMMIT_SUB => resources::promote(level, parent),
        pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB => {
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| {
                resources::abort(Some(level));
                flush();
                REMOTES.with_borrow_mut(|remotes| {
                    for remote in remotes.values_mut().filter(|remote| remote.levels.contains(&level)) {
                        match roll_back(remote, level) {
                            Delivery::Done => {}
                            Delivery::Pending(task) => remote.pending.push(task),
                            Delivery::Failed => remote.broken = true,
                        }
                        remote.levels.remove(&level);
                        remote.staged.remove(&level);
                    }
                });
            }));
        }
        _ => {}
    }
}

/// Publishes what was staged. With several servers one after the other: each by itself is all or nothing.
fn publish() -> Result<()> {
    let sessions: Vec<Session> = REMOTES.with_borrow(|remotes| remotes.keys().copied().collect());
    sessions.into_iter().try_for_each(settle)?;
    let broken = REMOTES.with_borrow(|remotes| remotes.values().any(|remote| remote.broken));
    if broken {
        let code = PgSqlErrorCode::ERRCODE_TRANSACTION_ROLLBACK;
        return Err(Error::new(
            code,
            "a rolled back savepoint could not be undone on the compute server",
        )
        .hint("The transaction is rolled back as a whole; repeat it."));
    }
    let staged: Vec<(Session, Client, PublishRequest)> = REMOTES.with_borrow(|remotes| {
        let request = |remote: &Remote| PublishRequest {
            transaction_id: remote.id.clone(),
            expects_writes: !remote.staged.is_empty(),
        };
        remotes
            .iter()
            .map(|(session, remote)| (*session, remote.client.clone(), request(remote)))
            .collect()
    });
    if staged.len() > 1 {
        // A server that is gone is found before the others have published anything.
        for (_, client, _) in &staged {
            wait(read!(client, telemetry.get_server_info(GetServerInfoRequest {})))?;
        }
    }
    for (session, client, request) in staged {
        // Repeating a publish answers as the first did, so a lost answer is asked for again.
        wait_settled(PUBLISH_LIMIT, read!(client, transactions.publish(request)))?;
        REMOTES.with_borrow_mut(|remotes| remotes.remove(&session));
    }
    Ok(())
}

/// Gives what a subtransaction staged to its parent.
fn release(level: pg_sys::SubTransactionId, parent: pg_sys::SubTransactionId) -> Result<()> {
    let staged: Vec<(Client, String)> = REMOTES.with_borrow(|remotes| {
        let touched = remotes.values().filter(|remote| remote.levels.contains(&level));
        touched
            .map(|remote| (remote.client.clone(), remote.id.clone()))
            .collect()
    });
    for (client, transaction_id) in staged {
        let request = ReleaseRequest {
            transaction_id,
            subtransaction_id: level,
            parent_subtransaction_id: parent,
        };
        wait(write!(client, transactions.release(request)))?;
    }
    REMOTES.with_borrow_mut(|remotes| {
        for remote in remotes.values_mut() {
            for levels in [&mut remote.levels, &mut remote.staged] {
                if levels.remove(&level) {
                    levels.insert(parent);
                }
            }
        }
    });
    Ok(())
}

/// Discards what a subtransaction staged, or everything for level 0.
fn roll_back(remote: &Remote, level: pg_sys::SubTransactionId) -> Delivery {
    let request = RollbackRequest {
        transaction_id: remote.id.clone(),
        subtransaction_id: level,
    };
    let client = remote.client.clone();
    let sent = spawn(async move { read!(client, transactions.rollback(request)).await.is_ok() });
    let Ok(mut task) = sent else { return Delivery::Failed };
    match pump(ROLLBACK_LIMIT, &mut task) {
        Some(Ok(true)) => Delivery::Done,
        Some(_) => Delivery::Failed,
        None => Delivery::Pending(task),
    }
}
