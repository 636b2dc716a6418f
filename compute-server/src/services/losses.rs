//! Losses of sequences without a gradient.

use candle_compute_proto::v1;
use candle_models::training::TrainingSequence;

use crate::error::Result;
use crate::owner::{ModelHandle, View};
use crate::requests::{Phase, RequestGuard};

/// Computes the losses of sequences, each in its own turn of the model's thread, so that generations go on meanwhile.
///
/// # Errors
/// `Cancelled`; `Stale` or `Memory` where the view has staged changes that cannot be applied.
pub(super) async fn compute(
    model: &ModelHandle,
    view: View,
    sequences: Vec<TrainingSequence>,
    request: RequestGuard,
) -> Result<Vec<v1::SequenceLoss>> {
    let request = std::sync::Arc::new(request);
    request.set_phase(Phase::Running);
    let mut losses = Vec::with_capacity(sequences.len());
    let total = sequences.len() as u64;
    for (index, sequence) in sequences.into_iter().enumerate() {
        request.set_progress(index as u64, total);
        let (view, request) = (view.clone(), std::sync::Arc::clone(&request));
        let computed = model.start_work(move |owner, reply| {
            let found = owner.decoder(&view).and_then(|decoder| {
                let cancelled = || reply.is_closed() || request.is_cancelled();
                Ok(decoder.losses_unless(sequence.tokens(), sequence.targets(), &cancelled)?)
            });
            reply.send(found);
        });
        let found: Vec<f64> = computed.await?.into_iter().flatten().map(f64::from).collect();
        losses.push(v1::SequenceLoss {
            loss: found.iter().sum::<f64>() / found.len() as f64,
            token_count: u32::try_from(found.len()).unwrap_or(u32::MAX),
        });
    }
    Ok(losses)
}
