//! Models written in every format and read back: bit for bit what they were.

use std::path::{Path, PathBuf};

use candle_models::convert::{Conversion, ConversionOptions, Converted, Format};
use candle_models::formats::{GgufModel, TensorSource, open_gguf, open_hugging_face};
use candle_models::{Error, LoadOptions, Model, WeightType};
use serde_json::{Value, json};

use crate::golden;
use crate::weight_formats::{bits, dense};

fn options(format: Format) -> ConversionOptions {
    ConversionOptions {
        format,
        dtype: None,
        shard_bytes: 5 << 30,
    }
}

fn convert(source: &Path, target: &Path, options: ConversionOptions) -> Result<Converted, Error> {
    Conversion::plan(source, options)?.write(target, &mut |_, _| {})
}

fn dtype(name: &str) -> Option<WeightType> {
    Some(WeightType::from_name(name).unwrap())
}

/// Names, types, shapes and bits of all tensors are the same.
fn assert_same(first: &Path, second: &Path) {
    let (first, second) = (open_hugging_face(first).unwrap(), open_hugging_face(second).unwrap());
    assert_eq!(first.names(), second.names());
    for name in first.names() {
        let (first, second) = (dense(&first, name), dense(&second, name));
        assert_eq!((first.dims(), first.dtype()), (second.dims(), second.dtype()), "{name}");
        assert_eq!(bits(&first), bits(&second), "{name}");
    }
}

fn logits(path: &Path) -> Vec<u32> {
    let model = Model::load(path, &LoadOptions::default()).unwrap();
    bits(&model.decoder.logits(&[3, 1, 4, 1, 5, 9, 2, 6]).unwrap())
}

const MODELS: [&str; 6] = ["gpt2", "llama", "qwen2", "qwen2-f16", "qwen2-bf16", "qwen2-sharded"];
/// Those that are not written as GGUF.
const OTHERS: [&str; 3] = ["gpt_neox", "gptj", "gptj-tied"];

/// Converts a golden model to each of these formats, each time from the one before: what it computes stays the same.
/// `check` is given each result with the number of bytes that were written.
fn follow_each_other(model: &str, folder: &Path, steps: &[(&str, Format, u64)], mut check: impl FnMut(&Path, u64)) {
    let mut source = golden(model);
    for &(name, format, shard_bytes) in steps {
        let target = folder.join(name);
        let step = ConversionOptions {
            shard_bytes,
            ..options(format)
        };
        let converted = convert(&source, &target, step).unwrap();
        assert_eq!(logits(&golden(model)), logits(&target), "{model} as {name}");
        check(&target, converted.bytes);
        source = target;
    }
}

#[test]
fn dense_formats_follow_each_other_bit_for_bit() {
    for model in MODELS.into_iter().chain(OTHERS) {
        let folder = tempfile::tempdir().unwrap();
        let steps = [
            ("jsonl", Format::Jsonl, 3000),
            ("model.npz", Format::Npz, 1),
            ("whole", Format::Safetensors, 5 << 30),
            ("whole.npz", Format::Npz, 1),
            ("shards", Format::Safetensors, 2000),
            ("one-file", Format::Jsonl, 5 << 30),
        ];
        follow_each_other(model, folder.path(), &steps, |target, bytes| {
            let length = |path: &Path| std::fs::metadata(path).unwrap().len();
            let files = match target.is_dir() {
                true => std::fs::read_dir(target)
                    .unwrap()
                    .map(|entry| length(&entry.unwrap().path()))
                    .sum(),
                false => length(target),
            };
            assert_eq!(bytes, files, "{}", target.display());
            assert_same(&golden(model), target);
        });
        assert!(folder.path().join("shards/model.safetensors.index.json").exists());
    }
}

