//! Layers that begin to share their parameters, or stop: weights and moments are those of the first layer of a group.

use candle_models::training::{AdamW, AdamWOptions};
use candle_models::{Decoder, Error, ParameterId};

use crate::support::{MODELS, gradient, load, load_shared, random_sequence, read_parameter};

fn logits(decoder: &Decoder) -> Vec<f32> {
    let logits = decoder.logits(&[1, 2, 3, 4, 5]).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// A step along the gradient of a sequence.
fn step(decoder: &mut Decoder, optimizer: &mut AdamW, seed: u64) {
    let batch = [random_sequence(decoder, 9, seed)];
    let (gradient, _) = gradient(decoder, &batch);
    optimizer.step(decoder, &gradient, &AdamWOptions::default()).unwrap();
}

#[test]
fn sharing_takes_the_first_layers_parameters_as_loading_does() {
    for name in MODELS {
        let (shared, sources) = load(name).regrouped(1).unwrap();
        let expected = load_shared(name);
        assert_eq!(shared.parameters(), expected.parameters());
        assert_eq!(shared.config(), expected.config());
        assert_eq!(logits(&shared), logits(&expected));
        let original = load(name);
        for (parameter, ParameterId(source)) in shared.parameters().iter().zip(sources) {
            assert_eq!(parameter.name, original.parameters()[source].name);
        }
    }
}

#[test]
fn ending_it_gives_every_layer_a_copy_that_is_trained_alone() {
    for name in MODELS {
        let shared = load_shared(name);
        let layers = shared.config().layers;
        let (mut apart, sources) = shared.regrouped(layers).unwrap();
        assert_eq!(apart.parameters(), load(name).parameters());
        assert_eq!(logits(&apart), logits(&shared));
        let before = logits(&shared);
        let mut optimizer = AdamW::new();
        step(&mut apart, &mut optimizer, 1);
        // Not even the one that was copied from is the same storage.
        assert_eq!(logits(&shared), before);
        let twins: Vec<usize> = (0..sources.len())
            .filter(|&index| sources.iter().filter(|source| **source == sources[index]).count() == layers)
            .collect();
        assert!(!twins.is_empty());
        let values: Vec<_> = apart
            .parameters()
            .iter()
            .map(|info| read_parameter(&apart, &info.name))
            .collect();
        for first in &twins {
            for second in &twins {
                if first < second && sources[*first] == sources[*second] {
                    assert_ne!(values[*first], values[*second], "{}", apart.parameters()[*first].name);
                }
            }
        }
    }
}

#[test]
fn moments_and_what_is_trained_go_with_the_parameters() {
    for name in MODELS {
        let mut decoder = load(name);
        decoder.set_trainable(ParameterId(0), false);
        let frozen = decoder.parameters()[0].name.clone();
        let mut optimizer = AdamW::new();
        step(&mut decoder, &mut optimizer, 1);
        let layers = decoder.config().layers;
        // There and back: the first layer's parameters and moments, twice.
        let (shared, sources) = decoder.regrouped(1).unwrap();
        let shared_optimizer = optimizer.regrouped(&sources).unwrap();
        assert_eq!(shared_optimizer.steps(), 1);
        assert!(shared_optimizer.memory_bytes() < optimizer.memory_bytes());
        let (mut back, sources) = shared.regrouped(layers).unwrap();
        let mut back_optimizer = shared_optimizer.regrouped(&sources).unwrap();
        assert_eq!(back_optimizer.memory_bytes(), optimizer.memory_bytes());
        assert!(
            back.parameters()
                .iter()
                .any(|info| info.name == frozen && !info.trainable)
        );
        // Two steps from there agree with those of a decoder that was put together by hand.
        let (mut other, sources) = decoder.regrouped(layers).unwrap();
        let mut other_optimizer = optimizer.regrouped(&sources).unwrap();
        step(&mut other, &mut other_optimizer, 2);
        step(&mut decoder, &mut optimizer, 2);
        assert_eq!(logits(&other), logits(&decoder), "the same groups change nothing");
        step(&mut back, &mut back_optimizer, 2);
        assert_eq!(back_optimizer.steps(), 2);
    }
}

#[test]
fn a_number_of_groups_that_cannot_be_is_refused() {
    let decoder = load("gpt2");
    for groups in [0, decoder.config().layers + 1] {
        assert!(matches!(decoder.regrouped(groups), Err(Error::InvalidConfig { .. })));
    }
}
