//! The tiny models of `tests/golden` and their golden values.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use candle_models::config::{DecoderConfig, from_hugging_face};
use candle_models::training::{self, AdamWOptions, Gradient, IGNORED_TARGET, SequenceLoss, TrainingSequence};
use candle_models::{AttentionBlock, AttentionLayouts, Decoder, Weight};

/// A golden model of every kind, stored in f32.
pub(crate) const MODELS: [&str; 5] = ["gpt2", "llama", "qwen2", "gpt_neox", "gptj"];

/// The folder with the golden files.
pub(crate) fn golden_directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

/// A golden model. Read without the crate's own loader, so that a fault there shows elsewhere.
pub(crate) fn load(name: &str) -> Decoder {
    load_with(name, |_| {})
}

/// A golden model with a changed `config.json`.
pub(crate) fn load_with(name: &str, change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) -> Decoder {
    let mut config = read_config(name);
    change(&mut config);
    build(name, from_hugging_face(&config).unwrap())
}

/// A golden model whose layers all share the parameters of the first.
pub(crate) fn load_shared(name: &str) -> Decoder {
    let mut config = from_hugging_face(&read_config(name)).unwrap();
    config.groups = 1;
    build(name, config)
}

/// A golden model with the windows and block layouts that go with its golden values `NAME-sparse`.
pub(crate) fn load_sparse(name: &str) -> Decoder {
    let golden = Golden::open(&format!("{name}-sparse"));
    let (windows, blocks) = (golden.integers("windows"), golden.integers("blocks"));
    let pattern: Vec<&str> = windows
        .iter()
        .map(|window| if *window > 0 { "banded" } else { "dense" })
        .collect();
    let mut decoder = load_with(name, |config| {
        config.insert("attention_window".into(), windows.iter().max().copied().into());
        config.insert("attention_pattern".into(), pattern.into());
        config.insert("attention_block_size".into(), golden.integers("block_size")[0].into());
    });
    let blocks = blocks.as_chunks::<4>().0.iter().map(|block| {
        let [layer, head, query_block, key_block] = block.map(|number| number as usize);
        AttentionBlock {
            layer,
            head,
            query_block,
            key_block,
        }
    });
    let mut layouts = AttentionLayouts::default();
    layouts.insert(decoder.config(), &blocks.collect::<Vec<_>>()).unwrap();
    decoder.set_attention_layouts(layouts).unwrap();
    decoder
}

fn read_config(name: &str) -> serde_json::Map<String, serde_json::Value> {
    let config = std::fs::read(golden_directory().join(name).join("config.json")).unwrap();
    serde_json::from_slice(&config).unwrap()
}

fn build(name: &str, config: DecoderConfig) -> Decoder {
    let directory = golden_directory().join(name);
    let tensors = candle_core::safetensors::load(directory.join("model.safetensors"), &Device::Cpu).unwrap();
    Decoder::build(config, &Device::Cpu, None, |parameter| {
        // transformers stores GPT-NeoX's head under its former name.
        let former = || tensors.get(&parameter.name.replace("lm_head", "embed_out"));
        let tensor = tensors.get(&parameter.name).or_else(former).unwrap();
        let held = if parameter.transposed {
            tensor.t().unwrap()
        } else {
            tensor.clone()
        };
        Weight::dense(&held)
    })
    .unwrap()
}

/// The golden values of a model.
pub(crate) struct Golden(HashMap<String, Tensor>);

impl Golden {
    /// Reads `NAME.golden.safetensors`.
    pub(crate) fn open(name: &str) -> Self {
        let path = golden_directory().join(format!("{name}.golden.safetensors"));
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }

    /// The elements of a floating-point tensor.
    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        let tensor = self.0.get(name).unwrap_or_else(|| panic!("no golden tensor {name}"));
        tensor
            .to_dtype(DType::F32)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    /// The elements of an integer tensor.
    pub(crate) fn integers(&self, name: &str) -> Vec<i64> {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("no golden tensor {name}"))
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    /// The elements of a tensor in double precision.
    pub(crate) fn doubles(&self, name: &str) -> Vec<f64> {
        self.0[name].to_vec1().unwrap()
    }

