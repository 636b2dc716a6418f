"""Makes `llama-window.golden.safetensors`, `gpt2-sparse.golden.safetensors` and `llama-sparse.golden.safetensors`: the
golden values of `generate.py` for its models with other attention masks.

- `llama-window`: the Llama weights as a Mistral model with a sliding window.
- `NAME-sparse`: masks per layer and head, given to PyTorch's scaled_dot_product_attention. Besides the golden values there
  are `block_size`, the window of each layer in `windows` (0: none), and `blocks` [rows, 4]: layer, head, query block and
  key block of every present block. Heads without rows are dense.

Run by developers only, after `generate.py`: `python tests/golden/sparse.py`.
"""

import torch
from generate import HERE, golden, save_golden
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

WINDOW = 6


def present(layer, head, query, key):
    """A block or two of those before, by a hash; the own block only of even ones."""
    return key == (query if query % 2 == 0 else query - 1) or (query * 31 + key * 17 + layer * 5 + head * 7) % 7 == 0


def masks(length, windows, size, blocks, heads):
    """One additive mask `[1, heads, length, length]` a layer."""
    query, key = torch.arange(length).unsqueeze(1), torch.arange(length).unsqueeze(0)
    rows = {tuple(row) for row in blocks}
    sparse = {row[:2] for row in rows}
    for layer, window in enumerate(windows):
        seen = (key <= query).repeat(heads, 1, 1)
        if window:
            seen &= query - key < window
        for head in range(heads):
            if (layer, head) in sparse:
                pairs = [[(layer, head, q // size, k // size) in rows for k in range(length)] for q in range(length)]
                seen[head] &= torch.tensor(pairs)
        yield torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).unsqueeze(0)


def sparse(name, windows, size, heads_with_layouts):
    model = AutoModelForCausalLM.from_pretrained(HERE / name, attn_implementation="sdpa", dtype=torch.float32).eval()
    model.config.use_cache = False
    config = model.config
    count = -(-config.max_position_embeddings // size)
    blocks = [
        (layer, head, query, key)
        for layer, head in heads_with_layouts
        for query in range(count)
        for key in range(query + 1)
        if present(layer, head, query, key)
    ]
    layers = [h.attn for h in model.transformer.h] if name == "gpt2" else [layer.self_attn for layer in model.model.layers]
    for number, layer in enumerate(layers):

        def hook(_, args, kwargs, number=number):
            hidden = args[0] if args else kwargs["hidden_states"]
            made = masks(hidden.shape[1], windows, size, blocks, config.num_attention_heads)
            kwargs["attention_mask"] = list(made)[number]
            return args, kwargs

        layer.register_forward_pre_hook(hook, with_kwargs=True)
    values = golden(model, config.vocab_size)
    values |= {"block_size": torch.tensor([size]), "windows": torch.tensor(windows), "blocks": torch.tensor(blocks)}
    save_golden(f"{name}-sparse", values)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(3000)
    llama = AutoModelForCausalLM.from_pretrained(HERE / "llama").config
    shape = {name: getattr(llama, name) for name in [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    ]}
    config = MistralConfig(**shape, rope_theta=10000.0, sliding_window=WINDOW)
    config._attn_implementation = "sdpa"
    model = MistralForCausalLM.from_pretrained(HERE / "llama", config=config, dtype=torch.float32).eval()
    model.config.use_cache = False
    save_golden("llama-window", golden(model, config.vocab_size))
    torch.manual_seed(3001)
    sparse("gpt2", [5, 0], 7, [(1, 0), (1, 2)])
    torch.manual_seed(3002)
    sparse("llama", [9, 0], 3, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)])


if __name__ == "__main__":
    main()
