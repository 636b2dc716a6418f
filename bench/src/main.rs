//! Measures the whole path: decode, prefill, training and parameter scans, from SQL and over gRPC directly, and the parts
//! of a training step alone, in turn with the same work in PyTorch and llama.cpp. Every figure is the median over the rounds of one run.
//!
//! `make bench` runs it. `BENCH_ROUNDS` sets the number of rounds (default 5), `BENCH_PYTHON` a Python with PyTorch,
//! `BENCH_LLAMA_CPP_PYTHON` one with llama-cpp-python; arguments name the subjects that are measured (default all).
#![allow(clippy::unwrap_used)] // A benchmark that cannot measure has nothing better to do than to stop.

mod direct;
mod durability;
mod evaluation;
mod generation;
mod overhead;
mod parts;
mod peer;
mod prompts;
mod report;
mod scan;
mod serving;
mod training;

// Pages that were freed stay with the process (`scripts/bench` says so in the environment), as in the server.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

use report::{Measurements, Results};

/// A name, and what makes its measurements.
type Subject = (&'static str, fn() -> Measurements);

fn main() {
    let rounds: usize = std::env::var("BENCH_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(5);
    let mut results = Results::default();
    let only: Vec<String> = std::env::args().skip(1).collect();
    let subjects: &[Subject] = &[
        ("smollm2", generation::smollm2),
        ("smollm2-sequences", generation::smollm2_sequences),
        ("gpt2", generation::gpt2),
        ("gpt2-bf16", generation::gpt2_bf16),
        ("gpt2-sequences", generation::gpt2_sequences),
        ("prefix", serving::prefix),
        ("memory", serving::memory),
        ("overhead", overhead::measurements),
        ("training", training::measurements),
        ("growth", training::growth),
        ("parts", parts::measurements),
        ("durability", durability::measurements),
        ("evaluation", evaluation::measurements),
        ("scan", scan::measurements),
        ("gradients", scan::gradients),
    ];
    // One subject at a time, so that only one holds memory; within it everything is measured in turn.
    for (_, subject) in subjects
        .iter()
        .filter(|(name, _)| only.is_empty() || only.iter().any(|only| only == name))
    {
        let mut measurements = subject();
        for round in 0..=rounds {
            for measurement in &mut measurements {
                let figures = measurement.run();
                // The first round warms caches up.
                if round > 0 {
                    results.add(figures);
                }
            }
        }
    }
    results.print();
}
