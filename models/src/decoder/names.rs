//! What transformers calls the parameters of each family.

use crate::config::Architecture;

/// The query, key and value projections: one matrix of all queries, then all keys, then all values; one matrix of each
/// head's three; or three matrices.
pub(super) enum QueryKeyValueNames {
    Fused(&'static str),
    PerHead(&'static str),
    Separate([&'static str; 3]),
}

/// Names of a family's parameters. Those of a layer follow `LAYER.NUMBER.`; `.weight` or `.bias` follows all.
pub(super) struct Names {
    pub(super) token_embedding: &'static str,
    pub(super) position_embedding: &'static str,
    pub(super) layer: &'static str,
    pub(super) attention_norm: &'static str,
    pub(super) query_key_value: QueryKeyValueNames,
    pub(super) attention_output: &'static str,
    pub(super) feed_forward_norm: &'static str,
    pub(super) gate: &'static str,
    pub(super) up: &'static str,
    pub(super) down: &'static str,
    pub(super) final_norm: &'static str,
    pub(super) head: &'static str,
    /// Whether transformers holds the layers' matrices as `[in, out]` (its `Conv1D`).
    pub(super) transposed: bool,
}

const GPT2: Names = Names {
    token_embedding: "transformer.wte",
    position_embedding: "transformer.wpe",
    layer: "transformer.h",
    attention_norm: "ln_1",
    query_key_value: QueryKeyValueNames::Fused("attn.c_attn"),
    attention_output: "attn.c_proj",
    feed_forward_norm: "ln_2",
    gate: "mlp.c_gate",
    up: "mlp.c_fc",
    down: "mlp.c_proj",
    final_norm: "transformer.ln_f",
    head: "lm_head",
    transposed: true,
};

const LLAMA: Names = Names {
    token_embedding: "model.embed_tokens",
    position_embedding: "model.embed_positions",
    layer: "model.layers",
    attention_norm: "input_layernorm",
    query_key_value: QueryKeyValueNames::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    attention_output: "self_attn.o_proj",
    feed_forward_norm: "post_attention_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    final_norm: "model.norm",
    head: "lm_head",
    transposed: false,
};

const GPT_NEOX: Names = Names {
    token_embedding: "gpt_neox.embed_in",
    position_embedding: "gpt_neox.embed_positions",
    layer: "gpt_neox.layers",
    attention_norm: "input_layernorm",
    query_key_value: QueryKeyValueNames::PerHead("attention.query_key_value"),
    attention_output: "attention.dense",
    feed_forward_norm: "post_attention_layernorm",
    gate: "mlp.gate",
    up: "mlp.dense_h_to_4h",
    down: "mlp.dense_4h_to_h",
    final_norm: "gpt_neox.final_layer_norm",
    head: "lm_head",
    transposed: false,
};

const GPTJ: Names = Names {
    token_embedding: "transformer.wte",
    position_embedding: "transformer.wpe",
    layer: "transformer.h",
    attention_norm: "ln_1",
    query_key_value: QueryKeyValueNames::Separate(["attn.q_proj", "attn.k_proj", "attn.v_proj"]),
    attention_output: "attn.out_proj",
    feed_forward_norm: "ln_1",
    gate: "mlp.gate",
    up: "mlp.fc_in",
    down: "mlp.fc_out",
    final_norm: "transformer.ln_f",
    head: "lm_head",
    transposed: false,
};

pub(super) fn names(architecture: Architecture) -> &'static Names {
    match architecture {
        Architecture::Gpt2 => &GPT2,
        Architecture::Llama
        | Architecture::Mistral
        | Architecture::Qwen2
        | Architecture::Mixtral
        | Architecture::Olmoe
        | Architecture::Qwen2Moe => &LLAMA,
        Architecture::GptNeox => &GPT_NEOX,
        Architecture::GptJ => &GPTJ,
    }
}

/// What GPT-NeoX's head is called in files, for the versions of transformers before 5, and in the model.
const FORMER_HEAD: (&str, &str) = ("embed_out.", "lm_head.");

/// The name under which transformers stores a parameter in a file: its own, but for GPT-NeoX's head.
pub(crate) fn stored_name(architecture: Architecture, name: &str) -> String {
    match (architecture, name.strip_prefix(FORMER_HEAD.1)) {
        (Architecture::GptNeox, Some(rest)) => format!("{}{rest}", FORMER_HEAD.0),
        _ => name.to_owned(),
    }
}

/// The inverse of [`stored_name`], by `model_type`.
pub(crate) fn name_of_stored(model_type: &str, stored: &str) -> String {
    match stored.strip_prefix(FORMER_HEAD.0) {
        Some(rest) if model_type == Architecture::GptNeox.name() => format!("{}{rest}", FORMER_HEAD.1),
        _ => stored.to_owned(),
    }
}

/// Whether a file's tensor is a buffer that old versions of transformers stored beside the parameters.
pub fn ignored_tensor(name: &str) -> bool {
    [
        ".attn.bias",
        ".attn.masked_bias",
        ".attention.bias",
        ".attention.masked_bias",
        "rotary_emb.inv_freq",
    ]
    .iter()
    .any(|buffer| name.ends_with(buffer))
}
