"""Makes the golden values of mixed precision that `models/tests` compares against, from the models and batches that
`generate.py` made.

Run by developers only, never by a test: `python tests/golden/half.py` after `generate.py`, with the same packages.

For every model `NAME` and type `TYPE` (bf16, f16) there is, in `NAME.half.safetensors`,

- `TYPE.gradient.PARAMETER`: the gradient of `batch.loss` under torch.autocast, unscaled; for f16 the loss was scaled by
  `TYPE.scale`, as torch.amp.GradScaler does. Kept in the type itself: its rounding is far below the tolerance.
- `TYPE.steps.losses` [10]: ten steps of torch.optim.AdamW under autocast, with GradScaler for f16, on the batches and with
  the settings of `generate.py`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
IGNORED = -100
TYPES = {"bf16": (torch.bfloat16, 1.0), "f16": (torch.float16, 1024.0)}


def read_batch(golden):
    weights = golden["batch.weights"].tolist()
    return [(golden[f"batch.{i}.ids"], golden[f"batch.{i}.targets"], weight) for i, weight in enumerate(weights)]


def batch_loss(model, batch, dtype):
    """The weighted sum of cross-entropies over the number of targets; the loss itself in f32."""
    total, count = 0.0, 0
    for ids, targets, weight in batch:
        kept = targets != IGNORED
        if not kept.any():
            continue
        with torch.autocast("cpu", dtype=dtype):
            logits = model(ids.unsqueeze(0)).logits[0]
        entropies = torch.nn.functional.cross_entropy(logits[kept].float(), targets[kept], reduction="sum")
        total, count = total + weight * entropies, count + int(kept.sum())
    return total / count


def load(name):
    return AutoModelForCausalLM.from_pretrained(HERE / name, attn_implementation="eager", dtype=torch.float32).eval()


def steps(name, golden, dtype, scale):
    model, batch = load(name), read_batch(golden)
    rate, beta1, beta2, epsilon, decay, norm = golden["steps.options"].tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(beta1, beta2), eps=epsilon, weight_decay=decay)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        loss = batch_loss(model, [s for i, s in enumerate(batch) if i != step % len(batch)], dtype)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return torch.tensor(losses)


def main():
    torch.set_num_threads(1)
    for name in ["gpt2", "llama", "qwen2", "gpt_neox", "gptj"]:
        golden, out = load_file(HERE / f"{name}.golden.safetensors"), {}
        for key, (dtype, scale) in TYPES.items():
            model = load(name)
            (scale * batch_loss(model, read_batch(golden), dtype)).backward()
            for parameter_name, parameter in model.named_parameters():
                gradient = parameter.grad / scale
                out[f"{key}.gradient.{parameter_name}"] = gradient.to(dtype)
                exact = golden[f"gradient.{parameter_name}"]
                relative = (gradient - exact).abs().max() / exact.abs().max()
                print(f"{name} {key} {parameter_name}: {relative:.1e} of the largest")
            out[f"{key}.scale"] = torch.tensor([scale])
            out[f"{key}.steps.losses"] = steps(name, golden, dtype, scale)
            difference = (out[f"{key}.steps.losses"] - golden["steps.losses"]).abs().max()
            print(f"{name} {key}: losses of ten steps differ from f32's by {difference:.1e}")
        path = HERE / f"{name}.half.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in out.items()}, path)
        path.chmod(0o644)


if __name__ == "__main__":
    main()
