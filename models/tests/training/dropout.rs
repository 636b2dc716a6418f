//! Dropout: its masks depend on nothing but their names, and gradients are those of the loss that it makes.

use candle_models::Decoder;
use candle_models::training::{
    self, ActivationSettings, Compression, DropoutKey, DropoutSettings, Gradient, HalfWeights, PassOptions, PassReport,
    Precision, Recompute, TrainingSequence,
};

use crate::support::{MODELS, difference, load, random_sequence, read_gradient, read_parameter, write_element};

const DROPOUT: DropoutSettings = DropoutSettings {
    embedding: 0.1,
    residual: 0.3,
    attention: 0.2,
};

fn options(step: u64, first_sequence: u64) -> PassOptions<'static> {
    PassOptions {
        dropout: DROPOUT,
        dropout_key: DropoutKey {
            seed: 42,
            step,
            first_sequence,
        },
        ..PassOptions::default()
    }
}

fn run(decoder: &Decoder, batch: &[TrainingSequence], options: &PassOptions<'_>) -> (Gradient, PassReport) {
    let mut gradient = Gradient::new(decoder);
    let report = training::accumulate_in_place(decoder, batch, &mut gradient, options, &|| false).unwrap();
    (gradient, report)
}

fn batch(decoder: &Decoder) -> Vec<TrainingSequence> {
    (0..4)
        .map(|number| random_sequence(decoder, 5 + 7 * number as usize, number))
        .collect()
}

#[test]
fn the_same_names_give_the_same_masks_in_any_packing() {
    for name in MODELS {
        let decoder = load(name);
        let batch = batch(&decoder);
        let (together, report) = run(&decoder, &batch, &options(3, 10));
        let (again, _) = run(&decoder, &batch, &options(3, 10));
        let mut apart = Gradient::new(&decoder);
        for (number, sequence) in (10..).zip(&batch) {
            let (one, losses) = run(&decoder, std::slice::from_ref(sequence), &options(3, number));
            let difference = losses.losses[0].loss - report.losses[number as usize - 10].loss;
            assert!(difference.abs() < 1e-6, "{name} {number}: {difference:e}");
            apart.merge(one).unwrap();
        }
        for parameter in decoder.parameters() {
            let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
            assert!(read(&together) == read(&again), "{name} {}", parameter.name);
            let (absolute, relative) = difference(&read(&apart), &read(&together));
            assert!(
                absolute < 1e-6 || relative < 1e-5,
                "{name} {}: {relative:e}",
                parameter.name
            );
        }
    }
}

#[test]
fn other_names_give_other_masks() {
    let decoder = load("gpt2");
    let batch = batch(&decoder);
    let loss = |options: &PassOptions<'_>| run(&decoder, &batch, options).1.losses[0].loss;
    let base = options(3, 10);
    let other_seed = PassOptions {
        dropout_key: DropoutKey {
            seed: 43,
            ..base.dropout_key
        },
        ..base
    };
    let mut losses = vec![
        loss(&base),
        loss(&options(4, 10)),
        loss(&options(3, 11)),
        loss(&other_seed),
    ];
    for at in [
        |dropout: &mut DropoutSettings| dropout.embedding = 0.0,
        |dropout: &mut DropoutSettings| dropout.residual = 0.0,
        |dropout: &mut DropoutSettings| dropout.attention = 0.0,
    ] {
        let mut without = base;
        at(&mut without.dropout);
        losses.push(loss(&without));
    }
    losses.push(loss(&PassOptions::default()));
    let count = losses.len();
    losses.sort_by(f64::total_cmp);
    losses.dedup();
    assert_eq!(losses.len(), count, "{losses:?}");
}

/// Over many masks the loss is near that without dropout: what is left is scaled up.
#[test]
fn the_mean_over_masks_is_near_the_loss_without() {
    let decoder = load("llama");
    let batch = [random_sequence(&decoder, 30, 1)];
    let little = PassOptions {
        dropout: DropoutSettings {
            embedding: 0.02,
            residual: 0.02,
            attention: 0.02,
        },
        ..options(0, 0)
    };
    let losses = (0..200).map(|step| {
        let mut options = little;
        options.dropout_key.step = step;
        run(&decoder, &batch, &options).1.losses[0].loss
    });
    let mean = losses.sum::<f64>() / 200.0;
    let without = run(&decoder, &batch, &PassOptions::default()).1.losses[0].loss;
    assert!((mean / without - 1.0).abs() < 0.05, "{mean} {without}");
}

#[test]
fn central_differences_agree_for_fixed_masks() {
    for name in MODELS {
        let mut decoder = load(name);
        let batch = [random_sequence(&decoder, 13, 1), random_sequence(&decoder, 6, 2)];
        let (analytic, _) = run(&decoder, &batch, &options(1, 0));
        let parameters: Vec<String> = decoder.parameters().iter().map(|p| p.name.clone()).collect();
        let mut worst = 0.0f64;
        for parameter in &parameters {
            let values = read_parameter(&decoder, parameter);
            let expected = read_gradient(&analytic, parameter, values.len());
            for coordinate in 0..3 {
                let index = (coordinate * 7919 + 3) % values.len();
                let mut loss = |value: f32| {
                    write_element(&mut decoder, parameter, index, value);
                    run(&decoder, &batch, &options(1, 0)).0.loss().unwrap()
                };
                let (low, high) = (values[index] - 1e-2, values[index] + 1e-2);
                let slope = (loss(high) - loss(low)) / f64::from(high - low);
                write_element(&mut decoder, parameter, index, values[index]);
                let difference = (slope - f64::from(expected[index])).abs();
                worst = worst.max(difference);
                let tolerance = 1e-3 + 0.03 * f64::from(expected[index].abs());
                assert!(
                    difference < tolerance,
                    "{name} {parameter}[{index}]: {difference:e} of {}",
                    expected[index]
                );
            }
        }
        println!("{name}: central differences differ by {worst:e}");
    }
}

/// Whatever is kept, in every precision, with dropout: the same bits.
#[test]
fn recomputation_gives_the_same_bits() {
    for name in MODELS {
        let decoder = load(name);
        let batch = batch(&decoder);
        for precision in Precision::ALL {
            let half = HalfWeights::new(&decoder, precision).unwrap();
            let with = |recompute, compression| PassOptions {
                activations: ActivationSettings {
                    recompute,
                    compression,
                    reuse: true,
                },
                half: half.as_ref(),
                loss_scale: 256.0,
                ..options(2, 5)
            };
            let (expected, report) = run(&decoder, &batch, &with(Recompute::None, Compression::None));
            let pairs = Recompute::EveryNthBlock(std::num::NonZeroUsize::new(2).unwrap());
            for recompute in [Recompute::BLOCKS, pairs] {
                let (actual, again) = run(&decoder, &batch, &with(recompute, Compression::None));
                assert_eq!(again.losses, report.losses);
                assert_eq!(actual.underflows(), expected.underflows());
                for parameter in decoder.parameters() {
                    let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
                    let name = format!("{name} {precision:?} {recompute:?} {}", parameter.name);
                    assert!(read(&actual) == read(&expected), "{name}");
                }
            }
            // Compressed, to the rounding.
            let (actual, _) = run(&decoder, &batch, &with(Recompute::None, Compression::Bf16));
            for parameter in decoder.parameters() {
                let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
                let (absolute, relative) = difference(&read(&actual), &read(&expected));
                assert!(
                    absolute < 1e-3 || relative < 0.05,
                    "{name} {}: {relative:e}",
                    parameter.name
                );
            }
        }
    }
}
