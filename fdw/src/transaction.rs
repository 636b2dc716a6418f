//! Ties PostgreSQL's transactions to the server's: what is written is staged there under an id, published at pre-commit
//! and discarded on abort, by subtransaction where savepoints are used.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use candle_compute_proto::v1::{
    DescribeExecutorRequest, GetServerInfoRequest, PublishRequest, PublishTensorsRequest, ReleaseRequest,
    ReleaseTensorsRequest, RollbackRequest, RollbackTensorsRequest, TransactionContext,
};
use pgrx::prelude::*;
use tokio::task::JoinHandle;

use crate::client::{Client, Session, flush, pump, read, resolve, spawn, wait, wait_settled, write};
use crate::error::{Error, OrReport, Result};
use crate::relation::Participant;
use crate::resources;

/// How long an abort waits for the answer to a rollback: a cancel must not take longer. What has been sent by then goes on
/// by itself, and the server discards what a lost connection left behind.
const ROLLBACK_LIMIT: Duration = Duration::from_millis(50);

/// How long a cancel waits for a publish that is under way: were it cut off, nobody would know whether it happened.
const PUBLISH_LIMIT: Duration = Duration::from_secs(2);

/// How long a server that went away while it published may take to come back and say whether it did.
const PUBLISH_PATIENCE: Duration = Duration::from_secs(30);

/// Whose transaction: a server's, over a connection, in one of the two ways.
type Key = (Participant, Session);

/// A transaction on one server.
struct Remote {
    id: String,
    client: Client,
    /// How it is ended there.
    ends: Ends,
    /// Subtransactions that wrote, or tried to.
    levels: BTreeSet<pg_sys::SubTransactionId>,
    /// Those of them in which a write succeeded: the server holds something that must not get lost.
    staged: BTreeSet<pg_sys::SubTransactionId>,
    /// Rollbacks of subtransactions that the server has not answered yet.
    pending: Vec<JoinHandle<bool>>,
    /// Set when the server may not have heard of a rollback: then nothing may be published.
    broken: bool,
}

/// How a transaction is ended.
#[derive(Clone)]
enum Ends {
    /// By `TransactionsService`.
    Models,
    /// By `TensorsService`, in the session of this id.
    Tensors(String),
}

/// What became of a rollback.
enum Delivery {
    Done,
    Pending(JoinHandle<bool>),
    Failed,
}

thread_local! {
    static REMOTES: RefCell<HashMap<Key, Remote>> = RefCell::new(HashMap::new());
    /// Rollbacks of transactions of tensors that the server has not answered yet: what the session reads next is to come
    /// after them.
    static ABORTED: RefCell<Vec<(Session, JoinHandle<bool>)>> = const { RefCell::new(Vec::new()) };
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
    settle((Participant::Models, session))?;
    Ok(known((Participant::Models, session)))
}

/// As [`reading`], for the relations of `participant`.
pub(crate) fn reading_of(participant: Participant, client: &Client) -> Result<Option<TransactionContext>> {
    if participant == Participant::Tensors {
        settle_aborted(client.session)?;
    }
    settle((participant, client.session))?;
    Ok(known((participant, client.session)))
}

fn known(key: Key) -> Option<TransactionContext> {
    let id = REMOTES.with_borrow(|remotes| remotes.get(&key).map(|remote| remote.id.clone()));
    id.map(context)
}

/// Waits until the server has answered the rollbacks of subtransactions, so that what follows does not overtake them.
fn settle(key: Key) -> Result<()> {
    while let Some((mut task, broken)) = REMOTES.with_borrow_mut(|remotes| {
        let remote = remotes.get_mut(&key)?;
        // Broken until the answer is here: a cancel may end the wait.
        Some((remote.pending.pop()?, std::mem::replace(&mut remote.broken, true)))
    }) {
        let done = wait(async { Ok((&mut task).await) })?;
        REMOTES.with_borrow_mut(|remotes| {
            if let Some(remote) = remotes.get_mut(&key) {
                remote.broken = broken || !matches!(done, Ok(true));
            }
        });
    }
    Ok(())
}

