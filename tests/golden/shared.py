"""Makes `gpt2-shared.golden.safetensors` and `llama-shared.golden.safetensors`: the golden values of `generate.py` for its
models when both of their layers are the first one, as `"share": "all"` makes them.

Run by developers only, after `generate.py`: `python tests/golden/shared.py`.
"""

import torch
from generate import HERE, golden, save_golden
from transformers import AutoModelForCausalLM


def main():
    torch.set_num_threads(1)
    for seed, name in enumerate(["gpt2", "llama"]):
        torch.manual_seed(2000 + seed)
        model = AutoModelForCausalLM.from_pretrained(HERE / name, attn_implementation="eager", dtype=torch.float32).eval()
        model.config.use_cache = False
        layers = model.transformer.h if name == "gpt2" else model.model.layers
        # A module that is there twice has its parameters once.
        layers[1] = layers[0]
        save_golden(f"{name}-shared", golden(model, model.config.vocab_size))


if __name__ == "__main__":
    main()
