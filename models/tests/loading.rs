//! Models from files: what was saved is what runs, and what contradicts itself is refused by name.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use candle_models::{Error, LoadOptions, Model, Pooled, Pooling, Result, SequenceStep};
use serde_json::{Map, Value, json};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(name)
}

fn golden_values(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden(&format!("{name}.golden.safetensors")), &Device::Cpu).unwrap()
}

/// The largest difference between a model's logits and PyTorch's.
fn difference(model: &Model, name: &str) -> f32 {
    let values = golden_values(name);
    let ids: Vec<u32> = values["logits.ids"].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    let logits = model.decoder.logits(&ids).unwrap();
    let error = (logits - &values["logits.values"]).unwrap().abs().unwrap();
    error.max_all().unwrap().to_scalar().unwrap()
}

fn options(config: Value) -> LoadOptions {
    LoadOptions {
        config: config.as_object().unwrap().clone(),
        ..Default::default()
    }
}

fn load(path: &Path) -> Result<Model> {
    Model::load(path, &LoadOptions::default())
}

/// A copy of a golden model with changed tensors and configuration.
fn changed(
    name: &str,
    change: impl FnOnce(&mut HashMap<String, Tensor>, &mut Map<String, Value>),
) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = candle_core::safetensors::load(golden(name).join("model.safetensors"), &Device::Cpu).unwrap();
    let mut config = serde_json::from_slice(&std::fs::read(golden(name).join("config.json")).unwrap()).unwrap();
    change(&mut tensors, &mut config);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    std::fs::write(folder.path().join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    folder
}

#[test]
fn every_stored_form_gives_pytorchs_logits() {
    for (folder, name, dtype, tolerance) in [
        ("gpt2", "gpt2", "f32", 2e-4),
        ("llama", "llama", "f32", 2e-4),
        ("qwen2", "qwen2", "f32", 2e-4),
        ("qwen2-sharded", "qwen2", "f32", 2e-4),
        ("gpt_neox", "gpt_neox", "f32", 2e-4),
        ("gpt_neox-sequential", "gpt_neox-sequential", "f32", 2e-4),
        ("gptj", "gptj", "f32", 2e-4),
        ("gptj-tied", "gptj-tied", "f32", 2e-4),
        ("qwen2-f16", "qwen2", "f16", 0.02),
        ("qwen2-bf16", "qwen2", "bf16", 0.15),
    ] {
        let model = load(&golden(folder)).unwrap();
        assert_eq!(model.decoder.dtype(), dtype, "{folder}");
        let difference = difference(&model, name);
        assert!(difference < tolerance, "{folder}: {difference}");
    }
}

