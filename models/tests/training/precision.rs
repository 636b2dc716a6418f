//! Training in bf16 and f16 against PyTorch's autocast (`tests/golden/half.py`), against f32, and against itself.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_models::config::from_settings;
use candle_models::training::{
    self, ActivationSettings, ActivationStorage, AdamW, AdamWOptions, Gradient, HalfWeights, LossScale, LossScaling,
    PassOptions, PassReport, Precision, Recompute, TrainingSequence,
};
use candle_models::{Decoder, Tokenizer};
use serde_json::json;

use crate::support::{
    Golden, MODELS, difference, golden_directory, load, random_sequence, read_gradient, read_parameter,
};

const HALVES: [Precision; 2] = [Precision::Bf16, Precision::F16];

/// The gradient of a batch in some precision, each target's loss scaled by `scale`.
fn gradient_in(
    decoder: &Decoder,
    batch: &[TrainingSequence],
    precision: Precision,
    scale: f64,
) -> (Gradient, PassReport) {
    let half = HalfWeights::new(decoder, precision).unwrap();
    let options = PassOptions {
        half: half.as_ref(),
        loss_scale: scale,
        ..PassOptions::default()
    };
    let mut gradient = Gradient::new(decoder);
    let report = training::accumulate_in_place(decoder, batch, &mut gradient, &options, &|| false).unwrap();
    (gradient, report)
}

