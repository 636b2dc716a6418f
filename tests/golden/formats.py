"""Makes `formats/`: the weights of `gpt2/` and `qwen2-bf16/` in the formats of numpy, PyTorch, pg_gpt2 and manifests.

Run by developers only: `python tests/golden/formats.py` with torch, numpy and safetensors installed. The values are
those of the folders, bit for bit; `config.json` is not repeated, tests put it beside.
"""

import gzip
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
OUT = HERE / "formats"


def npz(weights):
    """Deflated, some arrays in Fortran order, one in f64."""
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    for name in ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"]:
        arrays[name] = np.asfortranarray(arrays[name])
    arrays["transformer.ln_f.bias"] = arrays["transformer.ln_f.bias"].astype(np.float64)
    np.savez_compressed(OUT / "gpt2.npz", **arrays)


def npz_bf16(weights):
    """Stored, in the two-byte type that numpy makes of bfloat16."""
    np.savez(OUT / "qwen2-bf16.npz", **{name: tensor.view(torch.int16).numpy().view("V2") for name, tensor in weights.items()})


def pg_gpt2(weights):
    """As pg_gpt2's converter writes them, and as its pg_llm_export_npz does: flat, the embedding one row at a time."""
    names = {name.removeprefix("transformer."): tensor.numpy() for name, tensor in weights.items()}
    names["wte"], names["wpe"] = names.pop("wte.weight"), names.pop("wpe.weight")

    def entry(name, array):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
        return len(name).to_bytes(2, "little") + name.encode() + buffer.getvalue()

    converted = [entry(name, names[name]) for name in sorted(names)]
    exported = []
    for name in sorted(names):
        exported += [entry(name, row) for row in (names[name] if name == "wte" else [names[name].reshape(-1)])]
    for file, entries in [("pg_gpt2-converted.npz", converted), ("pg_gpt2-exported.npz", exported)]:
        with open(OUT / file, "wb") as raw, gzip.GzipFile(file, "wb", fileobj=raw, mtime=0) as stream:
            stream.write(b"".join(entries))


def bin_gpt2(weights):
    """Views of one storage: transposed, with an offset, tied, a parameter, and the buffers of old versions."""
    state = dict(weights)
    name = "transformer.h.0.attn.c_attn.weight"
    state[name] = state[name].t().contiguous().t()
    both = torch.cat([state["transformer.h.1.ln_1.weight"], state["transformer.h.1.ln_1.bias"]])
    state["transformer.h.1.ln_1.weight"], state["transformer.h.1.ln_1.bias"] = both[:15], both[15:]
    every_other = torch.zeros(2 * 15)
    every_other[::2] = state["transformer.ln_f.weight"]
    state["transformer.ln_f.weight"] = every_other[::2]
    state["transformer.ln_f.bias"] = torch.nn.Parameter(state["transformer.ln_f.bias"])
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"].double()
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8).tril()
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save(state, OUT / "gpt2.bin")


def bin_qwen2(weights):
    """The state_dict of a module, whose dictionary has attributes."""
    module = torch.nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        owner = module
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, torch.nn.Parameter(tensor))
    torch.save(module.state_dict(), OUT / "qwen2-bf16.bin")


def manifest(weights):
    """Two files, one in a folder; matrices split along either axis or stored transposed; a header with the documents."""
    folder = OUT / "gpt2-manifest"
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    files = {"a.bin": bytearray(b"begin"), "shards/b.bin": bytearray()}
    config = json.loads((HERE / "gpt2/config.json").read_text())
    lines = [{"format": "candle_fdw.weights", "version": 1, "config": config}]

    def add(name, tensor, whole, file, **more):
        data = tensor.contiguous().numpy().tobytes()
        start = len(files[file])
        files[file] += data
        digest = hashlib.sha256(data).hexdigest()
        lines.append({"name": name, "dtype": "F32", "shape": list(whole), "file": file,
                      "byte_range": [start, start + len(data)], "sha256": digest, **more})

    for number, (name, tensor) in enumerate(sorted(weights.items())):
        file, shape = ["a.bin", "shards/b.bin"][number % 2], tensor.shape
        if name.endswith("c_attn.weight"):
            for start, end in [(20, 45), (0, 7), (7, 20)]:
                add(name, tensor[:, start:end], shape, file, shard={"axis": 1, "range": [start, end]})
        elif name.endswith("c_fc.weight"):
            for start, end in [(0, 1), (1, 15)]:
                add(name, tensor[start:end].t(), shape, file, shard={"axis": 0, "range": [start, end]}, transposed=True)
        elif name.endswith("mlp.c_proj.weight"):
            add(name, tensor.t(), shape, file, transposed=True)
        else:
            add(name, tensor, shape, file)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    (folder / "model.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main():
    OUT.mkdir(exist_ok=True)
    gpt2 = load_file(HERE / "gpt2/model.safetensors")
    qwen2 = load_file(HERE / "qwen2-bf16/model.safetensors")
    npz(gpt2)
    npz_bf16(qwen2)
    pg_gpt2(gpt2)
    bin_gpt2(gpt2)
    bin_qwen2(qwen2)
    manifest(gpt2)


if __name__ == "__main__":
    main()
