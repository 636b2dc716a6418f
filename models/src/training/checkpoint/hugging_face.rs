//! `config.json` and its companions, so that transformers opens a checkpoint's folder as a model.

use serde_json::{Map, Value, json};

use crate::chat_template::ChatTemplate;
use crate::config::{Architecture, DecoderConfig, Position, RotaryScaling};
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// What transformers needs beside the weights of a model: each document's name and text.
///
/// Fails as [`Tokenizer::to_json`].
pub(crate) fn documents(
    config: &DecoderConfig,
    end_tokens: &[u32],
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
) -> Result<Vec<(String, String)>> {
    let json = |name: &str, value: Value| (name.to_owned(), format!("{value:#}"));
    let mut documents = vec![
        json("config.json", config_json(config, end_tokens)),
        json("generation_config.json", generation_config_json(end_tokens)),
    ];
    if let Some(tokenizer) = tokenizer {
        documents.push(("tokenizer.json".to_owned(), tokenizer.to_json()?));
    }
    if let Some(template) = template {
        let mut tokenizer_config = json!({"chat_template": template.source()});
        for (name, token) in [("bos_token", template.bos()), ("eos_token", template.eos())] {
            if let Some(token) = token {
                tokenizer_config[name] = json!(token);
            }
        }
        documents.push(json("tokenizer_config.json", tokenizer_config));
    }
    Ok(documents)
}

/// transformers' description of a decoder. What the family has no words for there (biases on some projections only, norms
/// on queries and keys) is said in words of our own, which transformers ignores and a load of the folder here reads.
fn config_json(config: &DecoderConfig, end_tokens: &[u32]) -> Value {
    let mut fields = match config.architecture {
        Architecture::Gpt2 => gpt2(config),
        Architecture::Llama => llama(config, "LlamaForCausalLM"),
        Architecture::Mistral => llama(config, "MistralForCausalLM"),
        Architecture::Qwen2 => llama(config, "Qwen2ForCausalLM"),
        Architecture::GptNeox => gpt_neox(config),
        Architecture::GptJ => gptj(config),
        Architecture::Mixtral => with_experts(config, "MixtralForCausalLM"),
        Architecture::Olmoe => with_experts(config, "OlmoeForCausalLM"),
        Architecture::Qwen2Moe => with_experts(config, "Qwen2MoeForCausalLM"),
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
fn generation_config_json(end_tokens: &[u32]) -> Value {
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
        "attention_dropout": 0.0,
    }));
    use Architecture::{Llama, Mistral, Mixtral, Olmoe, Qwen2, Qwen2Moe};
    let mut set = |name: &str, flag: bool| drop(fields.insert(name.into(), json!(flag)));
    let (bias, output_bias) = (config.attention_bias, config.attention_output_bias);
    let has_word = matches!(config.architecture, Llama | Olmoe);
    if has_word {
        set("attention_bias", bias);
    } else if bias != matches!(config.architecture, Qwen2 | Qwen2Moe) {
        set("qkv_bias", bias);
    }
    if output_bias != (has_word && bias) {
        set("attention_output_bias", output_bias);
    }
    if config.query_key_norm != config.architecture.has_query_key_norm() {
        set("query_key_norm", config.query_key_norm);
    }
    if config.architecture == Llama || config.feed_forward_bias {
        set("mlp_bias", config.feed_forward_bias);
    }
    if matches!(config.architecture, Mistral | Mixtral | Qwen2 | Qwen2Moe) {
        fields.extend(sliding_window(config));
    }
    if let Position::Rotary(rotary) = &config.position {
        fields.insert("rope_theta".into(), json!(rotary.theta));
        fields.insert("rope_scaling".into(), rope_scaling(&rotary.scaling));
    }
    fields
}

/// What [`llama`] says, and the experts. transformers holds Mixtral's number of experts under another name than the others'.
fn with_experts(config: &DecoderConfig, class: &str) -> Map<String, Value> {
    let mut fields = llama(config, class);
    let Some(experts) = &config.experts else { return fields };
    let mut set = |name: &str, value: Value| drop(fields.insert(name.into(), value));
    let number = match config.architecture {
        Architecture::Mixtral => "num_local_experts",
        _ => "num_experts",
    };
    set(number, json!(experts.experts));
    set("num_experts_per_tok", json!(experts.per_token));
    set("output_router_logits", json!(false));
    if config.architecture != Architecture::Mixtral {
        set("norm_topk_prob", json!(experts.normalize));
    }
    if config.architecture == Architecture::Qwen2Moe {
        set("moe_intermediate_size", json!(config.feed_forward_width));
        set("qkv_bias", json!(config.attention_bias));
        set("decoder_sparse_step", json!(1));
        set("mlp_only_layers", json!([]));
    }
    if config.architecture == Architecture::Qwen2Moe || experts.shared_width > 0 {
        set("shared_expert_intermediate_size", json!(experts.shared_width));
    }
    if experts.shared_gate != (experts.shared_width > 0) {
        set("shared_expert_gate", json!(experts.shared_gate));
    }
    fields
}