#[test]
fn gguf_keeps_f32_bit_for_bit_and_comes_back() {
    for model in MODELS {
        let folder = tempfile::tempdir().unwrap();
        let (gguf, back) = (folder.path().join("m.gguf"), folder.path().join("back"));
        let as_f32 = ConversionOptions {
            dtype: dtype("f32"),
            ..options(Format::Gguf)
        };
        convert(&golden(model), &gguf, as_f32).unwrap();
        convert(&gguf, &back, options(Format::Safetensors)).unwrap();
        let (first, second) = (
            open_hugging_face(&golden(model)).unwrap(),
            open_hugging_face(&back).unwrap(),
        );
        for name in first.names() {
            assert_eq!(
                bits(&dense(&first, name)),
                bits(&dense(&second, name)),
                "{model}: {name}"
            );
        }
        // An epsilon is an f32 in GGUF: near, but not the same.
        let (before, after) = (logits(&golden(model)), logits(&gguf));
        for (before, after) in before
            .into_iter()
            .zip(after)
            .map(|(b, a)| (f32::from_bits(b), f32::from_bits(a)))
        {
            // Half-precision models compute in their own type.
            let tolerance = if model.contains('-') { 0.2 } else { 1e-3 };
            assert!((before - after).abs() < tolerance, "{model}: {before} {after}");
        }
    }
}

#[test]
fn gguf_in_halves_and_eighths() {
    let stored = |gguf: &GgufModel, name: &str| gguf.stored_type(name).unwrap().name();
    for (name, matrix) in [("f16", "f16"), ("bf16", "bf16"), ("q8_0", "f16")] {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("m.gguf");
        let wanted = ConversionOptions {
            dtype: dtype(name),
            ..options(Format::Gguf)
        };
        convert(&golden("llama"), &target, wanted).unwrap();
        let gguf = open_gguf(&target).unwrap();
        // Rows of 20 are no whole blocks, so q8_0 leaves them as f16.
        assert_eq!(stored(&gguf, "model.layers.0.self_attn.q_proj.weight"), matrix);
        assert_eq!(stored(&gguf, "model.norm.weight"), "f32");
        let (gguf, plain) = (Model::load(&target, &LoadOptions::default()), logits(&golden("llama")));
        let found = bits(&gguf.unwrap().decoder.logits(&[3, 1, 4, 1, 5, 9, 2, 6]).unwrap());
        for (found, plain) in found
            .into_iter()
            .zip(plain)
            .map(|(f, p)| (f32::from_bits(f), f32::from_bits(p)))
        {
            assert!((found - plain).abs() < 0.2, "{name}: {found} {plain}");
        }
    }
}

#[test]
fn a_quantised_model_becomes_dense_and_eight_bits_are_whole_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let config = serde_json::json!({"architecture": "llama", "layers": 2, "width": 64, "heads": 4,
        "key_value_heads": 2, "head_dim": 32, "feed_forward_width": 96, "context_length": 16, "vocabulary": 40});
    let made = LoadOptions {
        config: config.as_object().unwrap().clone(),
        ..Default::default()
    };
    let model = Model::create(&made, None).unwrap();
    let optimizer = candle_models::training::AdamW::default();
    candle_models::training::checkpoint::save(&at("dense"), &model, &optimizer, Default::default()).unwrap();
    let eighths = ConversionOptions {
        dtype: dtype("q8_0"),
        ..options(Format::Gguf)
    };
    convert(&at("dense"), &at("q.gguf"), eighths.clone()).unwrap();
    let stored = open_gguf(&at("q.gguf")).unwrap();
    assert_eq!(stored.stored_type("model.layers.1.mlp.down_proj.weight"), dtype("q8_0"));
    convert(&at("q.gguf"), &at("back"), options(Format::Safetensors)).unwrap();
    let (first, second) = (
        open_hugging_face(&at("dense")).unwrap(),
        open_hugging_face(&at("back")).unwrap(),
    );
    for name in first.names() {
        let (first, second) = (dense(&first, name), dense(&second, name));
        let largest = first.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let error = (first - second)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(error <= largest / 127.0, "{name}: {error} of {largest}");
    }
    // Eight bits once more are the same eight bits.
    convert(&at("back"), &at("again.gguf"), eighths).unwrap();
    assert_eq!(
        std::fs::read(at("q.gguf")).unwrap().len(),
        std::fs::read(at("again.gguf")).unwrap().len()
    );
}

