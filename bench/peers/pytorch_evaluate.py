"""Loss and next-token accuracy of GPT-2 124M (random weights, f32) over documents of token ids, in PyTorch: batches of four,
fused attention.

Measures once per line of standard input and answers {"seconds": seconds, "tokens": tokens read, "loss": loss}.
"""

import json
import os
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

DOCUMENTS, LENGTH, BATCH = 16, 257, 4


def evaluate(model, documents):
    start = time.perf_counter()
    total, correct = 0.0, 0
    with torch.inference_mode():
        for batch in documents.split(BATCH):
            logits = model(batch[:, :-1]).logits.flatten(0, 1)
            targets = batch[:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            correct += (logits.argmax(-1) == targets).sum().item()
    tokens = DOCUMENTS * (LENGTH - 1)
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "loss": total / tokens}


def main():
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = GPT2LMHeadModel._from_config(GPT2Config(use_cache=False), attn_implementation="sdpa").eval()
    ids = [(i * 7919 + 13) % model.config.vocab_size for i in range(DOCUMENTS * LENGTH)]
    documents = torch.tensor(ids).view(DOCUMENTS, LENGTH)
    for _ in sys.stdin:
        print(json.dumps(evaluate(model, documents)), flush=True)


main()