/// Mixtral's published files and transformers 5 in memory name the experts differently.
#[test]
fn experts_are_read_one_by_one_and_together() {
    let merged = |tensors: &HashMap<String, Tensor>, layer: usize, matrices: &[&str]| {
        let matrices = (0..5).flat_map(|expert| matrices.iter().map(move |matrix| (expert, matrix)));
        let parts: Vec<_> = matrices
            .map(|(expert, matrix)| {
                tensors[&format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight")].clone()
            })
            .collect();
        let rows = parts[0].dims()[0];
        let merged = Tensor::cat(&parts, 0).unwrap();
        merged.reshape((5, parts.len() / 5 * rows, ())).unwrap()
    };
    let fused = changed("mixtral", |tensors, _| {
        for layer in 0..2 {
            let prefix = format!("model.layers.{layer}");
            let gate_up = merged(tensors, layer, &["w1", "w3"]);
            let down = merged(tensors, layer, &["w2"]);
            let router = tensors[&format!("{prefix}.block_sparse_moe.gate.weight")].clone();
            tensors.retain(|name, _| !name.starts_with(&format!("{prefix}.block_sparse_moe")));
            tensors.insert(format!("{prefix}.mlp.gate.weight"), router);
            tensors.insert(format!("{prefix}.mlp.experts.gate_up_proj"), gate_up);
            tensors.insert(format!("{prefix}.mlp.experts.down_proj"), down);
        }
    });
    for folder in [fused.path(), &golden("mixtral")] {
        let difference = difference(&load(folder).unwrap(), "mixtral");
        assert!(difference < 2e-4, "{difference}");
    }
}

/// A change of a model's tensors and of its configuration.
type Change<'a> = dyn Fn(&mut HashMap<String, Tensor>, &mut Map<String, Value>) + 'a;

#[test]
fn experts_that_contradict_the_configuration_are_refused_by_name() {
    let expert =
        |expert: usize, matrix: &str| format!("model.layers.1.block_sparse_moe.experts.{expert}.{matrix}.weight");
    let refused = |change: &Change<'_>, expected: &str| {
        let folder = changed("mixtral", |tensors, config| change(tensors, config));
        let error = load(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    };
    refused(&|tensors, _| drop(tensors.remove(&expert(3, "w3"))), "experts.3.w3");
    refused(&|_, config| config["num_local_experts"] = json!(4), "gate.weight");
    refused(&|_, config| config["num_local_experts"] = json!(6), "experts.5.w1");
    refused(&|_, config| config["num_local_experts"] = json!(0), "num_experts");
    refused(
        &|_, config| config["num_experts_per_tok"] = json!(6),
        "num_experts_per_tok",
    );
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    refused(
        &|tensors, _| drop(tensors.insert(expert(2, "w2"), zeros((14, 8)))),
        "experts.2.w2",
    );
    let switches = "model.layers.0.mlp.gate.switches";
    refused(
        &|tensors, _| drop(tensors.insert(switches.into(), zeros((2, 5)))),
        "enables 0 experts",
    );
    refused(
        &|tensors, _| drop(tensors.insert(switches.into(), zeros((2, 4)))),
        switches,
    );
}

#[test]
fn pooled_states_are_transformers() {
    let values = candle_core::safetensors::load(golden("embeddings.golden.safetensors"), &Device::Cpu).unwrap();
    for name in ["gpt2", "llama", "qwen2", "gpt_neox", "gptj"] {
        let model = load(&golden(name)).unwrap();
        let ids: Vec<u32> = values[&format!("{name}.ids")]
            .to_dtype(DType::U32)
            .unwrap()
            .to_vec1()
            .unwrap();
        for (pooling, pooled_name) in [(Pooling::Mean, "mean"), (Pooling::Last, "last"), (Pooling::Cls, "cls")] {
            let expected: Vec<f32> = values[&format!("{name}.{pooled_name}")].to_vec1().unwrap();
            let mut pooled = Pooled::new(pooling, expected.len());
            let mut cache = model.decoder.new_cache();
            for tokens in ids.chunks(16) {
                let step = SequenceStep {
                    tokens,
                    cache: &mut cache,
                };
                let states = model.decoder.states(&mut [step], &|| false).unwrap();
                pooled.add(&states.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            }
            let length = expected.iter().map(|value| value * value).sum::<f32>().sqrt();
            let unit: Vec<f32> = expected.iter().map(|value| value / length).collect();
            for (found, expected) in [(pooled.clone().finish(false), expected), (pooled.finish(true), unit)] {
                for (found, expected) in found.unwrap().iter().zip(expected) {
                    assert!(
                        (found - expected).abs() < 2e-5,
                        "{name}, {pooled_name}: {found}, not {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn weights_that_contradict_the_configuration_are_refused_by_name() {
    let wrong: [(&str, &str, Value); 11] = [
        ("gpt2", "n_embd", json!(18)),
        ("gpt2", "n_layer", json!(3)),
        ("gpt2", "n_layer", json!(1)),
        ("gpt2", "vocab_size", json!(62)),
        ("gpt2", "n_inner", json!(61)),
        ("llama", "num_key_value_heads", json!(4)),
        ("llama", "attention_bias", json!(true)),
        ("gpt_neox", "attention_bias", json!(false)),
        ("gpt_neox", "intermediate_size", json!(20)),
        ("gptj", "n_layer", json!(3)),
        ("gptj", "n_inner", json!(71)),
    ];
    for (name, field, value) in wrong {
        let folder = changed(name, |_, config| {
            config.insert(field.to_owned(), value.clone());
        });
        let error = load(folder.path()).unwrap_err();
        assert!(
            matches!(&error, Error::InvalidFile { reason, .. } if reason.contains('`')),
            "{field}: {error}"
        );
    }
}

/// As transformers does; a stored copy of the embedding is no head of its own.
#[test]
fn a_head_that_differs_from_the_embedding_is_kept_though_the_configuration_ties_it() {
    let tied = |copy: bool| {
        let folder = changed("llama", |tensors, config| {
            config.insert("tie_word_embeddings".into(), json!(true));
            if copy {
                tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
            }
        });
        load(folder.path()).unwrap().config["tied_head"].clone()
    };
    assert_eq!([tied(false), tied(true)], [json!(false), json!(true)]);
}

#[test]
fn missing_and_foreign_tensors_are_refused_by_name() {
    let missing = "transformer.h.1.mlp.c_fc.bias";
    let folder = changed("gpt2", |tensors, _| {
        tensors.remove(missing);
    });
    assert!(load(folder.path()).unwrap_err().to_string().contains(missing));
    let folder = changed("gpt2", |tensors, _| {
        tensors.insert("classifier.weight".into(), tensors["transformer.wpe.weight"].clone());
    });
    assert!(
        load(folder.path())
            .unwrap_err()
            .to_string()
            .contains("classifier.weight")
    );
}

#[test]
fn buffers_of_old_exports_and_missing_prefixes_are_understood() {
    let folder = changed("gpt2", |tensors, _| {
        let renamed = tensors
            .drain()
            .map(|(name, tensor)| (name.replace("transformer.", ""), tensor));
        *tensors = renamed.collect();
        tensors.insert(
            "h.0.attn.bias".into(),
            Tensor::zeros((1, 1, 40, 40), DType::F32, &Device::Cpu).unwrap(),
        );
    });
    assert!(difference(&load(folder.path()).unwrap(), "gpt2") < 2e-4);
    let folder = changed("gpt_neox", |tensors, _| {
        let head = tensors.remove("embed_out.weight").unwrap();
        let renamed = tensors
            .drain()
            .map(|(name, tensor)| (name.replace("gpt_neox.", ""), tensor));
        *tensors = renamed.collect();
        tensors.insert("lm_head.weight".into(), head);
        let mask = Tensor::zeros((1, 1, 40, 40), DType::F32, &Device::Cpu).unwrap();
        tensors.insert("layers.1.attention.bias".into(), mask);
    });
    assert!(difference(&load(folder.path()).unwrap(), "gpt_neox") < 2e-4);
}

#[test]
fn fields_that_are_not_known_or_contradict_each_other_are_refused_by_name() {
    let refused: [(&str, &str, Value, &str); 21] = [
        ("gpt2", "alibi", json!(true), "`alibi`"),
        ("gpt2", "pruned_heads", json!({"0": [1]}), "`pruned_heads`"),
        ("gpt2", "rotary_dim", json!(4), "`rotary_dim`"),
        (
            "llama",
            "attn_logit_softcapping",
            json!(30.0),
            "`attn_logit_softcapping`",
        ),
        ("llama", "use_parallel_residual", json!(true), "`use_parallel_residual`"),
        ("llama", "rope_interleaved", json!(true), "`rope_interleaved`"),
        (
            "llama",
            "rope_theta",
            json!(7),
            "`rope_parameters.rope_theta`: 10000 contradicts rope_theta 7",
        ),
        (
            "llama",
            "rope_scaling",
            json!({"rope_type": "linear", "factor": 2, "mscale": 1}),
            "`rope_scaling.mscale`",
        ),
        ("gpt_neox", "num_key_value_heads", json!(1), "`num_key_value_heads`"),
        ("gpt_neox", "rotary_dim", json!(4), "`rotary_dim`"),
        (
            "gpt_neox",
            "num_attention_heads",
            json!(4),
            "`num_attention_heads`: 4 does not divide hidden_size 21",
        ),
        (
            "gpt_neox",
            "head_dim",
            json!(5),
            "`head_dim`: 5 contradicts hidden_size 21 over num_attention_heads 3",
        ),
        (
            "gpt_neox",
            "rotary_pct",
            json!(0.5),
            "partial_rotary_factor`: 0.6 contradicts rotary_pct 0.5",
        ),
        (
            "gpt_neox",
            "rotary_emb_base",
            json!(7),
            "rope_theta`: 10000 contradicts rotary_emb_base 7",
        ),
        ("gpt_neox", "hidden_act", json!("relu6"), "`hidden_act`"),
        ("gptj", "rotary", json!(false), "`rotary`"),
        ("gptj", "rotary_dim", Value::Null, "`rotary_dim`"),
        ("gptj", "rotary_dim", json!(3), "`rotary_dim`"),
        (
            "gptj",
            "rotary_dim",
            json!(8),
            "`rotary_dim`: 8 is more than head_dim 6",
        ),
        ("gptj", "n_head", json!(4), "`n_head`: 4 does not divide n_embd 18"),
        ("gptj", "rope_theta", json!(500.0), "`rope_theta`"),
    ];
    for (name, field, value, expected) in refused {
        let folder = changed(name, |_, config| {
            config.insert(field.to_owned(), value.clone());
        });
        let error = load(folder.path()).unwrap_err();
        assert!(
            matches!(error, Error::Unsupported(_) | Error::InvalidConfig { .. }),
            "{name} {field}: {error}"
        );
        assert!(error.to_string().contains(expected), "{name} {field}: {error}");
    }
    // What is null, or says nothing about the computation, is passed over.
    let folder = changed("gptj", |_, config| {
        config.insert("num_local_experts".into(), Value::Null);
        config.insert("summary_type".into(), json!("cls_index"));
        config.insert("_name_or_path".into(), json!("somewhere"));
        config.insert(
            "task_specific_params".into(),
            json!({"text-generation": {"do_sample": true}}),
        );
        config.insert("rotary".into(), json!(true));
    });
    assert!(difference(&load(folder.path()).unwrap(), "gptj") < 2e-4);
}

#[test]
fn shown_configurations_make_the_same_model_again() {
    for name in ["gpt_neox", "gpt_neox-sequential", "gptj", "gptj-tied"] {
        let loaded = load(&golden(name)).unwrap();
        let again = Model::create(&options(loaded.config.clone()), None).unwrap();
        assert_eq!(again.decoder.config(), loaded.decoder.config(), "{name}");
        assert_eq!(again.config, loaded.config, "{name}");
    }
    let neox = load(&golden("gpt_neox")).unwrap().config;
    assert_eq!(
        (&neox["parallel_residual"], &neox["rotary_dim"], &neox["tied_head"]),
        (&json!(true), &json!(4), &json!(false))
    );
}

#[test]
fn gptj_as_gguf_is_refused_and_gptneox_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    for (dtype, name, tolerance) in [(GgmlDType::F32, "f32", 2e-4), (GgmlDType::F16, "f16", 0.05)] {
        write_neox_gguf(&path, "gptneox", dtype);
        let model = load(&path).unwrap();
        let expected = load(&golden("gpt_neox")).unwrap().decoder.config().clone();
        let norm_epsilon = f64::from(1e-5f32);
        let expected = candle_models::DecoderConfig {
            norm_epsilon,
            ..expected
        };
        assert_eq!(*model.decoder.config(), expected);
        assert_eq!(model.decoder.dtype(), name);
        let difference = difference(&model, "gpt_neox");
        assert!(difference < tolerance, "{name}: {difference}");
    }
    for architecture in ["gptj", "gpt_neox"] {
        write_neox_gguf(&path, architecture, GgmlDType::F32);
        let error = load(&path).unwrap_err();
        assert!(
            matches!(&error, Error::Unsupported(message) if message.contains(architecture)),
            "{error}"
        );
    }
}

/// Writes GPT-NeoX's golden model as llama.cpp's converter does: its own names, and all queries before all keys before
/// all values.
fn write_neox_gguf(path: &Path, architecture: &str, dtype: GgmlDType) {
    let tensors = candle_core::safetensors::load(golden("gpt_neox").join("model.safetensors"), &Device::Cpu).unwrap();
    let renames = [
        ("gpt_neox.embed_in", "token_embd"),
        ("gpt_neox.final_layer_norm", "output_norm"),
        ("embed_out", "output"),
        ("gpt_neox.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("attention.query_key_value", "attn_qkv"),
        ("attention.dense", "attn_output"),
        ("mlp.dense_h_to_4h", "ffn_up"),
        ("mlp.dense_4h_to_h", "ffn_down"),
    ];
    let mut written: Vec<(String, QTensor)> = Vec::new();
    for (name, tensor) in &tensors {
        let tensor = match name.contains("query_key_value") {
            true => {
                let rest = tensor.elem_count() / 63;
                let heads = tensor.reshape((3, 3, 7, rest)).unwrap();
                heads
                    .transpose(0, 1)
                    .unwrap()
                    .contiguous()
                    .unwrap()
                    .reshape(tensor.shape())
                    .unwrap()
            }
            false => tensor.clone(),
        };
        let dtype = if tensor.rank() == 2 { dtype } else { GgmlDType::F32 };
        let name = renames
            .iter()
            .fold(name.clone(), |name, (from, to)| name.replace(from, to));
        written.push((name, QTensor::quantize(&tensor, dtype).unwrap()));
    }
    let sizes = [
        ("block_count", 2),
        ("context_length", 40),
        ("embedding_length", 21),
        ("feed_forward_length", 22),
        ("attention.head_count", 3),
        ("rope.dimension_count", 4),
    ];
    let sizes = sizes.map(|(key, value)| (format!("{architecture}.{key}"), gguf_file::Value::U32(value)));
    let others = [
        (
            "general.architecture".to_owned(),
            gguf_file::Value::String(architecture.into()),
        ),
        (
            format!("{architecture}.use_parallel_residual"),
            gguf_file::Value::Bool(true),
        ),
        (
            format!("{architecture}.attention.layer_norm_epsilon"),
            gguf_file::Value::F32(1e-5),
        ),
    ];
    let metadata: Vec<_> = sizes
        .iter()
        .chain(&others)
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<_> = written.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn overrides_are_checked_and_shown() {
    let model = Model::load(
        &golden("llama"),
        &options(json!({"context_length": 20, "learning_rate": 0.5})),
    )
    .unwrap();
    assert_eq!(model.decoder.config().context_length, 20);
    assert_eq!(
        (&model.config["context_length"], &model.config["learning_rate"]),
        (&json!(20), &json!(0.5))
    );
    for (name, config) in [
        ("llama", json!({"context_length": 49})),
        ("llama", json!({"heads": 2})),
        ("llama", json!({"num_hidden_layers": 3})),
        ("llama", json!({"architecture": "gpt2"})),
        ("llama", json!({"nonsense": 1})),
        ("llama", json!({"tied_head": true})),
        ("gpt2", json!({"context_length": 41})),
    ] {
        let error = Model::load(&golden(name), &options(config.clone())).unwrap_err();
        assert!(matches!(error, Error::InvalidConfig { .. }), "{config}: {error}");
    }
    // The same value is no contradiction, whichever way it is written.
    Model::load(&golden("llama"), &options(json!({"n_head": 4.0, "dropout": 0}))).unwrap();
}

#[test]
fn models_from_nothing_follow_their_seed() {
    let config = json!({"architecture": "llama", "layers": 2, "width": 64, "heads": 4, "key_value_heads": 2,
        "context_length": 16, "vocabulary": 40, "weight_decay": 0.1});
    let make = |seed: u64| {
        Model::create(
            &LoadOptions {
                seed,
                ..options(config.clone())
            },
            None,
        )
        .unwrap()
    };
    let logits = |model: &Model| model.decoder.logits(&[1, 2, 3]).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(logits(&make(1)), logits(&make(1)));
    assert_ne!(logits(&make(1)), logits(&make(2)));
    let model = make(1);
    assert_eq!(model.config["feed_forward_width"], json!(192));
    assert_eq!(model.config["weight_decay"], json!(0.1));
    let too_large = json!({"architecture": "gpt2", "layers": 300, "width": 16384, "heads": 4, "context_length": 16,
        "vocabulary": 40});
    assert!(matches!(
        Model::create(&options(too_large), None),
        Err(Error::ResourceExhausted(_))
    ));
}

/// Writes GPT-2's golden model as llama.cpp's converter does: its own names, matrices [out, in], the head twice.
fn write_gguf(path: &Path, dtype: GgmlDType) {
    let tensors = candle_core::safetensors::load(golden("gpt2").join("model.safetensors"), &Device::Cpu).unwrap();
    let renames = [
        ("transformer.wte", "token_embd"),
        ("transformer.wpe", "position_embd"),
        ("transformer.ln_f", "output_norm"),
        ("transformer.h.", "blk."),
        ("ln_1", "attn_norm"),
        ("ln_2", "ffn_norm"),
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
    ];
    let mut written: Vec<(String, QTensor)> = Vec::new();
    for (name, tensor) in &tensors {
        let is_layer_matrix = name.contains(".h.") && tensor.rank() == 2;
        let tensor = if is_layer_matrix {
            tensor.t().unwrap().contiguous().unwrap()
        } else {
            tensor.clone()
        };
        let name = renames
            .iter()
            .fold(name.clone(), |name, (from, to)| name.replace(from, to));
        let dtype = if is_layer_matrix { dtype } else { GgmlDType::F32 };
        if name == "token_embd.weight" {
            written.push(("output.weight".into(), QTensor::quantize(&tensor, dtype).unwrap()));
        }
        written.push((name, QTensor::quantize(&tensor, dtype).unwrap()));
    }
    let number = |value: u32| gguf_file::Value::U32(value);
    let metadata = [
        ("general.architecture", gguf_file::Value::String("gpt2".into())),
        ("gpt2.block_count", number(2)),
        ("gpt2.context_length", number(40)),
        ("gpt2.embedding_length", number(15)),
        ("gpt2.feed_forward_length", number(60)),
        ("gpt2.attention.head_count", number(3)),
        ("gpt2.attention.layer_norm_epsilon", gguf_file::Value::F32(1e-5)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = written.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn gguf_gives_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    for (dtype, name, tolerance) in [(GgmlDType::F32, "f32", 2e-4), (GgmlDType::F16, "f16", 0.05)] {
        write_gguf(&path, dtype);
        let model = load(&path).unwrap();
        assert!(model.decoder.config().tied_head);
        assert_eq!(model.decoder.parameters()[2].name, "transformer.h.0.ln_1.weight");
        assert_eq!(model.decoder.dtype(), name);
        let difference = difference(&model, "gpt2");
        assert!(difference < tolerance, "{name}: {difference}");
    }
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(load(&path), Err(Error::InvalidFile { .. })));
}
