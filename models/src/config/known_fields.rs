//! Which fields of a `config.json` are known. Any other might change what the model computes, so it is refused by name.

use super::Architecture;
use super::fields::{Fields, shortened};
use crate::error::{Error, Result};
use serde_json::{Value, json};

/// Fields that say nothing about logits: which class and program wrote the file, tokens, initial values, dropout (told by
/// the training settings here), other heads, and the settings of generation that old files carry.
const HARMLESS: &[&str] = &[
    "architectures",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "model_type",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "reorder_and_upcast_attn",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "vocab_size",
];

/// Beginnings of fields that say nothing about logits either.
const HARMLESS_BEGINNINGS: &[&str] = &["_", "summary_", "transformers.js"];

/// A field and its only known value.
type FixedField = (&'static str, fn() -> Value);

/// Fields of every family with only one known value.
const FIXED: &[FixedField] = &[
    ("add_cross_attention", || json!(false)),
    ("is_encoder_decoder", || json!(false)),
    ("pruned_heads", || json!({})),
    ("rope_interleaved", || json!(false)),
    ("router_jitter_noise", || json!(0.0)),
];

/// What the families read.
const GPT2: &[&str] = &[
    "activation_function",
    "layer_norm_epsilon",
    "n_ctx",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
];
const GPTJ: &[&str] = &[
    "activation_function",
    "layer_norm_epsilon",
    "n_ctx",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "rotary",
    "rotary_dim",
    "scale_attn_weights",
];
const GPT_NEOX: &[&str] = &[
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "use_parallel_residual",
];
const LLAMA: &[&str] = &[
    "attention_bias",
    "attention_output_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "qkv_bias",
    "query_key_norm",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "use_sliding_window",
];

/// What every family reads: patterns of attention, by our own names.
const ATTENTION: &[&str] = &["attention_block_size", "attention_pattern", "attention_window"];

/// What families with experts read beside what [`LLAMA`] lists.
const EXPERTS: &[&str] = &[
    "clip_qkv",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "output_router_logits",
    "router_aux_loss_coef",
    "shared_expert_gate",
    "shared_expert_intermediate_size",
];

/// Refuses fields that the family is not known to have, but for nulls.
///
/// Fails with [`Error::Unsupported`] that names the field.
pub(super) fn refuse_unknown(architecture: Architecture, fields: &Fields<'_>) -> Result<()> {
    let own = match architecture {
        Architecture::Gpt2 => GPT2,
        Architecture::GptJ => GPTJ,
        Architecture::GptNeox => GPT_NEOX,
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 => LLAMA,
        Architecture::Mixtral | Architecture::Olmoe | Architecture::Qwen2Moe => EXPERTS,
    };
    let with_experts = matches!(
        architecture,
        Architecture::Mixtral | Architecture::Olmoe | Architecture::Qwen2Moe
    );
    for (field, value) in fields.0.iter().filter(|(_, value)| !value.is_null()) {
        if let Some((_, known)) = FIXED.iter().find(|(name, _)| name == field) {
            let known = known();
            let same_number = value.as_f64().is_some() && value.as_f64() == known.as_f64();
            if *value != known && !same_number {
                let value = shortened(value);
                let message = format!("configuration `{field}`: {value} is not supported, only {known}");
                return Err(Error::Unsupported(message));
            }
            continue;
        }
        let harmless = HARMLESS.contains(&field.as_str())
            || HARMLESS_BEGINNINGS.iter().any(|beginning| field.starts_with(beginning));
        let shared = ATTENTION.contains(&field.as_str()) || with_experts && LLAMA.contains(&field.as_str());
        if !harmless && !shared && !own.contains(&field.as_str()) {
            let field: String = field.chars().take(80).collect();
            let name = architecture.name();
            return Err(Error::Unsupported(format!(
                "configuration `{field}` is not known for a `{name}`, and may change what it computes; remove it if it does not"
            )));
        }
    }
    Ok(())
}
