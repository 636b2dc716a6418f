//! The instruments of one model or adapter.

use std::sync::{Mutex, PoisonError};

use candle_compute_proto::v1;
use prometheus::core::Collector;
use prometheus::{Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts};

use crate::error::{Error, Result};

/// Seconds of whole requests and their phases.
const REQUEST_BUCKETS: [f64; 16] = [
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
];
/// Seconds to a first token.
const FIRST_TOKEN_BUCKETS: [f64; 16] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
];
/// Seconds between two tokens.
const TOKEN_BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2,
];
/// Sequences of a decoding step.
const BATCH_BUCKETS: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0];

/// What is measured of a model, or of an adapter.
#[derive(Debug)]
pub(crate) struct ModelMetrics {
    request_duration: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    time_to_first_token: Histogram,
    time_per_output_token: Histogram,
    batch_size: Histogram,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    prefix_cache_queries: IntCounter,
    prefix_cache_hits: IntCounter,
    finished: IntCounterVec,
    last_step: Mutex<Option<v1::OptimizerStep>>,
}

impl ModelMetrics {
    /// Instruments that have measured nothing.
    ///
    /// # Errors
    /// `Internal`, for a defect of the names below.
    pub(crate) fn new() -> Result<Self> {
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())).map_err(defect)
        };
        let counter = |name: &str, help: &str| IntCounter::new(name, help).map_err(defect);
        let finished = Opts::new("candle_requests_finished_total", "Generations that ended, by why");
        Ok(Self {
            request_duration: histogram(
                "candle_request_duration_seconds",
                "From the arrival of a generation to its end",
                &REQUEST_BUCKETS,
            )?,
            queue_time: histogram(
                "candle_request_queue_time_seconds",
                "From the arrival of a generation to its turn",
                &REQUEST_BUCKETS,
            )?,
            prefill_time: histogram(
                "candle_request_prefill_time_seconds",
                "From the turn of a generation to its first token",
                &REQUEST_BUCKETS,
            )?,
            decode_time: histogram(
                "candle_request_decode_time_seconds",
                "From the first token of a generation to its end",
                &REQUEST_BUCKETS,
            )?,
            time_to_first_token: histogram(
                "candle_time_to_first_token_seconds",
                "From the arrival of a generation to its first token",
                &FIRST_TOKEN_BUCKETS,
            )?,
            time_per_output_token: histogram(
                "candle_time_per_output_token_seconds",
                "Mean time between two tokens of a generation",
                &TOKEN_BUCKETS,
            )?,
            batch_size: histogram("candle_batch_size", "Sequences of a decoding step", &BATCH_BUCKETS)?,
            prompt_tokens: counter(
                "candle_prompt_tokens_total",
                "Tokens of the prompts of ended generations",
            )?,
            generation_tokens: counter("candle_generation_tokens_total", "Tokens generated")?,
            prefix_cache_queries: counter(
                "candle_prefix_cache_queries_total",
                "Tokens of prompts that were looked for in the cache",
            )?,
            prefix_cache_hits: counter(
                "candle_prefix_cache_hits_total",
                "Tokens of prompts that were found in the cache",
            )?,
            finished: IntCounterVec::new(finished, &["finish_reason"]).map_err(defect)?,
            last_step: Mutex::default(),
        })
    }

    /// `sequences` were decoded in one step.
    pub(crate) fn decoded(&self, sequences: usize) {
        self.batch_size.observe(sequences as f64);
    }

    /// A token was generated.
    pub(crate) fn generated(&self) {
        self.generation_tokens.inc();
    }

    /// A generation ended.
    pub(crate) fn finished(&self, summary: &v1::GenerationSummary) {
        let (queue, first, whole) = (
            summary.queue_ms / 1e3,
            summary.time_to_first_token_ms / 1e3,
            summary.duration_ms / 1e3,
        );
        self.request_duration.observe(whole);
        self.queue_time.observe(queue);
        // A generation that was cancelled before had no first token.
        if summary.completion_tokens > 0 {
            self.time_to_first_token.observe(first);
            self.prefill_time.observe((first - queue).max(0.0));
            self.decode_time.observe((whole - first).max(0.0));
        }
        if summary.completion_tokens > 1 {
            let between = f64::from(summary.completion_tokens - 1);
            self.time_per_output_token.observe((whole - first).max(0.0) / between);
        }
        self.prompt_tokens.inc_by(summary.prompt_tokens.into());
        self.prefix_cache_queries.inc_by(summary.prompt_tokens.into());
        self.prefix_cache_hits.inc_by(summary.cached_tokens.into());
        self.finished.with_label_values(&[summary.finish_reason.as_str()]).inc();
    }

    /// A generation's client went away.
    pub(crate) fn abandoned(&self) {
        self.finished.with_label_values(&["abandoned"]).inc();
    }

    /// The last optimizer step that everybody sees is `step`.
    pub(crate) fn trained(&self, step: Option<&v1::OptimizerStep>) {
        *self.last_step.lock().unwrap_or_else(PoisonError::into_inner) = step.cloned();
    }

    /// Calls `show` with every instrument.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn visit(&self, mut show: impl FnMut(&dyn Collector)) -> Result<()> {
        let instruments: [&dyn Collector; 12] = [
            &self.request_duration,
            &self.queue_time,
            &self.prefill_time,
            &self.decode_time,
            &self.time_to_first_token,
            &self.time_per_output_token,
            &self.batch_size,
            &self.prompt_tokens,
            &self.generation_tokens,
            &self.prefix_cache_queries,
            &self.prefix_cache_hits,
            &self.finished,
        ];
        instruments.into_iter().for_each(&mut show);
        let last_step = self.last_step.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(step) = last_step.as_ref() {
            let learning_rate = step
                .options
                .and_then(|options| options.learning_rate)
                .unwrap_or(f64::NAN);
            for (name, help, value) in [
                ("candle_training_step", "Optimizer steps taken", step.step as f64),
                ("candle_training_loss", "Loss of the last step", step.loss),
                (
                    "candle_training_gradient_norm",
                    "Norm of the gradient of the last step, before clipping",
                    step.grad_norm,
                ),
                (
                    "candle_training_learning_rate",
                    "Learning rate of the last step",
                    learning_rate,
                ),
                (
                    "candle_training_loss_scale",
                    "Loss scale of the last step",
                    step.loss_scale,
                ),
            ] {
                show(&gauge(name, help, value)?);
            }
        }
        Ok(())
    }
}

/// A gauge that shows `value`.
///
/// # Errors
/// `Internal`, for a name that cannot be one.
pub(super) fn gauge(name: &str, help: &str, value: f64) -> Result<Gauge> {
    let gauge = Gauge::new(name, help).map_err(defect)?;
    gauge.set(value);
    Ok(gauge)
}

/// The names of instruments are part of the program.
pub(super) fn defect(error: prometheus::Error) -> Error {
    Error::Internal(format!("metrics: {error}"))
}
