"""Makes tiny models of the families whose layers run attention and feed-forward network side by side, GPT-NeoX and GPT-J,
and the golden values of `generate.py` for them.

Run by developers only: `python tests/golden/parallel.py`.
"""

import torch
from generate import HERE, golden, randomise, save_golden
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
# Heads of 7, of which 4 elements are rotated; heads of 5, of which transformers rotates 2 where the share says 1.
GPT_NEOX = GPTNeoXConfig(
    vocab_size=53, hidden_size=21, num_hidden_layers=2, num_attention_heads=3, intermediate_size=22,
    max_position_embeddings=40, rotary_pct=0.6, hidden_act="gelu", **TOKENS,
)
GPT_NEOX_SEQUENTIAL = GPTNeoXConfig(
    vocab_size=53, hidden_size=15, num_hidden_layers=1, num_attention_heads=3, intermediate_size=18,
    max_position_embeddings=40, rotary_pct=0.25, rotary_emb_base=500, hidden_act="gelu_new", layer_norm_eps=1e-6,
    use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, **TOKENS,
)
GPTJ = GPTJConfig(vocab_size=53, n_embd=18, n_layer=2, n_head=3, n_positions=40, rotary_dim=4, **TOKENS)
GPTJ_TIED = GPTJConfig(
    vocab_size=53, n_embd=12, n_layer=1, n_head=2, n_positions=40, rotary_dim=6, n_inner=10,
    activation_function="gelu", tie_word_embeddings=True, **TOKENS,
)


def main():
    torch.set_num_threads(1)
    models = {
        "gpt_neox": (GPTNeoXForCausalLM, GPT_NEOX),
        "gpt_neox-sequential": (GPTNeoXForCausalLM, GPT_NEOX_SEQUENTIAL),
        "gptj": (GPTJForCausalLM, GPTJ),
        "gptj-tied": (GPTJForCausalLM, GPTJ_TIED),
    }
    for seed, (name, (architecture, config)) in enumerate(models.items()):
        torch.manual_seed(4000 + seed)
        config._attn_implementation = "eager"
        model = architecture(config).eval()
        randomise(model)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        (HERE / name / "model.safetensors").chmod(0o644)
        save_golden(name, golden(model, config.vocab_size))
        (HERE / f"{name}.golden.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
