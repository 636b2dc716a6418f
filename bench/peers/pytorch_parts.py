"""Parts of a training step of GPT-2 124M in PyTorch: fused AdamW alone, the head with its cross-entropy and both gradients,
and all products of matrices but those of attention.

Measures once per line of standard input and answers {"adamw": ns a parameter, "head": ms, "products": s}.
"""

import json
import os
import sys
import time

import torch
import torch.nn.functional as functional

PARAMETERS, TOKENS, WIDTH, VOCABULARY, LAYERS = 124_439_808, 1024, 768, 50257, 12


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def products(inputs, outputs):
    """Seconds of a linear map's three products over all tokens."""
    x, w, dy = torch.rand(TOKENS, inputs), torch.rand(outputs, inputs), torch.rand(TOKENS, outputs)

    def run():
        return x @ w.T, dy @ w, dy.T @ x

    run()
    return timed(run)


def main():
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    parameter = torch.nn.Parameter(torch.rand(PARAMETERS))
    parameter.grad = torch.rand(PARAMETERS)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.01, fused=True)
    hidden = torch.rand(TOKENS, WIDTH, requires_grad=True)
    head = (torch.rand(VOCABULARY, WIDTH) * 0.02).requires_grad_()
    targets = torch.arange(TOKENS) * 7919 % VOCABULARY
    shapes = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]

    def loss():
        functional.cross_entropy(hidden @ head.T, targets, reduction="sum").backward()

    for _ in sys.stdin:
        answer = {
            "adamw": timed(optimizer.step) / PARAMETERS * 1e9,
            "head": timed(loss) * 1e3,
            "products": LAYERS * sum(products(*shape) for shape in shapes) + products(WIDTH, VOCABULARY),
        }
        print(json.dumps(answer), flush=True)


main()
