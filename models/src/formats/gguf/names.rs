//! GGUF's tensor names to those of transformers, and back.

/// The transformers name of a GGUF tensor; a name that the architecture's table does not hold stays as it is, and the
/// model then reports it as unexpected.
pub(super) fn transformers_name(architecture: &str, name: &str) -> String {
    let (whole, layer_prefix, parts) = match architecture {
        "gpt2" => (GPT2_WHOLE, "transformer.h.", GPT2_LAYER),
        "gptneox" => (NEOX_WHOLE, "gpt_neox.layers.", NEOX_LAYER),
        _ => (LLAMA_WHOLE, "model.layers.", LLAMA_LAYER),
    };
    let renamed = match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) if !layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit()) => {
            with_suffix(parts, rest).map(|rest| format!("{layer_prefix}{layer}.{rest}"))
        }
        _ => with_suffix(whole, name),
    };
    renamed.unwrap_or_else(|| name.to_owned())
}

/// Looks a name up without its `.weight` or `.bias`.
fn with_suffix(table: &[(&str, &str)], name: &str) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    let (_, renamed) = table.iter().find(|&&(known, _)| known == stem)?;
    matches!(suffix, "weight" | "bias").then(|| format!("{renamed}.{suffix}"))
}

/// The GGUF name of a tensor of transformers; `None` if the architecture's table does not hold it.
pub(crate) fn gguf_name(architecture: &str, name: &str) -> Option<String> {
    let (whole, layer_prefix, parts) = match architecture {
        "gpt2" => (GPT2_WHOLE, "transformer.h.", GPT2_LAYER),
        "gptneox" => (NEOX_WHOLE, "gpt_neox.layers.", NEOX_LAYER),
        _ => (LLAMA_WHOLE, "model.layers.", LLAMA_LAYER),
    };
    let (stem, suffix) = name.rsplit_once('.')?;
    let find = |table: &[(&'static str, &str)], stem: &str| {
        let found = table.iter().find(|&&(_, renamed)| renamed == stem);
        found.map(|&(known, _)| known)
    };
    match stem.strip_prefix(layer_prefix) {
        Some(rest) => {
            let (layer, part) = rest.split_once('.')?;
            Some(format!("blk.{layer}.{}.{suffix}", find(parts, part)?))
        }
        None => Some(format!("{}.{suffix}", find(whole, stem)?)),
    }
}

const GPT2_WHOLE: &[(&str, &str)] = &[
    ("token_embd", "transformer.wte"),
    ("position_embd", "transformer.wpe"),
    ("output_norm", "transformer.ln_f"),
    ("output", "lm_head"),
];

const GPT2_LAYER: &[(&str, &str)] = &[
    ("attn_norm", "ln_1"),
    ("attn_qkv", "attn.c_attn"),
    ("attn_output", "attn.c_proj"),
    ("ffn_norm", "ln_2"),
    ("ffn_up", "mlp.c_fc"),
    ("ffn_down", "mlp.c_proj"),
];

const NEOX_WHOLE: &[(&str, &str)] = &[
    ("token_embd", "gpt_neox.embed_in"),
    ("output_norm", "gpt_neox.final_layer_norm"),
    ("output", "lm_head"),
];

const NEOX_LAYER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_qkv", "attention.query_key_value"),
    ("attn_output", "attention.dense"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_up", "mlp.dense_h_to_4h"),
    ("ffn_down", "mlp.dense_4h_to_h"),
];

const LLAMA_WHOLE: &[(&str, &str)] = &[
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
];

const LLAMA_LAYER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_exps", "mlp.experts.gate_projs"),
    ("ffn_up_exps", "mlp.experts.up_projs"),
    ("ffn_down_exps", "mlp.experts.down_projs"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];

#[cfg(test)]
mod tests {
    use super::{gguf_name, transformers_name};

    #[test]
    fn names_of_the_families() {
        for (architecture, name, expected) in [
            ("gpt2", "token_embd.weight", "transformer.wte.weight"),
            ("gpt2", "blk.11.attn_qkv.bias", "transformer.h.11.attn.c_attn.bias"),
            ("gpt2", "blk.0.ffn_down.weight", "transformer.h.0.mlp.c_proj.weight"),
            ("gpt2", "output_norm.bias", "transformer.ln_f.bias"),
            ("llama", "blk.3.ffn_gate.weight", "model.layers.3.mlp.gate_proj.weight"),
            ("qwen2", "blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias"),
            ("llama", "output.weight", "lm_head.weight"),
            ("llama", "blk.1.ffn_gate_inp.weight", "model.layers.1.mlp.gate.weight"),
            (
                "qwen2moe",
                "blk.1.ffn_up_shexp.weight",
                "model.layers.1.mlp.shared_expert.up_proj.weight",
            ),
            (
                "olmoe",
                "blk.1.ffn_down_exps.weight",
                "model.layers.1.mlp.experts.down_projs.weight",
            ),
            (
                "gptneox",
                "blk.0.attn_qkv.bias",
                "gpt_neox.layers.0.attention.query_key_value.bias",
            ),
            ("llama", "rope_freqs.weight", "rope_freqs.weight"),
            ("llama", "blk.x.attn_q.weight", "blk.x.attn_q.weight"),
            ("llama", "blk.1.attn_q.scale", "blk.1.attn_q.scale"),
            ("llama", "blk.1", "blk.1"),
            ("llama", "", ""),
        ] {
            assert_eq!(transformers_name(architecture, name), expected);
            let renamed = expected != name;
            assert_eq!(gguf_name(architecture, expected), renamed.then(|| name.to_owned()));
        }
    }
}
