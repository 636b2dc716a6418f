"""torch.matmul of two square matrices of f32, of the size that the argument names.

Measures once per line of standard input and answers {"ms": milliseconds}.
"""

import json
import os
import sys
import time

import torch


def main():
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    size = int(sys.argv[1])
    a, b = torch.rand(size, size) - 0.5, torch.rand(size, size) - 0.5
    torch.matmul(a, b)
    for _ in sys.stdin:
        start = time.perf_counter()
        torch.matmul(a, b)
        print(json.dumps({"ms": (time.perf_counter() - start) * 1e3}), flush=True)


main()
