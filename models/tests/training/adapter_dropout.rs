//! Training adapters with dropout: against PEFT with the same masks (`tests/golden/adapter_dropout.py`), against finite
//! differences, and against itself with other settings and packings.

use candle_models::adapters;
use candle_models::training::{
    self, ActivationSettings, Compression, DropoutKey, DropoutSettings, Gradient, HalfWeights, PassOptions, PassReport,
    Precision, Recompute, TrainingSequence,
};
use candle_models::{Decoder, Device};

use crate::support::{
    Golden, difference, golden_directory, load, random_sequence, read_gradient, read_parameter, write_element,
};

const ADAPTERS: [(&str, &str); 2] = [("gpt2-lora", "gpt2"), ("llama-lora", "llama")];

/// A golden adapter with another probability in its configuration.
fn load_adapter((name, base): (&str, &str), probability: f64) -> Decoder {
    let golden = golden_directory().join(name);
    let folder = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(golden.join("adapter_config.json")).unwrap();
    let changed = config.replace("\"lora_dropout\": 0.0", &format!("\"lora_dropout\": {probability}"));
    assert!(probability == 0.0 || changed != config);
    std::fs::write(folder.path().join("adapter_config.json"), changed).unwrap();
    let file = "adapter_model.safetensors";
    std::fs::copy(golden.join(file), folder.path().join(file)).unwrap();
    adapters::load(folder.path(), &load(base)).unwrap()
}

