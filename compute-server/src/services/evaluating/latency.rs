//! The time that generations take: one after the other, as a user would wait for them, and without what the cache kept of
//! earlier ones.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::evaluation::percentile;
use tokio_stream::StreamExt as _;
use tonic::Status;

use super::settings::Settings;
use crate::access::Caller;
use crate::app::App;
use crate::owner::ModelHandle;
use crate::requests::{Phase, RequestGuard};
use crate::services::generate;

/// What generations took.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    first_token_ms: Vec<f64>,
    duration_ms: Vec<f64>,
    tokens: u64,
}

/// The beginning of a row that a generation goes on from: half of its tokens, one at least, as far as the context leaves
/// room for the generation.
pub(super) fn prompt(tokens: &[u32], model: &ModelHandle, settings: &Settings) -> Vec<u32> {
    let room = model.facts().decoder_config.context_length - settings.max_tokens;
    let length = tokens.len().div_ceil(2).min(room).max(1);
    tokens[..length.min(tokens.len())].to_vec()
}

/// Runs a greedy generation from each prompt.
///
/// # Errors
/// Those of generations.
pub(super) async fn measure(
    app: &Arc<App>,
    caller: &Caller,
    start: &v1::EvaluationStart,
    settings: &Settings,
    prompts: &[Vec<u32>],
    listed: &RequestGuard,
) -> Result<Latencies, Status> {
    let mut latencies = Latencies::default();
    listed.set_phase(Phase::Decode);
    for (done, prompt) in prompts.iter().enumerate() {
        listed.set_progress(done as u64, prompts.len() as u64);
        let tokens = v1::TokenIds {
            ids: prompt.iter().map(|token| i64::from(*token)).collect(),
        };
        let request = v1::GenerateRequest {
            transaction: start.transaction.clone(),
            model: start.model.clone(),
            adapter: start.adapter.clone(),
            input: Some(v1::generate_request::Input::Tokens(tokens)),
            max_tokens: Some(settings.max_tokens as i64),
            ignore_cache: true,
            ..Default::default()
        };
        let mut stream = generate::start(app, caller.clone(), request).await?;
        while let Some(message) = stream.next().await {
            if let Some(summary) = message?.summary {
                latencies.first_token_ms.push(summary.time_to_first_token_ms);
                latencies.duration_ms.push(summary.duration_ms);
                latencies.tokens += u64::from(summary.completion_tokens);
            }
        }
    }
    Ok(latencies)
}

impl Latencies {
    /// Writes them into an evaluation.
    pub(super) fn report(&self, evaluation: &mut v1::Evaluation) {
        let seconds = self.duration_ms.iter().sum::<f64>() / 1000.0;
        evaluation.generations = self.duration_ms.len() as u64;
        evaluation.time_to_first_token_ms = percentile(&self.first_token_ms, 0.5);
        evaluation.latency_p50_ms = percentile(&self.duration_ms, 0.5);
        evaluation.latency_p90_ms = percentile(&self.duration_ms, 0.9);
        evaluation.latency_p99_ms = percentile(&self.duration_ms, 0.99);
        evaluation.generation_tokens_per_second = (seconds > 0.0).then(|| self.tokens as f64 / seconds);
    }
}
