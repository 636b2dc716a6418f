"""Causal attention by PyTorch's scaled_dot_product_attention, dense and with a mask of blocks of which a quarter is present.

Arguments: length, block size, heads, head width. Measures once per line of standard input and answers milliseconds
{"dense_forward", "dense_backward", "masked_forward", "masked_backward"}.
"""

import json
import os
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention


def main():
    length, block, heads, width = map(int, sys.argv[1:])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    q, k, v = (torch.rand(1, heads, length, width, requires_grad=True) for _ in range(3))
    d_out = torch.rand(1, heads, length, width)
    count = length // block
    blocks = torch.eye(count, dtype=torch.bool).repeat(heads, 1, 1)
    below = torch.tril(torch.ones(count, count, dtype=torch.bool), -1).nonzero()
    wanted = count * (count + 1) // 2 // 4 - count
    for head in range(heads):
        chosen = below[torch.randperm(len(below))[:wanted]]
        blocks[head, chosen[:, 0], chosen[:, 1]] = True
    causal = torch.tril(torch.ones(length, length, dtype=torch.bool))
    mask = (blocks.repeat_interleave(block, 1).repeat_interleave(block, 2) & causal).unsqueeze(0)

    def measure(name, **how):
        start = time.perf_counter()
        out = scaled_dot_product_attention(q, k, v, **how)
        middle = time.perf_counter()
        torch.autograd.grad(out, (q, k, v), d_out)
        end = time.perf_counter()
        return {f"{name}_forward": (middle - start) * 1e3, f"{name}_backward": (end - middle) * 1e3}

    for _ in sys.stdin:
        answer = measure("dense", is_causal=True) | measure("masked", attn_mask=mask)
        print(json.dumps(answer), flush=True)


main()