    /// The elements of an integer tensor of any shape.
    pub(crate) fn integers_of(&self, name: &str) -> Vec<i64> {
        self.0[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Token ids.
    pub(crate) fn ids(&self, name: &str) -> Vec<u32> {
        self.integers(name)
            .iter()
            .map(|&id| u32::try_from(id).unwrap())
            .collect()
    }

    /// The golden batch.
    pub(crate) fn batch(&self, decoder: &Decoder) -> Vec<TrainingSequence> {
        let weights = self.floats("batch.weights");
        let sequence = |(number, weight): (usize, &f32)| {
            let ids = self.integers(&format!("batch.{number}.ids"));
            let targets = self.integers(&format!("batch.{number}.targets"));
            TrainingSequence::new(&ids, Some(&targets), Some(*weight), decoder.config()).unwrap()
        };
        weights.iter().enumerate().map(sequence).collect()
    }

    /// The settings of the golden steps.
    pub(crate) fn options(&self) -> AdamWOptions {
        let values: Vec<f64> = self.0["steps.options"].to_vec1().unwrap();
        let [learning_rate, beta1, beta2, epsilon, weight_decay, norm] = values[..] else {
            panic!("six settings")
        };
        AdamWOptions {
            learning_rate,
            beta1,
            beta2,
            epsilon,
            weight_decay,
            max_grad_norm: Some(norm),
            ..AdamWOptions::default()
        }
    }
}

/// The gradient of a batch and its losses.
pub(crate) fn gradient(decoder: &Decoder, batch: &[TrainingSequence]) -> (Gradient, Vec<SequenceLoss>) {
    let mut gradient = Gradient::new(decoder);
    let losses = training::accumulate(decoder, batch, &mut gradient, &|| false).unwrap();
    (gradient, losses)
}

/// All elements of a parameter's gradient.
pub(crate) fn read_gradient(gradient: &Gradient, name: &str, elements: usize) -> Vec<f32> {
    gradient.read(name, 0..elements).unwrap()
}

/// All elements of a parameter, in transformers' layout.
pub(crate) fn read_parameter(decoder: &Decoder, name: &str) -> Vec<f32> {
    let elements = decoder.parameters()[decoder.parameter_id(name).unwrap().0].elements();
    let data = decoder.read_parameter(name, 0..elements).unwrap().data;
    data.chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect()
}

/// Changes one element of a parameter, counted in transformers' layout.
pub(crate) fn write_element(decoder: &mut Decoder, name: &str, index: usize, value: f32) {
    let id = decoder.parameter_id(name).unwrap();
    let (shape, transposed) = (
        decoder.parameters()[id.0].shape.clone(),
        decoder.parameters()[id.0].transposed,
    );
    let held = if transposed {
        index % shape[1] * shape[0] + index / shape[1]
    } else {
        index
    };
    let tensor = decoder.weight(id).as_f32().unwrap();
    let mut values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    values[held] = value;
    let changed = Tensor::from_vec(values, tensor.dims(), &Device::Cpu).unwrap();
    *decoder.weight_mut(id) = Weight::Dense(changed);
}

/// A sequence of pseudo-random tokens with the default targets.
pub(crate) fn random_sequence(decoder: &Decoder, length: usize, seed: u64) -> TrainingSequence {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as i64 % decoder.config().vocabulary as i64
    };
    let tokens: Vec<i64> = (0..length).map(|_| next()).collect();
    let mut targets: Vec<i64> = tokens[1..].to_vec();
    targets.push(IGNORED_TARGET);
    TrainingSequence::new(&tokens, Some(&targets), None, decoder.config()).unwrap()
}

/// Largest absolute difference, and that over the largest golden magnitude.
pub(crate) fn difference(actual: &[f32], expected: &[f32]) -> (f32, f32) {
    assert_eq!(actual.len(), expected.len());
    assert!(actual.iter().all(|value| value.is_finite()), "not finite");
    let absolute = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| (a - e).abs())
        .fold(0.0, f32::max);
    let magnitude = expected.iter().map(|e| e.abs()).fold(0.0, f32::max);
    (absolute, absolute / magnitude.max(1e-12))
}

/// Asserts that a sequence and a single token have the golden logits.
pub(crate) fn assert_logits_match(name: &str, decoder: &Decoder, golden: &Golden) {
    for case in ["logits", "one"] {
        let logits = decoder.logits(&golden.ids(&format!("{case}.ids"))).unwrap();
        let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
        let (absolute, relative) = difference(&logits, &golden.floats(&format!("{case}.values")));
        println!("{name} {case}: logits differ by {absolute:e} (relative {relative:e})");
        assert!(relative < 1e-5, "{name} {case} {relative:e}");
    }
}
