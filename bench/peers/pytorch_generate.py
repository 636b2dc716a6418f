"""Greedy generation in PyTorch with a key-value cache, random weights.

    pytorch_generate.py gpt2|smollm2 float32|bfloat16

Measures once per line of standard input, {"sequences": n, "prompt": tokens, "tokens": decoded}, and answers
{"decode": tokens/s, "prefill": tokens/s, "seconds": of the whole}. SmolLM2 has no 4-bit kernels here: it runs in f32,
as transformers would run it.
"""

import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

CONFIGS = {
    "gpt2": GPT2Config(),
    "smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
}


@torch.no_grad()
def measure(model, prompt, tokens):
    sequences, length = prompt.shape
    start = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    prefilled = time.perf_counter()
    for _ in range(tokens - 1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    end = time.perf_counter()
    return {
        "decode": sequences * (tokens - 1) / (end - prefilled),
        "prefill": sequences * length / (prefilled - start),
        "seconds": end - start,
    }


def main():
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = CONFIGS[sys.argv[1]]
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sys.argv[2])).eval()
    for line in sys.stdin:
        work = json.loads(line)
        prompt = torch.randint(config.vocab_size, (work["sequences"], work["prompt"]))
        print(json.dumps(measure(model, prompt, work["tokens"])), flush=True)


main()
