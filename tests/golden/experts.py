"""Makes `mixtral/`, `olmoe/` and `qwen2_moe/` with their golden values, as `generate.py` makes those of the dense models.

The losses include those of the routers: to the mean cross-entropy of each sequence is added `router.options[0]` times
transformers' load-balancing loss over the sequence's tokens and `router.options[1]` times the z loss of ST-MoE
(arXiv:2202.08906), the mean over tokens and layers of the square of the router's log-sum-exp. Beside what `generate.py`
says, the golden files hold `routes.experts` and `routes.gates` [layers, 37, experts a token]: where the tokens of
`logits.ids` go.

Run by developers only: `python tests/golden/experts.py`.
"""

import generate
import torch
from generate import HERE, golden, randomise, save_golden
from transformers import (
    MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

SHAPE = {"vocab_size": 31, "max_position_embeddings": 48, "num_hidden_layers": 2, "bos_token_id": None,
         "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(
        **SHAPE, hidden_size=14, intermediate_size=9, num_attention_heads=3, num_key_value_heads=1, head_dim=6,
        num_local_experts=5, num_experts_per_tok=2, rope_theta=10000.0,
    ), (0.2, 0.0)),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(
        **SHAPE, hidden_size=12, intermediate_size=5, num_attention_heads=2, num_key_value_heads=1, num_experts=7,
        num_experts_per_tok=3, norm_topk_prob=False,
    ), (0.1, 0.05)),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig(
        **SHAPE, hidden_size=12, intermediate_size=20, moe_intermediate_size=7, shared_expert_intermediate_size=10,
        num_attention_heads=2, num_key_value_heads=2, num_experts=3, num_experts_per_tok=3, norm_topk_prob=True,
    ), (0.0, 0.0)),
}


def batch_loss(coefficients):
    """`generate.batch_loss` with the losses of the routers."""
    balance, z = coefficients

    def loss_of(model, batch):
        total, count, losses, counts = 0.0, 0, [], []
        for ids, targets, weight in batch:
            outputs = model(ids.unsqueeze(0), output_router_logits=True)
            kept = targets != generate.IGNORED
            number = int(kept.sum())
            counts.append(number)
            if number == 0:
                losses.append(float("nan"))
                continue
            loss = torch.nn.functional.cross_entropy(outputs.logits[0][kept], targets[kept])
            config = model.config
            loss = loss + balance * load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok
            )
            scores = torch.cat(outputs.router_logits)
            loss = loss + z * torch.logsumexp(scores, dim=-1).square().mean()
            losses.append(loss.item())
            total = total + weight * number * loss
            count += number
        return total / count, losses, counts

    return loss_of


def routes(model, ids):
    """Experts and gates of every layer for every token."""
    found = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, outputs: found.append(outputs[1:]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    return {
        "routes.experts": torch.stack([experts for _, experts in found]),
        "routes.gates": torch.stack([gates for gates, _ in found]),
    }


def main():
    torch.set_num_threads(1)
    for seed, (name, (architecture, config, coefficients)) in enumerate(MODELS.items()):
        torch.manual_seed(3000 + seed)
        config._attn_implementation = config._experts_implementation = "eager"
        model = architecture(config).eval()
        randomise(model)
        with torch.no_grad():
            for layer in model.model.layers:
                # Scores far enough apart that no step of training meets a near tie.
                layer.mlp.gate.weight.mul_(4.0)
        model.save_pretrained(HERE / name)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        generate.batch_loss = batch_loss(coefficients)
        values = golden(model, config.vocab_size)
        model.load_state_dict(before)
        values |= routes(model, values["logits.ids"])
        values["router.options"] = torch.tensor(coefficients, dtype=torch.float64)
        save_golden(name, values)
    for stray in HERE.glob("*/generation_config.json"):
        stray.unlink()
    for tensors in HERE.glob("**/*.safetensors"):
        tensors.chmod(0o644)


if __name__ == "__main__":
    main()