/// The words of Mistral, Qwen 2 and their mixtures for a window.
fn sliding_window(config: &DecoderConfig) -> Map<String, Value> {
    let windows = (0..config.layers).map(|layer| config.attention_pattern.window_of(layer));
    let kinds = windows.map(|window| match window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    });
    let kinds: Vec<_> = kinds.collect();
    let window = config.attention_pattern.window;
    let mut fields = object(json!({"sliding_window": window, "use_sliding_window": window.is_some()}));
    if matches!(config.architecture, Architecture::Qwen2 | Architecture::Qwen2Moe) {
        fields.insert("layer_types".into(), json!(kinds));
    }
    fields
}

fn gpt_neox(config: &DecoderConfig) -> Map<String, Value> {
    let mut fields = object(json!({
        "architectures": ["GPTNeoXForCausalLM"],
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward_width,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context_length,
        "hidden_act": config.activation.name(),
        "layer_norm_eps": config.norm_epsilon,
        "use_parallel_residual": config.residual.is_parallel(),
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }));
    if let Position::Rotary(rotary) = &config.position {
        fields.insert("rotary_emb_base".into(), json!(rotary.theta));
        fields.insert("rotary_pct".into(), json!(share(rotary.dim, config.head_dim)));
        fields.insert("rope_scaling".into(), rope_scaling(&rotary.scaling));
    }
    fields
}

/// A share of a head that rounds down to so many elements, as transformers computes it.
fn share(dim: usize, head_dim: usize) -> f64 {
    let share = dim as f64 / head_dim as f64;
    match (head_dim as f64 * share) as usize == dim {
        true => share,
        // A rounding error below; the next larger number is above.
        false => share.next_up(),
    }
}

fn gptj(config: &DecoderConfig) -> Map<String, Value> {
    let mut fields = gpt2(config);
    fields.insert("architectures".into(), json!(["GPTJForCausalLM"]));
    if let Position::Rotary(rotary) = &config.position {
        fields.insert("rotary_dim".into(), json!(rotary.dim));
    }
    fields
}

/// Null for what transformers has no words for.
fn rope_scaling(scaling: &RotaryScaling) -> Value {
    match scaling {
        RotaryScaling::Factors(_) => Value::Null,
        other => other.settings().unwrap_or(Value::Null),
    }
}

/// The fields of a JSON object.
fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{from_hugging_face, from_settings};

    /// Also what transformers has no words for.
    #[test]
    fn a_described_decoder_is_read_back_as_it_was() {
        let own: &[(&str, Value)] = &[
            ("gpt2", json!({})),
            (
                "gpt2",
                json!({"attention_pattern": ["dense", "banded"], "attention_window": 3}),
            ),
            ("gptj", json!({"rotary_dim": 2})),
            ("gpt_neox", json!({"attention_bias": false, "parallel_residual": false})),
            ("llama", json!({"attention_bias": true, "attention_output_bias": false})),
            (
                "llama",
                json!({"query_key_norm": true, "feed_forward_bias": true, "tied_head": false}),
            ),
            ("llama", json!({"rope_scaling": {"rope_type": "llama3", "factor": 2}})),
            ("mistral", json!({"attention_bias": true, "attention_window": 5})),
            ("qwen2", json!({"attention_bias": false})),
            (
                "mixtral",
                json!({"attention_bias": true, "shared_expert_intermediate_size": 4}),
            ),
            ("olmoe", json!({"query_key_norm": false, "norm_topk_prob": true})),
            (
                "olmoe",
                json!({"shared_expert_intermediate_size": 6, "shared_expert_gate": false}),
            ),
            (
                "qwen2_moe",
                json!({"shared_expert_intermediate_size": 6, "shared_expert_gate": false}),
            ),
        ];
        for (architecture, own) in own {
            let mut settings = object(
                json!({"architecture": architecture, "layers": 2, "width": 12, "heads": 3,
                "context_length": 16, "vocabulary": 11}),
            );
            settings.extend(object(own.clone()));
            let config = from_settings(&settings, None).unwrap();
            let read = from_hugging_face(&object(config_json(&config, &[1]))).unwrap();
            assert_eq!(read, config, "{architecture} {own}");
        }
    }
}
