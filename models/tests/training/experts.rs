//! Mixtures of experts against PyTorch (`tests/golden/experts.py`) and finite differences, in every shape.

use candle_core::Device;
use candle_models::config::from_settings;
use candle_models::training::{
    self, ActivationSettings, AdamW, Compression, Gradient, HalfWeights, PassOptions, Precision, Recompute,
    RouterSettings, SequenceLoss, TrainingSequence,
};
use candle_models::{
    Decoder, ExpertGradient, ExpertRows, ExpertWeights, ExpertsCall, GatedRows, LoadOptions, Model, Pending,
    RemoteExperts, SequenceStep,
};
use serde_json::{Value, json};

use crate::support::{
    Golden, assert_logits_match, difference, golden_directory, random_sequence, read_gradient, read_parameter,
    write_element,
};

const MODELS: [&str; 3] = ["mixtral", "olmoe", "qwen2_moe"];

fn load(name: &str) -> (Decoder, Golden, PassOptions<'static>) {
    let model = Model::load(&golden_directory().join(name), &LoadOptions::default()).unwrap();
    let golden = Golden::open(name);
    let [balance_loss, z_loss] = golden.doubles("router.options")[..] else {
        panic!("two factors")
    };
    let options = PassOptions {
        router: RouterSettings {
            balance_loss,
            z_loss,
            capacity_factor: None,
        },
        ..PassOptions::default()
    };
    (model.decoder, golden, options)
}

fn made(settings: Value) -> Decoder {
    let mut all = json!({"architecture": "olmoe", "layers": 2, "width": 10, "heads": 1, "feed_forward_width": 3,
        "context_length": 40, "vocabulary": 23});
    for (field, value) in settings.as_object().unwrap() {
        all[field] = value.clone();
    }
    let config = from_settings(all.as_object().unwrap(), None).unwrap();
    let mut decoder = Decoder::initialize(config, &Device::Cpu, None, 7).unwrap();
    // Large enough that every part matters.
    let names: Vec<String> = decoder.parameters().iter().map(|info| info.name.clone()).collect();
    for name in names
        .iter()
        .filter(|name| !name.contains("norm") && !name.ends_with("switches"))
    {
        let factor = if name.ends_with("mlp.gate.weight") { 60.0 } else { 15.0 };
        let values: Vec<f32> = read_parameter(&decoder, name)
            .iter()
            .map(|value| value * factor)
            .collect();
        decoder.write_parameter(name, 0, &values).unwrap();
    }
    decoder
}

fn run(decoder: &Decoder, batch: &[TrainingSequence], options: &PassOptions<'_>) -> (Gradient, Vec<SequenceLoss>) {
    let mut gradient = Gradient::new(decoder);
    let report = training::accumulate_in_place(decoder, batch, &mut gradient, options, &|| false).unwrap();
    (gradient, report.losses)
}

/// Parameters that transformers has too.
fn listed(decoder: &Decoder) -> impl Iterator<Item = &candle_models::ParameterInfo> {
    decoder.parameters().iter().filter(|info| info.is_listed())
}

#[test]
fn logits_match() {
    for name in MODELS {
        let (decoder, golden, _) = load(name);
        assert_logits_match(name, &decoder, &golden);
    }
}

#[test]
fn losses_and_every_gradient_match() {
    for name in MODELS {
        let (decoder, golden, options) = load(name);
        let (gradient, losses) = run(&decoder, &golden.batch(&decoder), &options);
        for (loss, expected) in losses.iter().zip(golden.floats("batch.losses")) {
            let same = loss.loss.is_nan() && expected.is_nan() || (loss.loss - f64::from(expected)).abs() < 1e-5;
            assert!(same, "{name}: {} is not {expected}", loss.loss);
        }
        let total = f64::from(golden.floats("batch.loss")[0]);
        assert!((gradient.loss().unwrap() - total).abs() < 1e-5, "{name}: {total}");
        for parameter in listed(&decoder) {
            let expected = golden.floats(&format!("gradient.{}", parameter.name));
            let actual = read_gradient(&gradient, &parameter.name, expected.len());
            let (absolute, relative) = difference(&actual, &expected);
            assert!(
                absolute < 1e-6 || relative < 3e-5,
                "{name} {}: {absolute:e} {relative:e}",
                parameter.name
            );
        }
    }
}