#[test]
fn tokenizers_and_templates_come_along() {
    for name in ["gpt2", "llama-bpe", "llama-legacy"] {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let tokenizer = candle_models::Tokenizer::from_files(&golden("text").join(name))
            .unwrap()
            .unwrap();
        let config = serde_json::json!({"architecture": "llama", "layers": 1, "width": 32, "heads": 1,
            "feed_forward_width": 32, "context_length": 16, "vocabulary": tokenizer.vocabulary_size() + 3});
        let made = LoadOptions {
            config: config.as_object().unwrap().clone(),
            ..Default::default()
        };
        let model = Model::create(&made, Some(std::sync::Arc::new(tokenizer.clone()))).unwrap();
        let optimizer = candle_models::training::AdamW::default();
        candle_models::training::checkpoint::save(&at("dense"), &model, &optimizer, Default::default()).unwrap();
        for (target, format) in [
            ("m.npz", Format::Npz),
            ("jsonl", Format::Jsonl),
            ("m.gguf", Format::Gguf),
        ] {
            convert(&at("dense"), &at(target), options(format)).unwrap();
            let read = Model::load(&at(target), &LoadOptions::default()).unwrap();
            let read = read.tokenizer.unwrap();
            for text in [
                "Hello world, it's 2024!",
                " naïve 漢字 🦀\n\n  x",
                "<s>a</s> <|endoftext|>",
            ] {
                assert_eq!(
                    read.encode(text).unwrap(),
                    tokenizer.encode(text).unwrap(),
                    "{name} in {target}: {text:?}"
                );
            }
        }
    }
}

#[test]
fn nothing_is_overwritten_and_nothing_half_written_stays() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.npz");
    std::fs::write(&target, "mine").unwrap();
    let refused = convert(&golden("gpt2"), &target, options(Format::Npz)).unwrap_err();
    assert!(matches!(refused, Error::FailedPrecondition(_)), "{refused:?}");
    assert_eq!(std::fs::read(&target).unwrap(), b"mine");
    let missing = folder.path().join("no/where");
    assert!(matches!(
        convert(&golden("gpt2"), &missing, options(Format::Jsonl)),
        Err(Error::NotFound(_))
    ));

    // A source whose last tensor is damaged: found when it is read, after others have been written.
    let source = folder.path().join("source");
    convert(&golden("gpt2"), &source, options(Format::Jsonl)).unwrap();
    let shard = source.join("weights-00001-of-00001.bin");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    for format in Format::ALL {
        let target = folder.path().join(format!("target-{}", format.name()));
        let error = convert(&source, &target, options(format)).unwrap_err().to_string();
        assert!(error.contains("SHA-256"), "{error}");
    }
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn attention_layouts_come_along_or_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::copy(golden("gpt2/model.safetensors"), source.join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(golden("gpt2/config.json")).unwrap()).unwrap();
    config["attention_block_size"] = json!(3);
    std::fs::write(source.join("config.json"), config.to_string()).unwrap();
    let dense = logits(&source);
    let blocks = config["n_positions"].as_u64().unwrap().div_ceil(3);
    let diagonal: Vec<[u64; 1]> = (0..blocks).map(|block| [block]).collect();
    let layouts = json!({"block_size": 3, "layouts": [{"layer": 0, "head": 1, "key_blocks": diagonal}]});
    std::fs::write(source.join("attention_layouts.json"), layouts.to_string()).unwrap();
    let sparse = logits(&source);
    assert_ne!(sparse, dense);
    for (name, format) in [
        ("folder", Format::Safetensors),
        ("jsonl", Format::Jsonl),
        ("one.npz", Format::Npz),
    ] {
        let target = folder.path().join(name);
        convert(&source, &target, options(format)).unwrap();
        let model = if format == Format::Jsonl {
            target.join("model.jsonl")
        } else {
            target
        };
        assert_eq!(logits(&model), sparse, "{name}");
    }
    let error = Conversion::plan(&source, options(Format::Gguf))
        .unwrap_err()
        .to_string();
    assert!(error.contains("attention layouts"), "{error}");
    // A window that is shorter than the context.
    std::fs::remove_file(source.join("attention_layouts.json")).unwrap();
    config["attention_window"] = json!(2);
    std::fs::write(source.join("config.json"), config.to_string()).unwrap();
    let error = Conversion::plan(&source, options(Format::Gguf))
        .unwrap_err()
        .to_string();
    assert!(error.contains("attention window of 2"), "{error}");
}

