//! Every way to keep activations gives the gradients of keeping them all, and the tape tells what is kept.

use std::num::NonZeroUsize;

use candle_models::Decoder;
use candle_models::training::{
    self, ActivationSettings, ActivationStorage, AdamW, AdamWOptions, Compression, Gradient, PassOptions, PassReport,
    Recompute, TrainingSequence,
};

use crate::support::{
    Golden, MODELS, difference, gradient, load, random_sequence, read_gradient, read_parameter, write_element,
};

fn every(n: usize) -> Recompute {
    Recompute::EveryNthBlock(NonZeroUsize::new(n).unwrap())
}

fn settings(recompute: Recompute, compression: Compression) -> ActivationSettings {
    ActivationSettings {
        recompute,
        compression,
        reuse: false,
    }
}

fn reusing(recompute: Recompute, compression: Compression) -> ActivationSettings {
    ActivationSettings {
        reuse: true,
        ..settings(recompute, compression)
    }
}

/// Sequences with common prefixes of several lengths, one twice, and one inside another.
fn forked_sequences(decoder: &Decoder) -> Vec<TrainingSequence> {
    let config = decoder.config();
    let length = config.context_length.min(24);
    let token = |place: usize| (place * 7 % config.vocabulary) as i64;
    let sequence = |fork: usize, length: usize, other: i64, weight: f32| {
        let tokens: Vec<i64> = (0..length)
            .map(|place| {
                if place < fork {
                    token(place)
                } else {
                    (token(place) + other) % config.vocabulary as i64
                }
            })
            .collect();
        TrainingSequence::new(&tokens, None, Some(weight), config).unwrap()
    };
    vec![
        sequence(length, length, 0, 1.0),
        sequence(length - 3, length, 1, 0.5),
        sequence(2, length - 1, 2, 1.0),
        sequence(length, length, 0, 2.0),
        sequence(length - 5, length - 4, 3, 1.0),
        sequence(length, length - 6, 0, 1.0),
        sequence(0, 5, 1, 1.0),
    ]
}

fn pass(activations: ActivationSettings) -> PassOptions<'static> {
    PassOptions {
        activations,
        ..PassOptions::default()
    }
}

/// Every way to recompute: of each block, of pairs, and more than there are.
fn recomputing() -> [Recompute; 3] {
    [Recompute::BLOCKS, every(2), every(100)]
}

fn gradient_with(
    decoder: &Decoder,
    batch: &[TrainingSequence],
    activations: ActivationSettings,
) -> (Gradient, PassReport) {
    let mut gradient = Gradient::new(decoder);
    let report = training::accumulate_in_place(decoder, batch, &mut gradient, &pass(activations), &|| false).unwrap();
    (gradient, report)
}

#[test]
fn recomputed_gradients_are_the_same_bit_for_bit() {
    for name in MODELS {
        let (decoder, golden) = (load(name), Golden::open(name));
        let mut batch = golden.batch(&decoder);
        batch.push(random_sequence(&decoder, 33, 5));
        let (expected, losses) = gradient(&decoder, &batch);
        for recompute in recomputing() {
            let (actual, report) = gradient_with(&decoder, &batch, settings(recompute, Compression::None));
            let bits = |losses: &[training::SequenceLoss]| -> Vec<_> {
                losses
                    .iter()
                    .map(|loss| (loss.loss.to_bits(), loss.token_count))
                    .collect()
            };
            assert_eq!(bits(&report.losses), bits(&losses));
            for parameter in decoder.parameters() {
                let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
                assert!(
                    read(&actual) == read(&expected),
                    "{name} {recompute:?} {}",
                    parameter.name
                );
            }
        }
    }
}

#[test]
fn compressed_gradients_are_pytorchs_to_the_rounding() {
    for name in MODELS {
        let (decoder, golden) = (load(name), Golden::open(name));
        let batch = golden.batch(&decoder);
        let (_, losses) = gradient(&decoder, &batch);
        let ways = [Recompute::None, Recompute::BLOCKS, every(2)]
            .into_iter()
            .flat_map(|recompute| [(recompute, Compression::Bf16, 0.01), (recompute, Compression::Q8, 0.05)]);
        for (recompute, compression, tolerance) in ways {
            let (actual, report) = gradient_with(&decoder, &batch, settings(recompute, compression));
            let same =
                |(a, b): (&training::SequenceLoss, &training::SequenceLoss)| a.loss.to_bits() == b.loss.to_bits();
            assert!(
                report.losses.iter().zip(&losses).all(same),
                "the loss needs no activations"
            );
            let (mut error, mut norm) = (0.0f64, 0.0f64);
            for parameter in decoder.parameters() {
                let expected = golden.floats(&format!("gradient.{}", parameter.name));
                let actual = read_gradient(&actual, &parameter.name, expected.len());
                let squares = |values: &mut dyn Iterator<Item = f32>| -> f64 {
                    values.map(|value| f64::from(value) * f64::from(value)).sum()
                };
                let (own_error, own_norm) = (
                    squares(&mut actual.iter().zip(&expected).map(|(a, e)| a - e)),
                    squares(&mut expected.iter().copied()),
                );
                // Gradients of key biases are near 0, so that alone they would be mostly rounding.
                assert!(
                    own_error.sqrt() < 3.0 * tolerance * own_norm.sqrt() || parameter.name.ends_with("bias"),
                    "{name} {recompute:?} {compression:?} {}: {own_error:e} {own_norm:e}",
                    parameter.name
                );
                (error, norm) = (error + own_error, norm + own_norm);
            }
            let relative = (error / norm).sqrt();
            println!("{name} {recompute:?} {compression:?}: the gradient differs by {relative:e} of its norm");
            assert!(
                relative < tolerance,
                "{name} {recompute:?} {compression:?}: {relative:e}"
            );
        }
    }
}

