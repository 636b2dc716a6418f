//! The streams of `TensorsService`: a session, chunks of tensors, operations that end.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::{Tensor, executor};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::ResponseStream;
use crate::error::{Error, Result};
use crate::executor::{HeldSession, StoredOperation, StoredTensor, unknown_operation};

/// Chunks that lie ready for a client that is slow to read them.
const AHEAD: usize = 2;

/// Says that the session is open, and ends it with the stream.
pub(super) fn hold(mut session: HeldSession) -> ResponseStream<v1::HoldSessionResponse> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        // Fails only when the client has gone already.
        let _ = sender.send(Ok(v1::HoldSessionResponse {})).await;
        tokio::select! {
            () = sender.closed() => {}
            _ = session.ended.wait_for(|ended| *ended) => {}
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

/// The chunks of `tensors` that are selected. Stops when the client goes away.
pub(super) fn read(
    tensors: Vec<Arc<StoredTensor>>,
    selection: v1::TensorSelection,
) -> ResponseStream<v1::ReadTensorsResponse> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        for tensor in tensors {
            let sent = tokio::select! {
                sent = send(&tensor, &selection, &sender) => sent,
                () = sender.closed() => return,
            };
            if let Err(error) = sent {
                let _ = sender.send(Err(error.into())).await;
                return;
            }
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

/// Sends the chunks of one tensor, with data once there is some.
async fn send(
    tensor: &Arc<StoredTensor>,
    selection: &v1::TensorSelection,
    sender: &mpsc::Sender<Result<v1::ReadTensorsResponse, Status>>,
) -> Result<()> {
    let value = match selection.without_data {
        true => None,
        false => Some(tensor.wait().await?),
    };
    let mut described = Some(tensor.describe());
    let incomplete = described.as_ref().is_some_and(|tensor| {
        let status = tensor.status();
        status == v1::TensorStatus::Incomplete
    });
    let received = described
        .as_ref()
        .map(|tensor| tensor.received.clone())
        .unwrap_or_default();
    for number in 0..tensor.chunks() {
        let chunk = u32::try_from(number).unwrap_or(u32::MAX);
        if !selection.chunks.is_empty() && !selection.chunks.contains(&chunk)
            || incomplete && !received.contains(&chunk)
        {
            continue;
        }
        let mut chunk = tensor.describe_chunk(number);
        if let Some(value) = value.clone() {
            chunk.data = data(value, tensor.range(number)).await?.into();
        }
        let message = v1::ReadTensorsResponse {
            chunk: Some(chunk),
            tensor: described.take(),
        };
        if sender.send(Ok(message)).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// The elements, copied from the device on a thread that may wait.
async fn data(value: Tensor, range: std::ops::Range<usize>) -> Result<Vec<u8>> {
    let copied = tokio::task::spawn_blocking(move || executor::read(&value, range)).await;
    let copied = copied.map_err(|error| Error::Internal(format!("reading a tensor failed: {error}")))?;
    Ok(copied?)
}

/// The operations, each when it has ended. `ids` are those asked for.
///
/// # Errors
/// `NotFound` for an id without an operation.
pub(super) fn wait(
    operations: Vec<Arc<StoredOperation>>,
    ids: &[u64],
) -> Result<ResponseStream<v1::WaitOperationsResponse>> {
    let known = |id: u64| operations.iter().any(|operation| operation.facts.id == id);
    if let Some(unknown) = ids.iter().find(|id| !known(**id)) {
        return Err(unknown_operation(*unknown));
    }
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let (ended, open): (Vec<_>, Vec<_>) = operations
            .into_iter()
            .map(|operation| Arc::clone(&operation.facts))
            .partition(|facts| facts.has_ended());
        let mut waiting = JoinSet::new();
        for facts in open {
            waiting.spawn(async move {
                facts.ended().await;
                facts
            });
        }
        let tell = async |facts: &crate::executor::Facts| {
            let operation = Some(facts.describe());
            sender.send(Ok(v1::WaitOperationsResponse { operation })).await.is_ok()
        };
        for facts in ended {
            if !tell(&facts).await {
                return;
            }
        }
        loop {
            tokio::select! {
                joined = waiting.join_next() => match joined {
                    Some(Ok(facts)) if tell(&facts).await => {}
                    _ => return,
                },
                () = sender.closed() => return,
            }
        }
    });
    Ok(Box::pin(ReceiverStream::new(receiver)))
}
