"""Makes the golden values of adapters that are trained with dropout.

Run by developers only, after `adapters.py` and with what that needs: `python tests/golden/adapter_dropout.py`. For every
adapter of the tiny models there is `NAME.dropout.safetensors` with `batch.losses` and `gradient.PARAMETER` as
`generate.py` describes them, on the batch of `NAME.golden.safetensors`. PEFT computes them; only the masks of its dropout
are given, from a Philox 4x32-10 of its own here, by the numbers that the crate gives seed, step, sequence and place.
"""

import numpy
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters import ADAPTERS
from generate import HERE, batch_loss

PROBABILITY, SEED, STEP = 0.25, 42, 5
U32, U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def mixed(number):
    """SplitMix64."""
    number = (number + 0x9E3779B97F4A7C15) & U64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & U64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & U64
    return number ^ (number >> 31)


def philox(key, counter):
    """The four words of a counter."""
    keys = [key & U32, key >> 32]
    a, b, c, d = counter
    for _ in range(10):
        high, low = divmod(a * 0xD2511F53, 1 << 32)
        high2, low2 = divmod(c * 0xCD9E8D57, 1 << 32)
        a, b, c, d = high2 ^ b ^ keys[0], low2, high ^ d ^ keys[1], low
        keys = [(keys[0] + 0x9E3779B9) & U32, (keys[1] + 0xBB67AE85) & U32]
    return a, b, c, d


def factors(site, sequence, rows, width):
    """The mask of a sequence `[rows, width]`: element `4 * 16 * g + 16 * j + i` is word j of counter `16 * g + i`."""
    key = mixed((SEED + mixed(STEP)) & U64)
    groups = -(-width // 64)
    words = numpy.empty((rows, groups, 4, 16), dtype=numpy.uint64)
    for row in range(rows):
        for counter in range(groups * 16):
            words[row, counter // 16, :, counter % 16] = philox(key, (counter, site, sequence, row))
    kept = words.reshape(rows, groups * 64)[:, :width] >= int(PROBABILITY * 2**32)
    return torch.from_numpy(kept.astype(numpy.float32)) / (1 - PROBABILITY)


class Masked(torch.nn.Module):
    """In the place of PEFT's dropout of one module."""

    sequence = None

    def __init__(self, site):
        super().__init__()
        self.site = site

    def forward(self, x):
        return x * factors(self.site, Masked.sequence, x.shape[1], x.shape[2])


def numbered(batch):
    """The batch, telling the masks which sequence is computed."""
    for number, entry in enumerate(batch):
        Masked.sequence = number
        yield entry


def main():
    torch.set_num_threads(1)
    for name, (base, _) in ADAPTERS.items():
        model = AutoModelForCausalLM.from_pretrained(HERE / base, dtype=torch.float32, attn_implementation="eager")
        config, base_parameters = model.config, len(list(model.parameters()))
        model = PeftModel.from_pretrained(model, HERE / name, is_trainable=True)
        trained = {key.replace(".default.", "."): p for key, p in model.named_parameters() if p.requires_grad}
        first_site = 1 + config.num_hidden_layers * (config.num_attention_heads + 2) + base_parameters
        for index, key in enumerate(key for key in trained if "lora_A" in key):
            module = model.get_submodule(key.removesuffix(".lora_A.weight"))
            module.lora_dropout["default"] = Masked(first_site + 2 * index)
        golden = load_file(HERE / f"{name}.golden.safetensors")
        weights = golden["batch.weights"].tolist()
        batch = [(golden[f"batch.{i}.ids"], golden[f"batch.{i}.targets"], w) for i, w in enumerate(weights)]
        loss, losses, _ = batch_loss(model, numbered(batch))
        loss.backward()
        values = {f"gradient.{key}": parameter.grad.clone() for key, parameter in trained.items()}
        values["batch.losses"] = torch.tensor(losses)
        path = HERE / f"{name}.dropout.safetensors"
        save_file(values, path)
        path.chmod(0o644)


if __name__ == "__main__":
    main()