#[test]
fn what_a_format_cannot_hold_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let plan = |format, name| {
        let wanted = ConversionOptions {
            dtype: dtype(name),
            ..options(format)
        };
        Conversion::plan(&golden("gpt2"), wanted)
    };
    for (format, name, expected) in [
        (Format::Npz, "q8_0", "for quantised weights write gguf"),
        (Format::Safetensors, "q4_0", "for quantised weights write gguf"),
        (Format::Gguf, "q4_k", "f32, f16, bf16 or q8_0"),
    ] {
        let error = plan(format, name).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    for model in OTHERS {
        let error = Conversion::plan(&golden(model), options(Format::Gguf))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("gguf is written for gpt2, llama, mistral, qwen2, mixtral"),
            "{error}"
        );
    }
    // Numbers that f16 does not reach.
    let source = folder.path().join("source");
    let mut tensors =
        candle_core::safetensors::load(golden("gpt2/model.safetensors"), &candle_core::Device::Cpu).unwrap();
    let norm = tensors.get_mut("transformer.ln_f.bias").unwrap();
    *norm = (&*norm * 1e9).unwrap();
    std::fs::create_dir(&source).unwrap();
    std::fs::copy(golden("gpt2/config.json"), source.join("config.json")).unwrap();
    candle_core::safetensors::save(&tensors, source.join("model.safetensors")).unwrap();
    let halves = ConversionOptions {
        dtype: dtype("f16"),
        ..options(Format::Safetensors)
    };
    let error = convert(&source, &folder.path().join("halves"), halves)
        .unwrap_err()
        .to_string();
    assert!(error.contains("tensor transformer.ln_f.bias holds a number"), "{error}");
}

/// With the matrices of each expert by themselves, as transformers saves them.
const MIXTURES: [&str; 3] = ["mixtral", "olmoe", "qwen2_moe"];

