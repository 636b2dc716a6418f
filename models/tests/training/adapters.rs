//! LoRA adapters: logits, gradients and ten steps against PyTorch and PEFT (`tests/golden/adapters.py`), over quantised
//! bases, merged, and made from nothing.

use candle_models::adapters::{self, AdapterWeights, Delta, LoraConfig, TargetModules};
use candle_models::training::{self, AdamW, Gradient};
use candle_models::{Decoder, Device, Error, SequenceStep, WeightType, config};

use serde_json::json;

use crate::support::{
    Golden, difference, golden_directory, gradient, load, random_sequence, read_gradient, read_parameter, write_element,
};

/// Each golden adapter with its base.
const ADAPTERS: [(&str, &str); 2] = [("gpt2-lora", "gpt2"), ("llama-lora", "llama")];

fn load_adapter(name: &str, base: &str) -> Decoder {
    adapters::load(&golden_directory().join(name), &load(base)).unwrap()
}

fn logits(decoder: &Decoder, ids: &[u32]) -> Vec<f32> {
    decoder.logits(ids).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A model whose rows are whole blocks of q4_0, held as `kind`.
fn seeded(architecture: &str, kind: &str) -> Decoder {
    let settings = json!({"architecture": architecture, "layers": 2, "width": 64, "heads": 4, "context_length": 32,
        "vocabulary": 90, "feed_forward_width": 96});
    let config = config::from_settings(settings.as_object().unwrap(), None).unwrap();
    let kind = WeightType::from_name(kind).unwrap();
    Decoder::initialize(config, &Device::Cpu, Some(kind), 5).unwrap()
}

/// An adapter of every matrix, none of whose factors is 0.
fn adapter_of_all(base: &Decoder) -> Decoder {
    let config = LoraConfig {
        rank: 3,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    let mut adapter = adapters::create(base, &config, 11).unwrap();
    let names: Vec<String> = adapter.parameters()[adapter.own_parameters()]
        .iter()
        .filter(|parameter| parameter.name.contains("lora_B"))
        .map(|parameter| parameter.name.clone())
        .collect();
    for name in names {
        let values: Vec<f32> = (0..read_parameter(&adapter, &name).len())
            .map(|index| ((index * 37 % 19) as f32 - 9.0) / 90.0)
            .collect();
        adapter.write_parameter(&name, 0, &values).unwrap();
    }
    adapter
}

#[test]
fn logits_match_and_so_do_those_of_the_merged_base() {
    for (name, base) in ADAPTERS {
        let (adapter, golden) = (load_adapter(name, base), Golden::open(name));
        let ids = golden.ids("logits.ids");
        let unmerged = logits(&adapter, &ids);
        let (absolute, relative) = difference(&unmerged, &golden.floats("logits.values"));
        println!("{name}: logits differ by {absolute:e} (relative {relative:e})");
        assert!(relative < 1e-5, "{name} {relative:e}");

        let mut merged = load(base).deep_copy().unwrap();
        Delta::of(&adapter).unwrap().apply(&mut merged).unwrap();
        let merged = logits(&merged, &ids);
        let (_, to_peft) = difference(&merged, &golden.floats("merged.values"));
        let (_, to_unmerged) = difference(&merged, &unmerged);
        println!("{name}: merged logits differ by {to_peft:e} from PEFT's and by {to_unmerged:e} from the unmerged");
        assert!(to_peft < 1e-5 && to_unmerged < 1e-5, "{name}");
    }
}

#[test]
fn a_pass_that_mixes_adapters_gives_each_what_it_gets_alone() {
    for (architecture, kind) in [
        ("gpt2", "f32"),
        ("llama", "q4_0"),
        ("gpt_neox", "f32"),
        ("gptj", "q8_0"),
    ] {
        let base = seeded(architecture, kind);
        let (first, mut second) = (adapter_of_all(&base), adapter_of_all(&base));
        let name = second.parameters()[second.own_parameters().start + 1].name.clone();
        second.write_parameter(&name, 0, &[0.9, -0.8, 0.7]).unwrap();
        let copies = [&first, &second].map(|adapter| AdapterWeights::of(adapter).unwrap());
        let mut merged = first.deep_copy().unwrap();
        merged.set_merged();
        let nothing = AdapterWeights::of(&merged).unwrap();
        assert!(copies[0].memory_bytes() > 0 && nothing.memory_bytes() == 0);
        // Sequence 1 has no adapter, 4 a merged one; those of the first adapter are no neighbours.
        let adapters = [
            Some(&copies[0]),
            None,
            Some(&copies[1]),
            Some(&copies[0]),
            Some(&nothing),
        ];
        let alone = [&first, &base, &second, &first, &base];
        let mut mixed: Vec<_> = adapters.iter().map(|_| base.new_cache()).collect();
        let mut single: Vec<_> = alone.iter().map(|decoder| decoder.new_cache()).collect();
        for step in 0..4_u32 {
            // A few tokens of a prompt beside single tokens.
            let tokens: Vec<Vec<u32>> = (0..5_u32)
                .map(|index| {
                    (0..1 + (index + step) % 3)
                        .map(|token| (token * 31 + index * 7 + step) % 90)
                        .collect()
                })
                .collect();
            let mut batch: Vec<_> = tokens
                .iter()
                .zip(&mut mixed)
                .map(|(tokens, cache)| SequenceStep { tokens, cache })
                .collect();
            let found: Vec<Vec<f32>> = base
                .forward_adapted(&mut batch, &adapters, &|| false)
                .unwrap()
                .to_vec2()
                .unwrap();
            for (index, (decoder, cache)) in alone.iter().zip(&mut single).enumerate() {
                let tokens = &tokens[index];
                let logits = decoder.forward(&mut [SequenceStep { tokens, cache }]).unwrap();
                let expected: Vec<Vec<f32>> = logits.to_vec2().unwrap();
                assert_eq!(
                    found[index], expected[0],
                    "{architecture}, sequence {index}, step {step}"
                );
            }
        }
        let ids = [3, 1, 4, 1, 5];
        let over = copies[1].over(&base).unwrap();
        assert_eq!(logits(&over, &ids), logits(&second, &ids));
        assert_ne!(logits(&over, &ids), logits(&base, &ids));
        assert!(matches!(AdapterWeights::of(&base), Err(Error::InvalidArgument(_))));
        assert!(matches!(copies[0].over(&first), Err(Error::Unsupported(_))));
    }
}

#[test]
fn losses_and_every_gradient_match() {
    for (name, base) in ADAPTERS {
        let (adapter, golden) = (load_adapter(name, base), Golden::open(name));
        let (gradient, losses) = gradient(&adapter, &golden.batch(&adapter));
        for (loss, expected) in losses.iter().zip(golden.floats("batch.losses")) {
            let both_unknown = loss.loss.is_nan() && expected.is_nan();
            assert!(both_unknown || (loss.loss - f64::from(expected)).abs() < 1e-5);
        }
        let mut worst = (0.0, 0.0);
        for parameter in &adapter.parameters()[adapter.own_parameters()] {
            let expected = golden.floats(&format!("gradient.{}", parameter.name));
            let actual = read_gradient(&gradient, &parameter.name, expected.len());
            let (absolute, relative) = difference(&actual, &expected);
            assert!(relative < 2e-5, "{name} {}: {absolute:e} {relative:e}", parameter.name);
            worst = (absolute.max(worst.0), relative.max(worst.1));
        }
        println!("{name}: gradients differ by {:e} (relative {:e})", worst.0, worst.1);
        // No memory for the gradient of the base.
        assert_eq!(gradient.memory_bytes(), 4 * adapter.parameter_count());
    }
}

#[test]
fn ten_steps_match_and_leave_the_base_alone() {
    for (name, base) in ADAPTERS {
        let (mut adapter, golden) = (load_adapter(name, base), Golden::open(name));
        let (batch, options) = (golden.batch(&adapter), golden.options());
        let mut optimizer = AdamW::new();
        let (losses, norms) = (golden.floats("steps.losses"), golden.floats("steps.norms"));
        for (step, (loss, norm)) in losses.iter().zip(&norms).enumerate() {
            let mut gradient = Gradient::new(&adapter);
            let kept = batch
                .iter()
                .enumerate()
                .filter(|(number, _)| number % batch.len() != step % batch.len());
            for (_, sequence) in kept {
                let sequence = std::slice::from_ref(sequence);
                training::accumulate(&adapter, sequence, &mut gradient, &|| false).unwrap();
            }
            let report = optimizer.step(&mut adapter, &gradient, &options).unwrap();
            assert!(
                (report.loss - f64::from(*loss)).abs() < 2e-5,
                "{name} {step}: {} {loss}",
                report.loss
            );
            let relative = (report.grad_norm / f64::from(*norm) - 1.0).abs();
            assert!(relative < 2e-5, "{name} step {step}: {} {norm}", report.grad_norm);
        }
        for parameter in &adapter.parameters()[adapter.own_parameters()] {
            let expected = golden.floats(&format!("final.{}", parameter.name));
            let (absolute, _) = difference(&read_parameter(&adapter, &parameter.name), &expected);
            assert!(absolute < 2e-5, "{name} {}: {absolute:e}", parameter.name);
        }
        let untouched = load(base);
        for (held, original) in adapter.parameters()[..adapter.own_parameters().start]
            .iter()
            .zip(untouched.parameters())
        {
            let weight = |decoder: &Decoder, name: &String| {
                let index = decoder.parameters().iter().position(|info| info.name == *name).unwrap();
                let weight = decoder.weight(candle_models::ParameterId(index));
                weight
                    .to_f32()
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap()
            };
            assert_eq!(weight(&adapter, &held.name), weight(&untouched, &original.name));
        }
    }
}

#[test]
fn a_quantised_base_gives_the_gradients_of_its_expanded_weights_and_stays_quantised() {
    for (architecture, kind) in [
        ("gpt2", "q4_0"),
        ("llama", "q8_0"),
        ("gpt_neox", "q4_0"),
        ("gptj", "q8_0"),
        ("gpt2", "bf16"),
        ("llama", "f16"),
        ("gptj", "bf16"),
    ] {
        let base = seeded(architecture, kind);
        let adapter = adapter_of_all(&base);
        let mut expanded = base.deep_copy().unwrap();
        expanded.make_trainable().unwrap();
        let mut reference = adapter.deep_copy().unwrap();
        reference.share_base(&expanded).unwrap();
        let batch = [random_sequence(&base, 30, 1), random_sequence(&base, 9, 2)];
        let (found, losses) = gradient(&adapter, &batch);
        let (expected, expected_losses) = gradient(&reference, &batch);
        assert!((losses[0].loss - expected_losses[0].loss).abs() < 1e-5);
        for parameter in &adapter.parameters()[adapter.own_parameters()] {
            let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
            let (_, relative) = difference(&read(&found), &read(&expected));
            assert!(
                relative < 2e-4,
                "{architecture} {kind} {}: {relative:e}",
                parameter.name
            );
        }
        assert_eq!(adapter.dtype(), kind);
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let base = seeded("llama", "q8_0");
    let mut adapter = adapter_of_all(&base);
    let batch = [random_sequence(&base, 20, 3)];
    let (gradient, _) = gradient(&adapter, &batch);
    for name in [
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
        "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight",
    ] {
        let values = read_parameter(&adapter, name);
        let expected = read_gradient(&gradient, name, values.len());
        for index in [0, 7, values.len() - 1] {
            let step = 2e-2;
            let mut loss = |by: f32| {
                write_element(&mut adapter, name, index, values[index] + by);
                training::accumulate(&adapter, &batch, &mut Gradient::new(&adapter), &|| false).unwrap()[0].loss
            };
            let numeric = (loss(step) - loss(-step)) / f64::from(2.0 * step);
            loss(0.0);
            let error = (numeric - f64::from(expected[index])).abs();
            assert!(error < 3e-4, "{name} {index}: {numeric} {}", expected[index]);
        }
    }
}

#[test]
fn a_new_adapter_changes_nothing_and_its_seed_decides() {
    let base = seeded("gpt2", "f32");
    let config = LoraConfig::default();
    let [first, same, other] = [7, 7, 8].map(|seed| adapters::create(&base, &config, seed).unwrap());
    let name = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight";
    assert_eq!(read_parameter(&first, name), read_parameter(&same, name));
    assert_ne!(read_parameter(&first, name), read_parameter(&other, name));
    let largest = read_parameter(&first, name)
        .into_iter()
        .fold(0.0f32, |most, value| most.max(value.abs()));
    assert!(largest <= 0.125 && largest > 0.1, "uniform in 1 / sqrt(64): {largest}");
    assert_eq!(logits(&first, &[1, 2, 3]), logits(&base, &[1, 2, 3]));
    // 2 layers of A [8, 64] and B [192, 8].
    assert_eq!(first.parameter_count(), 2 * 8 * (64 + 192));
    assert_eq!(first.memory_bytes(), 4 * first.parameter_count());
}

#[test]
fn what_cannot_be_is_refused_by_its_name() {
    let base = seeded("gpt2", "f32");
    let names = |names: &[&str]| TargetModules::Names(names.iter().map(|&name| name.to_owned()).collect());
    let default = LoraConfig::default();
    for (config, what) in [
        (
            LoraConfig {
                rank: 0,
                ..default.clone()
            },
            "rank is 0",
        ),
        (
            LoraConfig {
                rank: 65,
                ..default.clone()
            },
            "rank is 65; it must be at most 64",
        ),
        (
            LoraConfig {
                alpha: f64::NAN,
                ..default.clone()
            },
            "alpha is NaN",
        ),
        (
            LoraConfig {
                alpha: 0.0,
                ..default.clone()
            },
            "alpha is 0",
        ),
        (
            LoraConfig {
                dropout: 1.0,
                ..default.clone()
            },
            "dropout is 1",
        ),
        (
            LoraConfig {
                target_modules: names(&["c_attn", "q_proj"]),
                ..default.clone()
            },
            "\"q_proj\"",
        ),
        (
            LoraConfig {
                target_modules: names(&["attn"]),
                ..default.clone()
            },
            "c_attn, c_fc, c_proj",
        ),
        (
            LoraConfig {
                target_modules: names(&["wte"]),
                ..default.clone()
            },
            "\"wte\"",
        ),
    ] {
        let error = adapters::create(&base, &config, 0).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    }
    let adapter = adapters::create(&base, &default, 0).unwrap();
    assert!(matches!(
        adapters::create(&adapter, &default, 0),
        Err(Error::Unsupported(_))
    ));
    let sharing = json!({"architecture": "gpt2", "layers": 2, "width": 64, "heads": 4, "context_length": 32,
        "vocabulary": 90, "share": "all"});
    let sharing = config::from_settings(sharing.as_object().unwrap(), None).unwrap();
    let sharing = Decoder::initialize(sharing, &Device::Cpu, None, 5).unwrap();
    let refused = adapters::create(&sharing, &default, 0);
    assert!(matches!(refused, Err(Error::Unsupported(_))));
    assert!(matches!(TargetModules::from_names(&[]), Err(Error::InvalidArgument(_))));
    let quantised = seeded("gpt2", "q8_0");
    let delta = Delta::of(&adapters::create(&quantised, &default, 0).unwrap()).unwrap();
    let refused = delta.apply(&mut quantised.deep_copy().unwrap());
    assert!(matches!(refused, Err(Error::Unsupported(_))));
}

#[test]
fn files_of_another_base_or_damaged_ones_are_refused() {
    let golden = golden_directory().join("gpt2-lora");
    let refuse = |directory: &std::path::Path, base: &Decoder, what: &str| {
        let error = adapters::load(directory, base).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    };
    refuse(&golden, &load("llama"), "\"c_attn\"");
    // Another width.
    refuse(
        &golden,
        &seeded("gpt2", "f32"),
        "has shape [3, 15] where the base needs [3, 64]",
    );
    refuse(&golden_directory().join("gpt2"), &load("gpt2"), "adapter_config.json");

    let folder = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(golden.join("adapter_config.json")).unwrap();
    let write = |config: &str| std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    write(&config);
    refuse(folder.path(), &load("gpt2"), "no adapter_model.safetensors");
    let weights = std::fs::read(golden.join("adapter_model.safetensors")).unwrap();
    let path = folder.path().join("adapter_model.safetensors");
    std::fs::write(&path, &weights).unwrap();
    adapters::load(folder.path(), &load("gpt2")).unwrap();
    write(&config.replace("\"c_proj\"", "\"c_fc\""));
    refuse(
        folder.path(),
        &load("gpt2"),
        "mlp.c_fc.lora_A.weight` of shape [3, 15] is missing",
    );
    write(&config.replace("\"c_attn\",", ""));
    refuse(
        folder.path(),
        &load("gpt2"),
        "attn.c_attn.lora_A.weight` belongs to no module",
    );
    write(&config.replace("\"r\": 3", "\"r\": 2"));
    refuse(
        folder.path(),
        &load("gpt2"),
        "has shape [3, 15] where the base needs [2, 15]",
    );
    write(&config.replace("\"none\"", "\"all\""));
    refuse(folder.path(), &load("gpt2"), "bias is \"all\"");
    write(&config);
    std::fs::write(&path, &weights[..weights.len() - 4]).unwrap();
    refuse(folder.path(), &load("gpt2"), "adapter_model.safetensors");
}