/// Waits until the server has answered the rollbacks of the session's earlier transactions of tensors. One that failed is
/// made up for by the next transaction: the server undoes what another one left open.
fn settle_aborted(session: Session) -> Result<()> {
    let take = || {
        ABORTED.with_borrow_mut(|aborted| {
            let index = aborted.iter().position(|(of, _)| *of == session)?;
            Some(aborted.swap_remove(index).1)
        })
    };
    while let Some(task) = take() {
        let _ = wait(async { Ok(task.await) })?;
    }
    Ok(())
}

/// The context for a write; the first one begins the transaction.
pub(crate) fn writing(client: &Client) -> Result<TransactionContext> {
    writing_of(Participant::Models, client)
}

/// As [`writing`], for the relations of `participant`.
pub(crate) fn writing_of(participant: Participant, client: &Client) -> Result<TransactionContext> {
    let key = (participant, client.session);
    let known = REMOTES.with_borrow(|remotes| remotes.contains_key(&key));
    let ends = match known {
        true => None,
        false => Some(begin(participant, client)?),
    };
    settle(key)?;
    // SAFETY: reads a variable of the backend.
    let level = unsafe { pg_sys::GetCurrentSubTransactionId() };
    let id = REMOTES.with_borrow_mut(|remotes| {
        let remote = remotes.entry(key).or_insert_with(|| Remote {
            id: random_id(),
            client: client.clone(),
            ends: ends.unwrap_or(Ends::Models),
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

/// Prepares for the first write of a transaction. A write is never repeated, so a connection that died unnoticed is
/// replaced before it.
fn begin(participant: Participant, client: &Client) -> Result<Ends> {
    match participant {
        Participant::Models => {
            wait(read!(client, telemetry.get_server_info(GetServerInfoRequest {})))?;
            Ok(Ends::Models)
        }
        Participant::Tensors => {
            settle_aborted(client.session)?;
            wait(read!(client, tensors.describe_executor(DescribeExecutorRequest {})))?;
            Ok(Ends::Tensors(wait(client.tensor_session())?))
        }
    }
}

/// Notes that a write of the current subtransaction succeeded.
pub(crate) fn wrote(session: Session) {
    wrote_of(Participant::Models, session);
}

/// As [`wrote`], for the relations of `participant`.
pub(crate) fn wrote_of(participant: Participant, session: Session) {
    // SAFETY: reads a variable of the backend.
    let level = unsafe { pg_sys::GetCurrentSubTransactionId() };
    REMOTES.with_borrow_mut(|remotes| {
        if let Some(remote) = remotes.get_mut(&(participant, session)) {
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
pub(crate) fn random_id() -> String {
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
        pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT if REMOTES.with_borrow(|remotes| !remotes.is_empty()) => {
            // PostgreSQL looks for serialization failures only after this event, and what is published stays.
            // SAFETY: we are in the commit of a transaction; the function raises an error or marks it as prepared.
            unsafe {
                if pg_sys::XactIsoLevel == pg_sys::XACT_SERIALIZABLE as i32 {
                    pg_sys::PreCommit_CheckForSerializationFailure();
                }
            }
            publish().or_report();
        }
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
                    for remote in &remotes {
                        if let (Delivery::Pending(task), Ends::Tensors(_)) = (roll_back(remote, 0), &remote.ends) {
                            let session = remote.client.session;
                            ABORTED.with_borrow_mut(|aborted| aborted.push((session, task)));
                        }
                    }
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
    let mut keys: Vec<Key> = REMOTES.with_borrow(|remotes| remotes.keys().copied().collect());
    // What lives in memory alone comes first: when a later publish fails, nothing lasting has happened.
    keys.sort_by_key(|(participant, _)| *participant != Participant::Tensors);
    keys.iter().copied().try_for_each(settle)?;
    let broken = REMOTES.with_borrow(|remotes| remotes.values().any(|remote| remote.broken));
    if broken {
        let code = PgSqlErrorCode::ERRCODE_TRANSACTION_ROLLBACK;
        return Err(Error::new(
            code,
            "a rolled back savepoint could not be undone on the compute server",
        )
        .hint("The transaction is rolled back as a whole; repeat it."));
    }
    let clients: Vec<(Participant, Client)> = REMOTES.with_borrow(|remotes| {
        let client = |key: &Key| Some((key.0, remotes.get(key)?.client.clone()));
        keys.iter().filter_map(client).collect()
    });
    // A server that is gone is found before anybody has published anything.
    for (participant, client) in &clients {
        let greeted = match participant {
            Participant::Models => wait(read!(client, telemetry.get_server_info(GetServerInfoRequest {}))).map(drop),
            Participant::Tensors => {
                wait(read!(client, tensors.describe_executor(DescribeExecutorRequest {}))).map(drop)
            }
        };
        greeted.map_err(|error| about(error, client.session, clients.len()))?;
    }
    for key in keys {
        publish_one(key).map_err(|error| about(error, key.1, clients.len()))?;
        REMOTES.with_borrow_mut(|remotes| remotes.remove(&key));
    }
    Ok(())
}

/// The error with the name of its server, where there are several.
fn about(error: Error, session: Session, servers: usize) -> Error {
    if servers < 2 {
        return error;
    }
    // SAFETY: the server exists as long as the transaction that wrote to it; its name is NUL-terminated.
    let name = unsafe { std::ffi::CStr::from_ptr((*pg_sys::GetForeignServer(session.server)).servername) };
    error.context(&format!("server \"{}\"", name.to_string_lossy()))
}

/// Publishes what was staged in one place. Repeating a publish answers as the first did, so a lost answer is asked for
/// again.
fn publish_one(key: Key) -> Result<()> {
    let staged = REMOTES.with_borrow(|remotes| {
        let remote = remotes.get(&key)?;
        let expects_writes = !remote.staged.is_empty();
        Some((
            remote.client.clone(),
            remote.id.clone(),
            remote.ends.clone(),
            expects_writes,
        ))
    });
    let Some((client, transaction_id, ends, expects_writes)) = staged else {
        return Ok(());
    };
    match ends {
        Ends::Models => {
            let request = PublishRequest {
                transaction_id,
                expects_writes,
            };
            let answer = resolve!(client, PUBLISH_PATIENCE, transactions.publish(request));
            wait_settled(PUBLISH_LIMIT, answer)?;
        }
        Ends::Tensors(session_id) => {
            let request = PublishTensorsRequest {
                session_id,
                transaction_id,
                expects_writes,
            };
            let published = async {
                let answer = read!(client, tensors.publish_tensors(request)).await;
                client.in_tensor_session(answer).await
            };
            wait_settled(PUBLISH_LIMIT, published)?;
        }
    }
    Ok(())
}

/// Gives what a subtransaction staged to its parent.
fn release(level: pg_sys::SubTransactionId, parent: pg_sys::SubTransactionId) -> Result<()> {
    let staged: Vec<(Client, String, Ends)> = REMOTES.with_borrow(|remotes| {
        let touched = remotes.values().filter(|remote| remote.levels.contains(&level));
        touched
            .map(|remote| (remote.client.clone(), remote.id.clone(), remote.ends.clone()))
            .collect()
    });
    for (client, transaction_id, ends) in staged {
        match ends {
            Ends::Models => {
                let request = ReleaseRequest {
                    transaction_id,
                    subtransaction_id: level,
                    parent_subtransaction_id: parent,
                };
                wait(write!(client, transactions.release(request)))?;
            }
            Ends::Tensors(session_id) => {
                let request = ReleaseTensorsRequest {
                    session_id,
                    transaction_id,
                    subtransaction_id: level,
                    parent_subtransaction_id: parent,
                };
                wait(write!(client, tensors.release_tensors(request)))?;
            }
        }
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
    let (client, transaction_id) = (remote.client.clone(), remote.id.clone());
    let sent = match remote.ends.clone() {
        Ends::Models => {
            let request = RollbackRequest {
                transaction_id,
                subtransaction_id: level,
            };
            spawn(async move { read!(client, transactions.rollback(request)).await.is_ok() })
        }
        Ends::Tensors(session_id) => {
            let request = RollbackTensorsRequest {
                session_id,
                transaction_id,
                subtransaction_id: level,
            };
            spawn(async move {
                let answer = read!(client, tensors.rollback_tensors(request)).await;
                client.in_tensor_session(answer).await.is_ok()
            })
        }
    };
    let Ok(mut task) = sent else { return Delivery::Failed };
    match pump(ROLLBACK_LIMIT, &mut task) {
        Some(Ok(true)) => Delivery::Done,
        Some(_) => Delivery::Failed,
        None => Delivery::Pending(task),
    }
}