#[test]
fn ten_steps_match() {
    for name in MODELS {
        let (mut decoder, golden, options) = load(name);
        let batch = golden.batch(&decoder);
        let mut optimizer = AdamW::new();
        for (step, loss) in golden.floats("steps.losses").iter().enumerate() {
            let mut sequences = batch.clone();
            sequences.remove(step % batch.len());
            let (gradient, _) = run(&decoder, &sequences, &options);
            let report = optimizer.step(&mut decoder, &gradient, &golden.options()).unwrap();
            let difference = (report.loss - f64::from(*loss)).abs();
            assert!(difference < 3e-5, "{name} step {step}: {} {loss}", report.loss);
            let norm = f64::from(golden.floats("steps.norms")[step]);
            assert!((report.grad_norm / norm - 1.0).abs() < 3e-5, "{name} step {step}");
        }
        for parameter in listed(&decoder) {
            let expected = golden.floats(&format!("final.{}", parameter.name));
            let (absolute, _) = difference(&read_parameter(&decoder, &parameter.name), &expected);
            assert!(absolute < 5e-5, "{name} {}: {absolute:e}", parameter.name);
        }
    }
}

/// Every shape, with all losses, against central differences. Where a step brings a token to another expert the loss jumps,
/// so that such a step says nothing.
#[test]
fn central_differences_agree() {
    for (settings, capacity_factor) in [
        (json!({"num_experts": 1, "num_experts_per_tok": 1}), None),
        (
            json!({"num_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": true, "layers": 1}),
            None,
        ),
        (
            json!({"num_experts": 5, "num_experts_per_tok": 2, "feed_forward_width": 1}),
            Some(0.8),
        ),
        (
            json!({"architecture": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2,
                "shared_expert_intermediate_size": 5, "shared_expert_gate": false, "norm_topk_prob": true}),
            Some(0.5),
        ),
        (
            json!({"architecture": "mixtral", "num_experts": 4, "share": "all", "heads": 2, "key_value_heads": 1,
                "head_dim": 4}),
            None,
        ),
    ] {
        let mut decoder = made(settings.clone());
        let options = PassOptions {
            router: RouterSettings {
                balance_loss: 0.3,
                z_loss: 0.2,
                capacity_factor,
            },
            ..PassOptions::default()
        };
        let batch = [
            random_sequence(&decoder, 9, 1),
            random_sequence(&decoder, 5, 2),
            random_sequence(&decoder, 1, 3),
        ];
        let (gradient, _) = run(&decoder, &batch, &options);
        let choices = |decoder: &Decoder| -> Vec<u32> {
            let routes = batch
                .iter()
                .flat_map(|sequence| decoder.routes(sequence.tokens(), &|| false).unwrap());
            routes.map(|route| route.expert).collect()
        };
        let chosen = choices(&decoder);
        let (mut compared, mut jumped) = (0, 0);
        let names: Vec<(String, usize)> = listed(&decoder)
            .map(|info| (info.name.clone(), info.elements()))
            .collect();
        for (name, elements) in names {
            let values = read_parameter(&decoder, &name);
            let expected = read_gradient(&gradient, &name, elements);
            for coordinate in 0..5 {
                let index = (coordinate * 7919 + 3) % elements;
                let mut loss_at = |value: f32| {
                    write_element(&mut decoder, &name, index, value);
                    let same = choices(&decoder) == chosen;
                    (run(&decoder, &batch, &options).0.loss().unwrap(), same)
                };
                let step = 2e-3;
                let (above, below) = (loss_at(values[index] + step), loss_at(values[index] - step));
                loss_at(values[index]);
                if !(above.1 && below.1) {
                    jumped += 1;
                    continue;
                }
                compared += 1;
                let rise = above.0 - below.0;
                let difference = (rise / f64::from(2.0 * step) - f64::from(expected[index])).abs();
                let tolerance = 2e-3 + 0.03 * f64::from(expected[index].abs());
                assert!(
                    difference < tolerance,
                    "{settings} {name}[{index}]: {difference:e} of {}",
                    expected[index]
                );
            }
        }
        assert!(
            compared > jumped,
            "{settings}: {jumped} steps jumped, {compared} did not"
        );
    }
}

