"""Makes quantized.gguf and quantized.safetensors: every GGUF element type that is served, and its values by an
independent implementation (the `gguf` package of llama.cpp).

    pip install gguf numpy safetensors
    python tests/golden/quantized.py

`gguf` quantises the simple types itself; of the k-quants it can only read, so their blocks are random bytes with
finite scales. Query and key rows are permuted as llama.cpp's converter does for the `llama` architecture, so the file
has them as real models do, and the expected values are in transformers' order.
"""

from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

HERE = Path(__file__).parent
Type = gguf.GGMLQuantizationType
HEADS, KEY_VALUE_HEADS = 4, 2
# Offsets of the f16 scales in a block, from ggml-common.h.
SCALES = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}
random = np.random.default_rng(20)


def permute(weights, heads):
    """convert_hf_to_gguf.py, LlamaModel.permute."""
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def random_blocks(kind, rows, columns):
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows, columns // elements, size), dtype=np.uint8)
    for offset in SCALES[kind]:
        scale = random.normal(0, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, offset : offset + 2] = scale.view(np.uint8).reshape(*blocks.shape[:2], 2)
    return blocks.reshape(rows, -1)


def main():
    writer = gguf.GGUFWriter(HERE / "quantized.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    expected = {}

    def add(name, transformers_name, data, kind, values):
        writer.add_tensor(name, data, raw_dtype=kind)
        expected[transformers_name] = values.astype(np.float32)

    simple = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
    for layer, kind in enumerate(simple):
        data = quantize(random.normal(0, 1, (3, 64)).astype(np.float32), kind)
        add(f"blk.{layer}.ffn_up.weight", f"model.layers.{layer}.mlp.up_proj.weight", data, kind, dequantize(data, kind))
    for layer, kind in enumerate(SCALES, start=len(simple)):
        data = random_blocks(kind, 2, 512)
        add(f"blk.{layer}.ffn_up.weight", f"model.layers.{layer}.mlp.up_proj.weight", data, kind, dequantize(data, kind))
    for layer, kind in enumerate([Type.F32, Type.F16, Type.Q4_1, Type.Q8_0]):
        for part, heads in [("q", HEADS), ("k", KEY_VALUE_HEADS)]:
            weights = random.normal(0, 1, (heads * 6, 32)).astype(np.float32)
            values = dequantize(quantize(weights, kind), kind)
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            add(f"blk.{layer}.attn_{part}.weight", name, quantize(permute(weights, heads), kind), kind, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, HERE / "quantized.safetensors")


if __name__ == "__main__":
    main()
