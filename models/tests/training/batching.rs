//! A batch gives what its sequences give one by one; merging, cancelling and refusing are all or nothing.

use candle_models::training::{self, AdamW, Gradient, TrainingSequence};
use candle_models::{Error, LoadOptions, Model, training::AdamWOptions};

use crate::support::{
    Golden, MODELS, difference, golden_directory, gradient, load, random_sequence, read_gradient, read_parameter,
    write_element,
};

fn batch(decoder: &candle_models::Decoder) -> Vec<TrainingSequence> {
    (0..7)
        .map(|number| random_sequence(decoder, 1 + 5 * number as usize, number + 10))
        .collect()
}

#[test]
fn batched_equals_single() {
    for name in MODELS {
        let decoder = load(name);
        let batch = batch(&decoder);
        let (together, together_losses) = gradient(&decoder, &batch);
        let mut apart = Gradient::new(&decoder);
        for (sequence, together) in batch.iter().zip(&together_losses) {
            let (one, losses) = gradient(&decoder, std::slice::from_ref(sequence));
            assert_eq!(losses[0].token_count, together.token_count);
            assert!(losses[0].token_count == 0 || (losses[0].loss - together.loss).abs() < 1e-6);
            apart.merge(one).unwrap();
        }
        assert_eq!(
            (together.tokens(), together.micro_batches()),
            (apart.tokens(), apart.micro_batches())
        );
        for parameter in decoder.parameters() {
            let elements = parameter.shape.iter().product();
            let expected = read_gradient(&apart, &parameter.name, elements);
            let (absolute, relative) = difference(&read_gradient(&together, &parameter.name, elements), &expected);
            assert!(
                absolute < 1e-7 || relative < 1e-5,
                "{name} {}: {absolute:e} {relative:e}",
                parameter.name
            );
        }
    }
}

#[test]
fn long_batches_are_split_and_repeatable() {
    let decoder = load("gpt2");
    // More tokens than one pass takes.
    let batch: Vec<_> = (0..70).map(|seed| random_sequence(&decoder, 40, seed)).collect();
    let ((one, losses), (two, _)) = (gradient(&decoder, &batch), gradient(&decoder, &batch));
    assert_eq!(losses.len(), 70);
    assert_eq!(one.tokens(), 70 * 39);
    for parameter in decoder.parameters() {
        let elements = parameter.shape.iter().product();
        let (one, two) = (
            read_gradient(&one, &parameter.name, elements),
            read_gradient(&two, &parameter.name, elements),
        );
        assert!(
            one.iter().zip(&two).all(|(a, b)| a.to_bits() == b.to_bits()),
            "{}",
            parameter.name
        );
    }
}

#[test]
fn reading_a_part_gives_that_part() {
    let decoder = load("gpt2");
    let (gradient, _) = gradient(&decoder, &batch(&decoder));
    // transformers keeps this matrix transposed: [in, out].
    let name = "transformer.h.1.mlp.c_fc.weight";
    let whole = gradient.read(name, 0..15 * 60).unwrap();
    assert_eq!(gradient.read(name, 37..411).unwrap(), whole[37..411]);
    assert!(matches!(
        gradient.read(name, 0..15 * 60 + 1),
        Err(Error::InvalidArgument(_))
    ));
    assert!(matches!(
        gradient.read("transformer.h.9.x", 0..1),
        Err(Error::NotFound(_))
    ));
}

#[test]
fn cancelling_leaves_the_gradient_as_it_was() {
    let decoder = load("llama");
    let sequences = batch(&decoder);
    for before in [&sequences[..0], &sequences[..3]] {
        let (mut partial, _) = gradient(&decoder, before);
        let (expected, _) = gradient(&decoder, before);
        let calls = std::cell::Cell::new(0);
        let cancelled = || {
            calls.set(calls.get() + 1);
            calls.get() > 3
        };
        let error = training::accumulate(&decoder, &sequences, &mut partial, &cancelled).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        assert_eq!(
            (partial.tokens(), partial.micro_batches()),
            (expected.tokens(), expected.micro_batches())
        );
        for parameter in decoder.parameters() {
            let elements = parameter.shape.iter().product();
            assert_eq!(
                read_gradient(&partial, &parameter.name, elements),
                read_gradient(&expected, &parameter.name, elements)
            );
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_skips_the_step() {
    let mut decoder = load("gpt2");
    let sequence = random_sequence(&decoder, 9, 3);
    let mut optimizer = AdamW::new();
    let options = AdamWOptions::default();
    let (finite, _) = gradient(&decoder, std::slice::from_ref(&sequence));
    optimizer.step(&mut decoder, &finite, &options).unwrap();

    let name = "transformer.h.0.mlp.c_fc.weight";
    let weight = read_parameter(&decoder, name)[5];
    write_element(&mut decoder, name, 5, f32::INFINITY);
    let (broken, _) = gradient(&decoder, &[sequence]);
    write_element(&mut decoder, name, 5, weight);
    let before: Vec<_> = decoder
        .parameters()
        .iter()
        .map(|p| read_parameter(&decoder, &p.name))
        .collect();
    let report = optimizer.step(&mut decoder, &broken, &options).unwrap();
    assert!(report.skipped && !report.grad_norm.is_finite());
    assert_eq!(optimizer.steps(), 1);
    let after: Vec<_> = decoder
        .parameters()
        .iter()
        .map(|p| read_parameter(&decoder, &p.name))
        .collect();
    assert_eq!(before, after);
}

#[test]
fn a_step_without_targets_is_refused() {
    let mut decoder = load("qwen2");
    let (gradient, losses) = gradient(&decoder, &[random_sequence(&decoder, 1, 1)]);
    assert!(losses[0].loss.is_nan());
    let error = AdamW::new()
        .step(&mut decoder, &gradient, &AdamWOptions::default())
        .unwrap_err();
    assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
}

#[test]
fn half_precision_is_trained_only_after_it_was_expanded() {
    let path = golden_directory().join("qwen2-bf16");
    let mut decoder = Model::load(&path, &LoadOptions::default()).unwrap().decoder;
    let golden = Golden::open("qwen2");
    let batch = golden.batch(&decoder);
    let mut sum = Gradient::new(&decoder);
    let error = training::accumulate(&decoder, &batch, &mut sum, &|| false).unwrap_err();
    assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
    assert_eq!((sum.micro_batches(), sum.memory_bytes()), (0, 0));
    decoder.make_trainable().unwrap();
    let (expanded, _) = gradient(&decoder, &batch);
    for parameter in decoder.parameters() {
        let expected = golden.floats(&format!("gradient.{}", parameter.name));
        let (_, relative) = difference(&read_gradient(&expanded, &parameter.name, expected.len()), &expected);
        // The weights themselves were rounded to 8 bits.
        assert!(relative < 0.1, "{}: {relative:e}", parameter.name);
    }
}
