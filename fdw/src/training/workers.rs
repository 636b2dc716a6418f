//! The servers that take part in a run, and what is asked of all of them at once.

use candle_compute_proto::v1::{DigestModelRequest, ListAdaptersRequest, ListModelsRequest, Model, TransactionContext};
use pgrx::{PgSqlErrorCode, pg_sys};
use tokio::task::JoinSet;

use super::arguments::Trained;
use super::progress::Progress;
use crate::client::{Client, Session, connect, dropped_work, read, wait};
use crate::error::{Error, Result};
use crate::functions::default_client;
use crate::procedure::run;
use crate::relation::Work;
use crate::transaction;

/// A server that takes part.
pub(super) struct Worker {
    /// How errors name it; None where it is the only one.
    label: Option<String>,
    /// Name of the foreign server.
    pub(super) server: String,
    pub(super) client: Client,
}

impl Worker {
    fn blame(&self, error: Error) -> Error {
        match &self.label {
            Some(label) => error.context(label),
            None => error,
        }
    }
}

/// The servers behind schemas into which their tables were imported, else the one that functions use.
///
/// # Errors
/// Those of a connection; 3F000 for a schema that shows no server, 22023 for a server that is named twice, 42501 for one
/// whose batches the user may not insert.
pub(super) fn find(schemas: &[&str]) -> Result<Vec<Worker>> {
    if schemas.is_empty() {
        let (client, server) = default_client()?;
        return Ok(vec![Worker {
            label: None,
            server,
            client,
        }]);
    }
    let mut workers: Vec<Worker> = Vec::new();
    for schema in schemas {
        let (oid, server) = behind(schema)?;
        let label = format!("worker \"{schema}\"");
        if workers.iter().any(|worker| worker.client.session.server == oid) {
            return Err(Error::bad_value(format!(
                "{label} is the server \"{server}\", which is a worker already"
            )));
        }
        let user = current_user();
        let client = connect(Session { server: oid, user }).map_err(|error| error.context(&label))?;
        workers.push(Worker {
            label: Some(label),
            server,
            client,
        });
    }
    Ok(workers)
}

fn current_user() -> pg_sys::Oid {
    #[allow(unsafe_code)]
    // SAFETY: reads a variable of the backend.
    unsafe {
        pg_sys::GetUserId()
    }
}

/// The server whose `batches` the schema shows.
fn behind(schema: &str) -> Result<(pg_sys::Oid, String)> {
    let statement =
        "SELECT s.oid, s.srvname::text, has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'INSERT')
        FROM pg_catalog.pg_foreign_table t
        JOIN pg_catalog.pg_class c ON c.oid = t.ftrelid
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_catalog.pg_foreign_server s ON s.oid = t.ftserver
        JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid = s.srvfdw
        WHERE n.nspname = $1 AND w.fdwname = 'candle_fdw' AND 'relation=batches' = ANY (t.ftoptions)";
    let found = run(statement, &[schema.into()], |rows| {
        rows.map(|row| Ok((row.get::<pg_sys::Oid>(1)?, row.get::<String>(2)?, row.get::<bool>(3)?)))
            .collect::<std::result::Result<Vec<_>, pgrx::spi::Error>>()
    })?;
    match &found[..] {
        [(Some(oid), Some(server), Some(true))] => Ok((*oid, server.clone())),
        [(_, Some(server), _)] => {
            let code = PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE;
            Err(Error::new(
                code,
                format!("permission denied for worker \"{schema}\" (server \"{server}\")"),
            )
            .hint("It takes USAGE on the schema and INSERT on its table batches."))
        }
        [] => {
            let code = PgSqlErrorCode::ERRCODE_INVALID_SCHEMA_NAME;
            Err(Error::new(
                code,
                format!("worker \"{schema}\" is no schema with the tables of a compute server"),
            )
            .hint("IMPORT FOREIGN SCHEMA candle FROM SERVER … INTO …;"))
        }
        _ => {
            let code = PgSqlErrorCode::ERRCODE_AMBIGUOUS_PARAMETER;
            Err(Error::new(
                code,
                format!("worker \"{schema}\" shows the batches of several servers"),
            ))
        }
    }
}