#[test]
fn batched_equals_single_and_recomputed_equals_kept() {
    for (name, capacity_factor) in [("mixtral", Some(0.7)), ("olmoe", None), ("qwen2_moe", Some(0.4))] {
        let (decoder, _, mut options) = load(name);
        options.router.capacity_factor = capacity_factor;
        let batch: Vec<_> = (0..5)
            .map(|number| random_sequence(&decoder, 1 + 6 * number, number as u64))
            .collect();
        let (together, losses) = run(&decoder, &batch, &options);
        let mut apart = Gradient::new(&decoder);
        for (sequence, loss) in batch.iter().zip(&losses) {
            let (one, alone) = run(&decoder, std::slice::from_ref(sequence), &options);
            assert!(
                loss.token_count == 0 || (alone[0].loss - loss.loss).abs() < 1e-6,
                "{name}"
            );
            apart.merge(one).unwrap();
        }
        for (together, apart) in together.load().iter().zip(apart.load()) {
            assert_eq!((together.tokens, together.dropped), (apart.tokens, apart.dropped));
        }
        let dropped: u64 = together.load().iter().map(|load| load.dropped).sum();
        assert_eq!(dropped > 0, capacity_factor.is_some(), "{name}");
        for parameter in listed(&decoder) {
            let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
            let (absolute, relative) = difference(&read(&together), &read(&apart));
            assert!(
                absolute < 1e-6 || relative < 2e-5,
                "{name} {}: {relative:e}",
                parameter.name
            );
        }
        for (recompute, compression) in [
            (Recompute::BLOCKS, Compression::None),
            (Recompute::None, Compression::Bf16),
        ] {
            let activations = ActivationSettings {
                recompute,
                compression,
                reuse: true,
            };
            let (again, _) = run(&decoder, &batch, &PassOptions { activations, ..options });
            for parameter in listed(&decoder) {
                let read = |gradient| read_gradient(gradient, &parameter.name, parameter.elements());
                let (_, relative) = difference(&read(&again), &read(&together));
                let tolerance = if compression == Compression::None { 2e-5 } else { 0.05 };
                assert!(relative < tolerance, "{name} {}: {relative:e}", parameter.name);
            }
        }
    }
}

#[test]
fn half_precision_is_near() {
    for name in MODELS {
        let (decoder, golden, mut options) = load(name);
        let half = HalfWeights::new(&decoder, Precision::Bf16).unwrap();
        options.half = half.as_ref();
        let (gradient, losses) = run(&decoder, &golden.batch(&decoder), &options);
        for (loss, expected) in losses.iter().zip(golden.floats("batch.losses")) {
            assert!(
                expected.is_nan() || (loss.loss - f64::from(expected)).abs() < 0.05,
                "{name}: {}",
                loss.loss
            );
        }
        let name = "model.layers.1.mlp.experts.down_proj";
        let expected = golden.floats(&format!("gradient.{name}"));
        let (_, relative) = difference(&read_gradient(&gradient, name, expected.len()), &expected);
        assert!(relative < 0.1, "{relative:e}");
    }
}

#[test]
fn a_row_is_the_same_alone_and_in_a_batch() {
    for dtype in [None, Some("q8_0".to_owned())] {
        let settings = json!({"architecture": "mixtral", "layers": 2, "width": 32, "heads": 2, "feed_forward_width": 32,
            "context_length": 40, "vocabulary": 23, "num_experts": 6, "num_experts_per_tok": 3});
        let options = LoadOptions {
            dtype,
            config: settings.as_object().unwrap().clone(),
            ..LoadOptions::default()
        };
        let decoder = Model::create(&options, None).unwrap().decoder;
        let prompts: Vec<Vec<u32>> = (0..9)
            .map(|n| (0..1 + 4 * n).map(|i| (i * 7 + n) % 23).collect())
            .collect();
        let logits = |prompts: &[Vec<u32>]| -> Vec<Vec<f32>> {
            let mut caches: Vec<_> = prompts.iter().map(|_| decoder.new_cache()).collect();
            let mut steps: Vec<_> = prompts
                .iter()
                .zip(&mut caches)
                .map(|(tokens, cache)| SequenceStep { tokens, cache })
                .collect();
            decoder.forward(&mut steps).unwrap().to_vec2().unwrap()
        };
        let together = logits(&prompts);
        for (prompt, together) in prompts.iter().zip(&together) {
            assert_eq!(logits(std::slice::from_ref(prompt))[0], *together);
        }
    }
}

