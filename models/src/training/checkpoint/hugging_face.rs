//! `config.json` and its companions, so that transformers opens a checkpoint's folder as a model.

use serde_json::{Map, Value, json};

use crate::config::{Architecture, DecoderConfig, Position, RotaryScaling};

/// transformers' description of a decoder. A combination that transformers has no words for (biases on some projections
/// only, rotary factors from a GGUF file) is described as nearly as it can be: the manifest is what a restore reads.
pub(super) fn config_json(config: &DecoderConfig, end_tokens: &[u32]) -> Value {
    let mut fields = match config.architecture {
        Architecture::Gpt2 => gpt2(config),
        Architecture::Llama => llama(config, "LlamaForCausalLM"),
        Architecture::Mistral => llama(config, "MistralForCausalLM"),
        Architecture::Qwen2 => llama(config, "Qwen2ForCausalLM"),
    };
    // What transformers has no words for; it ignores these.
    fields.extend(config.attention_pattern.settings());
    fields.insert("model_type".into(), json!(config.architecture.name()));
    fields.insert("vocab_size".into(), json!(config.vocabulary));
    fields.insert("tie_word_embeddings".into(), json!(config.tied_head));
    fields.insert("dtype".into(), json!("float32"));
    fields.insert("torch_dtype".into(), json!("float32"));
    fields.insert("bos_token_id".into(), Value::Null);
    fields.insert("eos_token_id".into(), end_token_ids(end_tokens));
    Value::Object(fields)
}

/// transformers' defaults for generation.
pub(super) fn generation_config_json(end_tokens: &[u32]) -> Value {
    json!({"eos_token_id": end_token_ids(end_tokens)})
}

/// One id, a list, or null.
fn end_token_ids(end_tokens: &[u32]) -> Value {
    match end_tokens {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    }
}

fn gpt2(config: &DecoderConfig) -> Map<String, Value> {
    object(json!({
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.feed_forward_width,
        "n_positions": config.context_length,
        "activation_function": config.activation.name(),
        "layer_norm_epsilon": config.norm_epsilon,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }))
}

fn llama(config: &DecoderConfig, class: &str) -> Map<String, Value> {
    let mut fields = object(json!({
        "architectures": [class],
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward_width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "hidden_act": config.activation.name(),
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.feed_forward_bias,
        "attention_dropout": 0.0,
    }));
    if matches!(config.architecture, Architecture::Mistral | Architecture::Qwen2) {
        fields.extend(sliding_window(config));
    }
    if let Position::Rotary(rotary) = &config.position {
        fields.insert("rope_theta".into(), json!(rotary.theta));
        let scaling = match &rotary.scaling {
            RotaryScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RotaryScaling::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_context_length,
            } => {
                json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_frequency_factor,
                    "high_freq_factor": high_frequency_factor,
                    "original_max_position_embeddings": original_context_length,
                })
            }
            RotaryScaling::None | RotaryScaling::Factors(_) => Value::Null,
        };
        fields.insert("rope_scaling".into(), scaling);
    }
    fields
}

/// Mistral's and Qwen 2's words for a window.
fn sliding_window(config: &DecoderConfig) -> Map<String, Value> {
    let windows = (0..config.layers).map(|layer| config.attention_pattern.window_of(layer));
    let kinds = windows.map(|window| match window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    });
    let kinds: Vec<_> = kinds.collect();
    let window = config.attention_pattern.window;
    let mut fields = object(json!({"sliding_window": window, "use_sliding_window": window.is_some()}));
    if config.architecture == Architecture::Qwen2 {
        fields.insert("layer_types".into(), json!(kinds));
    }
    fields
}

/// The fields of a JSON object.
fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}
