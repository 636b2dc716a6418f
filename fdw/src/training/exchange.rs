//! Gives all workers the same gradient: the mean of what each has accumulated, weighted by targets.
//!
//! The mean is made here, chunk by chunk as the workers send them, and replaces what each worker has. So every worker holds
//! the same bits and takes the same step, whatever part of the batch it had. Where the gradient of one has overflowed the
//! mean is not finite either, and all skip the step.

use candle_compute_proto::v1::{
    MergeGradientsRequest, ReadGradientsRequest, ReadGradientsResponse, TensorChunk, TransactionContext,
    ZeroGradientsRequest,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::arguments::Trained;
use super::workers::{Worker, all, blame};
use crate::client::{Client, read, write};
use crate::error::{Error, Result};

/// Chunks on their way to a worker.
const CHUNKS_UNDER_WAY: usize = 4;

/// A worker's gradient on its way here.
struct Incoming {
    worker: usize,
    client: Client,
    chunks: Streaming<ReadGradientsResponse>,
}

/// Gives all workers the mean gradient.
///
/// # Errors
/// Those of the calls, which name the worker.
pub(super) async fn exchange(workers: &[Worker], contexts: &[TransactionContext], trained: &Trained) -> Result<()> {
    let mut incoming = open(workers, contexts, trained).await?;
    let mut outgoing = Outgoing::open(workers, contexts, trained);
    loop {
        let mut chunks = Vec::with_capacity(incoming.len());
        for stream in &mut incoming {
            let chunk = stream.client.next(&mut stream.chunks).await;
            chunks.extend(chunk.map_err(|error| blame(workers, stream.worker, error))?);
        }
        if chunks.is_empty() {
            break;
        }
        if chunks.len() < incoming.len() {
            return Err(Error::protocol("gradient of the same parameters from every worker"));
        }
        // A worker that had no part of the batch sends nothing at all, and is left out.
        outgoing.send(workers, mean(&chunks)?).await?;
    }
    // What each had is discarded once all of it was read, and before what was sent is added, which is when a call ends.
    all(workers, |index, client| {
        let request = ZeroGradientsRequest {
            transaction: Some(contexts[index].clone()),
            model: trained.model.clone(),
            adapter: trained.adapter.clone(),
        };
        Box::pin(async move { write!(client, training.zero_gradients(request)).await })
    })
    .await?;
    outgoing.finish(workers).await
}

/// Opens the gradients of those workers that have one.
async fn open(workers: &[Worker], contexts: &[TransactionContext], trained: &Trained) -> Result<Vec<Incoming>> {
    let opened = all(workers, |worker, client| {
        let request = ReadGradientsRequest {
            transaction: Some(contexts[worker].clone()),
            model: trained.model.clone(),
            adapter: trained.adapter.clone(),
            selection: None,
        };
        let probe = ReadGradientsRequest {
            selection: Some(candle_compute_proto::v1::TensorSelection {
                without_data: true,
                ..Default::default()
            }),
            ..request.clone()
        };
        Box::pin(async move {
            let mut probed = read!(client, training.read_gradients(probe)).await?;
            if client.next(&mut probed).await?.is_none() {
                return Ok(None);
            }
            let chunks = read!(client, training.read_gradients(request)).await?;
            Ok(Some(Incoming { worker, client, chunks }))
        })
    });
    Ok(opened.await?.into_iter().flatten().collect())
}

/// The calls that take the mean to the workers.
struct Outgoing {
    contexts: Vec<TransactionContext>,
    trained: Trained,
    senders: Vec<mpsc::Sender<MergeGradientsRequest>>,
    calls: JoinSet<(usize, Result<()>)>,
}

impl Outgoing {
    fn open(workers: &[Worker], contexts: &[TransactionContext], trained: &Trained) -> Self {
        let mut calls = JoinSet::new();
        let mut senders = Vec::with_capacity(workers.len());
        for (index, worker) in workers.iter().enumerate() {
            let (sender, receiver) = mpsc::channel(CHUNKS_UNDER_WAY);
            senders.push(sender);
            let client = worker.client.clone();
            calls.spawn(async move {
                let merged = write!(client, training.merge_gradients(ReceiverStream::new(receiver))).await;
                (index, merged.map(drop))
            });
        }
        Self {
            contexts: contexts.to_vec(),
            trained: trained.clone(),
            senders,
            calls,
        }
    }

    async fn send(&mut self, workers: &[Worker], message: MergeGradientsRequest) -> Result<()> {
        for (sender, context) in self.senders.iter().zip(&self.contexts) {
            let message = MergeGradientsRequest {
                transaction: Some(context.clone()),
                model: self.trained.model.clone(),
                adapter: self.trained.adapter.clone(),
                ..message.clone()
            };
            if sender.send(message).await.is_err() {
                // The call has ended: it tells why.
                self.senders.clear();
                return self
                    .join(workers)
                    .await
                    .and(Err(Error::protocol("merge of a gradient")));
            }
        }
        Ok(())
    }

    async fn finish(mut self, workers: &[Worker]) -> Result<()> {
        self.senders.clear();
        self.join(workers).await
    }

    async fn join(&mut self, workers: &[Worker]) -> Result<()> {
        while let Some(ended) = self.calls.join_next().await {
            let (index, merged) = ended.map_err(|_| Error::protocol("answer"))?;
            merged.map_err(|error| blame(workers, index, error))?;
        }
        Ok(())
    }
}

/// The mean of one chunk over workers, weighted by their targets, in f64.
fn mean(chunks: &[ReadGradientsResponse]) -> Result<MergeGradientsRequest> {
    let tensors: Option<Vec<&TensorChunk>> = chunks.iter().map(|message| message.chunk.as_ref()).collect();
    let tensors = tensors.ok_or_else(|| Error::protocol("chunk"))?;
    let first = tensors[0];
    let alike = |tensor: &&TensorChunk| {
        tensor.name == first.name && tensor.chunk == first.chunk && tensor.data.len() == first.data.len()
    };
    if !tensors.iter().all(alike) {
        return Err(Error::protocol("gradient of the same parameters from every worker"));
    }
    let tokens: u64 = chunks.iter().map(|message| message.tokens).sum();
    let share = |message: &ReadGradientsResponse| message.tokens as f64 / tokens.max(1) as f64;
    let mut sums = vec![0.0f64; first.data.len() / 4];
    for (tensor, message) in tensors.iter().zip(chunks) {
        let share = share(message);
        let elements = tensor.data.as_chunks::<4>().0.iter();
        for (sum, element) in sums.iter_mut().zip(elements) {
            *sum += share * f64::from(f32::from_le_bytes(*element));
        }
    }
    let mut data = Vec::with_capacity(first.data.len());
    for sum in sums {
        data.extend_from_slice(&(sum as f32).to_le_bytes());
    }
    let losses = chunks.iter().filter(|message| message.tokens > 0);
    let loss: Option<f64> = losses
        .map(|message| message.loss.map(|loss| loss * share(message)))
        .sum();
    Ok(MergeGradientsRequest {
        chunk: Some(TensorChunk {
            data: data.into(),
            ..first.clone()
        }),
        tokens,
        micro_batches: chunks.iter().map(|message| message.micro_batches).sum(),
        loss: loss.filter(|loss| loss.is_finite()),
        accept_non_finite: true,
        overflows: chunks.iter().map(|message| message.overflows).sum(),
        underflows: chunks.iter().map(|message| message.underflows).sum(),
        ..MergeGradientsRequest::default()
    })
}