#[test]
fn routes_match() {
    for name in MODELS {
        let (decoder, golden, _) = load(name);
        let (experts, gates) = (golden.integers_of("routes.experts"), golden.floats("routes.gates"));
        let ids = golden.ids("logits.ids");
        let routes = decoder.routes(&ids, &|| false).unwrap();
        let per_token = experts.len() / decoder.config().layers / ids.len();
        assert_eq!(routes.len(), experts.len());
        for route in routes {
            let place = (route.layer * ids.len() + route.position) * per_token + route.rank;
            assert_eq!(i64::from(route.expert), experts[place], "{name} {route:?}");
            assert!(
                (route.gate - gates[place]).abs() < 1e-5,
                "{name} {route:?} {}",
                gates[place]
            );
        }
    }
}

#[test]
fn switches_decide_and_are_kept_in_checkpoints() {
    use candle_models::training::checkpoint;
    let mut model = Model::load(&golden_directory().join("mixtral"), &LoadOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let save = |model: &Model, name: &str| {
        let directory = folder.path().join(name);
        checkpoint::save(&directory, model, &AdamW::new(), checkpoint::Details::default()).unwrap();
        let names =
            candle_core::safetensors::load(directory.join("model.safetensors"), &Device::Cpu).unwrap_or_default();
        (checkpoint::load(&directory, &Device::Cpu).unwrap().model, names)
    };
    let (_, names) = save(&model, "plain");
    assert!(names.contains_key("model.layers.0.mlp.experts.gate_up_proj"));
    assert!(!names.keys().any(|name| name.ends_with("switches")));
    // Of layer 1: expert 2 is off, and a bias brings all tokens to expert 4.
    let switches = [0.0, 0.0, 0.0, 0.0, 1e6, 1.0, 1.0, 0.0, 1.0, 1.0];
    model
        .decoder
        .write_parameter("model.layers.1.mlp.gate.switches", 0, &switches)
        .unwrap();
    let (restored, _) = save(&model, "switched");
    let ids: Vec<u32> = (0..30).collect();
    let routes = model.decoder.routes(&ids, &|| false).unwrap();
    assert_eq!(routes, restored.decoder.routes(&ids, &|| false).unwrap());
    for route in routes.iter().filter(|route| route.layer == 1) {
        assert!(route.expert != 2 && (route.rank > 0 || route.expert == 4), "{route:?}");
    }
    assert!(routes.iter().any(|route| route.layer == 0 && route.expert == 2));
    let sequence = random_sequence(&model.decoder, 20, 1);
    let (gradient, _) = run(&model.decoder, &[sequence], &PassOptions::default());
    let load = &gradient.load()[5..];
    assert_eq!((load[2].tokens, load[4].tokens), (0, 20));
}

/// Servers that hold some of the experts, played by this process: what they get are rows, and weights if they ask for them.
#[derive(Debug)]
struct Elsewhere {
    experts: Vec<usize>,
    calls: std::sync::atomic::AtomicUsize,
}

impl RemoteExperts for Elsewhere {
    fn holds(&self, expert: usize) -> bool {
        self.experts.contains(&expert)
    }

    fn forward<'a>(
        &self,
        call: ExpertsCall<'a>,
        groups: Vec<ExpertRows>,
    ) -> candle_models::Result<Pending<'a, Vec<Vec<f32>>>> {
        self.calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(Box::new(move |_| {
            let output = |group: &ExpertRows| {
                let weights = sent(call, group.expert)?;
                match call.products {
                    Some(products) => weights.forward(&group.rows, products),
                    None => weights.infer(&group.rows),
                }
            };
            groups.iter().map(output).collect()
        }))
    }

    fn backward<'a>(
        &self,
        call: ExpertsCall<'a>,
        groups: Vec<GatedRows>,
    ) -> candle_models::Result<Pending<'a, Vec<ExpertGradient>>> {
        self.calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(Box::new(move |_| {
            let gradient = |group: &GatedRows| {
                let weights = sent(call, group.expert)?;
                weights.backward(&group.rows, &group.gates, &group.gradient, call.products.unwrap())
            };
            groups.iter().map(gradient).collect()
        }))
    }
}

/// An expert's weights, by way of bytes.
fn sent(call: ExpertsCall<'_>, expert: usize) -> candle_models::Result<ExpertWeights> {
    let weights = call.decoder.expert_weights(call.layer, expert)?;
    let [up, down] = weights.to_bytes()?;
    let copy = ExpertWeights::from_bytes(call.decoder, weights.types(), [&up, &down])?;
    assert_eq!(copy.digest()?, call.decoder.expert_digest(call.layer, expert)?);
    Ok(copy)
}