/// A copy of a golden model with another field in its configuration.
fn with_field(model: &str, field: &str, value: serde_json::Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(golden(model).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config[field] = value;
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let weights = "model.safetensors";
    std::fs::copy(golden(model).join(weights), folder.path().join(weights)).unwrap();
    folder
}

#[test]
fn mixtures_follow_each_other_bit_for_bit() {
    for model in MIXTURES {
        let folder = tempfile::tempdir().unwrap();
        let steps = [
            ("jsonl", Format::Jsonl, 3000),
            ("model.npz", Format::Npz, 1),
            ("shards", Format::Safetensors, 2000),
            ("one-file", Format::Jsonl, 5 << 30),
        ];
        // Experts that are stored one by one follow together.
        let mut before: Option<PathBuf> = None;
        follow_each_other(model, folder.path(), &steps, |target, _| {
            if let Some(before) = before.replace(target.to_owned()) {
                assert_same(&before, target);
            }
        });
    }
}

#[test]
fn mixtures_become_gguf_and_come_back() {
    let as_trained = with_field("qwen2_moe", "norm_topk_prob", false.into());
    for source in [golden("mixtral"), golden("olmoe"), as_trained.path().to_owned()] {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let as_f32 = ConversionOptions {
            dtype: dtype("f32"),
            ..options(Format::Gguf)
        };
        convert(&source, &at("m.gguf"), as_f32).unwrap();
        let names: Vec<String> = open_gguf(&at("m.gguf"))
            .unwrap()
            .names()
            .into_iter()
            .map(str::to_owned)
            .collect();
        assert!(
            names
                .iter()
                .any(|name| name == "model.layers.1.mlp.experts.up_projs.weight"),
            "{names:?}"
        );
        convert(&at("m.gguf"), &at("back"), options(Format::Safetensors)).unwrap();
        convert(&source, &at("direct"), options(Format::Safetensors)).unwrap();
        assert_same(&at("direct"), &at("back"));
        let (before, after) = (logits(&source), logits(&at("m.gguf")));
        for (before, after) in before.into_iter().zip(after) {
            let (before, after) = (f32::from_bits(before), f32::from_bits(after));
            assert!((before - after).abs() < 1e-4, "{before} {after}");
        }
    }
    // What llama.cpp would compute in another way.
    for (model, field, value) in [
        ("qwen2_moe", "norm_topk_prob", serde_json::Value::from(true)),
        ("olmoe", "norm_topk_prob", true.into()),
    ] {
        let source = with_field(model, field, value);
        let error = Conversion::plan(source.path(), options(Format::Gguf)).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
        assert!(error.to_string().contains(field), "{error}");
    }
}

/// A mixture whose rows are whole blocks, written as transformers 5 holds it.
fn mixture_of_blocks(folder: &Path, experts: usize, per_token: usize) {
    let config = serde_json::json!({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 40,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32, "num_local_experts": experts,
        "num_experts_per_tok": per_token, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true});
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let settings = serde_json::json!({"architecture": "mixtral", "layers": 1, "width": 32, "heads": 2,
        "key_value_heads": 1, "head_dim": 16, "feed_forward_width": 64, "context_length": 32, "vocabulary": 40,
        "num_experts": experts, "num_experts_per_tok": per_token});
    let settings = candle_models::config::from_settings(settings.as_object().unwrap(), None).unwrap();
    let decoder = candle_models::Decoder::initialize(settings, &candle_models::Device::Cpu, None, 5).unwrap();
    let mut tensors = std::collections::HashMap::new();
    for info in decoder.parameters().iter().filter(|info| info.is_listed()) {
        let values = decoder
            .weight(decoder.parameter_id(&info.name).unwrap())
            .to_f32()
            .unwrap();
        let factor = if info.name.contains("norm") { 1.0 } else { 10.0 };
        let values = (values.reshape(info.shape.as_slice()).unwrap() * factor).unwrap();
        tensors.insert(info.name.clone(), values);
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

#[test]
fn quantised_experts_are_served_as_they_are() {
    for (experts, per_token) in [(1, 1), (3, 3), (5, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let gguf = folder.path().join("m.gguf");
        mixture_of_blocks(folder.path(), experts, per_token);
        let step = ConversionOptions {
            dtype: dtype("q8_0"),
            ..options(Format::Gguf)
        };
        convert(folder.path(), &gguf, step).unwrap();
        let model = Model::load(&gguf, &LoadOptions::default()).unwrap();
        for info in model
            .decoder
            .parameters()
            .iter()
            .filter(|info| info.name.contains(".experts."))
        {
            assert_eq!(info.dtype, "q8_0", "{}", info.name);
        }
        experts_apart_compute_as_here(&model.decoder, experts);
        let exact = Model::load(folder.path(), &LoadOptions::default()).unwrap();
        for info in model.decoder.parameters() {
            let [near, exact] = [&model, &exact].map(|model| {
                let id = model.decoder.parameter_id(&info.name).unwrap();
                let values = model.decoder.weight(id).to_f32().unwrap();
                values.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            });
            let largest = exact.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            for (near, exact) in near.iter().zip(&exact) {
                let close = (near - exact).abs() <= 0.01 * largest;
                assert!(close, "{experts}, {}: {near} {exact} of {largest}", info.name);
            }
        }
        let [near, exact] = [&model, &exact].map(|model| {
            let logits = model.decoder.logits(&[3, 1, 4, 1, 5, 9, 2, 6]).unwrap();
            logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        });
        let largest = exact.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        for (near, exact) in near.iter().zip(&exact) {
            assert!(
                (near - exact).abs() < 0.1 * largest,
                "{experts}: {near} {exact} of {largest}"
            );
        }
    }
}

#[test]
fn switches_of_routers_are_kept_exactly_or_refused_at_once() {
    const SWITCHES: &str = "model.layers.0.mlp.gate.switches";
    let folder = tempfile::tempdir().unwrap();
    mixture_of_blocks(folder.path(), 3, 2);
    let weights = folder.path().join("model.safetensors");
    let device = candle_models::Device::Cpu;
    let mut tensors = candle_core::safetensors::load(&weights, &device).unwrap();
    let switches = candle_core::Tensor::new(&[[0.1f32, 0.0, -0.7], [1.0, 0.0, 1.0]], &device).unwrap();
    tensors.insert(SWITCHES.into(), switches);
    candle_core::safetensors::save(&tensors, &weights).unwrap();
    let loaded = |path: &Path| {
        let decoder = Model::load(path, &LoadOptions::default()).unwrap().decoder;
        let id = decoder.parameter_id(SWITCHES).unwrap();
        let values = decoder.weight(id).to_f32().unwrap();
        values.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let expected = loaded(folder.path());
    assert_eq!(expected, [0.1, 0.0, -0.7, 1.0, 0.0, 1.0]);
    for format in [Format::Safetensors, Format::Jsonl, Format::Npz] {
        for name in ["bf16", "f16"] {
            let target = folder.path().join(match format {
                Format::Npz => format!("{name}.npz"),
                _ => format!("{name}-{}", format.name()),
            });
            let halved = ConversionOptions {
                dtype: dtype(name),
                ..options(format)
            };
            convert(folder.path(), &target, halved).unwrap();
            let source = match format {
                Format::Jsonl => target.join("model.jsonl"),
                _ => target,
            };
            assert_eq!(loaded(&source), expected, "{name} {}", format.name());
        }
    }
    let error = Conversion::plan(folder.path(), options(Format::Gguf)).unwrap_err();
    assert!(error.to_string().contains(SWITCHES), "{error}");
}

/// What is sent of an expert's weights makes of rows what the decoder makes of them.
fn experts_apart_compute_as_here(decoder: &candle_models::Decoder, experts: usize) {
    for expert in 0..experts {
        let weights = decoder.expert_weights(0, expert).unwrap();
        assert_eq!(weights.types(), [dtype("q8_0").unwrap(); 2]);
        assert_eq!(weights.digest().unwrap(), decoder.expert_digest(0, expert).unwrap());
        let [up, down] = weights.to_bytes().unwrap();
        let sent = candle_models::ExpertWeights::from_bytes(decoder, weights.types(), [&up, &down]).unwrap();
        assert_eq!(sent.digest().unwrap(), weights.digest().unwrap());
        for count in [1, 3, 20] {
            let rows: Vec<f32> = (0..32 * count).map(|index| (index as f32 * 0.37).sin()).collect();
            let group = candle_models::ExpertRows {
                expert,
                rows: rows.clone(),
            };
            let here = decoder.expert_outputs(0, &[group]).unwrap();
            assert_eq!(sent.infer(&rows).unwrap(), here[0]);
        }
        // Each matrix may be held in its own way, as GGUF files of mixed types have them.
        let zeros = vec![0u8; 4 * 32 * 64];
        let types = [dtype("q8_0").unwrap(), WeightType::F32];
        let mixed = candle_models::ExpertWeights::from_bytes(decoder, types, [&up, &zeros]).unwrap();
        assert_eq!((mixed.types(), mixed.to_bytes().unwrap()), (types, [up.clone(), zeros]));
        assert_ne!(mixed.digest().unwrap(), weights.digest().unwrap());
        assert_eq!(mixed.infer(&[1.0; 64]).unwrap(), [0.0; 64]);
        // Half as many bytes; blocks that do not divide the rows; training.
        let halves = [&up[..up.len() / 2], &down[..]];
        assert!(candle_models::ExpertWeights::from_bytes(decoder, weights.types(), halves).is_err());
        let blocks = [dtype("q4_k").unwrap(); 2];
        let error = candle_models::ExpertWeights::sizes(decoder.config(), blocks).unwrap_err();
        assert!(error.to_string().contains("q4_k"), "{error}");
        let error = sent.forward(&[0.0; 32], candle_models::DType::F32).unwrap_err();
        assert!(error.to_string().contains("q8_0"), "{error}");
    }
}

#[test]
fn a_gguf_without_half_of_its_experts_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = folder.path().join("m.gguf");
    convert(&golden("olmoe"), &gguf, options(Format::Gguf)).unwrap();
    let bytes = std::fs::read(&gguf).unwrap();
    for (from, to) in [
        ("blk.1.ffn_up_exps", "blk.1.ffn_xx_exps"),
        ("blk.0.ffn_down_exps", "blk.0.ffn_dxxx_exps"),
    ] {
        let mut damaged = bytes.clone();
        let at = bytes
            .windows(from.len())
            .position(|window| window == from.as_bytes())
            .unwrap();
        damaged[at..at + to.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&gguf, damaged).unwrap();
        let error = Model::load(&gguf, &LoadOptions::default()).unwrap_err();
        assert!(matches!(error, Error::InvalidFile { .. }), "{error}");
        assert!(error.to_string().contains("experts"), "{error}");
    }
}