/// What PyTorch gave.
fn golden_half(name: &str) -> HashMap<String, Tensor> {
    let path = golden_directory().join(format!("{name}.half.safetensors"));
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// PyTorch's scale of the mean loss as one of each of the about 64 targets.
fn target_scale(torch: &HashMap<String, Tensor>, kind: &str) -> f64 {
    f64::from(floats(&torch[&format!("{kind}.scale")])[0]) / 64.0
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    tensor.to_vec1().unwrap()
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// Each parameter's gradient is PyTorch's to the rounding of the type, and all together are about as near to the exact ones
/// as PyTorch's are: in f16 where the processor has VNNI, whose products round small elements in groups, up to 1.4 times
/// as far.
#[test]
fn gradients_are_pytorchs_to_the_rounding() {
    for name in MODELS {
        let (decoder, golden, torch) = (load(name), Golden::open(name), golden_half(name));
        let batch = golden.batch(&decoder);
        for (precision, tolerance, share) in [(Precision::Bf16, 0.06, 1.2), (Precision::F16, 0.008, 1.6)] {
            let kind = precision.name();
            let scale = target_scale(&torch, kind);
            let (gradient, _) = gradient_in(&decoder, &batch, precision, scale);
            let (mut worst, mut own_error, mut torch_error) = (0.0f32, 0.0, 0.0);
            for parameter in decoder.parameters() {
                let expected = floats(&torch[&format!("{kind}.gradient.{}", parameter.name)]);
                let exact = golden.floats(&format!("gradient.{}", parameter.name));
                let actual = read_gradient(&gradient, &parameter.name, expected.len());
                own_error += squared_distance(&actual, &exact);
                torch_error += squared_distance(&expected, &exact);
                // The gradient of key biases is 0 but for rounding, so it has no relative error.
                let is_key_bias = parameter.name.contains("k_proj.bias") || parameter.name.contains("c_attn.bias");
                let (absolute, relative) = difference(&actual, &expected);
                let close = if is_key_bias {
                    absolute < tolerance / 10.0
                } else {
                    relative < tolerance
                };
                assert!(close, "{name} {kind} {}: {absolute:e} {relative:e}", parameter.name);
                worst = worst.max(if is_key_bias { 0.0 } else { relative });
            }
            let (own_error, torch_error) = (own_error.sqrt(), torch_error.sqrt());
            println!(
                "{name} {kind}: differs by {worst:e} of the largest; error {own_error:e}, PyTorch's {torch_error:e}"
            );
            assert!(
                own_error < share * torch_error,
                "{name} {kind}: {own_error:e} {torch_error:e}"
            );
        }
    }
}

#[test]
fn ten_steps_match_pytorchs() {
    for name in MODELS {
        let (golden, torch) = (Golden::open(name), golden_half(name));
        for (precision, tolerance) in [(Precision::Bf16, 1e-2), (Precision::F16, 2e-3)] {
            let mut decoder = load(name);
            let (batch, options) = (golden.batch(&decoder), golden.options());
            let kind = precision.name();
            let scale = target_scale(&torch, kind);
            let mut optimizer = AdamW::new();
            let mut worst = 0.0f64;
            for (step, loss) in floats(&torch[&format!("{kind}.steps.losses")]).iter().enumerate() {
                let mut sequences = batch.clone();
                sequences.remove(step % batch.len());
                let (gradient, _) = gradient_in(&decoder, &sequences, precision, scale);
                let report = optimizer.step(&mut decoder, &gradient, &options).unwrap();
                assert_eq!((report.skipped, report.overflows), (false, 0));
                worst = worst.max((report.loss - f64::from(*loss)).abs());
            }
            println!("{name} {kind}: losses of ten steps differ by {worst:e}");
            assert!(worst < tolerance, "{name} {kind}: {worst:e}");
        }
    }
}

/// Losses of some steps of a model in the demo's shape on a real text.
fn loss_curve(precision: Precision, scaling: LossScaling) -> Vec<f64> {
    let text = std::fs::read_to_string(golden_directory().join("../../LICENSE")).unwrap();
    let tokenizer = Tokenizer::train_bpe(text.lines(), 512).unwrap();
    let tokens: Vec<i64> = tokenizer.encode(&text).unwrap().into_iter().map(i64::from).collect();
    let settings = json!({"architecture": "gpt2", "layers": 4, "width": 128, "heads": 4, "context_length": 64,
        "vocabulary": 512});
    let config = from_settings(settings.as_object().unwrap(), None).unwrap();
    let mut decoder = Decoder::initialize(config, &Device::Cpu, None, 7).unwrap();
    let sequences: Vec<TrainingSequence> = tokens
        .chunks_exact(64)
        .map(|tokens| TrainingSequence::new(tokens, None, None, decoder.config()).unwrap())
        .collect();
    let (mut optimizer, mut state) = (AdamW::new(), LossScale::default());
    let options = AdamWOptions {
        learning_rate: 1e-3,
        ..AdamWOptions::default()
    };
    let mut losses = vec![];
    while losses.len() < 60 {
        let start = 8 * losses.len() % (sequences.len() - 7);
        let (gradient, _) = gradient_in(&decoder, &sequences[start..start + 8], precision, scaling.factor(state));
        let report = optimizer.step(&mut decoder, &gradient, &options).unwrap();
        state = scaling.after_step(state, report.skipped);
        if !report.skipped {
            losses.push(report.loss);
        }
    }
    losses
}

/// Means of ten neighbouring losses each: a single batch's loss jumps.
fn smoothed(losses: &[f64]) -> Vec<f64> {
    losses
        .windows(10)
        .map(|window| window.iter().sum::<f64>() / 10.0)
        .collect()
}

#[test]
fn the_loss_curve_is_that_of_f32_within_a_percent() {
    let exact = loss_curve(Precision::F32, LossScaling::None);
    assert!(exact[59] < 0.75 * exact[0], "{} {}", exact[0], exact[59]);
    let dynamic = LossScaling::Dynamic { growth_interval: 20 };
    for (precision, scaling) in [(Precision::Bf16, LossScaling::None), (Precision::F16, dynamic)] {
        let curve = loss_curve(precision, scaling);
        let worst = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (b / a - 1.0).abs()).fold(0.0, f64::max);
        let (single, smooth) = (worst(&exact, &curve), worst(&smoothed(&exact), &smoothed(&curve)));
        let (single, smooth) = (100.0 * single, 100.0 * smooth);
        println!(
            "{}: losses differ by {smooth:.3} %, single ones by {single:.3} %",
            precision.name()
        );
        assert!(
            smooth < 1.0 && single < 5.0,
            "{}: {smooth} % {single} %",
            precision.name()
        );
    }
}

/// With the range of f32 a power of two as loss scale changes no bit; in f16 it saves small gradients.
#[test]
fn gradients_are_unscaled() {
    for name in MODELS {
        let decoder = load(name);
        let batch = [random_sequence(&decoder, 15, 1), random_sequence(&decoder, 9, 2)];
        let read = |gradient: &Gradient, parameter: &candle_models::ParameterInfo| {
            read_gradient(gradient, &parameter.name, parameter.elements())
        };
        let run = |precision, scale| gradient_in(&decoder, &batch, precision, scale).0;
        let (plain, scaled) = (run(Precision::Bf16, 1.0), run(Precision::Bf16, 1024.0));
        let odd = run(Precision::Bf16, 1000.0);
        let trainable = vec![true; decoder.parameters().len()];
        let norms = [&plain, &scaled].map(|gradient| gradient.norm(&trainable).unwrap());
        assert_eq!(norms[0], norms[1]);
        let (small, large) = (run(Precision::F16, 2f64.powi(-12)), run(Precision::F16, 2f64.powi(8)));
        assert!(small.underflows() > 10 * large.underflows().max(1), "{name}");
        assert_eq!((plain.overflows(), large.overflows()), (0, 0));
        for parameter in decoder.parameters() {
            let expected = read(&plain, parameter);
            assert!(read(&scaled, parameter) == expected, "{name} {}", parameter.name);
            let (absolute, relative) = difference(&read(&odd, parameter), &expected);
            assert!(
                absolute < 1e-3 || relative < 0.05,
                "{name} {}: {relative:e}",
                parameter.name
            );
        }
        // Sums of different scales are brought together.
        for [first, second] in [[1.0, 1024.0], [1024.0, 1.0], [1000.0, 8.0]] {
            let (mut merged, other) = (run(Precision::Bf16, first), run(Precision::Bf16, second));
            merged.merge_from(&other).unwrap();
            merged.merge(other).unwrap();
            assert_eq!(merged.tokens(), 3 * plain.tokens());
            for parameter in decoder.parameters() {
                let (absolute, relative) = difference(&read(&merged, parameter), &read(&plain, parameter));
                assert!(
                    absolute < 1e-3 || relative < 0.05,
                    "{name} {}: {relative:e}",
                    parameter.name
                );
            }
        }
        let parameter = &decoder.parameters()[0];
        let mut merged = run(Precision::Bf16, 4096.0);
        let (before, count) = (read(&merged, parameter)[0], merged.tokens());
        merged.add_mean(&parameter.name, 0, &[3.0], count).unwrap();
        merged.add_weight(count, 1, None);
        assert!((read(&merged, parameter)[0] - (before + 3.0) / 2.0).abs() < 1e-6);
    }
}

#[test]
fn an_overflow_skips_steps_until_the_scale_fits() {
    let mut decoder = load("gpt2");
    let batch = [random_sequence(&decoder, 15, 1)];
    let scaling = LossScaling::Dynamic { growth_interval: 2 };
    let mut state = LossScale {
        scale: 2f64.powi(30),
        good_steps: 1,
    };
    let mut optimizer = AdamW::new();
    let (mut skipped, mut scales) = (0, vec![]);
    for _ in 0..20 {
        let before: Vec<_> = decoder
            .parameters()
            .iter()
            .map(|p| read_parameter(&decoder, &p.name))
            .collect();
        let (gradient, _) = gradient_in(&decoder, &batch, Precision::F16, scaling.factor(state));
        let report = optimizer
            .step(&mut decoder, &gradient, &AdamWOptions::default())
            .unwrap();
        scales.push(state.scale);
        state = scaling.after_step(state, report.skipped);
        assert_eq!(report.skipped, report.overflows > 0);
        assert!(report.loss.is_finite(), "the loss is not scaled");
        let after: Vec<_> = decoder
            .parameters()
            .iter()
            .map(|p| read_parameter(&decoder, &p.name))
            .collect();
        assert_eq!(before == after, report.skipped);
        skipped += u64::from(report.skipped);
    }
    println!("scales {scales:?}, {skipped} skipped");
    assert!(skipped > 3 && scales[1] == scales[0] / 2.0);
    assert_eq!(optimizer.steps(), 20 - skipped);
    // It works, grows after two good steps, and comes back.
    assert!(skipped < 15 && scales[19] < 2f64.powi(28), "{scales:?}");
}

#[test]
fn the_tape_is_half_as_large() {
    for precision in HALVES {
        for name in MODELS {
            let decoder = load(name);
            let batch = [random_sequence(&decoder, 12, 1)];
            let half = HalfWeights::new(&decoder, precision).unwrap();
            let tape = |half: Option<&HalfWeights>, recompute| {
                let options = PassOptions {
                    activations: ActivationSettings {
                        recompute,
                        ..ActivationSettings::default()
                    },
                    half,
                    ..PassOptions::default()
                };
                let mut gradient = Gradient::new(&decoder);
                training::accumulate_in_place(&decoder, &batch, &mut gradient, &options, &|| false)
                    .unwrap()
                    .tape
            };
            let (plain, halved) = (tape(None, Recompute::None), tape(half.as_ref(), Recompute::None));
            for (plain, halved) in plain.iter().zip(&halved) {
                let of_products = ["query", "key", "value", "attention", "gate", "up", "final_norm"];
                let expected = match of_products.contains(&plain.operation) {
                    true => (precision.name(), plain.bytes / 2),
                    false if plain.storage == ActivationStorage::Recomputed => (halved.dtype, 0),
                    false => ("f32", plain.bytes),
                };
                assert_eq!((halved.dtype, halved.bytes), expected, "{halved:?}");
                assert_eq!(plain.storage, halved.storage, "{halved:?}");
            }
            let blocks = tape(half.as_ref(), Recompute::BLOCKS);
            assert!(
                blocks
                    .iter()
                    .any(|entry| entry.operation == "query" && entry.bytes == 0)
            );
        }
    }
}

#[test]
fn only_what_products_read_is_copied() {
    for name in MODELS {
        let decoder = load(name);
        let read = |parameter: &&candle_models::ParameterInfo| {
            let tied = decoder.config().tied_head && parameter.name.contains("wte")
                || decoder.config().tied_head && parameter.name.contains("embed_tokens");
            let table = ["wte", "wpe", "embed_tokens", "embed_in"]
                .iter()
                .any(|table| parameter.name.contains(table));
            parameter.shape.len() == 2 && (tied || !table)
        };
        let elements: usize = decoder.parameters().iter().filter(read).map(|p| p.elements()).sum();
        for precision in HALVES {
            assert_eq!(HalfWeights::bytes(&decoder, precision), 2 * elements as u64, "{name}");
        }
        assert_eq!(HalfWeights::bytes(&decoder, Precision::F32), 0);
        assert!(HalfWeights::new(&decoder, Precision::F32).unwrap().is_none());
    }
}