#[test]
fn experts_elsewhere_train_as_here() {
    for (settings, experts) in [
        (json!({"num_experts": 1, "num_experts_per_tok": 1}), vec![0]),
        (
            json!({"num_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": true, "layers": 1}),
            vec![2, 0],
        ),
        (
            json!({"num_experts": 5, "num_experts_per_tok": 2, "feed_forward_width": 1}),
            vec![0, 1, 4],
        ),
        (
            json!({"architecture": "mixtral", "num_experts": 4, "share": "all", "heads": 2, "key_value_heads": 1,
                "head_dim": 4}),
            vec![1],
        ),
    ] {
        for (precision, capacity_factor) in [(Precision::F32, None), (Precision::Bf16, Some(0.8))] {
            let (mut here, mut split) = (made(settings.clone()), made(settings.clone()));
            let servers = std::sync::Arc::new(Elsewhere {
                experts: experts.clone(),
                calls: 0.into(),
            });
            split.set_remote_experts(Some(servers.clone()));
            let mut optimizers = [AdamW::new(), AdamW::new()];
            for step in 0..3u64 {
                let batch = [random_sequence(&here, 9, step), random_sequence(&here, 1, step + 9)];
                let pass = |decoder: &Decoder, alone: bool| {
                    let half = HalfWeights::new(decoder, precision).unwrap();
                    let options = PassOptions {
                        half: half.as_ref(),
                        alone,
                        activations: ActivationSettings {
                            recompute: Recompute::EveryNthBlock(std::num::NonZero::<usize>::MIN),
                            ..ActivationSettings::default()
                        },
                        router: RouterSettings {
                            balance_loss: 0.3,
                            z_loss: 0.2,
                            capacity_factor,
                        },
                        ..PassOptions::default()
                    };
                    run(decoder, &batch, &options)
                };
                let (expected, losses) = pass(&here, false);
                let (gradient, split_losses) = pass(&split, false);
                let (again, _) = pass(&split, true);
                for (loss, split) in losses.iter().zip(&split_losses) {
                    let same = loss.loss.is_nan() && split.loss.is_nan() || (loss.loss - split.loss).abs() < 1e-5;
                    assert!(same || precision != Precision::F32, "{settings} {loss:?} {split:?}");
                }
                for info in listed(&here) {
                    let [expected, actual, alone] =
                        [&expected, &gradient, &again].map(|g| read_gradient(g, &info.name, info.elements()));
                    let (absolute, relative) = difference(&actual, &expected);
                    let tolerance = if precision == Precision::F32 { 2e-5 } else { 2e-2 };
                    assert!(
                        absolute < 1e-6 || relative < tolerance,
                        "{settings} {precision:?} {} {absolute:e} {relative:e}",
                        info.name
                    );
                    // A log is replayed without the servers.
                    assert_eq!(actual, alone, "{settings} {}", info.name);
                }
                let options = training::AdamWOptions::default();
                optimizers[0].step(&mut here, &expected, &options).unwrap();
                optimizers[1].step(&mut split, &expected, &options).unwrap();
            }
            let calls = servers.calls.load(std::sync::atomic::Ordering::Relaxed);
            let layers = settings["layers"].as_u64().unwrap_or(2) as usize;
            // Forward, again for every layer but the last one's output, and back; each step.
            assert!(calls >= 3 * (2 * layers), "{calls}");
            let tokens = [1, 2, 3, 4, 5, 6, 7];
            let logits = [&here, &split].map(|decoder| decoder.logits(&tokens).unwrap().to_vec2::<f32>().unwrap());
            assert_eq!(logits[0], logits[1], "{settings}");
        }
    }
}

#[test]
fn an_experts_digest_follows_its_weights() {
    let mut decoder = made(json!({"num_experts": 3, "num_experts_per_tok": 1}));
    let before: Vec<_> = (0..3).map(|expert| decoder.expert_digest(1, expert).unwrap()).collect();
    assert!(before[0] != before[1] && before[1] != before[2]);
    // The last element of the second expert's down projection: `[experts, width, inner]`.
    decoder
        .write_parameter("model.layers.1.mlp.experts.down_proj", 2 * 10 * 3 - 1, &[9.0])
        .unwrap();
    let after: Vec<_> = (0..3).map(|expert| decoder.expert_digest(1, expert).unwrap()).collect();
    assert_eq!((before[0], before[2]), (after[0], after[2]));
    assert_ne!(before[1], after[1]);
    for (layer, expert) in [(2, 0), (0, 3)] {
        assert!(decoder.expert_digest(layer, expert).is_err());
    }
}
