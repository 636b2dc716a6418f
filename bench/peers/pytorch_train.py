"""One training step of GPT-2 124M in PyTorch: batch 4 x 256, fused attention and fused AdamW; in f32, or with the argument
bf16 under torch.autocast.

Measures once per line of standard input and answers {"step": seconds, "loss": loss}.
"""

import json
import os
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

BATCH, LENGTH = 4, 256


def step(model, optimizer, tokens):
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=sys.argv[1] == "bf16"):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return {"step": time.perf_counter() - start, "loss": loss.item()}


def main():
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    ids = [(i * 7919 + 13) % config.vocab_size for i in range(BATCH * LENGTH)]
    tokens = torch.tensor(ids).view(BATCH, LENGTH)
    for _ in sys.stdin:
        print(json.dumps(step(model, optimizer, tokens)), flush=True)


main()
