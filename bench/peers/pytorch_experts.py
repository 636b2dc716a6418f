"""The feed-forward part of a Mixtral layer (8 experts, top 2, width 512, inner 1024 each) and that of a Llama layer of inner
2048 in PyTorch: forward and backward over 1024 tokens.

Measures once per line of standard input and answers {"experts": ms, "dense": ms}.
"""

import json
import os
import sys
import time

import torch
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

TOKENS, WIDTH = 1024, 512


def timed(module, x):
    start = time.perf_counter()
    module(x).sum().backward()
    return (time.perf_counter() - start) * 1e3


def main():
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    experts = MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=WIDTH, intermediate_size=1024, num_local_experts=8, num_experts_per_tok=2)
    )
    dense = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=2048))
    with torch.no_grad():
        for parameter in [*experts.parameters(), *dense.parameters()]:
            parameter.normal_(std=0.02)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    for _ in sys.stdin:
        print(json.dumps({"experts": timed(experts, x), "dense": timed(dense, x)}), flush=True)


main()