/// Calls every worker at once: `work` gets the worker's number and its client. The first error ends all.
pub(super) async fn all<T: Send + 'static>(
    workers: &[Worker],
    work: impl Fn(usize, Client) -> Work<T>,
) -> Result<Vec<T>> {
    let mut calls = JoinSet::new();
    for (index, worker) in workers.iter().enumerate() {
        let call = work(index, worker.client.clone());
        calls.spawn(async move { (index, call.await) });
    }
    let mut answers: Vec<Option<T>> = workers.iter().map(|_| None).collect();
    while let Some(ended) = calls.join_next().await {
        let (index, answer) = ended.map_err(|_| Error::protocol("answer"))?;
        let answer = answer.inspect_err(|_| dropped_work());
        answers[index] = Some(answer.map_err(|error| workers[index].blame(error))?);
    }
    answers
        .into_iter()
        .collect::<Option<_>>()
        .ok_or_else(|| Error::protocol("answer"))
}

/// Attributes an error to a worker.
pub(super) fn blame(workers: &[Worker], index: usize, error: Error) -> Error {
    workers[index].blame(error)
}

/// The model on the first worker, once all are known to have it in the same state.
///
/// # Errors
/// 42704 where a worker does not have it; 55000 where two have it in different states.
pub(super) fn same_model(workers: &[Worker], trained: &Trained) -> Result<Model> {
    let name = trained.model.as_str();
    let contexts = workers
        .iter()
        .map(|worker| transaction::reading(worker.client.session))
        .collect::<Result<Vec<_>>>()?;
    let models = wait(all(workers, |index, client| {
        let (transaction, wanted) = (contexts[index].clone(), trained.clone());
        Box::pin(async move {
            let request = ListModelsRequest {
                transaction: transaction.clone(),
                names: vec![wanted.model.clone()],
            };
            let models = read!(client, models.list_models(request)).await?.models;
            let found = models.into_iter().find(|model| model.name == wanted.model);
            let mut model = found.ok_or_else(|| missing(&format!("model \"{}\"", wanted.model)))?;
            if !wanted.adapter.is_empty() {
                model.step = adapter_step(&client, transaction, &wanted).await?;
            }
            Ok(model)
        })
    }))?;
    let Some((first, others)) = models.split_first() else {
        return Err(Error::protocol("model"));
    };
    for (other, worker) in others.iter().zip(&workers[1..]) {
        if first.step != other.step {
            let (a, b) = (first.step, other.step);
            return Err(different(
                worker,
                trained,
                &format!("it is at step {b} there, and at step {a} on the first"),
            ));
        }
    }
    if workers.len() > 1 {
        let digests = wait(all(workers, |index, client| {
            let request = DigestModelRequest {
                transaction: contexts[index].clone(),
                model: name.to_string(),
                adapter: trained.adapter.clone(),
            };
            Box::pin(async move { read!(client, models.digest_model(request)).await })
        }))?;
        let differs = digests.iter().position(|digest| digest.sha256 != digests[0].sha256);
        if let Some(index) = differs {
            let what = "weights or the optimizer's moments differ from those on the first";
            return Err(different(&workers[index], trained, what));
        }
    }
    Ok(first.clone())
}

fn missing(what: &str) -> Error {
    Error::new(PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT, format!("there is no {what}"))
}

/// Optimizer steps that an adapter has taken.
async fn adapter_step(client: &Client, transaction: Option<TransactionContext>, wanted: &Trained) -> Result<u64> {
    let request = ListAdaptersRequest {
        transaction,
        models: vec![wanted.model.clone()],
        names: vec![wanted.adapter.clone()],
    };
    let adapters = read!(client, adapters.list_adapters(request)).await?.adapters;
    let found = adapters.first().ok_or_else(|| missing(&wanted.to_string()))?;
    Ok(found.step)
}

fn different(worker: &Worker, trained: &Trained, what: &str) -> Error {
    let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
    worker.blame(
        Error::new(code, format!("{trained} is not the same on all workers"))
            .detail(format!("Worker: {}. {what}.", worker.server))
            .hint("Load it on every worker from the same checkpoint, or create it with the same config and seed."),
    )
}

/// Waits for what is asked of all workers, until the run is cancelled.
pub(super) fn wait_all<T: Send + 'static>(
    workers: &[Worker],
    progress: &Progress,
    work: impl Fn(usize, Client) -> Work<T>,
) -> Result<Vec<T>> {
    progress.wait(all(workers, work))
}
