"""Makes `executor.golden.json` and `executor.golden.safetensors`: what PyTorch computes for the executor's operations.

Run by developers only: `python tests/golden/executor.py`. The JSON lists cases: `name`, `operation`, `inputs` (a number)
and `attributes`. Of case NAME the tensors are `NAME.0`, `NAME.1`, … and `NAME.out`. Half types are computed in f32 and
rounded once, as the executor does.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).parent
cases, tensors = [], {}


def case(name, operation, inputs, compute, **attributes):
    """Computes in f32 and rounds the result to the type of the first floating-point input."""
    dtype = next(x.dtype for x in inputs if x.is_floating_point() or operation != "embedding")
    wide = [x.float() if x.is_floating_point() else x for x in inputs]
    out = compute(*wide)
    if operation != "cast":
        out = out.to(dtype)
    cases.append({"name": name, "operation": operation, "inputs": len(inputs), "attributes": attributes})
    for index, tensor in enumerate(inputs):
        tensors[f"{name}.{index}"] = tensor.contiguous().clone()
    tensors[f"{name}.out"] = out.contiguous().clone()


def noise(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def main():
    torch.manual_seed(5)
    half = [("", torch.float32), ("_f16", torch.float16), ("_bf16", torch.bfloat16)]
    for suffix, dtype in half:
        case("matmul" + suffix, "matmul", [noise(3, 7, dtype=dtype), noise(7, 5, dtype=dtype)], torch.matmul)
        case("softmax" + suffix, "softmax", [noise(5, 37, dtype=dtype, scale=4)], lambda x: F.softmax(x, -1))
        case("layer_norm" + suffix, "layer_norm", [noise(3, 2, 19, dtype=dtype), noise(19, dtype=dtype), noise(19, dtype=dtype)],
             lambda x, w, b: F.layer_norm(x, (19,), w, b, 1e-3), epsilon=1e-3)
        case("rms_norm" + suffix, "rms_norm", [noise(4, 21, dtype=dtype), noise(21, dtype=dtype)],
             lambda x, w: F.rms_norm(x, (21,), w, 1e-5))
        case("gelu" + suffix, "gelu", [noise(7, 11, dtype=dtype, scale=3)], F.gelu)
        case("add" + suffix, "add", [noise(2, 1, 3, dtype=dtype), noise(4, 1, dtype=dtype)], torch.add)
        case("div" + suffix, "div", [noise(3, 3, dtype=dtype), noise(dtype=dtype)], torch.div)
        case("mean" + suffix, "mean", [noise(3, 17, 2, dtype=dtype)], lambda x: x.mean(1), axis=1)
    case("matmul_vector", "matmul", [noise(1, 33), noise(33, 1)], torch.matmul)
    case("matmul_batched", "matmul", [noise(2, 1, 3, 4), noise(5, 4, 2)], torch.matmul)
    case("matmul_transposed", "matmul", [noise(3, 9, 5), noise(2, 9)], lambda a, b: a.transpose(-1, -2) @ b.T,
         transpose_a=True, transpose_b=True)
    case("matmul_without_inner", "matmul", [noise(3, 0), noise(0, 2)], torch.matmul)
    case("matmul_empty", "matmul", [noise(0, 3), noise(3, 2)], torch.matmul)
    case("matmul_wide", "matmul", [noise(70, 65), noise(65, 130)], torch.matmul)
    case("softmax_axis", "softmax", [noise(3, 5, 2)], lambda x: F.softmax(x, 1), axis=-2)
    case("softmax_one", "softmax", [noise(4, 1)], lambda x: F.softmax(x, -1))
    infinite = torch.tensor([[0.0, float("-inf"), 1.0], [float("nan"), 0.0, 1.0], [float("-inf")] * 3])
    case("softmax_infinite", "softmax", [infinite], lambda x: F.softmax(x, -1))
    case("log_softmax", "log_softmax", [noise(3, 18, scale=30)], lambda x: F.log_softmax(x, -1))
    case("layer_norm_plain", "layer_norm", [noise(6, 5)], lambda x: F.layer_norm(x, (5,)))
    case("layer_norm_one", "layer_norm", [noise(2, 1)], lambda x: F.layer_norm(x, (1,)))
    case("gelu_tanh", "gelu", [noise(9, scale=3)], lambda x: F.gelu(x, approximate="tanh"), approximate="tanh")
    case("silu", "silu", [noise(13, scale=4)], F.silu)
    case("relu", "relu", [torch.tensor([-1.0, 0.0, 2.0, float("nan"), float("-inf"), float("inf")])], F.relu)
    case("sub", "sub", [noise(3), noise(2, 3)], torch.sub)
    case("mul_scalar", "mul", [noise(), noise(2, 2, 2)], torch.mul)
    integers = [torch.tensor([[1, -2], [2**31 - 1, 7]], dtype=torch.int32), torch.tensor([3, 1], dtype=torch.int32)]
    case("add_i32", "add", integers, torch.add)
    case("mul_i32", "mul", integers, torch.mul)
    case("sum", "sum", [noise(3, 4)], torch.sum)
    case("sum_kept", "sum", [noise(3, 4, 2)], lambda x: x.sum(0, keepdim=True), axis=0, keep_dimensions=True)
    case("sum_nothing", "sum", [noise(3, 0)], lambda x: x.sum(1), axis=1)
    case("mean_nothing", "mean", [noise(0)], torch.mean)
    case("transpose", "transpose", [noise(2, 3, 4)], lambda x: x.transpose(-1, -2))
    case("transpose_axes", "transpose", [noise(2, 3, 4)], lambda x: x.permute(2, 0, 1), axes=[2, 0, 1])
    case("transpose_i32", "transpose", [torch.arange(6, dtype=torch.int32).reshape(2, 3)], torch.t)
    case("reshape", "reshape", [noise(2, 6)], lambda x: x.reshape(3, 4), shape=[3, -1])
    case("reshape_scalar", "reshape", [noise(1, 1)], lambda x: x.reshape(()), shape=[])
    case("slice", "slice", [noise(5, 4)], lambda x: x[:, 1:3], axis=1, start=1, end=3)
    case("concatenate", "concatenate", [noise(2, 1), noise(2, 0), noise(2, 3)], lambda *x: torch.cat(x, 1), axis=1)
    case("concatenate_i32", "concatenate", integers[1:] * 2, lambda *x: torch.cat(x))
    ids = torch.tensor([[0, 4], [2, 2], [1, 0]], dtype=torch.int32)
    case("embedding", "embedding", [ids, noise(5, 3)], lambda ids, table: F.embedding(ids, table))
    case("embedding_bf16", "embedding", [ids, noise(5, 3, dtype=torch.bfloat16)], lambda ids, table: F.embedding(ids, table))
    case("cast_bf16", "cast", [noise(3, 5)], lambda x: x.bfloat16(), dtype="bf16")
    case("cast_f16", "cast", [noise(4, scale=1e6)], lambda x: x.half(), dtype="f16")
    case("cast_i32", "cast", [noise(6, scale=1000)], lambda x: x.int(), dtype="i32")
    case("cast_from_i32", "cast", [torch.tensor([1, -5, 2**24 + 1], dtype=torch.int32)], lambda x: x.float(), dtype="f32")
    case("copy", "copy", [noise(3, 2)], lambda x: x)
    save_file(tensors, HERE / "executor.golden.safetensors")
    (HERE / "executor.golden.safetensors").chmod(0o644)
    lines = ",\n".join(json.dumps(case) for case in cases)
    (HERE / "executor.golden.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
