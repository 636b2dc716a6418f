"""Makes the tiny models and golden values that `models/tests` compares against.

Run by developers only, never by a test: `python tests/golden/generate.py` with torch, transformers, safetensors and
numpy installed. Everything is seeded; the versions that made the committed files are in `versions.json`.

For every model folder `NAME/` (a Hugging Face directory) there is `NAME.golden.safetensors` with

- `logits.ids` [37], `logits.values` [37, vocabulary]; `one.ids` [1], `one.values` [1, vocabulary];
- `batch.N.ids`, `batch.N.targets` [length] and `batch.weights` [sequences]: a batch of unequal lengths, with ignored
  targets, weights, and a sequence of one token that has no target;
- `batch.losses` [sequences] (NaN without targets), `batch.counts` [sequences], `batch.loss`: the weighted sum of the
  cross-entropies over the number of targets;
- `gradient.PARAMETER`: the gradient of `batch.loss`;
- `steps.losses`, `steps.norms` [10] and `final.PARAMETER`: ten steps of torch.optim.AdamW with clip_grad_norm_, step i
  on the batch without the sequence i modulo their number. The settings are in `steps.options`: learning rate, beta1,
  beta2, epsilon, weight decay, largest norm.
"""

import json
import math
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY, MAX_NORM = 3e-3, 0.9, 0.99, 1e-6, 0.1, 0.9
STEPS = 10
IGNORED = -100

GPT2 = GPT2Config(
    vocab_size=61, n_positions=40, n_embd=15, n_layer=2, n_head=3,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
)
LLAMA = LlamaConfig(
    vocab_size=53, hidden_size=20, intermediate_size=22, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, max_position_embeddings=48, rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
)
QWEN2 = Qwen2Config(
    vocab_size=53, hidden_size=12, intermediate_size=18, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=48, rms_norm_eps=1e-6, rope_theta=10000.0,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
)
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def randomise(model):
    """Weights large enough that every part of the model matters, norms and biases away from 1 and 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            is_norm = "ln_" in name or "norm" in name
            if is_norm and name.endswith("weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(0.25 * noise)


def cross_entropies(model, ids, targets):
    """Cross-entropy of each target that is not ignored."""
    logits = model(ids.unsqueeze(0)).logits[0]
    kept = targets != IGNORED
    return torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="none")


def make_batch(vocabulary):
    """Sequences of unequal length, their targets and weights."""
    lengths, weights = [37, 11, 1, 2, 24], [1.0, 0.5, 1.0, 2.0, 1.0]
    batch = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, vocabulary, (length,))
        targets = torch.cat([ids[1:], torch.tensor([IGNORED])])
        if number == 4:
            targets[3:9] = IGNORED
            targets[-1] = 7
        batch.append((ids, targets, weights[number]))
    return batch


def batch_loss(model, batch):
    """The weighted sum of cross-entropies over the number of targets, and each sequence's mean and count."""
    total, count, losses, counts = 0.0, 0, [], []
    for ids, targets, weight in batch:
        entropies = cross_entropies(model, ids, targets)
        losses.append(entropies.mean().item() if len(entropies) else math.nan)
        counts.append(len(entropies))
        if len(entropies):
            total = total + weight * entropies.sum()
            count += len(entropies)
    return total / count, losses, counts


def golden(model, vocabulary):
    """All golden values of one model; leaves the model as ten steps made it."""
    out = {}
    ids, one = torch.randint(0, vocabulary, (37,)), torch.randint(0, vocabulary, (1,))
    with torch.no_grad():
        out["logits.ids"], out["logits.values"] = ids, model(ids.unsqueeze(0)).logits[0]
        out["one.ids"], out["one.values"] = one, model(one.unsqueeze(0)).logits[0]
    batch = make_batch(vocabulary)
    for number, (ids, targets, _) in enumerate(batch):
        out[f"batch.{number}.ids"], out[f"batch.{number}.targets"] = ids, targets
    out["batch.weights"] = torch.tensor([weight for _, _, weight in batch])
    loss, losses, counts = batch_loss(model, batch)
    loss.backward()
    out["batch.loss"] = loss.detach().reshape(1)
    out["batch.losses"], out["batch.counts"] = torch.tensor(losses), torch.tensor(counts)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        out[f"gradient.{name}"] = parameter.grad.clone()

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=WEIGHT_DECAY
    )
    step_losses, step_norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, _, _ = batch_loss(model, [s for i, s in enumerate(batch) if i != step % len(batch)])
        loss.backward()
        step_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        step_losses.append(loss.item())
        optimizer.step()
    out["steps.losses"], out["steps.norms"] = torch.tensor(step_losses), torch.tensor(step_norms)
    out["steps.options"] = torch.tensor([LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY, MAX_NORM], dtype=torch.float64)
    for name, parameter in trained.items():
        out[f"final.{name}"] = parameter.detach().clone()
    return out


def save_golden(name, values):
    """Integers as i64, everything else as f32."""
    tensors = {k: v.contiguous() for k, v in values.items()}
    save_file(tensors, HERE / f"{name}.golden.safetensors")


def scaled_logits(folder, ids):
    """Logits of the Llama model with Llama 3's rotary scaling, which the tests switch on in a copy of its config."""
    config = LlamaConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_theta": 10000.0, **LLAMA3_SCALING}
    model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(ids.unsqueeze(0)).logits[0]


def main():
    torch.set_num_threads(1)
    models = {"gpt2": (GPT2LMHeadModel, GPT2), "llama": (LlamaForCausalLM, LLAMA), "qwen2": (Qwen2ForCausalLM, QWEN2)}
    for seed, (name, (architecture, config)) in enumerate(models.items()):
        torch.manual_seed(1000 + seed)
        config._attn_implementation = "eager"
        model = architecture(config).eval()
        randomise(model)
        folder = HERE / name
        model.save_pretrained(folder)
        if name == "qwen2":
            model.to(torch.float16).save_pretrained(HERE / "qwen2-f16")
            model.float()
            model = architecture.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
            model.to(torch.bfloat16).save_pretrained(HERE / "qwen2-bf16")
            model = architecture.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
            model.save_pretrained(HERE / "qwen2-sharded", max_shard_size="4KB")
        values = golden(model, config.vocab_size)
        if name == "llama":
            values["scaled.values"] = scaled_logits(folder, values["logits.ids"])
        save_golden(name, values)
    for stray in HERE.glob("*/generation_config.json"):
        stray.unlink()
    for tensors in HERE.glob("**/*.safetensors"):
        tensors.chmod(0o644)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