/// Ten steps against PyTorch, as the golden test does with everything kept.
#[test]
fn ten_steps_match_with_every_setting() {
    let exact = [Recompute::BLOCKS, every(2)].map(|recompute| (settings(recompute, Compression::None), 2e-5));
    let reused = [Recompute::None, every(2)].map(|recompute| (reusing(recompute, Compression::None), 2e-5));
    let rounded = [Recompute::None, Recompute::BLOCKS].map(|recompute| (settings(recompute, Compression::Bf16), 2e-3));
    let bytes = [Recompute::None, Recompute::BLOCKS].map(|recompute| (reusing(recompute, Compression::Q8), 4e-3));
    for name in MODELS {
        for (activations, tolerance) in exact.into_iter().chain(reused).chain(rounded).chain(bytes) {
            let (mut decoder, golden) = (load(name), Golden::open(name));
            let (batch, options) = (golden.batch(&decoder), golden.options());
            let mut optimizer = AdamW::new();
            let mut worst = 0.0f64;
            for (step, loss) in golden.floats("steps.losses").iter().enumerate() {
                let mut sequences = batch.clone();
                sequences.remove(step % batch.len());
                let (gradient, _) = gradient_with(&decoder, &sequences, activations);
                let report = optimizer.step(&mut decoder, &gradient, &options).unwrap();
                worst = worst.max((report.loss - f64::from(*loss)).abs());
            }
            println!("{name} {activations:?}: losses of ten steps differ by {worst:e}");
            assert!(worst < tolerance, "{name} {activations:?}: {worst:e}");
        }
    }
}

#[test]
fn common_prefixes_are_computed_once_for_the_same_gradient() {
    for name in MODELS {
        let decoder = load(name);
        let batch = forked_sequences(&decoder);
        let (expected, report) = gradient_with(&decoder, &batch, ActivationSettings::default());
        let (actual, reused) = gradient_with(&decoder, &batch, reusing(Recompute::None, Compression::None));
        // A row of a product does not depend on the others.
        assert_eq!(reused.losses, report.losses);
        assert_eq!(actual.tokens(), expected.tokens());
        let rows = |report: &PassReport| report.tape[0].shape[0];
        assert!(
            rows(&reused) < rows(&report) * 2 / 3,
            "{} {}",
            rows(&reused),
            rows(&report)
        );
        for parameter in decoder.parameters() {
            let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
            let (absolute, relative) = difference(&read(&actual), &read(&expected));
            assert!(
                absolute < 1e-6 || relative < 1e-5,
                "{name} {}: {absolute:e} {relative:e}",
                parameter.name
            );
        }
        for recompute in recomputing() {
            let (again, _) = gradient_with(&decoder, &batch, reusing(recompute, Compression::None));
            for parameter in decoder.parameters() {
                let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
                assert!(read(&again) == read(&actual), "{name} {recompute:?} {}", parameter.name);
            }
        }
    }
}

#[test]
fn without_common_prefixes_nothing_changes() {
    let decoder = load("llama");
    let batch = [random_sequence(&decoder, 12, 1), random_sequence(&decoder, 9, 2)];
    let (expected, _) = gradient(&decoder, &batch);
    let (actual, _) = gradient_with(&decoder, &batch, reusing(Recompute::None, Compression::None));
    for parameter in decoder.parameters() {
        let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
        assert!(read(&actual) == read(&expected), "{}", parameter.name);
    }
}

