//! One optimizer step of all workers.

use candle_compute_proto::v1::{
    AccumulateBatchesRequest, AdamWOptions, OptimizerStep, Sequence, StepRequest, TransactionContext,
};
use pgrx::PgSqlErrorCode;

use super::arguments::Trained;
use super::exchange::exchange;
use super::progress::Progress;
use super::workers::{Worker, wait_all};
use crate::client::write;
use crate::error::{Error, Result};
use crate::transaction;

/// Splits a batch over the workers, has each compute its part at the same time, gives all of them the mean of their
/// gradients, and has all take the same step, staged in this transaction.
pub(super) fn take(
    workers: &[Worker],
    progress: &Progress,
    trained: &Trained,
    batch: Vec<Sequence>,
    learning_rate: Option<f64>,
) -> Result<OptimizerStep> {
    let contexts = workers
        .iter()
        .map(|worker| transaction::writing(&worker.client))
        .collect::<Result<Vec<_>>>()?;
    accumulate(workers, progress, trained, &contexts, split(batch, workers.len()))?;
    // From here on a transaction that the server lost must not pass for one without writes.
    workers
        .iter()
        .for_each(|worker| transaction::wrote(worker.client.session));
    if workers.len() > 1 {
        progress.wait(exchange(workers, &contexts, trained))?;
    }
    let steps = wait_all(workers, progress, |index, client| {
        let request = StepRequest {
            transaction: Some(contexts[index].clone()),
            model: trained.model.clone(),
            adapter: trained.adapter.clone(),
            options: Some(AdamWOptions {
                learning_rate,
                ..AdamWOptions::default()
            }),
        };
        Box::pin(async move {
            let taken = write!(client, training.step(request)).await?;
            taken.step.ok_or_else(|| Error::protocol("step"))
        })
    })?;
    let Some(first) = steps.first() else {
        return Err(Error::protocol("step"));
    };
    // Of a skipped step nothing is a number.
    let bits = |number: f64| {
        if number.is_nan() {
            f64::NAN.to_bits()
        } else {
            number.to_bits()
        }
    };
    let outcome = |step: &OptimizerStep| (step.step, bits(step.loss), bits(step.grad_norm), step.skipped);
    if steps.iter().any(|step| outcome(step) != outcome(first)) {
        let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        return Err(
            Error::new(code, format!("the workers took different steps of {trained}"))
                .hint("Run all compute servers in the same version, on processors with the same SIMD level."),
        );
    }
    Ok(first.clone())
}

fn accumulate(
    workers: &[Worker],
    progress: &Progress,
    trained: &Trained,
    contexts: &[TransactionContext],
    shards: Vec<Vec<Sequence>>,
) -> Result<()> {
    wait_all(workers, progress, |index, client| {
        let request = AccumulateBatchesRequest {
            transaction: Some(contexts[index].clone()),
            model: trained.model.clone(),
            adapter: trained.adapter.clone(),
            sequences: shards[index].clone(),
        };
        Box::pin(async move {
            if request.sequences.is_empty() {
                return Ok(());
            }
            write!(client, training.accumulate_batches(request)).await?;
            Ok(())
        })
    })?;
    Ok(())
}

/// Shares sequences out so that each part has about as many tokens: the longest first, each to the part that has the
/// fewest. Within a part their order stays.
fn split(batch: Vec<Sequence>, parts: usize) -> Vec<Vec<Sequence>> {
    let mut order: Vec<usize> = (0..batch.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(batch[index].token_ids.len()));
    let mut loads = vec![0; parts];
    let mut part_of = vec![0; batch.len()];
    for index in order {
        let part = (0..parts).min_by_key(|&part| loads[part]).unwrap_or(0);
        loads[part] += batch[index].token_ids.len();
        part_of[index] = part;
    }
    let mut shards = vec![Vec::new(); parts];
    for (sequence, part) in batch.into_iter().zip(part_of) {
        shards[part].push(sequence);
    }
    shards
}