fn options(first_sequence: u64) -> PassOptions<'static> {
    PassOptions {
        dropout_key: DropoutKey {
            seed: 42,
            step: 5,
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

/// Names and sizes of the factors.
fn factors(adapter: &Decoder) -> Vec<(String, usize)> {
    let own = &adapter.parameters()[adapter.own_parameters()];
    own.iter().map(|info| (info.name.clone(), info.elements())).collect()
}

fn assert_same_bits(adapter: &Decoder, actual: &Gradient, expected: &Gradient, what: &str) {
    for (name, elements) in factors(adapter) {
        let read = |gradient| read_gradient(gradient, &name, elements);
        assert!(read(actual) == read(expected), "{what} {name}");
    }
}

#[test]
fn losses_and_gradients_are_pefts_with_the_same_masks() {
    for pair in ADAPTERS {
        let (name, _) = pair;
        let path = golden_directory().join(format!("{name}.dropout.safetensors"));
        let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let floats = |key: &str| golden[key].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let adapter = load_adapter(pair, 0.25);
        let (gradient, report) = run(&adapter, &Golden::open(name).batch(&adapter), &options(0));
        for (loss, expected) in report.losses.iter().zip(floats("batch.losses")) {
            let both_unknown = loss.loss.is_nan() && expected.is_nan();
            assert!(both_unknown || (loss.loss - f64::from(expected)).abs() < 1e-5);
        }
        for (parameter, elements) in factors(&adapter) {
            let actual = read_gradient(&gradient, &parameter, elements);
            let (absolute, relative) = difference(&actual, &floats(&format!("gradient.{parameter}")));
            assert!(relative < 2e-5, "{name} {parameter}: {absolute:e} {relative:e}");
        }
    }
}

#[test]
fn central_differences_agree_for_fixed_masks() {
    for pair in ADAPTERS {
        let mut adapter = load_adapter(pair, 0.4);
        let batch = [random_sequence(&adapter, 13, 1), random_sequence(&adapter, 6, 2)];
        let (analytic, _) = run(&adapter, &batch, &options(3));
        for (name, elements) in factors(&adapter) {
            let (values, expected) = (
                read_parameter(&adapter, &name),
                read_gradient(&analytic, &name, elements),
            );
            for index in [0, elements / 2, elements - 1] {
                let mut loss = |value: f32| {
                    write_element(&mut adapter, &name, index, value);
                    run(&adapter, &batch, &options(3)).0.loss().unwrap()
                };
                let (low, high) = (values[index] - 1e-2, values[index] + 1e-2);
                let slope = (loss(high) - loss(low)) / f64::from(high - low);
                loss(values[index]);
                let tolerance = 1e-3 + 0.03 * f64::from(expected[index].abs());
                let error = (slope - f64::from(expected[index])).abs();
                assert!(error < tolerance, "{name}[{index}]: {slope} {}", expected[index]);
            }
        }
    }
}

/// Whatever is kept, in every precision: the same bits.
#[test]
fn recomputation_gives_the_same_bits() {
    for pair in ADAPTERS {
        let adapter = load_adapter(pair, 0.3);
        let batch: Vec<_> = (0..3)
            .map(|number| random_sequence(&adapter, 9 + 6 * number as usize, number))
            .collect();
        for precision in Precision::ALL {
            let half = HalfWeights::new(&adapter, precision).unwrap();
            let with = |recompute| PassOptions {
                activations: ActivationSettings {
                    recompute,
                    compression: Compression::None,
                    reuse: true,
                },
                half: half.as_ref(),
                loss_scale: 64.0,
                ..options(2)
            };
            let (expected, report) = run(&adapter, &batch, &with(Recompute::None));
            let (actual, again) = run(&adapter, &batch, &with(Recompute::BLOCKS));
            assert_eq!(again.losses, report.losses);
            assert_same_bits(&adapter, &actual, &expected, &format!("{pair:?} {precision:?}"));
        }
    }
}

/// Sequences with a common prefix have masks of their own, even where activations are reused.
#[test]
fn masks_depend_on_a_sequences_number_alone() {
    for pair in ADAPTERS {
        let adapter = load_adapter(pair, 0.3);
        let long = random_sequence(&adapter, 20, 1);
        let batch = [long.clone(), random_sequence(&adapter, 7, 2), long];
        let reusing = |first| PassOptions {
            activations: ActivationSettings {
                reuse: true,
                ..ActivationSettings::default()
            },
            ..options(first)
        };
        assert!(!reusing(0).reuses(&adapter) && reusing(0).reuses(&load_adapter(pair, 0.0)));
        let (together, report) = run(&adapter, &batch, &reusing(0));
        assert_ne!(report.losses[0], report.losses[2]);
        let mut apart = Gradient::new(&adapter);
        for (number, sequence) in (0..).zip(&batch) {
            let (one, losses) = run(&adapter, std::slice::from_ref(sequence), &reusing(number));
            assert!((losses.losses[0].loss - report.losses[number as usize].loss).abs() < 1e-6);
            apart.merge(one).unwrap();
        }
        for (name, elements) in factors(&adapter) {
            let read = |gradient| read_gradient(gradient, &name, elements);
            let (absolute, relative) = difference(&read(&apart), &read(&together));
            assert!(absolute < 1e-6 || relative < 1e-5, "{name}: {relative:e}");
        }
    }
}

/// The key of the masks is of no consequence without dropout, and dropout is none in inference.
#[test]
fn only_training_with_a_probability_drops() {
    for pair in ADAPTERS {
        let (without, with) = (load_adapter(pair, 0.0), load_adapter(pair, 0.5));
        let batch = [random_sequence(&without, 15, 1)];
        let expected = run(&without, &batch, &PassOptions::default());
        let actual = run(&without, &batch, &options(7));
        assert_eq!(actual.1.losses, expected.1.losses);
        assert_same_bits(&without, &actual.0, &expected.0, "without dropout");
        assert_ne!(run(&with, &batch, &options(7)).1.losses, expected.1.losses);
        let tokens = batch[0].tokens();
        assert_eq!(with.score(tokens).unwrap(), without.score(tokens).unwrap());
    }
}

/// The model's own dropout and the adapter's have masks of their own.
#[test]
fn dropout_of_the_model_comes_beside_it() {
    let (without, with) = (load_adapter(ADAPTERS[0], 0.0), load_adapter(ADAPTERS[0], 0.5));
    let batch = [random_sequence(&without, 15, 1)];
    let residual = |options: PassOptions<'static>| PassOptions {
        dropout: DropoutSettings {
            residual: 0.2,
            ..DropoutSettings::default()
        },
        ..options
    };
    let mut losses: Vec<f64> = [&without, &with]
        .into_iter()
        .flat_map(|adapter| [options(0), residual(options(0))].map(|o| run(adapter, &batch, &o).1.losses[0].loss))
        .collect();
    losses.sort_by(f64::total_cmp);
    losses.dedup();
    assert_eq!(losses.len(), 4, "{losses:?}");
}