#[test]
fn a_cancelled_recomputation_ends() {
    let decoder = load("gpt2");
    let batch = [random_sequence(&decoder, 9, 1)];
    let total = std::cell::Cell::new(0);
    let count = || {
        total.set(total.get() + 1);
        false
    };
    let activations = settings(every(2), Compression::None);
    training::accumulate_in_place(
        &decoder,
        &batch,
        &mut Gradient::new(&decoder),
        &pass(activations),
        &count,
    )
    .unwrap();
    for last in 0..total.get() {
        let asked = std::cell::Cell::new(0);
        let cancel = || asked.replace(asked.get() + 1) == last;
        let mut gradient = Gradient::new(&decoder);
        let error =
            training::accumulate_in_place(&decoder, &batch, &mut gradient, &pass(activations), &cancel).unwrap_err();
        assert!(matches!(error, candle_models::Error::Cancelled));
    }
}

#[test]
fn the_tape_tells_what_is_kept() {
    for name in MODELS {
        let decoder = load(name);
        let batch = [random_sequence(&decoder, 12, 1), random_sequence(&decoder, 20, 2)];
        let tape = |activations| gradient_with(&decoder, &batch, activations).1.tape;
        let all = tape(ActivationSettings::default());
        assert_eq!((all[0].segment.as_str(), all[0].operation), ("embedding", "embedding"));
        assert_eq!(all[0].shape, [32, decoder.config().width]);
        let last = all.last().unwrap();
        assert_eq!((last.segment.as_str(), last.operation), ("head", "cross_entropy"));
        assert_eq!(last.shape, [30]);
        for (position, entry) in all.iter().enumerate() {
            assert!(entry.inputs.iter().all(|input| *input < position), "{entry:?}");
            assert_eq!(entry.inputs.is_empty(), position == 0, "{entry:?}");
        }
        let bytes = |tape: &[training::TapeEntry], storage| -> u64 {
            let of = tape.iter().filter(|entry| entry.storage == storage);
            of.map(|entry| entry.bytes).sum()
        };
        let kept = bytes(&all, ActivationStorage::Kept);
        let blocks = tape(settings(Recompute::BLOCKS, Compression::None));
        let pairs = tape(settings(every(2), Compression::None));
        let shapes = |tape: &[training::TapeEntry]| -> Vec<_> {
            tape.iter()
                .map(|entry| (entry.operation, entry.shape.clone()))
                .collect()
        };
        assert_eq!(shapes(&blocks), shapes(&all));
        let kept_blocks = bytes(&blocks, ActivationStorage::Kept);
        assert!(kept_blocks < kept / 2, "{kept_blocks} {kept}");
        assert!(bytes(&pairs, ActivationStorage::Kept) < kept_blocks);
        assert_eq!(bytes(&blocks, ActivationStorage::Recomputed), 0);
        let compressed = tape(settings(Recompute::None, Compression::Bf16));
        assert!(compressed.iter().any(|entry| entry.dtype == "bf16"));
        let (rest, half) = (
            bytes(&compressed, ActivationStorage::Kept),
            bytes(&compressed, ActivationStorage::Compressed),
        );
        assert_eq!(rest + 2 * half, kept);
        let bytes_each = tape(settings(Recompute::None, Compression::Q8));
        assert!(bytes_each.iter().any(|entry| entry.dtype == "q8"));
        let quarter = bytes(&bytes_each, ActivationStorage::Compressed);
        assert!(quarter > half / 2 && quarter < half * 11 / 20, "{quarter} {half}");
    }
}

#[test]
fn norms_and_biases_can_be_left_out_of_the_decay() {
    for name in MODELS {
        let step = |weight_decay: f64, decay_norms_and_biases: bool| {
            let mut decoder = load(name);
            // Initial biases are 0, where decay does nothing.
            if name == "gpt2" {
                write_element(&mut decoder, "transformer.h.0.mlp.c_fc.bias", 3, 0.5);
            }
            let (gradient, _) = gradient(&decoder, &[random_sequence(&decoder, 15, 3)]);
            let options = AdamWOptions {
                weight_decay,
                decay_norms_and_biases,
                learning_rate: 0.01,
                ..AdamWOptions::default()
            };
            AdamW::new().step(&mut decoder, &gradient, &options).unwrap();
            decoder
        };
        let (grouped, decayed, constant) = (step(0.5, false), step(0.5, true), step(0.0, true));
        for parameter in grouped.parameters() {
            let matrix = parameter.shape.len() == 2;
            let read = |decoder| read_parameter(decoder, &parameter.name);
            let expected = read(if matrix { &decayed } else { &constant });
            assert!(read(&grouped) == expected, "{name} {}", parameter.name);
            if matrix || parameter.name.contains("norm") || parameter.name.contains("c_fc.bias") && name == "gpt2" {
                let differs = read(&decayed) != read(&constant);
                assert!(
                    differs || parameter.name.contains("h.1.mlp"),
                    "{name} {}",
                    parameter.name
                );
            }
        }
    }
}
