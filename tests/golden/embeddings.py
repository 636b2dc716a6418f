"""Makes `embeddings.golden.safetensors`: what transformers gives as the last hidden state of the tiny models, pooled.

Run by developers only: `python tests/golden/embeddings.py` after `generate.py`. For each model NAME there are

- `NAME.ids` [37]: the tokens;
- `NAME.mean`, `NAME.last`, `NAME.cls` [width]: the mean of the hidden states after the last norm, that of the last token,
  that of the first.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel

HERE = Path(__file__).parent


def main():
    out = {}
    for seed, name in enumerate(["gpt2", "llama", "qwen2", "gpt_neox", "gptj"]):
        torch.manual_seed(2000 + seed)
        model = AutoModel.from_pretrained(HERE / name, dtype=torch.float32, attn_implementation="eager").eval()
        ids = torch.randint(0, model.config.vocab_size, (37,))
        with torch.no_grad():
            states = model(ids.unsqueeze(0)).last_hidden_state[0]
        out[f"{name}.ids"] = ids
        out[f"{name}.mean"], out[f"{name}.last"], out[f"{name}.cls"] = states.mean(0), states[-1], states[0]
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, HERE / "embeddings.golden.safetensors")
    (HERE / "embeddings.golden.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
