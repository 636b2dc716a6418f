//! Time and memory of training steps of GPT-2 124M (random weights) on batches of 4 sequences of 256 tokens.
//!
//! `cargo bench -p candle-models --bench training_step [-- STEPS LAYERS WIDTH SEQUENCES LENGTH SETTING=VALUE…]`, where
//! the settings are training settings of `models.config`: `recompute=blocks`, `precision=bf16`.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use candle_models::training::{
    self, AdamW, DropoutKey, Gradient, HalfWeights, LossScale, PassOptions, TrainingSequence, TrainingSettings,
};
use candle_models::{LoadOptions, Model};
use serde_json::json;

// As in the server: pages that were freed stay with the process.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A line of /proc/self/status in MB.
fn memory(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap_or("");
    line.split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse::<f64>().ok())
        .unwrap_or(f64::NAN)
        / 1024.0
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let number = |index: usize, default: usize| numbers.get(index).copied().unwrap_or(default);
    let (steps, layers, width) = (number(0, 5), number(1, 12), number(2, 768));
    let (sequences, length) = (number(3, 4), number(4, 256));
    let mut settings = serde_json::Map::new();
    for argument in std::env::args() {
        if let Some((name, value)) = argument.split_once('=') {
            settings.insert(name.into(), value.parse().unwrap_or_else(|_| json!(value)));
        }
    }
    let settings = TrainingSettings::read(&settings).unwrap();
    let config = json!({"architecture": "gpt2", "layers": layers, "width": width, "heads": width / 64,
        "context_length": 1024.max(length), "vocabulary": 50257});
    let options = LoadOptions {
        config: config.as_object().unwrap().clone(),
        ..LoadOptions::default()
    };
    let mut model = Model::create(&options, None).unwrap();
    println!(
        "{} parameters, {sequences} x {length} tokens, {} MB",
        model.decoder.parameter_count(),
        memory("VmRSS:")
    );

    let mut optimizer = AdamW::new();
    let mut gradient = Gradient::new(&model.decoder);
    let (mut gradients, mut updates, mut held) = (vec![], vec![], 0u64);
    for step in 0..steps {
        let batch: Vec<_> = (0..sequences)
            .map(|sequence| {
                let token = |position: usize| ((step + 31 * sequence + 7 * position) * 2_654_435 % 50257) as i64;
                let tokens: Vec<i64> = (0..length).map(token).collect();
                TrainingSequence::new(&tokens, None, None, model.decoder.config()).unwrap()
            })
            .collect();
        let start = Instant::now();
        gradient.reset().unwrap();
        let half = HalfWeights::new(&model.decoder, settings.precision.precision).unwrap();
        let pass = PassOptions {
            alone: false,
            activations: settings.activations,
            half: half.as_ref(),
            loss_scale: settings.precision.loss_scaling.factor(LossScale::default()),
            dropout: settings.dropout,
            router: settings.router,
            dropout_key: DropoutKey {
                step: step as u64,
                ..DropoutKey::default()
            },
        };
        let passed = training::accumulate_in_place(&model.decoder, &batch, &mut gradient, &pass, &|| false).unwrap();
        held = passed.tape.iter().map(|entry| entry.bytes).sum();
        let middle = Instant::now();
        let options = settings.options(optimizer.steps() + 1);
        let report = optimizer.step(&mut model.decoder, &gradient, &options).unwrap();
        let (gradient_time, update_time) = ((middle - start).as_secs_f64(), middle.elapsed().as_secs_f64());
        println!(
            "step {} loss {:.4} gradient {gradient_time:.3} s, update {update_time:.3} s",
            report.step, report.loss
        );
        gradients.push(gradient_time);
        updates.push(update_time);
    }
    println!(
        "median gradient {:.3} s, update {:.3} s, activations {:.0} MB, peak {:.0} MB",
        median(&mut gradients),
        median(&mut updates),
        held as f64 / 1048576.0,
        memory("VmHWM:")
    );
}
